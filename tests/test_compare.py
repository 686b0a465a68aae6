"""What `launch/compare.py` trains, how it continues, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from finished_runs import settings, write_run

from engine.config import CONFIGS, Config, config_from_dict, make_parser, parse_config, to_dict
from engine.reports.report import is_finished
from launch import compare


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


def test_the_same_command_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    children = Children({"unetr": 75})
    monkeypatch.setattr(compare, "run_process", children)
    monkeypatch.setattr(compare, "draw_predictions", lambda rows, path, store_dir: None)
    args = ["--run_dir", str(tmp_path / "out")]
    assert compare.main(args) == 75 and children.trained == ["unet", "unetr"]
    assert "unetr ended with status 75; run the same command to continue" in capsys.readouterr().err
    children.statuses.clear()
    assert compare.main(args) == 0 and children.trained == ["unet", "unetr", "unetr", "unetr_monai"]
    assert all("--resume auto" in " ".join(command) for command in children.commands)
    said = capsys.readouterr().out
    assert "unet: finished" in said and "UNETR of self-attention-cv" in said and "not comparable" in said
    for name in ("table.md", "comparison.json", "curves.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0
    assert compare.main([*args, "--optim.lr", "0.5"]) == 2
    assert "unet was started with --optim.lr 0.002, and now has --optim.lr 0.5" in capsys.readouterr().err
    assert compare.main([*args, "--kernels", "reference"]) == 2
    assert "unet was started with --kernels auto, and now has --kernels reference" in capsys.readouterr().err
    page = tmp_path / "out" / "unet" / "report.html"
    page.write_text("<p>")
    shutil.rmtree(tmp_path / "out" / "unet" / "checkpoints")
    assert compare.main(args) == 0 and children.trained[4:] == ["unet"] and is_finished(page.parent)
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
        (["--runs", "a", "--seeds", "2"], "omit one of the two"),
        (["--runs", "nothing_here"], "nothing_here is not a finished run"),
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
    assert compare.main(args) == 130 and "run the same command to continue" in capsys.readouterr().err


def test_the_launcher_must_not_start_the_comparison_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert compare.main([]) == 2 and "with python, as one process" in capsys.readouterr().err


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
