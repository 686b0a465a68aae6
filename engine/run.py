"""A training run from configuration to report, and how its failures are told."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table

from engine import checkpoint, metrics, report
from engine.config import Config, to_dict
from engine.data import Data, load_data
from engine.distributed import Ranks, first_on_node, gather, init_ranks
from engine.failure import Watch, join_watch
from engine.progress import percent
from engine.trained import load_trained, make_model
from engine.trainer import Trainer
from engine.watch import STOP_SIGNALS, Interrupted, Preempted
from kernels import dispatch
from kernels.dice_ce import region_masks
from models import parameter_count
from pipelines.labels import REGIONS

log = logging.getLogger(__name__)


def start_run(read: Callable[[], Config]) -> int:
    """Run a command's work; returns the exit status, or ends the process where one of several ranks fails.

    A user's mistake (`ValueError`: a bad value, a faulty scan) becomes one line on standard error and status 2; the
    traceback goes to the run's log. Ctrl-C (130) and a signal that stops training (75) say how to go on. Of several
    ranks, the first to fail gives the line and the status of all.
    """
    config: Config | None = None
    watch: Watch | None = None
    status, line = 0, ""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if not (watch and watch.is_ending):
            raise Interrupted(signal.Signals(number).name)

    handlers = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        watch = join_watch()
        config = read()
        run(config)
    except Preempted as stop:
        status, line = _told(stop, config)
        log.debug(line)
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        log.debug("traceback", exc_info=True)
        status, line = _told(error, config)
        if watch and status:
            watch.fail(error, line, status)
        if not isinstance(error, ValueError | OSError | KeyboardInterrupt):
            raise
        line = f"error: {line}" if status == 2 else line
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if watch:  # a signal that comes now must not end this rank while another one is still writing
            watch.close()
        else:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if line and (watch is None or watch.rank == 0):
        print(line, file=sys.stderr)
    return status


def _told(error: BaseException, config: Config | None) -> tuple[int, str]:
    """Exit status and words for the user."""
    if isinstance(error, ValueError | OSError):
        return 2, str(error)
    if isinstance(error, Preempted | Interrupted):
        return os.EX_TEMPFAIL, f"stopped by {error}; {_how_to_go_on(config)}"
    if isinstance(error, KeyboardInterrupt):
        return 130, f"\ninterrupted; {_how_to_go_on(config)}"
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        return status, "the command line was refused, see above"
    return 1, f"{type(error).__name__}: {error}"


def run(config: Config) -> None:
    """Train as `config` says and write the run folder: logs, checkpoints, tables, pictures, report.

    Raises:
        ValueError, OSError: a value, a scan or a folder that can't be used, before training starts where it can be
            known by then.
    """
    with torch.device("meta"):
        make_model(config, channels=1)  # refuses sizes that do not fit before any data are prepared
    ranks = init_ranks(config.train.device)
    paths_taken = dispatch.use(config.kernels, ranks.device)
    config.run_dir = gather(config.run_dir, ranks)[0]  # its default holds the time, which differs between ranks
    config.resume = gather(config.resume, ranks)[0]  # a shared file system may show a checkpoint to some ranks first
    run_dir = config.run_dir
    assert run_dir is not None

    _start_log(run_dir, ranks)
    data = first_on_node(lambda: load_data(config.data), ranks)
    torch.manual_seed(config.train.seed)
    model = make_model(config, channels=len(data.store.modalities))
    log.info(
        "%s, %s parameters; %d training and %d validation cases of %s; %d rank(s) on %s",
        config.model.name, f"{parameter_count(model):,}", len(data.train), len(data.val),
        ", ".join(data.store.modalities), ranks.world_size, ranks.device.type,
    )  # fmt: skip
    log.info(paths_taken)
    trainer = Trainer(config, ranks, data, model)
    if ranks.is_first:
        _write_config(config, run_dir)
        _draw_sample(trainer, data, run_dir / "samples.png")
    trainer.fit()
    if ranks.is_first:
        finish(trainer, run_dir)


def finish(trainer: Trainer, run_dir: Path) -> None:
    """Pictures, page and the closing table, from the best weights."""
    pictures = ["curves.png", "samples.png"]
    example = next(iter(trainer.val_loader or ()), None)
    if example:
        name, (image, labels) = example[0], (part.to(trainer.ranks.device) for part in example[1:])
        with torch.no_grad():
            # A network of its own, for the trained one may be sharded over ranks.
            best = load_trained(run_dir, trainer.ranks.device).network
            prediction = trainer.masks(best, image)
        truth = region_masks(labels, trainer.regions)[0]
        dice = metrics.case_dice(name, prediction, truth).dice()
        scan, truth_masks, predicted = (report.as_numpy(array) for array in (image[0, 0], truth, prediction))
        report.draw_prediction(name, scan, truth_masks, predicted, dice, run_dir / "prediction.png")
        pictures.insert(1, "prediction.png")
    report.draw_curves(trainer.history, run_dir / "curves.png")
    summary = trainer.summary()
    page = report.write_html(run_dir, to_dict(trainer.config), summary, pictures)
    _print_table(summary)
    print(f"pictures, logs and checkpoints: {run_dir}\nopen {page}")


def _draw_sample(trainer: Trainer, data: Data, path: Path) -> None:
    """The first crop of the run that holds tumour, as the network sees it."""
    for batch in islice(trainer.train_loader.epoch(0), 20):
        image = batch[0]
        masks = region_masks(batch[1], data.store.coding.regions)
        holds_tumour = masks.flatten(1).any(dim=1)
        if holds_tumour.any():
            break
    index = int(holds_tumour.int().argmax())
    report.draw_sample(report.as_numpy(image[index]), report.as_numpy(masks[index]), data.store.modalities, path)


def _print_table(summary: dict) -> None:
    table = Table(title=f"validation Dice (%), {summary['validated_on'].replace('_', ' ')}")
    for column in ("", "epoch", "mean", *REGIONS, "cases"):
        table.add_column(column, justify="left" if not column else "right")
    for row in ("best", "last"):
        scores = summary[row]
        if scores["epoch"] is None:
            continue  # nothing was validated, or no truth had any region
        dice = [percent(scores.get(name)) for name in ("mean", *REGIONS)]
        table.add_row(row, str(scores["epoch"]), *dice, str(scores.get("cases", 0)))
    Console().print(table)


def _start_log(run_dir: Path, ranks: Ranks) -> None:
    """Everything in a file, and lines on the terminal from the first rank alone.

    The file is `run.log`, the first rank's; of several ranks each also writes one of its own, `logs/rank-0003.log`.
    """
    (run_dir / "logs" if ranks.world_size > 1 else run_dir).mkdir(parents=True, exist_ok=True)
    files = [run_dir / "logs" / f"rank-{ranks.rank:04d}.log"] if ranks.world_size > 1 else []
    handlers: list[logging.Handler] = []
    if ranks.is_first:
        files.append(run_dir / "run.log")
        handlers.append(logging.StreamHandler(sys.stdout))
        handlers[0].setLevel(logging.INFO)
    for file in files:
        handler = logging.FileHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(handler)
    logging.captureWarnings(True)
    for name in ("engine", "models", "pipelines", "py.warnings"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        if ranks.is_first:
            logging.getLogger(name).handlers = list(handlers)
    if not ranks.is_first:
        logging.getLogger().handlers = handlers  # with the warnings of other packages, too


def _how_to_go_on(config: Config | None) -> str:
    saved = checkpoint.states(config.run_dir / "checkpoints") if config and config.run_dir else []
    if config and saved:
        return f"{saved[0]} is saved; the same command with --resume {config.run_dir} continues from it"
    return (
        "there is no checkpoint yet (they are written at validations, and every --train.save_every_steps): start again"
    )


def _write_config(config: Config, run_dir: Path) -> None:
    """`config.yaml`, from which `--resume` continues and anyone can start the same run again, from any folder."""
    values = {name: value for name, value in to_dict(config).items() if name not in ("run_dir", "resume")}
    for group, name in (("data", "root"), ("data", "store_dir"), ("train", "deepspeed")):
        if values[group][name]:
            values[group][name] = str(Path(values[group][name]).resolve())
    partial = run_dir / "config.yaml.partial"
    partial.write_text(yaml.safe_dump(values, sort_keys=False))
    os.replace(partial, run_dir / "config.yaml")
