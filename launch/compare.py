"""Compare UNet, UNETR of self-attention-cv and UNETR of MONAI, trained under the same conditions.

python launch/compare.py --config launch/configs/compare.yaml --data.root Task01_BrainTumour     train, then compare
python launch/compare.py --config launch/configs/compare.yaml --data.root Task01_BrainTumour --seeds 3
python launch/compare.py --runs runs/A runs/B runs/C                                     compare finished runs

It takes the options of `launch/train.py` except `--model.name`, and trains the models one after the other, each by
`launch/train.py` in a process of its own. `--run_dir` (`runs/<config>`) gets a folder for each, and `table.md`,
`comparison.json`, `curves.png` and `predictions.png`. The same command continues where it stopped: finished runs are
kept, interrupted ones resumed. Epochs are as published (UNet 170, UNETR 180) unless `--train.epochs` is given.
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  # before any other import

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from engine.ranks.command import run_command
from engine.ranks.rank_env import read_rank_env
from engine.ranks.signals import install_handlers, restore_handlers
from pipelines.basics.atomic import replacing, subfolder
from pipelines.basics.option_values import Bounds, path_text
from pipelines.basics.tables import print_table
from pipelines.basics.text import printable

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from engine.config import Config
    from engine.reports.comparison import ComparisonRow, FinishedRun

STOP_LIMIT_S = 60.0  # for a run's processes to save and end


def main(args: list[str] | None = None) -> int:
    """Parse the command line, train what is not finished, and compare.

    Returns:
        exit status: 0, 2 for a user's mistake, 75 or 130 when stopped; if training ended early, its own.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> int:
        from engine.config import make_parser, parse_config
        from engine.reports.comparison import FinishedRun

        parser = make_parser("Compare UNet, UNETR of self-attention-cv and UNETR of MONAI under the same conditions.")
        seeds = "Runs of each model, with seeds from --train.seed on."
        parser.add_argument("--seeds", type=int, bounds=Bounds(1, 1000), default=1, help=seeds)
        launchers = "deepspeed trains on all GPUs; the default if there are several."
        parser.add_argument("--launcher", choices=("python", "deepspeed"), help=launchers)
        parser.add_argument("--runs", nargs="+", type=Path, help="Finished runs to compare; nothing is trained.")
        config, options = parse_config(parser, args)
        check(config, options)
        files = () if options.runs else options.config or ()
        folder = options.run_dir or Path("runs") / (files[0].stem if files else "comparison")
        if not options.runs:
            given = parser.parse_args(args, defaults=False, before=files)
            runs = plan(config, folder, options.seeds, with_epochs="train.epochs" in given)
            status = train_all(runs, options.launcher)
            if status:
                return status
        compare([FinishedRun.read(run_dir) for run_dir in options.runs or runs], folder, config.data.store_dir)
        return 0

    return run_command(work, lambda: "run the same command to continue", alone=True)


def check(config: Config, options: Namespace) -> None:
    """Refuse options that contradict each other or this command."""
    if config.resume:
        raise ValueError("--resume: this command resumes by itself; give --run_dir, the folder it wrote")
    if options.runs and options.seeds > 1:
        raise ValueError(f"--seeds {options.seeds} trains, --runs compares finished runs: omit one of the two")
    if read_rank_env().world_size > 1:
        raise ValueError("start launch/compare.py with python, as one process: it starts each run's launcher itself")


def plan(config: Config, folder: Path, seeds: int, with_epochs: bool) -> dict[Path, Config]:
    """The runs to train, by folder: every model with the first of the seeds, then with the next.

    They take `config.train.epochs` only if `with_epochs`, otherwise the published number.
    """
    from models import NETWORKS

    runs = {}
    for seed in range(config.train.seed, config.train.seed + seeds):
        for name, network in sorted(NETWORKS.items()):
            if network.published:
                model = dataclasses.replace(config.model, name=name)
                epochs = config.train.epochs if with_epochs else network.published.epochs
                train = dataclasses.replace(config.train, seed=seed, epochs=epochs)
                run_dir = folder / (name if seed == config.train.seed else f"{name}-seed-{seed}")
                runs[run_dir] = dataclasses.replace(config, model=model, train=train, run_dir=None, resume=None)
    return runs


def train_all(runs: dict[Path, Config], launcher: str | None) -> int:
    """Train what is not finished, one run after another; returns the status of the first that ended early, or 0.

    Raises:
        ValueError: a run was started with other options, or its folder is a link to somewhere else.
    """
    from engine.reports.report import is_finished

    files = {
        subfolder(run_dir.parent, run_dir.name): write_options(config, run_dir) for run_dir, config in runs.items()
    }
    command = launch_command(launcher)
    for run_dir, file in files.items():
        if is_finished(run_dir):
            print(f"{run_dir}: finished")
            continue
        print(f"{run_dir}: training", flush=True)
        options = ["--config", path_text(file), "--run_dir", path_text(run_dir), "--resume", "auto"]
        status = run_process([*command, *options])
        if status:
            print(f"{run_dir} ended with status {status}; run the same command to continue", file=sys.stderr)
            return status if status > 0 else 128 - status  # killed by a signal: as shells report it
    return 0


