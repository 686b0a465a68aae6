"""Which folders are read as finished runs, and what their table says and refuses to say."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finished_runs import DEFINITION, read_run, settings, write_run

from engine.metrics import CaseDice
from engine.reports import comparison
from engine.reports.comparison import FinishedRun, differing_settings, make_rows, table_notes, unmet_conditions
from engine.reports.comparison_pictures import can_share_a_case
from engine.run_tables import write_validation
from models import NETWORKS

PUBLISHED = {name: network.published for name, network in NETWORKS.items() if network.published}


def task01(folder: Path, cases: int = 484, name: str = "BRATS") -> Path:
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({"name": name, "training": [{}] * cases}))
    return folder


def published_run(folder: Path, root: Path, model: str = "unetr", **options: Any) -> FinishedRun:
    epochs = PUBLISHED[model].epochs
    config = settings("compare", data_root=str(root), model_name=model, train_epochs=epochs)
    return read_run(folder, config, **{"epochs": epochs, "cases": 96, "mean": 0.77} | options)


# ---------- conditions


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_full_comparison_is_the_published_experiment(model: str, tmp_path: Path) -> None:
    run = published_run(tmp_path / model, task01(tmp_path / "Task01"), model)
    assert unmet_conditions(run) == []
    (row,) = make_rows([run])
    assert row.cells()[-1] == f"{100 * PUBLISHED[model].dice:.1f}"
    assert not any("Not comparable" in line for line in table_notes([row]))


def test_every_unmet_condition_is_named(tmp_path: Path) -> None:
    root = task01(tmp_path / "Task01")
    config = settings("brats", data_root=str(root), train_validation="full_volume", optim_ema_decay=0.9)
    run = read_run(tmp_path / "run", config, epochs=5, cases=96, ranks=8)
    assert unmet_conditions(run) == [
        "--data.regions release, published tutorial",
        "--data.spacing_axes patient, published file",
        "--loss.ce bce, published argmax",
        "--optim.ema_decay 0.9, published 0.0",
        "--train.validation full_volume, published center_crop",
        "--train.score label_map, published masks",
        "crops per step 16, published 2",
        "5 epochs, published 180",
    ]
    (row,) = make_rows([run])
    assert row.cells()[-1] == "not comparable"
    said = table_notes([row])
    assert "Not comparable with the published 76.9 (UNETR of self-attention-cv):" in said
    assert "- --loss.ce bce, published argmax" in said


def test_settings_that_do_not_change_the_experiment_are_not_conditions(tmp_path: Path) -> None:
    root = task01(tmp_path / "Task01")
    config = settings("compare", data_root=str(root), data_modalities=None, data_store_dtype="float16", train_seed=5,
                      train_precision="bf16", train_batch_size=1, train_accumulate_steps=2)  # fmt: skip
    assert unmet_conditions(read_run(tmp_path / "run", config, epochs=180, cases=96)) == []


def test_a_fold_or_a_change_of_augmentation_is_a_condition(tmp_path: Path) -> None:
    root = task01(tmp_path / "Task01")
    config = settings("compare", data_root=str(root), data_folds=5, data_fold=1, data_augment={"noise_prob": 0.1})
    run = read_run(tmp_path / "run", config, epochs=180, cases=96)
    assert unmet_conditions(run) == [
        "--data.folds 5, published 0",
        "--data.fold 1, published None",
        "--data.augment.noise_prob 0.1, published 0.0",
    ]


@pytest.mark.parametrize(
    ("cases", "name", "validated", "says"),
    [
        (483, "BRATS", 96, "483 cases of BRATS, not 484 of BRATS"),
        (484, "Hippocampus", 96, "484 cases of Hippocampus"),
        (484, "BRATS", 95, "95 validation cases, published 96"),
    ],
)
def test_data_that_are_not_task01_are_named(cases: int, name: str, validated: int, says: str, tmp_path: Path) -> None:
    run = published_run(tmp_path / "run", task01(tmp_path / "Task01", cases, name), cases=validated)
    (reason,) = unmet_conditions(run)
    assert says in reason


def test_folders_without_dataset_json_and_synthetic_scans_are_not_task01(tmp_path: Path) -> None:
    (reason,) = unmet_conditions(published_run(tmp_path / "a", tmp_path))
    assert "its dataset.json is missing" in reason
    synthetic = read_run(tmp_path / "b", settings("compare"), epochs=180, cases=96)
    assert unmet_conditions(synthetic) == ["the scans are synthetic, not Decathlon Task01"]


# ---------- table


def test_seeds_of_a_model_share_a_row_with_mean_and_spread(tmp_path: Path) -> None:
    runs = [
        read_run(tmp_path / f"{model}{seed}", settings("demo", model_name=model, train_seed=seed), mean=mean)
        for model, means in (("unetr", (0.50, 0.56, 0.53)), ("unet", (0.7,)))
        for seed, mean in enumerate(means)
    ]
    rows = make_rows(runs)
    assert [row.model for row in rows] == ["unet", "unetr"]
    assert (rows[1].cell("mean"), rows[1].cell("WT"), rows[1].cell("ET")) == ("53.0 ± 3.0", "63.0 ± 3.0", "n/a")
    assert rows[0].cell("mean") == "70.0"
    comparison.write_table(rows, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| UNet | 3 | 2 | 70.0 | 70.0 | 80.0 | n/a | not comparable |" in table
    assert DEFINITION in table and "± is the sample standard deviation over 1 or 3 seeds" in table
    plain = json.loads((tmp_path / "comparison.json").read_text())["rows"][1]
    assert plain["seeds"] == [0, 1, 2] and plain["spread"]["mean"] == pytest.approx(0.03)
    assert plain["dice"]["mean"] == [0.5, 0.56, 0.53] and plain["mean"]["ET"] is None


def test_two_runs_of_one_model_and_seed_are_refused(tmp_path: Path) -> None:
    runs = [read_run(tmp_path / name, settings("demo")) for name in "ab"]
    with pytest.raises(ValueError, match="a and .*b are both unetr with --train.seed 0: .*omit one"):
        make_rows(runs)


def test_runs_of_versions_that_scored_masks_differ_from_those_of_today(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "new", settings("demo"))
    older = write_run(tmp_path / "older", settings("demo", model_name="unet"))
    metrics = json.loads((older / "metrics.json").read_text())
    del metrics["scored"]
    (older / "metrics.json").write_text(json.dumps(metrics | {"definition": "Dice on masks <b>"}))
    runs = [FinishedRun.read(run_dir), FinishedRun.read(older)]
    assert [run.config.train.score for run in runs] == ["label_map", "masks"]
    assert differing_settings(runs) == ["--train.score"] and not can_share_a_case(runs)
    assert any("--train.score label_map, published masks" in reason for reason in unmet_conditions(runs[0]))
    assert not any("--train.score" in reason for reason in unmet_conditions(runs[1]))
    comparison.write_table(make_rows(runs), tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert f"Dice on masks \\<b>; or: {DEFINITION}." in table


def test_the_settings_in_which_runs_differ_are_named(tmp_path: Path) -> None:
    demo = settings("demo")
    same = [read_run(tmp_path / m, settings("demo", model_name=m)) for m in ("unet", "unetr", "unetr_monai")]
    assert differing_settings(same) == [] and can_share_a_case(same)
    other = replace(demo, optim=replace(demo.optim, lr=0.5), model=replace(demo.model, hidden_size=24))
    runs = [*same, read_run(tmp_path / "other", other)]
    assert differing_settings(runs) == ["--model.hidden_size", "--optim.lr"] and can_share_a_case(runs)
    elsewhere = read_run(tmp_path / "elsewhere", replace(demo, data=replace(demo.data, root=tmp_path)))
    assert differing_settings([same[0], elsewhere]) == ["--data.root"]
    assert not can_share_a_case([same[0], elsewhere])
    fewer = read_run(tmp_path / "fewer", demo, cases=1)
    assert differing_settings([same[0], fewer]) == ["validation cases"]


def test_an_unfinished_run_is_refused_with_the_command_that_continues_it(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", settings("demo"))
    (run_dir / "report.html").unlink()
    with pytest.raises(ValueError, match="it lacks report.html: .*--resume .*run"):
        FinishedRun.read(run_dir)


def test_cases_keep_the_names_they_were_validated_under(tmp_path: Path) -> None:
    run_dir, names = write_run(tmp_path / "run", settings("demo")), ("=1", "caf\udce9", "a\nb")
    write_validation(run_dir, [CaseDice(name, (1, 1, 1), (1, 1, 1), (1, 1, 1)) for name in names], {})
    assert json.loads((run_dir / "metrics.json").read_text()) == {}
    shutil.copy(write_run(tmp_path / "other", settings("demo")) / "metrics.json", run_dir)
    assert FinishedRun.read(run_dir).cases == names


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.json", '{"definition": "Di', "Unterminated string"),
        ("metrics.json", "{}", "it lacks 'epochs'"),
        ("metrics.json", "[" * 100_000, "recursion"),
        ("metrics.json", "[]", "metrics.json is [], and must be"),
        ("metrics.json", '{"epochs": "many", "best": {"epoch": 1}, "definition": ""}', "epochs 'many' must be a whole"),
        ("metrics.json", '{"epochs": 1, "best": {"epoch": -1}, "definition": ""}', "best epoch -1 must be a whole"),
        ("metrics.json", '{"epochs": 1, "best": {"epoch": 1, "TC": "x"}, "definition": ""}', "best TC 'x' must be"),
        ("metrics.json", '{"epochs": 1, "best": {"epoch": 1, "TC": NaN}, "definition": ""}', "best TC nan must be"),
        ("metrics.json", '{"scored": "everything"}', "metrics.json scored 'everything'"),
        ("checkpoints/step-00000001-validated/about.json", '{"world_size": "8"}', "world_size '8' must be a whole"),
        ("config.yaml", "", "the file is null and must be a group"),
        ("config.yaml", "data: [", "expected the node content"),
        ("config.yaml", "[" * 100_000, "nested too deeply"),
        ("log.csv", "epoch,loss\n1,half", "could not convert string to float: 'half'"),
        ("log.csv", "epoch,loss\n1,2,3", "log.csv, line 2: 3 cells, must be 2"),
        ("log.csv", "epoch,loss\n", "log.csv has no rows with epoch and loss"),
        ("validation.csv", "case,TC\n" + "x" * 140_000 + ",1", "validation.csv, line 2: field larger than"),
        ("validation.csv", "case,TC\n\0\0", "validation.csv, line 2: it holds NUL bytes"),
        ("validation.csv", "case,TC\na,1", "it lacks 'WT'"),
    ],
)
def test_a_run_with_a_damaged_file_is_named(name: str, content: str, says: str, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", settings("demo"))
    (run_dir / name).write_text(content)
    with pytest.raises(ValueError, match=r"run can't be read, a file in it is damaged .*; copy it again") as raised:
        FinishedRun.read(run_dir)
    assert says in str(raised.value) and "\n" not in str(raised.value)
