"""The page of a run: what it shows, and the facts from log, configuration and machine."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config
from engine.data import DataConfig
from engine.metrics import CaseDice
from engine.ranks.distributed import Ranks
from engine.reports import report
from engine.reports.pictures import draw_curves
from engine.reports.report import (
    PictureSection,
    RunResults,
    best_and_worst,
    data_facts,
    environment_facts,
    is_finished,
    timing_facts,
    write_html,
)
from engine.step import TrainConfig
from pipelines.layouts.labels import CODINGS

EAGER = TrainConfig(precision="float32", compile=False, cuda_graph=False)
ROW = {"epoch": 1, "loss": 1.5, "dice_loss": 1.0, "ce_loss": 0.5}
SUMMARY: dict[str, Any] = {
    "definition": "Dice <per case>",
    "validated_on": "center_crop",
    "last": {"epoch": 2, "mean": 0.5, "TC": None, "WT": 0.613, "ET": 0.1, "cases": 3,
             "empty_truths": {"TC": 3, "WT": 0, "ET": 1}, "false_positives": {"TC": 2, "WT": 0, "ET": 0}},
    "best": {"epoch": None, "mean": None},
}  # fmt: skip


def case(name: str, *hits: int | None) -> CaseDice:
    """A case with these Dice in percent for TC, WT and ET; None: the truth is empty."""
    truth = tuple(0 if hit is None else 100 for hit in hits)
    return CaseDice(name, tuple(hit or 0 for hit in hits), truth, truth)


def results(**changes: Any) -> RunResults:
    made = RunResults(
        config=Config(data=DataConfig(root=Path("<folder>"), crop_size_voxels=(32, 32, 16))),
        summary=SUMMARY,
        cases=[case("whole", 90, 80, 70), case("<poor>", 10, 20, 30), case("none", None, None, None)],
        train=["one", "two"],
        val=["whole", "<poor>", "none"],
        facts={"Data": {"modalities": "flair, t1c"}, "Environment": {"device": "a <fast> one"}},
    )
    return dataclasses.replace(made, **changes)


class Tags(HTMLParser):
    """Collects a page's links and sources; fails if an element is closed that is not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.names: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "!doctype"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_one_whole_file_that_loads_and_runs_nothing(tmp_path: Path) -> None:
    draw_curves([ROW], tmp_path / "curves.png")
    page = write_html(
        tmp_path, results(), [PictureSection("Curves", {"curves.png": "by epoch"}), PictureSection("Empty", {})]
    )
    tags = Tags(page.read_text())
    assert not tags.open and len(tags.sources) == 1 and tags.sources[0].startswith("data:image/png;base64,")
    assert not tags.names & {"script", "link", "iframe"} and "url(" not in page.read_text()
    assert "<h2>Curves</h2>" in page.read_text() and "<h2>Empty</h2>" not in page.read_text()


def test_the_page_has_scores_facts_cases_and_options_and_escapes_them(tmp_path: Path) -> None:
    page = write_html(tmp_path, results(), []).read_text()
    for text in (
        "<td>61.3</td>", "<td>n/a</td>", "Dice &lt;per case&gt;", "TC: truth empty in 3 cases, 2 with false positives",
        "&lt;folder&gt;", "one, two", "<h2>Data</h2>", "flair, t1c", "a &lt;fast&gt; one",
        "crop_size_voxels: [32, 32, 16]",
    ):  # fmt: skip
        assert text in page, text
    assert "<folder>" not in page and "<poor>" not in page and "run_dir" not in page


def test_names_are_escaped_in_the_page(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "caf\udce9", 'a" onload="x', "b\x1b[31m"]
    draw_curves([ROW], tmp_path / "curves.png")
    cases = [case(name, 10, 20, 30) for name in names]
    section = PictureSection(names[0], {"curves.png": names[2]}, names[1])
    page = write_html(tmp_path, results(cases=cases, val=names), [section])
    tags = Tags(page.read_text(encoding="utf-8"))
    assert not tags.open and len(tags.sources) == 1 and "script" not in tags.names
    for text in ("&lt;script&gt;", r"caf\udce9", "a&quot; onload=&quot;x", r"b\x1b[31m"):
        assert text in page.read_text(encoding="utf-8"), text


