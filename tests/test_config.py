"""What the command line and the YAML files mean."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import yaml

from engine.config import CONFIGS, Config, config_from_dict, make_parser, parse_config, to_dict, to_portable_dict
from engine.data import Data, DataConfig, load_data, make_loaders, prepared
from engine.ranks.distributed import Ranks
from engine.step import TrainConfig
from pipelines.scans.geometry import Spacing


def parse(*args: str) -> Config:
    return parse_config(make_parser("test"), list(args))[0]


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
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
    make_loaders(config.data, config.train, ranks, Data(mock.Mock(), ("a",), (), mock.Mock()))
    assert prepare.call_args.args[2] == crops.call_args.kwargs["spacing"] == Spacing((1.0, 2.0, 3.0), axes)


def test_brats_differs_from_the_seed_only_in_what_was_wrong_there() -> None:
    seed, brats = (to_dict(parse("--config", str(CONFIGS / f"{name}.yaml"))) for name in ("seed", "brats"))
    differing = {
        f"{group}.{name}"
        for group in ("data", "model", "loss", "optim", "train")
        for name in seed[group]
        if seed[group][name] != brats[group][name]
    }
    assert differing == {"data.regions", "data.modalities", "data.spacing_axes", "loss.ce", "train.score",
                         "train.precision"}  # fmt: skip  # float32, as it was published
    defaults = to_dict(Config())
    assert {group: brats[group] for group in differing_groups(brats)} == {
        group: defaults[group] for group in differing_groups(defaults)
    }


def kinds_in(kind: Any) -> list[Any]:
    """The types that a type is made of."""
    return [part for inner in get_args(kind) for part in kinds_in(inner)] or [kind]


def differing_groups(values: dict) -> list[str]:
    return [group for group in values if group not in ("run_dir", "resume")]


@pytest.mark.parametrize(
    ("option", "meant"),
    [
        ("--train.epoch", "--train.epochs"),
        ("--trian.epochs", "--train.epochs"),
        ("--data.crop_size", "--data.crop_size_voxels"),
        ("--epochs", "--train.epochs"),
        ("--train.lr", "--optim.lr"),
        ("--batch-size", "--train.batch_size"),
        ("--seed", "--data.phantom.seed or --train.seed"),
    ],
)
def test_a_typo_in_an_option_is_an_error_that_names_it_and_what_was_meant(option: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"^there is no option {option}; did you mean {meant}\\?$"):
        parse(option, "3")


def test_a_typo_in_a_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {lr: 7}\nepochs: 3\n")
    with pytest.raises(ValueError) as raised:
        parse("--config", str(file))
    for name, meant in (("train.lr", "optim.lr"), ("epochs", "train.epochs")):
        assert f"{file}: there is no option {name}; did you mean {meant}?" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"data: 3\n", "mine.yaml: data is 3 and must be a group of options"),
        (b"train:\n  # epochs: 7\n", "mine.yaml: train is null and must be a group"),
        (b"data:\n  phantom:\n", "mine.yaml: data.phantom is null and must be a group"),
        (b"", "mine.yaml: the file is null and must be a group"),
        (b"[1, 2]", "mine.yaml: the file is .* and must be a group"),
        (b"data: [\n", "mine.yaml is not an options file: line"),
        (b"\xff\xfe", "mine.yaml is not an options file: byte"),
    ],
)
def test_a_file_without_options_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parse("--config", str(file))
    with pytest.raises(ValueError, match=message):
        parse(f"--config={file}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--train.batch_size", "0"), "train.batch_size 0 must be at least 1"),
        (("--train.accumulate_steps", "0"), "train.accumulate_steps 0 must be at least 1"),
        (("--data.crops_per_case", "0"), "data.crops_per_case 0 must be at least 1"),
        (("--data.foreground_prob", "1.5"), "data.foreground_prob 1.5 must be at most 1"),
        (("--data.val_fraction", "2"), "--data.val_fraction 2 must be below 1"),
        (("--data.folds", "5"), "--data.folds 5 without --data.fold: .*0 to 4"),
        (("--loss.ce_weight", "0", "--loss.dice_weight", "0"), "leave no loss: raise one"),
        (("--data.fold", "1"), "--data.fold 1 needs --data.folds"),
        (("--data.folds", "5", "--data.fold", "0", "--data.val_cases", "[a]"), "two ways to split"),
        (
            ("--data.crop_size_voxels", "[0,64,64]"),
            "--data.crop_size_voxels .0,64,64. must be 3 whole numbers, each at least 1",
        ),
        (
            ("--data.unprepared", "true", "--data.skip_faulty", "true"),
            "--data.skip_faulty true finds faulty scans by",
        ),
    ],
)
def test_values_that_break_a_rule_are_refused_by_value(args: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*args)


OPTIONS = {name: option for name, option in make_parser("").options.items() if name not in ("config", "print_config")}
NUMBERS = [name for name, option in OPTIONS.items() if set(kinds_in(option.kind)) & {int, float}]


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_must_be_finite_and_within_its_bounds(name: str, tmp_path: Path) -> None:
    option = OPTIONS[name]
    count = len([kind for kind in kinds_in(option.kind) if kind in (int, float)])
    assert option.bounds.example is not None or option.default is None, f"{name} has no bounds"
    for wrong in ("nan", "inf", "-inf", "-1e30", "1e30", "x", "", "true", "{a: 1}", "[]", "9" * 5000):
        raw = ",".join([wrong] * count) if wrong[:1] not in "{[" else wrong
        with pytest.raises(ValueError, match=f"^--{re.escape(name)} .* must be "):
            parse(f"--{name}={raw}")
    file = tmp_path / "mine.yaml"
    for content in ("null", "") if option.default is not None else ():
        file.write_text(f"{name}: {content}\n")
        with pytest.raises(ValueError, match=f"mine.yaml: {re.escape(name)} null must be "):
            parse("--config", str(file))


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.default is not None])
def test_an_option_with_a_default_takes_no_empty_value(name: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"{name}:\n")
    with pytest.raises(ValueError, match=f"mine.yaml: {re.escape(name)} null must be "):
        parse("--config", str(file))
    values: dict[str, Any] = to_dict(Config())
    *groups, last = name.split(".")
    group = values
    for part in groups:
        group = group[part]
    group[last] = None
    with pytest.raises(ValueError, match=f"^{re.escape(name)} null must be "):
        config_from_dict(values)


def test_all_mistakes_are_reported_together_with_their_places(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: .nan}\nmodle: {}\n")
    with pytest.raises(ValueError) as raised:
        parse("--config", str(file), "--train.epochs", "0", "--bla", "--train.precision", "fp61", "more")
    assert str(raised.value).splitlines() == [
        "6 options can't be used:",
        "  there is no option --bla; --help lists all",
        "  unexpected argument more; see --help",
        f"  {file}: there is no option modle; did you mean model?",
        f"  {file}: optim.lr .nan must be finite",
        "  --train.epochs 0 must be at least 1",
        "  --train.precision fp61 must be one of auto, float32, tf32, bf16, fp16; did you mean fp16?",
    ]


def test_a_configuration_made_in_python_obeys_the_same_rules() -> None:
    with pytest.raises(ValueError) as raised:
        Config(
            data=DataConfig(spacing_mm=(1.0, math.nan, 1.0), root="scans"),  # type: ignore[arg-type]
            train=TrainConfig(epochs=True, seed="3", precision=None),  # type: ignore[arg-type]
        )
    wrong = (
        "--data.root scans",
        "--data.spacing_mm",
        "--train.epochs true",
        "--train.seed 3",
        "--train.precision null",
    )
    assert all(name in str(raised.value) for name in wrong), raised.value
    assert len(str(raised.value).splitlines()) == 1 + len(wrong)


PATHS = ["null", "~x", "# x", "1e3", "[x]", "{x}", "@x", "a b", "x: y", "true", "-x", "-", "a,b", "'x'", "!x", "*", "é"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_the_text_that_is_typed(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("data.root", "data.store_dir", "train.deepspeed", "run_dir"):
        for words in ([f"--{name}", path], [f"--{name}={path}"]):
            value: Any = parse(*words)
            for part in name.split("."):
                value = getattr(value, part)
            assert value == Path(path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).mkdir()
    (tmp_path / path / "config.yaml").write_text("train: {epochs: 11}\n")
    for words in (["--resume", path], ["--config", f"{path}/config.yaml"]):
        assert parse(*words).train.epochs == 11
    config = Config(data=DataConfig(root=Path(path)))
    assert config_from_dict(to_dict(config)) == config
    file = tmp_path / "whole.yaml"
    file.write_text(yaml.safe_dump(to_dict(config)))
    assert parse("--config", str(file)).data.root == Path(path)


def test_a_tilde_is_home_where_a_shell_would_expand_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert parse("--run_dir=~/x").run_dir == Path("/home/somebody/x")
    assert parse("--data.root", "~").data.root == Path("/home/somebody")
    assert parse("--data.root", "./~").data.root == Path("~") and parse("--data.root", "a/~").data.root == Path("a/~")
    (tmp_path / "mine.yaml").write_text("data: {root: ~/scans, store_dir: ~}\n")
    data = parse("--config", str(tmp_path / "mine.yaml")).data
    assert (data.root, data.store_dir) == (Path("/home/somebody/scans"), None)  # a YAML file's ~ is null
    literal = Config(data=DataConfig(root=Path("~/scans")))
    assert config_from_dict(to_dict(literal)) == literal
    for option in ("--data.root", "--run_dir", "--resume"):
        with pytest.raises(ValueError, match=f"{option} '' .nothing. must be a path"):
            parse(option, "")


@pytest.mark.parametrize(
    "words", [["flair,t1c"], ["flair", "t1c"], ["[flair,t1c]"], ["[flair, 't1c']"], ["flair,", "t1c"]]
)
def test_a_list_may_be_written_with_commas_blanks_or_brackets(words: list[str], tmp_path: Path) -> None:
    assert parse("--data.modalities", *words, "--train.epochs", "3").data.modalities == ["flair", "t1c"]
    (tmp_path / "mine.yaml").write_text(f"data.modalities: {' '.join(words)}\n")
    if len(words) == 1:
        assert parse("--config", str(tmp_path / "mine.yaml")).data.modalities == ["flair", "t1c"]


@pytest.mark.parametrize(
    "words", [["64", "48", "32"], ["64,48,32"], ["[64,48,32]"], ["[64, 48, 32]"], ["64,", "48,", "32"]]
)
def test_sizes_may_be_written_with_commas_blanks_or_brackets(words: list[str]) -> None:
    assert parse("--data.crop_size_voxels", *words).data.crop_size_voxels == (64, 48, 32)


def test_names_of_cases_stay_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data: {train_cases: [00001, 1e3, on], val_cases: 00002}\n")
    data = parse("--config", str(tmp_path / "mine.yaml")).data
    assert (data.train_cases, data.val_cases) == (["00001", "1e3", "on"], ["00002"])
    assert parse("--data.val_cases", "[00001]").data.val_cases == ["00001"]
    assert parse("--data.val_cases", '["a,b", c d]').data.val_cases == ["a,b", "c d"]
    for wrong in ("a,,b", "[a, [b]]", "[]x]"):
        with pytest.raises(ValueError, match="--data.val_cases .* must be names"):
            parse("--data.val_cases", wrong)


def test_the_printed_configuration_gives_the_same_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--config", str(CONFIGS / "real.yaml"), "--data.root", "~x", "--data.val_cases", "00001"]
    with pytest.raises(SystemExit) as ended:
        parse(*args, "--run_dir", "out", "--print_config")
    assert ended.value.code == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert parse("--config", str(tmp_path / "mine.yaml")) == parse(*args, "--run_dir", "out")


def test_folds_reach_the_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [{"name": f"case{i}", "flair": "flair.nii.gz", "label": "label.nii.gz"} for i in range(7)]
    for name in ("flair", "label"):
        (tmp_path / f"{name}.nii.gz").touch()
    (tmp_path / "list.json").write_text(json.dumps(cases))
    monkeypatch.setattr("engine.data.prepared", lambda config, cases: cases)
    monkeypatch.setattr("engine.data._warn_without_tumour", lambda *_: None)  # nothing is prepared
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
    assert "--train.compile {auto,true,false} " in text  # as it is typed


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


def test_resume_auto_starts_a_run_that_has_no_checkpoint(tmp_path: Path) -> None:
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