def write_options(config: Config, run_dir: Path) -> Path:
    """Write the YAML file with the options of a run, beside its folder.

    Raises:
        ValueError: there is one with other options, which the run was started with, or one that can't be read.
    """
    import yaml

    from engine.config import config_from_dict, to_dict, without_place
    from engine.parser import read_yaml
    from engine.reports.comparison import by_option

    values = without_place(config)
    file = run_dir.with_name(f"{run_dir.name}.yaml")
    if file.is_file():
        try:
            before, now = by_option(to_dict(config_from_dict(read_yaml(file)))), by_option(values)
        except ValueError as error:
            raise ValueError(f"{file} can't be read ({error}): give another --run_dir") from error
        names = [name for name in now if before[name] != now[name]]
        if names:
            was, asked = (", ".join(f"{name} {each[name]}" for name in names) for each in (before, now))
            raise ValueError(
                f"{run_dir} was started with {was}, and now has {asked}: all runs of a comparison must have the same "
                "options; give another --run_dir, or the same options as before"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        yaml.safe_dump(values, partial, sort_keys=False)
    return file


def launch_command(launcher: str | None) -> list[str]:
    """The command that starts `launch/train.py`; ValueError if DeepSpeed's launcher is wanted but not installed."""
    import torch

    script = str(Path(__file__).with_name("train.py"))
    if (launcher or ("deepspeed" if torch.cuda.device_count() > 1 else "python")) == "python":
        return [sys.executable, script]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    if not deepspeed.is_file():
        raise ValueError(f"--launcher deepspeed: there is no {deepspeed}; install deepspeed or give --launcher python")
    return [str(deepspeed), script]


def run_process(command: Sequence[str]) -> int:
    """Run a command until all its processes have ended; returns its exit status. Signals are passed on to all of them.

    The ranks outlive a launcher that is ended alone, and would go on writing to the folder that the next run uses.
    """
    stopping: list[float] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopping.append(time.monotonic())
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    with subprocess.Popen(command, start_new_session=True) as process:
        handlers = install_handlers(pass_on) | {signal.SIGINT: signal.signal(signal.SIGINT, pass_on)}
        try:
            status = process.wait()
            with contextlib.suppress(ProcessLookupError):  # once all of them have ended
                while stopping and time.monotonic() - stopping[-1] < STOP_LIMIT_S:
                    os.killpg(process.pid, 0)
                    time.sleep(0.05)
                if stopping:
                    os.killpg(process.pid, signal.SIGKILL)
            return status
        finally:
            restore_handlers(handlers)


def compare(runs: Sequence[FinishedRun], folder: Path, store_dir: Path | None) -> None:
    """Write tables and pictures to the folder, and print the table.

    `store_dir` is for `comparison_pictures.predict_example`. Raises ValueError for two runs of one model and seed.
    """
    from engine.reports import comparison, comparison_pictures

    rows = comparison.make_rows(runs)
    folder.mkdir(parents=True, exist_ok=True)
    comparison.write_table(rows, folder)
    comparison_pictures.draw_curves(rows, folder / "curves.png")
    print_table(comparison.HEAD, [row.cells() for row in rows])
    print(*map(printable, comparison.table_notes(rows)), sep="\n")
    draw_predictions(rows, folder / "predictions.png", store_dir)
    print(printable(f"table, curves and predictions: {folder}"))


def draw_predictions(rows: Sequence[ComparisonRow], path: Path, store_dir: Path | None) -> None:
    """Draw one case as every model predicts it, or print why there is no picture."""
    import torch

    from engine.reports import comparison_pictures
    from kernels import dispatch

    runs = [row.runs[0] for row in rows]
    path.unlink(missing_ok=True)
    if not comparison_pictures.can_share_a_case(runs):
        print("no predictions.png: the runs share no validation case that they process in the same way")
        return
    settings = runs[0].config
    device = torch.device("cuda" if settings.train.device != "cpu" and torch.cuda.is_available() else "cpu")
    dispatch.use(settings.kernels, device)
    try:
        comparison_pictures.draw_predictions(comparison_pictures.predict_example(rows, device, store_dir), path)
    except ValueError as error:  # missing scans cost the picture alone
        print(printable(f"no predictions.png: {error}"))


if __name__ == "__main__":
    sys.exit(main())
