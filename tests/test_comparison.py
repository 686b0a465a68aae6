"""Finished runs beside each other: what their table says, what it refuses to say, and which runs are trained.

Runs here are folders with made-up tables; networks that predict are saved with random weights.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import yaml
from commands import SMALL
from test_trained import content_of

from engine.config import CONFIGS, Config, config_from_dict, make_parser, parse_config, to_dict
from engine.data import load_data
from engine.metrics import CaseDice
from engine.network import make_model
from engine.reports import comparison, comparison_pictures
from engine.reports.comparison import Run, differences, make_rows, notes, unmet_conditions
from engine.reports.report import END
from engine.reports.run_tables import write_validation
from engine.weights_file import write_content
from launch import compare
from models import NETWORKS

DEFINITION = "Dice per case and region"


def settings(name: str, **changes: Any) -> Config:
    """The options of a file in `launch/configs`; changes as model_name="unet"."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    for key, value in changes.items():
        group, option = key.split("_", 1)
        values.setdefault(group, {})[option] = value
    return config_from_dict(values)


def write_run(folder: Path, config: Config, mean: float = 0.5, epochs: int = 3, cases: int = 2, ranks: int = 1) -> Path:
    """A folder as a finished run leaves it, without weights."""
    state = folder / "checkpoints" / "step-00000001-validated"
    state.mkdir(parents=True)
    (state / "about.json").write_text(json.dumps({"world_size": ranks}))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config) | {"run_dir": None, "resume": None}))
    scores = {"mean": mean, "TC": mean, "WT": mean + 0.1, "ET": None}
    best = {"epoch": 2, **scores, "cases": cases}
    metrics = {"definition": DEFINITION, "scored": config.train.score, "epochs": epochs, "best": best}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    history = [{"epoch": e, "loss": 2 / e, "val_mean": mean if e > 1 else ""} for e in range(1, epochs + 1)]
    for name, rows in (("log.csv", history), ("validation.csv", [case_row(i) for i in range(cases)])):
        with open(folder / name, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    (folder / "report.html").write_text(f"<p>a page</p>{END}")
    return folder


def case_row(number: int) -> dict[str, Any]:
    return {"case": f"case{number}", "TC": 0.5, "WT": 0.6, "ET": 0.4 if number else ""}


def task01(folder: Path, cases: int = 484, name: str = "BRATS") -> Path:
    folder.mkdir()
    (folder / "dataset.json").write_text(json.dumps({"name": name, "training": [{}] * cases}))
    return folder


def published_run(folder: Path, root: Path, model: str = "unetr", **options: Any) -> Run:
    epochs = comparison.PUBLISHED[model].epochs
    config = settings("compare", data_root=str(root), model_name=model, train_epochs=epochs)
    return Run.read(write_run(folder, config, **{"epochs": epochs, "cases": 96, "mean": 0.77} | options))


# ---------- conditions


@pytest.mark.parametrize("model", list(comparison.PUBLISHED))
def test_the_full_comparison_is_the_published_experiment(model: str, tmp_path: Path) -> None:
    run = published_run(tmp_path / model, task01(tmp_path / "Task01"), model)
    assert unmet_conditions(run) == []
    (row,) = make_rows([run])
    assert comparison.table_cells([row])[0][-1] == f"{100 * comparison.PUBLISHED[model].dice:.1f}"
    assert not any("Not comparable" in line for line in notes([row]))


def test_every_condition_that_is_not_met_is_named(tmp_path: Path) -> None:
    root = task01(tmp_path / "Task01")
    config = settings("brats", data_root=str(root), train_validation="full_volume", optim_ema_decay=0.9)
    run = Run.read(write_run(tmp_path / "run", config, epochs=5, cases=96, ranks=8))
    assert unmet_conditions(run) == [
        "--data.regions release, published tutorial",
        "--data.spacing_axes patient, published file",
        "--loss.ce bce, published argmax",
        "--optim.ema_decay 0.9, published 0.0",
        "--train.validation full_volume, published center_crop",
        "--train.score label_map, published masks",
        "crops of a step 16, published 2",
        "5 epochs, published 180",
    ]
    (row,) = make_rows([run])
    assert comparison.table_cells([row])[0][-1] == "not comparable"
    said = notes([row])
    assert "Not comparable with the published 76.9 (UNETR of self-attention-cv):" in said
    assert "- --loss.ce bce, published argmax" in said


def test_what_does_not_change_the_experiment_is_no_condition(tmp_path: Path) -> None:
    root = task01(tmp_path / "Task01")
    config = settings("compare", data_root=str(root), data_modalities=None, data_store_dtype="float16", train_seed=5,
                      train_precision="bf16", train_batch_size=1, train_accumulate_steps=2)  # fmt: skip
    assert unmet_conditions(Run.read(write_run(tmp_path / "run", config, epochs=180, cases=96))) == []


def test_a_fold_or_a_change_of_augmentation_is_a_condition(tmp_path: Path) -> None:
    root = task01(tmp_path / "Task01")
    config = settings("compare", data_root=str(root), data_folds=5, data_fold=1, data_augment={"noise_prob": 0.1})
    run = Run.read(write_run(tmp_path / "run", config, epochs=180, cases=96))
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
    assert "has no dataset.json" in reason
    synthetic = Run.read(write_run(tmp_path / "b", settings("compare"), epochs=180, cases=96))
    assert unmet_conditions(synthetic) == ["the scans are synthetic, not Decathlon Task01"]


# ---------- table


def test_seeds_of_a_model_share_a_row_with_mean_and_spread(tmp_path: Path) -> None:
    runs = [
        Run.read(write_run(tmp_path / f"{model}{seed}", settings("demo", model_name=model, train_seed=seed), mean))
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
    runs = [Run.read(write_run(tmp_path / name, settings("demo"))) for name in "ab"]
    with pytest.raises(ValueError, match="a and .*b are both unetr with --train.seed 0: .*leave one"):
        make_rows(runs)


def test_an_unfinished_run_is_refused_with_what_goes_on_with_it(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", settings("demo"))
    (run_dir / "report.html").unlink()
    with pytest.raises(ValueError, match="no report.html: .*--resume .*run"):
        Run.read(run_dir)


def test_a_run_whose_page_was_cut_off_has_not_finished(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", settings("demo"))
    assert comparison.is_finished(run_dir)
    for content in ("", "<!doctype html>", END[:-1]):
        (run_dir / "report.html").write_text(content)
        assert not comparison.is_finished(run_dir)
        with pytest.raises(ValueError, match="is no finished run, it has no whole report.html: .*--resume"):
            Run.read(run_dir)


def test_what_a_run_scored_is_what_its_tables_say_and_masks_in_those_of_older_versions(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "new", settings("demo"))
    older = write_run(tmp_path / "older", settings("demo", model_name="unet"))
    metrics = json.loads((older / "metrics.json").read_text())
    del metrics["scored"]
    (older / "metrics.json").write_text(json.dumps(metrics | {"definition": "Dice on masks <b>"}))
    runs = [Run.read(run_dir), Run.read(older)]
    assert [run.config.train.score for run in runs] == ["label_map", "masks"]
    assert differences(runs) == ["--train.score"] and not comparison_pictures.can_share_a_case(runs)
    assert any("--train.score label_map, published masks" in reason for reason in unmet_conditions(runs[0]))
    assert not any("--train.score" in reason for reason in unmet_conditions(runs[1]))
    comparison.write_table(make_rows(runs), tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert f"Dice on masks \\<b>; or: {DEFINITION}." in table


def test_cases_have_the_names_that_they_were_validated_by(tmp_path: Path) -> None:
    run_dir, names = write_run(tmp_path / "run", settings("demo")), ("=1", "caf\udce9", "a\nb")
    write_validation(run_dir, [CaseDice(name, (1, 1, 1), (1, 1, 1), (1, 1, 1)) for name in names], {})
    assert json.loads((run_dir / "metrics.json").read_text()) == {}
    shutil.copy(write_run(tmp_path / "other", settings("demo")) / "metrics.json", run_dir)
    assert Run.read(run_dir).cases == names


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
        Run.read(run_dir)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_runs_that_differ_say_in_what(tmp_path: Path) -> None:
    demo = settings("demo")
    same = [Run.read(write_run(tmp_path / m, settings("demo", model_name=m))) for m in ("unet", "unetr", "unetr_monai")]
    assert differences(same) == [] and comparison_pictures.can_share_a_case(same)
    other = replace(demo, optim=replace(demo.optim, lr=0.5), model=replace(demo.model, hidden_size=24))
    runs = [*same, Run.read(write_run(tmp_path / "other", other))]
    assert differences(runs) == ["--model.hidden_size", "--optim.lr"] and comparison_pictures.can_share_a_case(runs)
    elsewhere = Run.read(write_run(tmp_path / "elsewhere", replace(demo, data=replace(demo.data, root=tmp_path))))
    assert differences([same[0], elsewhere]) == ["--data.root"]
    assert not comparison_pictures.can_share_a_case([same[0], elsewhere])
    fewer = Run.read(write_run(tmp_path / "fewer", demo, cases=1))
    assert differences([same[0], fewer]) == ["validation cases"]


# ---------- pictures


def colours(path: Path) -> set[tuple[int, int, int]]:
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()}


def rgb(code: str) -> tuple[int, int, int]:
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:], 16)


def test_curves_show_every_model(tmp_path: Path) -> None:
    runs = [Run.read(write_run(tmp_path / m, settings("demo", model_name=m))) for m in ("unet", "unetr_monai")]
    comparison_pictures.draw_curves(make_rows(runs), tmp_path / "curves.png")
    found = colours(tmp_path / "curves.png")
    assert {rgb(NETWORKS[m].colour) for m in ("unet", "unetr_monai")} <= found
    assert rgb(NETWORKS["unetr"].colour) not in found


@pytest.mark.filterwarnings("error")
def test_a_run_that_was_never_validated_is_in_the_curves_too(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", settings("demo", model_name="unet"))
    (run_dir / "log.csv").write_text("epoch,loss,val_mean\n1,0.5,\n2,0.4,\n")
    comparison_pictures.draw_curves(make_rows([Run.read(run_dir)]), tmp_path / "curves.png")
    assert rgb(NETWORKS["unet"].colour) in colours(tmp_path / "curves.png")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("validation", ["center_crop", "full_volume"])
def test_models_predict_the_same_case_and_a_picture_shows_them(
    validation: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIOFORGE_CACHE", str(cache))
    runs = []
    for name in ("unet", "unetr"):
        small = {group: dict(values) for group, values in SMALL.items()}
        small["data"]["val_fraction"] = 0.4
        small["model"] |= {"feature_size": 2, "hidden_size": 8, "mlp_dim": 8}
        small["model"]["name"], small["train"]["validation"] = name, validation
        config = config_from_dict(small)
        data = load_data(config.data)
        run_dir = write_run(tmp_path / name, config)
        trained = {
            "weights": make_model(config.model, config.data.crop_size_voxels, 4).state_dict(),
            "modalities": list(data.store.modalities),
        }
        content = content_of(data.store.coding, **trained, config=to_dict(config))
        write_content(run_dir / "checkpoints" / "best.pt", content)
        runs.append(replace(Run.read(run_dir), cases=data.val, example=data.val[1]))
    store = tmp_path / "store"  # not the cache, for which there may be no place
    predictions = comparison_pictures.predict_example(make_rows(runs), torch.device("cpu"), store)
    assert len(list(store.glob("*.image.npy"))) == 1  # no case is prepared that is not shown
    assert predictions.name == data.val[1] and list(predictions.of_models) == ["unet", "unetr"]
    shape = (32, 32, 16) if validation == "center_crop" else data.store.shape(data.store.index(data.val[1]))
    assert predictions.truth_RXYZ.shape == (3, *shape) and predictions.truth_RXYZ.any()
    one, other = (masks for masks, _ in predictions.of_models.values())
    assert not np.array_equal(one, other)  # each by its own network
    for masks, counts in predictions.of_models.values():
        assert counts.predicted == tuple(masks.sum((1, 2, 3))) and counts.name == data.val[1]
        core, whole, enhancing = masks  # as a file would have them: random weights give masks that overlap otherwise
        assert not (enhancing & ~core).any() and not (core & ~whole).any()
        assert counts.intersection == tuple((masks & predictions.truth_RXYZ).sum((1, 2, 3)))
    comparison_pictures.draw_predictions(predictions, tmp_path / "predictions.png")
    height, width, _ = np.shape(matplotlib.image.imread(tmp_path / "predictions.png"))
    assert height > width  # three rows of three


# ---------- what is trained


def plan_of(*args: str) -> dict[Path, Config]:
    parser = make_parser("test")
    config = parse_config(parser, list(args))[0]
    given = parser.parse_args(list(args), defaults=False)
    return compare.plan(config, Path("out"), 2, with_epochs="train.epochs" in given)


def test_epochs_are_as_published_unless_they_are_given(tmp_path: Path) -> None:
    runs = plan_of("--config", str(CONFIGS / "compare.yaml"))
    assert {str(run_dir): (c.model.name, c.train.seed, c.train.epochs) for run_dir, c in runs.items()} == {
        "out/unet": ("unet", 0, 170), "out/unetr": ("unetr", 0, 180), "out/unetr_monai": ("unetr_monai", 0, 180),
        "out/unet-seed-1": ("unet", 1, 170), "out/unetr-seed-1": ("unetr", 1, 180),
        "out/unetr_monai-seed-1": ("unetr_monai", 1, 180),
    }  # fmt: skip
    for args in (("--config", str(CONFIGS / "real.yaml")), ("--train.epochs", "180"), ("--train", "{epochs: 180}")):
        assert len({config.train.epochs for config in plan_of(*args).values()}) == 1, args


def test_the_options_of_the_full_comparison_are_the_seeds() -> None:
    seed, full = (to_dict(settings(name)) for name in ("seed", "compare"))
    assert seed == full


class Children:
    """Stands for `launch/train.py`: notes each command and leaves a finished run, or the status of one that ended."""

    def __init__(self, statuses: dict[str, int]) -> None:
        self.statuses = statuses
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> int:
        self.commands.append(list(command))
        run_dir = Path(command[command.index("--run_dir") + 1])
        status = self.statuses.get(run_dir.name, 0)
        if not status:
            options = Path(command[command.index("--config") + 1]).read_text()
            write_run(run_dir, config_from_dict(yaml.safe_load(options)))
        return status

    @property
    def trained(self) -> list[str]:
        return [Path(command[command.index("--run_dir") + 1]).name for command in self.commands]


def test_the_same_command_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = Children({"unetr": 75})
    monkeypatch.setattr(compare, "run_process", children)
    monkeypatch.setattr(compare, "draw_predictions", lambda rows, path, store_dir: None)
    args = ["--run_dir", str(tmp_path / "out")]
    assert compare.main(args) == 75 and children.trained == ["unet", "unetr"]
    assert "unetr ended with status 75; the same command goes on" in capsys.readouterr().err
    children.statuses.clear()
    assert compare.main(args) == 0 and children.trained == ["unet", "unetr", "unetr", "unetr_monai"]
    assert all("--resume auto" in " ".join(command) for command in children.commands)
    said = capsys.readouterr().out
    assert "unet: finished" in said and "UNETR of self-attention-cv" in said and "not comparable" in said
    for name in ("table.md", "comparison.json", "curves.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert compare.main([*args, "--optim.lr", "0.5"]) == 2
    assert "unet was begun with --optim.lr 0.002, and now has --optim.lr 0.5" in capsys.readouterr().err
    assert compare.main([*args, "--kernels", "reference"]) == 2
    assert "unet was begun with --kernels auto, and now has --kernels reference" in capsys.readouterr().err
    page = tmp_path / "out" / "unet" / "report.html"
    page.write_text("<p>")
    shutil.rmtree(tmp_path / "out" / "unet" / "checkpoints")
    assert compare.main(args) == 0 and children.trained[4:] == ["unet"] and comparison.is_finished(page.parent)
    children.commands.pop()
    options = tmp_path / "out" / "unet.yaml"
    whole = options.read_bytes()
    for damaged in (b"", b"{", b"\xff", b"[" * 10_000):
        options.write_bytes(damaged)
        assert compare.main(args) == 2 and f"{options} " in capsys.readouterr().err
    options.write_bytes(whole)
    runs = [str(tmp_path / "out" / name) for name in ("unet", "unetr_monai")]
    assert compare.main(["--runs", *runs, "--run_dir", str(tmp_path / "two")]) == 0
    assert len(json.loads((tmp_path / "two" / "comparison.json").read_text())["rows"]) == 2
    assert len(children.commands) == 4


def test_a_run_folder_that_is_a_link_to_elsewhere_is_not_trained_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = Children({})
    monkeypatch.setattr(compare, "run_process", children)
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").mkdir()
    (tmp_path / "out" / "unet").symlink_to(tmp_path / "precious")
    assert compare.main(["--run_dir", str(tmp_path / "out")]) == 2 and not children.commands
    assert "unet is a link to" in capsys.readouterr().err and not list((tmp_path / "precious").iterdir())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seeds", "0"], "--seeds 0 must be at least 1"),
        (["--runs", "a", "--seeds", "2"], "leave one of the two out"),
        (["--runs", "nothing_here"], "nothing_here is no finished run"),
    ],
)
def test_a_users_mistake_ends_in_one_line_and_status_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(args) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_training_that_is_killed_ends_with_the_status_of_shells_and_ctrl_c_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--run_dir", str(tmp_path / "out")]
    monkeypatch.setattr(compare, "run_process", Children({"unet": -signal.SIGKILL}))
    assert compare.main(args) == 128 + signal.SIGKILL
    monkeypatch.setattr(compare, "run_process", lambda command: signal.raise_signal(signal.SIGINT))
    assert compare.main(args) == 130 and "the same command goes on from here" in capsys.readouterr().err


def test_the_launcher_must_not_start_the_comparison_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert compare.main([]) == 2 and "by python, as one process" in capsys.readouterr().err


def test_several_gpus_are_trained_on_by_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, first in ((0, "python"), (1, "python"), (2, "deepspeed")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert Path(compare.launch_command(None)[0]).name.startswith(first)
    assert Path(compare.launch_command("python")[0]).name.startswith("python")


def test_a_signal_goes_to_the_training_process_and_its_status_comes_back() -> None:
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "os.kill(os.getppid(), signal.SIGUSR1)\n"
        "time.sleep(30)"
    )
    before = signal.getsignal(signal.SIGUSR1)
    assert compare.run_process([sys.executable, "-c", code]) == 75
    assert signal.getsignal(signal.SIGUSR1) is before


def test_processes_that_outlive_their_launcher_are_waited_for(tmp_path: Path) -> None:
    """The launcher dies of the signal; its rank takes a while to save."""
    saved = tmp_path / "saved"
    rank = (
        "import os, pathlib, signal, sys, time\n"
        f"saved = pathlib.Path({str(saved)!r})\n"
        "signal.signal(signal.SIGUSR1, lambda *_: (time.sleep(0.5), saved.touch(), sys.exit()))\n"
        "os.kill(int(sys.argv[1]), signal.SIGUSR1)\n"
        "time.sleep(30)\n"
    )
    launcher = f"import os, subprocess, sys\nsubprocess.run([sys.executable, '-c', {rank!r}, str(os.getppid())])\n"
    assert compare.run_process([sys.executable, "-c", launcher]) == -signal.SIGUSR1
    assert saved.exists()
