"""Compare UNet, UNETR of self-attention-cv and UNETR of MONAI, trained under the same conditions.

python launch/compare.py --config launch/configs/compare.yaml --data.root Task01_BrainTumour     train, then compare
python launch/compare.py --config launch/configs/compare.yaml --data.root Task01_BrainTumour --seeds 3
python launch/compare.py --runs runs/A runs/B runs/C                                     compare what is trained

It takes the options of `launch/train.py` but for `--model.name`, and trains the models one after the other, each by
`launch/train.py` in a process of its own. `--run_dir` (`runs/<config>`) gets a folder for each, and `table.md`,
`comparison.json`, `curves.png` and `predictions.png`. The same command goes on where it stopped: finished runs are
taken as they are, interrupted ones resumed. Epochs are as published (UNet 170, UNETR 180) unless `--train.epochs` is
given.
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  before the imports below, which take seconds

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
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from rich.console import Console
from rich.table import Table

from engine.config import Config, config_from_dict, make_parser, parse_config, to_dict
from engine.ranks.command import run_command
from engine.ranks.rank_env import read_rank_env
from engine.ranks.signals import install_handlers, restore_handlers
from engine.reports import comparison, comparison_pictures
from engine.reports.comparison import PUBLISHED, Row, Run
from engine.yaml_file import read_yaml
from kernels import dispatch
from pipelines.basics.atomic import below, replacing
from pipelines.basics.option_values import Bounds, path_text
from pipelines.basics.text import printable

STOP_LIMIT_S = 60.0  # for a run's processes to save and end
PIPE_WIDTH = 160  # columns; a table in a file or a pipe has no terminal to fit


def main(args: list[str] | None = None) -> int:
    """Parse the command line, train what has to be trained, and compare.

    Returns:
        exit status: 0, 2 for a user's mistake, 75 or 130 when stopped; where training ended early, its own.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = sys.argv[1:] if args is None else args
    parser = make_parser("Compare UNet, UNETR of self-attention-cv and UNETR of MONAI under the same conditions.")
    parser.add_argument(
        "--seeds", type=int, bounds=Bounds(1, 1000), default=1, help="Runs of each model, from --train.seed on."
    )
    launchers = "deepspeed trains on all GPUs: the default where there are several."
    parser.add_argument("--launcher", choices=("python", "deepspeed"), help=launchers)
    parser.add_argument("--runs", nargs="+", type=Path, help="Finished runs to compare; nothing is trained.")

    def work() -> int:
        config, options = parse_config(parser, args)
        check(config, options)
        run_dirs, folder = options.runs, options.run_dir or Path("runs") / "comparison"
        if not run_dirs:
            files = options.config or ()
            folder = options.run_dir or Path("runs") / (files[0].stem if files else "comparison")
            given = parser.parse_args(args, defaults=False, before=files)
            runs = plan(config, folder, options.seeds, with_epochs="train.epochs" in given)
            run_dirs = list(runs)
            status = train_all(runs, options.launcher)
            if status:
                return status
        compare([Run.read(run_dir) for run_dir in run_dirs], folder, config.data.store_dir)
        return 0

    return run_command(work, lambda: "the same command goes on from here", alone=True)


def check(config: Config, options: Namespace) -> None:
    """Refuse what contradicts itself, or the way this command works."""
    if config.resume:
        raise ValueError("--resume: this command goes on by itself; give --run_dir, the folder that it wrote")
    if options.runs and options.seeds > 1:
        raise ValueError(f"--seeds {options.seeds} trains, --runs takes what is trained: leave one of the two out")
    if read_rank_env().world_size > 1:
        raise ValueError("start launch/compare.py by python, as one process: it starts the launcher for each run")


# Training


def plan(config: Config, folder: Path, seeds: int, with_epochs: bool) -> dict[Path, Config]:
    """The runs to train: every model with the first seed, then with the next.

    Args:
        config: of all. folder: of the run folders. seeds: how many, from `config.train.seed` on.
        with_epochs: train for `config.train.epochs`, not for as many as were published.
    """
    runs = {}
    for seed in range(config.train.seed, config.train.seed + seeds):
        for name, published in PUBLISHED.items():
            model = dataclasses.replace(config.model, name=name)
            epochs = config.train.epochs if with_epochs else published.epochs
            settings = dataclasses.replace(config.train, seed=seed, epochs=epochs)
            run_dir = folder / (name if seed == config.train.seed else f"{name}-seed-{seed}")
            runs[run_dir] = dataclasses.replace(config, model=model, train=settings, run_dir=None, resume=None)
    return runs


