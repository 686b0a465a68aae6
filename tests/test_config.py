"""What the command line and the YAML files mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from engine.config import (
    CONFIGS,
    Config,
    DataConfig,
    config_from_dict,
    make_parser,
    parse_config,
    to_dict,
    to_portable_dict,
)
from engine.data import Data, load_data, make_loaders, prepared
from engine.distributed import Ranks
from pipelines.geometry import Spacing


def parse(*args: str) -> Config:
    return parse_config(make_parser("test"), list(args))[0]


def test_the_command_line_goes_before_the_file_and_the_file_before_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 0.5}\ntrain: {epochs: 7}\n")
    config = parse("--config", str(file), "--train.epochs", "9")
    assert (config.train.epochs, config.optim.lr, config.train.batch_size) == (9, 0.5, Config().train.batch_size)


def test_no_arguments_mean_the_demo() -> None:
    demo = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    assert parse().train.epochs == demo["train"]["epochs"]
    assert parse("--train.batch_size", "3").train.epochs == demo["train"]["epochs"]
    assert parse("--data.root", "somewhere").train.epochs == Config().train.epochs


def test_the_seeds_experiment_is_as_published() -> None:
    config = parse("--config", str(CONFIGS / "seed.yaml"))
    assert (config.optim.lr, config.optim.weight_decay, config.optim.schedule) == (1e-4, 1e-5, "constant")
    assert (config.train.batch_size, config.train.epochs, config.train.val_every_epochs) == (2, 180, 5)
    assert (config.data.regions, config.loss.ce, config.model.name) == ("tutorial", "argmax", "unetr")
    assert config.data.crop_size_voxels == (128, 128, 64) and config.data.spacing == Spacing((1.5, 1.5, 2.0), "file")
    assert (config.data.val_fraction, config.data.split_seed, config.data.foreground_prob) == (0.2, 0, 0.0)


@pytest.mark.parametrize("axes", ["patient", "file"])
def test_the_axes_of_the_spacing_reach_the_store_and_unprepared_crops(
    axes: Any, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = Config(data=DataConfig(spacing_mm=(1.0, 2.0, 3.0), spacing_axes=axes, store_dir=Path("store")))
    prepare, crops = mock.Mock(), mock.Mock()
    monkeypatch.setattr("engine.data.prepare", prepare)
    monkeypatch.setattr("engine.data.RawLoader", crops)
    prepared(config.data, mock.Mock())
    make_loaders(config, ranks, Data(mock.Mock(), ("a",), (), mock.Mock()))
    assert prepare.call_args.args[2] == crops.call_args.kwargs["spacing"] == Spacing((1.0, 2.0, 3.0), axes)


def test_brats_differs_from_the_seed_in_what_was_wrong_there_alone() -> None:
    seed, brats = (to_dict(parse("--config", str(CONFIGS / f"{name}.yaml"))) for name in ("seed", "brats"))
    differing = {
        f"{group}.{name}"
        for group in ("data", "model", "loss", "optim", "train")
        for name in seed[group]
        if seed[group][name] != brats[group][name]
    }
    assert differing == {"data.regions", "data.modalities", "data.spacing_axes", "loss.ce"}
    defaults = to_dict(Config())
    assert {group: brats[group] for group in differing_groups(brats)} == {
        group: defaults[group] for group in differing_groups(defaults)
    }


def differing_groups(values: dict) -> list[str]:
    return [group for group in values if group not in ("run_dir", "resume")]


@pytest.mark.parametrize("option", ["--train.epoch", "--data.crop_size", "--trian.epochs"])
def test_a_typo_in_an_option_is_an_error_that_names_it(option: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(option, "3")
    assert ended.value.code == 2
    assert option in capsys.readouterr().err


def test_a_typo_in_a_file_is_an_error_that_names_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine.yaml").write_text("train: {epoch: 7}\n")
    with pytest.raises(SystemExit):
        parse("--config", str(tmp_path / "mine.yaml"))
    assert "'epoch'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: 3\n", "mine.yaml: data is 3 and must be a group of options"),
        (b"train:\n  # epochs: 7\n", "mine.yaml: train is None and must be a group"),
        (b"data:\n  phantom:\n", "mine.yaml: data.phantom is None and must be a group"),
        (b"", "mine.yaml: the file is None and must be a group"),
        (b"data: [\n", "mine.yaml is no YAML"),
        (b"\xff\xfe", "mine.yaml is no YAML"),
    ],
)
def test_a_file_that_holds_no_options_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(file))
    with pytest.raises(ValueError, match=message):
        parse(f"--config={file}")


def test_the_launchers_local_rank_is_no_error() -> None:
    assert parse("--local_rank=1").train.epochs > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--train.batch_size", "0"), "train.batch_size 0 must be at least 1"),
        (("--data.val_fraction", "2"), "val_fraction 2.0 must lie between 0 and 1"),
        (("--data.folds", "5"), "--data.folds 5 without --data.fold: .*0 to 4"),
        (("--data.fold", "1"), "--data.fold 1 needs --data.folds"),
        (("--data.folds", "5", "--data.fold", "0", "--data.val_cases", "[a]"), "two ways to split"),
        (("--data.crop_size_voxels", "[0,64,64]"), "must be positive on every axis"),
        (
            ("--data.unprepared", "true", "--data.skip_faulty", "true"),
            "--data.skip_faulty true finds faulty scans when",
        ),
    ],
)
def test_values_against_a_rule_are_refused_with_the_value(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*args)


def test_folds_reach_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [{"name": f"case{i}", "flair": "flair.nii.gz", "label": "label.nii.gz"} for i in range(7)]
    for name in ("flair", "label"):
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "list.json").write_text(json.dumps(cases))
    monkeypatch.setattr("engine.data.prepared", lambda config, cases: cases)
    monkeypatch.setattr("engine.data._say_tumours", lambda *_: None)  # nothing is prepared
    folds = [parse("--data.root", str(tmp_path / "list.json"), "--data.release", "brats2018", "--data.folds", "3",
                   "--data.fold", str(fold)).data for fold in range(3)]  # fmt: skip
    held_out = [load_data(config).val for config in folds]
    assert sorted(len(names) for names in held_out) == [2, 2, 3]
    assert {name for names in held_out for name in names} == {case["name"] for case in cases}


def test_help_explains_every_field(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    for group, fields in to_dict(Config()).items():
        for name in fields if isinstance(fields, dict) else ():
            if name != "phantom":
                after = text.split(f"--data.{name} " if group == "data" else f"--{group}.{name} ")[-1]
                assert len(after.split("(type:")[0].split()) > 1, f"{group}.{name} has no help"


def test_resume_reads_the_runs_own_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {epochs: 11}\n")
    config = parse("--resume", str(tmp_path))
    assert (config.train.epochs, config.run_dir) == (11, tmp_path)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000003" / "about.json").touch()
    config = parse("--resume", "--run_dir", str(tmp_path), "--train.val_every_epochs", "3")
    assert (config.train.epochs, config.train.val_every_epochs, config.resume) == (11, 3, "auto")
    with pytest.raises(ValueError, match="no run with a checkpoint in"):
        parse("--resume", str(tmp_path / "nothing"))


def test_a_job_that_was_never_begun_is_begun_by_the_command_that_resumes_it(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("train: {epochs: 11}\n")  # it ended before its first checkpoint
    config = parse("--resume", "auto", "--run_dir", str(tmp_path), "--train.epochs", "7")
    assert (config.train.epochs, config.resume, config.run_dir) == (7, None, tmp_path)


def test_a_portable_configuration_means_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(data=DataConfig(root=Path("scans"), store_dir=Path("/store")), run_dir=Path("run"))
    values = to_portable_dict(config)
    assert values["data"]["root"] == str(tmp_path / "scans") and values["data"]["store_dir"] == "/store"
    assert values["train"]["deepspeed"] is None and "run_dir" not in values and "resume" not in values
    assert config_from_dict(values).data.root == tmp_path / "scans"