def test_a_run_whose_page_was_cut_off_has_not_finished(tmp_path: Path) -> None:
    assert not is_finished(tmp_path)
    page = write_html(tmp_path, results(), [])
    content = page.read_bytes()
    assert is_finished(tmp_path)
    for length in (0, 3, len(content) // 2, len(content) - 1):
        page.write_bytes(content[:length])
        assert not is_finished(tmp_path), length


def test_the_page_lists_every_case_worst_first(tmp_path: Path) -> None:
    page = write_html(tmp_path, results(), []).read_text()
    table = page.split("<details>")[1].split("<tbody>")[1].split("</tbody>")[0]
    rows = [re.findall("<t[hd][^>]*>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]
    assert [row[0] for row in rows] == ["&lt;poor&gt;", "whole", "none"]
    assert rows[1] == ["whole", "80.0", "90.0", "80.0", "70.0", "100", "100", "100"]
    assert rows[2][1:5] == ["n/a"] * 4


def test_a_run_without_validation_has_a_page_too(tmp_path: Path) -> None:
    last = {"epoch": 1, "mean": None, "TC": None, "WT": None, "ET": None, "cases": 0}
    page = write_html(tmp_path, results(cases=[], val=[], summary=SUMMARY | {"last": last}), []).read_text()
    assert "2 training cases" in page and "validation cases" not in page and "per case after" not in page


def test_on_paper_folded_parts_are_open_and_no_picture_is_cut() -> None:
    on_paper = report.STYLE.split("@media print")[1]
    assert re.search(r"details::details-content \{[^}]*content-visibility: visible", on_paper)
    assert re.search(r"figure, tr \{ break-inside: avoid", on_paper)


def test_the_extremes_are_two_of_each_and_never_the_same_case() -> None:
    cases = [case(name, dice, None, None) for name, dice in zip("abcdef", (30, 90, 10, 70, 50, None))]
    names = [[found.name for found in kind] for kind in best_and_worst(cases)]
    assert names == [["b", "d"], ["c", "a"]]
    assert [[found.name for found in kind] for kind in best_and_worst(cases[:3])] == [["b", "a"], ["c"]]
    assert [[found.name for found in kind] for kind in best_and_worst(cases[:1])] == [["a"], []]
    assert best_and_worst(cases[5:]) == ([], [])


LOG: dict[str, Any] = {"epoch": 1, "step": 2, "skipped_steps": 0, "samples_per_s": 2.0, "data_wait": 0.1}
RANKS = Ranks(0, 1, 0, torch.device("cpu"))


def test_data_are_named_with_split_grid_and_coding() -> None:
    config = DataConfig(root=Path("/scans/task"), crop_size_voxels=(32, 32, 16))
    assert data_facts(config, ["a", "b"], ["c"], ("flair", "t1c"), CODINGS["brats2018"]) == {
        "scans": "task",
        "cases": "2 for training, 1 for validation",
        "modalities": "flair, t1c",
        "spacing": "1.5 x 1.5 x 2 mm",
        "crop": "32 x 32 x 16 voxels",
        "labels": "brats2018: 1 non-enhancing, 2 oedema, 4 enhancing",
        "regions": "TC 1 + 4, WT 1 + 2 + 4, ET 4 (label values)",
    }
    facts = data_facts(DataConfig(folds=5, fold=1), ["a"], ["c"], ("flair",), CODINGS["brats2018"])
    assert facts["scans"] == "synthetic" and facts["cases"].endswith("(fold 1 of 5, counted from 0)")


def test_timing_comes_from_the_log() -> None:
    history = [
        LOG | {"samples_per_s": 2.0, "data_wait": 0.5},
        LOG | {"epoch": 2, "step": 4, "samples_per_s": 4.0, "data_wait": 0.1, "val_seconds": 3.0, "skipped_steps": 1},
        LOG | {"epoch": 3, "step": 1006, "samples_per_s": 4.0, "data_wait": 0.1, "val_seconds": 5.0},
    ]
    facts = timing_facts(history, epoch_samples=400)
    assert facts == {
        "epochs": "3",
        "steps": "1,006 (1 skipped)",
        "training": "100.0 s per epoch (the first 200.0 s)",
        "throughput": "4.00 crops/s over all ranks",
        "waiting for data": "30.0 % of the training time",
        "validation": "4.0 s each, 2 times",
        "total": "6 min 48 s",
    }
    assert timing_facts(history, epoch_samples=40_000)["total"] == "11 h 06 min"


def test_timing_survives_an_epoch_that_was_resumed_after_its_last_step() -> None:
    facts = timing_facts([LOG | {"samples_per_s": 0.0, "val_seconds": 2.0}], epoch_samples=20)
    assert "training" not in facts and facts["total"] == "0 min 02 s"


def test_the_environment_names_versions_ranks_and_kernels() -> None:
    config = Config(train=dataclasses.replace(EAGER, precision="bf16", zero_stage=2, seed=7, cuda_graph=True))
    facts = environment_facts(config, Ranks(0, 8, 0, torch.device("cpu"), 4), "kernels: reference (asked for)")
    assert facts["device"].startswith("CPU, ") and facts["ranks"] == "8, 4 of them on this node"
    assert (facts["kernels"], facts["precision"]) == ("reference (asked for)", "bf16")
    assert facts["step"] == "CUDA graph"
    assert (facts["ZeRO stage"], facts["seed"]) == ("2", "7")
    assert f"PyTorch {torch.__version__}" in facts["versions"]
    for name in ("Python", "Triton", "MONAI", "DALI", "DeepSpeed"):
        assert re.search(rf"\b{name} \d+\.\d+", facts["versions"]), name
    assert environment_facts(config, RANKS, "")["ranks"] == "1"


def test_the_commit_is_that_of_the_checkout_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*command: str) -> str:
        name = ("-c", "user.name=one", "-c", "user.email=one@example.org")
        done = subprocess.run(["git", *name, *command], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    monkeypatch.delenv("GLIOFORGE_COMMIT", raising=False)
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert environment_facts(Config(train=EAGER), RANKS, "")["commit"] == git("rev-parse", "--short", "HEAD")
    (tmp_path / "site-packages").mkdir()
    monkeypatch.setattr(report, "ROOT", tmp_path / "site-packages")
    assert environment_facts(Config(train=EAGER), RANKS, "")["commit"] == "unknown"
    monkeypatch.setenv("GLIOFORGE_COMMIT", "abc1234")
    assert environment_facts(Config(train=EAGER), RANKS, "")["commit"] == "abc1234"