def train_all(runs: dict[Path, Config], launcher: str | None) -> int:
    """Train what is not finished, one run after the other; returns the status of the first that ended early, or 0.

    Raises:
        ValueError: a run was begun with other options, or its folder is a link to somewhere else.
    """
    files = {below(run_dir.parent, run_dir.name): write_options(config, run_dir) for run_dir, config in runs.items()}
    command = launch_command(launcher)
    for run_dir, file in files.items():
        if comparison.is_finished(run_dir):
            print(f"{run_dir}: finished")
            continue
        print(f"{run_dir}: training", flush=True)
        status = run_process(
            [*command, "--config", path_text(file), "--run_dir", path_text(run_dir), "--resume", "auto"]
        )
        if status:
            print(f"{run_dir} ended with status {status}; the same command goes on from there", file=sys.stderr)
            return status if status > 0 else 128 - status  # by a signal: as shells count
    return 0


def write_options(config: Config, run_dir: Path) -> Path:
    """The YAML file that a run is trained by, beside its folder.

    Raises:
        ValueError: there is one with other options, by which the run was begun.
    """
    values = {name: value for name, value in to_dict(config).items() if name not in ("run_dir", "resume")}
    file = run_dir.with_name(f"{run_dir.name}.yaml")
    if file.is_file():
        before, now = (comparison.by_option(each) for each in (read_options(file), values))
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if names:
            was, asked = (", ".join(f"{name} {each.get(name)}" for name in names) for each in (before, now))
            raise ValueError(
                f"{run_dir} was begun with {was}, and now has {asked}: all runs of a comparison must have the same "
                "options; give another --run_dir, or the options of before"
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as partial:
        yaml.safe_dump(values, partial, sort_keys=False)
    return file


def read_options(file: Path) -> dict[str, Any]:
    """What `write_options` wrote.

    Raises:
        ValueError: it can't be read.
    """
    try:
        return to_dict(config_from_dict(read_yaml(file)))
    except ValueError as error:
        raise ValueError(f"{file} can't be read ({error}): give another --run_dir") from error


def launch_command(launcher: str | None) -> list[str]:
    """What `launch/train.py` is started by.

    Raises:
        ValueError: DeepSpeed's launcher is asked for and not installed.
    """
    script = str(Path(__file__).with_name("train.py"))
    if (launcher or ("deepspeed" if torch.cuda.device_count() > 1 else "python")) == "python":
        return [sys.executable, script]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    if not deepspeed.is_file():
        raise ValueError(f"--launcher deepspeed: there is no {deepspeed}; install deepspeed or give --launcher python")
    return [str(deepspeed), script]


def run_process(command: Sequence[str]) -> int:
    """Run a command to the end of all its processes; returns its exit status. Signals go to each of them.

    A launcher's ranks outlive a launcher that is ended alone, and would still write where the next run goes on.
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
            while stopping and _is_alive(process.pid):
                if time.monotonic() - stopping[-1] > STOP_LIMIT_S:
                    os.killpg(process.pid, signal.SIGKILL)
                    break
                time.sleep(0.05)
            return status
        finally:
            restore_handlers(handlers)


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# Comparison


def compare(runs: Sequence[Run], folder: Path, store_dir: Path | None) -> None:
    """Write tables and pictures, and print the table.

    Args:
        runs: what is compared. folder: of tables and pictures. store_dir: see `comparison_pictures.predict_example`.

    Raises:
        ValueError: two runs of one model and seed.
    """
    rows = comparison.make_rows(runs)
    folder.mkdir(parents=True, exist_ok=True)
    comparison.write_table(rows, folder)
    comparison_pictures.draw_curves(rows, folder / "curves.png")
    table = Table()
    for column in comparison.HEAD:
        table.add_column(column, justify="left" if column == "model" else "right")
    for cells in comparison.table_cells(rows):
        table.add_row(*cells)
    console = Console(width=None if Console().is_terminal else PIPE_WIDTH)
    console.print(table)
    console.print("\n".join(map(printable, comparison.notes(rows))), highlight=False, markup=False)
    draw_predictions(rows, folder / "predictions.png", store_dir)
    print(printable(f"table, curves and predictions: {folder}"))


def draw_predictions(rows: Sequence[Row], path: Path, store_dir: Path | None) -> None:
    """The same case by every model; without it, the reason."""
    runs = [row.runs[0] for row in rows]
    path.unlink(missing_ok=True)
    if not comparison_pictures.can_share_a_case(runs):
        print("no predictions.png: the runs have no validation case that they see in the same way")
        return
    settings = runs[0].config
    device = torch.device("cuda" if settings.train.device != "cpu" and torch.cuda.is_available() else "cpu")
    dispatch.use(settings.kernels, device)
    try:
        comparison_pictures.draw_predictions(comparison_pictures.predict_example(rows, device, store_dir), path)
    except ValueError as error:  # scans that are gone leave the table as it is
        print(printable(f"no predictions.png: {error}"))


if __name__ == "__main__":
    sys.exit(main())
