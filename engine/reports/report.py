"""The page that people keep of a run: `report.html`, one file without links or scripts.

It holds the Dice table, every validation case, the pictures, facts about data, timing and environment, and the
configuration, and is made to be read on a screen, on a phone and on paper.
"""

from __future__ import annotations

import base64
import contextlib
import html
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from engine.metrics import CaseDice
from pipelines.basics.atomic import write_text
from pipelines.basics.tables import percent
from pipelines.basics.text import counted, printable
from pipelines.layouts.labels import REGIONS, Coding

if TYPE_CHECKING:
    from engine.config import Config
    from engine.data import DataConfig
    from engine.ranks.distributed import Ranks

ROOT = Path(__file__).resolve().parents[2]
REPORT = "report.html"
END = "</body></html>\n"
DICE_HEAD = ("Dice (%)", "epoch", "mean", *REGIONS, "cases")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1, h2, p, summary, figcaption { overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.3rem }
img { max-width: 100% }
figure { margin: 1rem 0; max-width: 36rem }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 0 2rem }
.scroll { overflow-x: auto }
pre { overflow-x: auto; background: #f5f5f5; padding: 1rem; font-size: .8rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child { padding-left: 0; text-align: left }
td, tbody th { vertical-align: top }
tbody th { font-weight: normal }
.facts td { text-align: left; overflow-wrap: anywhere }
.facts th { white-space: nowrap; color: #555 }
.note, figcaption { color: #555; font-size: .9rem }
summary { cursor: pointer; margin: .75rem 0 }
@media (max-width: 30rem) {
  th, td { padding: .3rem .25rem }
  table { font-size: .85rem }
  details table { font-size: .72rem }
  details th, details td { padding: .3rem .15rem }
  h1 { font-size: 1.4rem }
}
@media print {
  body { margin: 0; max-width: none; font-size: 10pt }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; background: none; padding: 0 }
  .scroll { overflow: visible }
  .grid { display: block }
  .grid figure { display: inline-block; width: 48%; vertical-align: top }
  figure, tr { break-inside: avoid }
  img { max-height: 22cm }
  h2, h2 + .note, summary, figcaption { break-after: avoid }
  details::details-content { content-visibility: visible; block-size: auto }
}
"""


@dataclass(frozen=True)
class RunResults:
    """What the page says about a run, apart from its pictures.

    `summary` is as in `metrics.json`, `cases` are those of the last validation, `train` and `val` are names, and the
    facts under each heading are texts with a name.
    """

    config: Config
    summary: dict[str, Any]
    cases: Sequence[CaseDice]
    train: Sequence[str]
    val: Sequence[str]
    facts: Mapping[str, Mapping[str, str]]


@dataclass(frozen=True)
class PictureSection:
    """Pictures on the page: the caption of each by its PNG file's name in the run's folder, and a note on all."""

    title: str
    pictures: Mapping[str, str]
    note: str = ""


def write_html(run_dir: Path, results: RunResults, sections: Sequence[PictureSection]) -> Path:
    """Write `report.html` into the run's folder, which holds the pictures."""
    title, summary = f"glioforge: {run_dir.resolve().name}", results.summary
    rest = {
        "Cases": _names("training case", results.train) + _names("validation case", results.val),
        **{heading: _table(values.items(), kind="facts") for heading, values in results.facts.items()},
        "Configuration": f"<pre>{_escape(_as_yaml(results.config))}</pre>",
    }
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{_escape(title)}</h1>
{_dice_table(summary)}
{_note(f"{summary['definition']}. Validated on: {summary['validated_on'].replace('_', ' ')}.")}
{_case_table(results.cases, summary["last"]["epoch"])}
{"".join(_pictures(run_dir, section) for section in sections if section.pictures)}
{"".join(f"<h2>{heading}</h2>{content}" for heading, content in rest.items())}
{_note(f"Written {time.strftime('%Y-%m-%d %H:%M')}.")}
{END}"""
    write_text(run_dir / REPORT, page)
    return run_dir / REPORT


def is_finished(run_dir: Path) -> bool:
    """Whether a run ended; its page is the last thing it writes, and must be complete."""
    page = run_dir / REPORT
    return page.is_file() and page.read_bytes().endswith(END.encode())


def best_and_worst(cases: Iterable[CaseDice], count: int = 2) -> tuple[list[CaseDice], list[CaseDice]]:
    """At most `count` cases with the highest mean Dice, best first, and as many others with the lowest, worst first.

    A case without a tumour has no Dice and is in neither.
    """
    ranked = sorted((case for case in cases if not math.isnan(case.mean())), key=lambda case: -case.mean())
    return ranked[:count], ranked[count:][: -count - 1 : -1]


def _as_yaml(config: Config) -> str:
    """One option per line, as in `config.yaml`, without the run's folder."""
    from engine.config import without_place

    class InlineListDumper(yaml.SafeDumper):
        def represent_list(self, values: list[Any]) -> yaml.Node:
            return self.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)

    InlineListDumper.add_representer(list, InlineListDumper.represent_list)
    return yaml.dump(without_place(config), Dumper=InlineListDumper, sort_keys=False)


def dice_rows(summary: dict[str, Any]) -> list[list[str]]:
    """The Dice of the best and of the last validation below `DICE_HEAD`, as text, if there was one."""
    return [
        [title, str(epoch), *(percent(scores.get(name)) for name in ("mean", *REGIONS)), str(scores.get("cases", 0))]
        for title, scores in (("best", summary["best"]), ("last", summary["last"]))
        if (epoch := scores["epoch"]) is not None
    ]


def _dice_table(summary: dict[str, Any]) -> str:
    last = summary["last"]
    empty = [
        f"{region}: truth empty in {counted(count)}, {last['false_positives'][region]} with false positives"
        for region, count in last.get("empty_truths", {}).items()
        if count
    ]
    return _table(dice_rows(summary), DICE_HEAD) + _note("; ".join(empty))


def _case_table(cases: Sequence[CaseDice], epoch: int) -> str:
    """Every case of the last validation, worst first; those without a tumour last."""
    if not cases:
        return ""
    worst_first = sorted(cases, key=lambda case: math.inf if math.isnan(case.mean()) else case.mean())
    rows = (
        [case.name, *map(percent, (case.mean(), *case.dice())), *(f"{voxels:,}" for voxels in case.truth)]
        for case in worst_first
    )
    table = _table(rows, ("case", "mean", *REGIONS, *(f"{region} voxels" for region in REGIONS)))
    summary = f"<summary>Dice (%) per case after epoch {epoch}, worst first</summary>"
    return f"<details>{summary}{table}{_note('Voxel counts are of the truth.')}</details>"


def _pictures(run_dir: Path, section: PictureSection) -> str:
    figures = "".join(
        f'<figure><figcaption>{_escape(caption)}</figcaption><img alt="{_escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode((run_dir / name).read_bytes()).decode()}"></figure>'
        for name, caption in section.pictures.items()
    )
    return f'<h2>{_escape(section.title)}</h2>{_note(section.note)}<div class="grid">{figures}</div>'


def _table(rows: Iterable[Sequence[str]], head: Sequence[str] = (), kind: str = "scroll") -> str:
    """A table whose first column names the rows."""
    columns = f"<thead><tr>{''.join(f'<th>{_escape(cell)}</th>' for cell in head)}</tr></thead>" if head else ""
    lines = (
        f'<tr><th scope="row">{_escape(name)}</th>{"".join(f"<td>{_escape(cell)}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f'<div class="{kind}"><table>{columns}<tbody>{"".join(lines)}</tbody></table></div>'


def _names(noun: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"<details><summary>{counted(len(names), noun)}</summary><p>{_escape(', '.join(names))}</p></details>"


def _note(text: str) -> str:
    return f'<p class="note">{_escape(text)}</p>' if text else ""


def _escape(text: str) -> str:
    return html.escape("\n".join(map(printable, text.split("\n"))))


def data_facts(
    config: DataConfig, train: Sequence[str], val: Sequence[str], modalities: Sequence[str], coding: Coding
) -> dict[str, str]:
    """What a run was trained on; `train` and `val` are names of cases, `modalities` are in channel order."""
    fold = f" (fold {config.fold} of {config.folds}, counted from 0)" if config.folds else ""
    tissues = ", ".join(f"{value} {tissue}" for value, tissue in sorted(coding.tissues.items()))
    regions = ", ".join(
        f"{region} {' + '.join(map(str, values))}" for region, values in zip(REGIONS, coding.regions, strict=True)
    )
    return {
        "scans": config.root.resolve().name if config.root else "synthetic",
        "cases": f"{len(train)} for training, {len(val)} for validation{fold}",
        "modalities": ", ".join(modalities),
        "spacing": f"{' x '.join(f'{mm:g}' for mm in config.spacing_mm)} mm",
        "crop": f"{' x '.join(map(str, config.crop_size_voxels))} voxels",
        "labels": f"{coding.release}: {tissues}",
        "regions": f"{regions} (label values)",
    }


def timing_facts(history: Sequence[Mapping[str, Any]], epoch_samples: int) -> dict[str, str]:
    """How long training and validation took, by the rows of `log.csv`; `epoch_samples` is crops over all ranks."""
    timed = [row for row in history if row["samples_per_s"] > 0]  # 0: resumed after the epoch's last step
    seconds = [epoch_samples / row["samples_per_s"] for row in timed]
    validations = [row["val_seconds"] for row in history if "val_seconds" in row]
    skipped = sum(row["skipped_steps"] for row in history)
    steps = f"{history[-1]['step']:,}"
    facts = {"epochs": str(len(history)), "steps": f"{steps} ({skipped} skipped)" if skipped else steps}
    if timed:
        first = f" (the first {seconds[0]:,.1f} s)" if len(timed) > 1 else ""
        waited = sum(row["data_wait"] * duration for row, duration in zip(timed, seconds))
        facts["training"] = f"{statistics.median(seconds):,.1f} s per epoch{first}"
        facts["throughput"] = f"{statistics.median(row['samples_per_s'] for row in timed):.2f} crops/s over all ranks"
        facts["waiting for data"] = f"{100 * waited / sum(seconds):.1f} % of the training time"
    if validations:
        facts["validation"] = f"{statistics.median(validations):,.1f} s each, {len(validations)} times"
    return facts | {"total": _clock(sum(seconds) + sum(validations))}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def environment_facts(config: Config, ranks: Ranks, kernels: str) -> dict[str, str]:
    """What a run is computed with: its options, with nothing left to `auto`, and the result of `dispatch.use`."""
    from engine.step_trial import Way

    train = config.train
    versions = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
        "DALI": _version("nvidia-dali-cuda"),
        **{name: _version(name.lower()) for name in ("Triton", "MONAI", "DeepSpeed", "glioforge")},
    }
    nodes = "one node" if ranks.ranks_on_node == ranks.world_size else f"{ranks.ranks_on_node} of them on this node"
    return {
        "device": ranks.device_name,
        "ranks": "1" if ranks.world_size == 1 else f"{ranks.world_size}, {nodes}",
        "kernels": kernels.removeprefix("kernels: "),
        "precision": train.precision,
        "step": str(Way.of(train)),
        "ZeRO stage": str(train.zero_stage),
        "seed": str(train.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": _commit(),
        "system": platform.platform(),
    }


def _version(prefix: str) -> str | None:
    """Version of the installed distribution of that name, or of that name followed by a CUDA version."""
    named = ((found.metadata["Name"] or "", found.version) for found in metadata.distributions())
    return next((version for name, version in named if re.fullmatch(rf"{prefix}\d*", name.lower())), None)


def _commit() -> str:
    """Of the checkout that the program runs from, or else `GLIOFORGE_COMMIT`."""
    commit = ""
    if (ROOT / ".git").exists():  # if not, git would report a repository around this folder
        command = ["git", "describe", "--always", "--dirty"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10).stdout.strip()
    return commit or os.environ.get("GLIOFORGE_COMMIT") or "unknown"
