"""A training run from configuration to report.

A run folder that is resumed may be somebody else's, and its `config.yaml` may have changed since the checkpoint was
written: what resuming changes, and what it writes elsewhere, is logged before anything is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
import sys
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from engine import checkpoint, metrics
from engine.config import Config, to_portable_dict
from engine.data import load_data, make_val_loader
from engine.deepspeed_json import apply_deepspeed_json
from engine.network import make_model
from engine.precision import set_up_torch
from engine.ranks.distributed import Ranks, first_on_node, gather, init_ranks
from engine.ranks.terminal import LogFile, PlainFormatter
from engine.reports import pictures, report
from engine.run_tables import write_log, write_validation
from engine.step_choice import OPTIONS, with_precision
from engine.trained import load_trained
from engine.trainer import Trainer
from kernels import dispatch
from kernels.dice_ce import region_masks
from models import parameter_count
from pipelines.basics.atomic import cannot_write, make_subfolder, open_to_append, replacing, subfolder
from pipelines.basics.tables import percent, print_table
from pipelines.basics.text import printable

log = logging.getLogger(__name__)

WRITTEN = ("checkpoints", "logs", "tensorboard", "run.log", ".lock")
"""Folders that a run writes to, and files that it appends to; all others it replaces."""


def run(config: Config) -> None:
    """Train as `config` says and write the run folder: logs, checkpoints, tables, pictures, report.

    Raises:
        ValueError, OSError: a value, a scan or a folder that can't be used, before training starts if possible.
    """
    with torch.device("meta"):
        make_model(config.model, config.data.crop_size_voxels, channels=1)  # refuses sizes before data are prepared
    to_portable_dict(config)  # refuses paths that `config.yaml` can't hold
    ranks = init_ranks(config.train.device)
    measurements: dispatch.Measurements = "default" if config.train.deterministic else "known"
    paths_taken = dispatch.use(config.kernels, ranks.device, measurements)
    config.run_dir = gather(config.run_dir, ranks)[0]  # its default holds the time, which differs between ranks
    run_dir = config.run_dir
    assert run_dir is not None
    new = [path for path in (run_dir, *run_dir.parents) if not path.exists()]  # which this run makes
    config.resume = gather(config.resume, ranks)[0]  # on a shared file system some ranks may see a checkpoint first

    _refuse_links(run_dir)
    lock = None
    try:
        lock = _claim(run_dir, is_resumed=config.resume is not None) if ranks.is_first else None
        trainer = _begin(config, ranks, run_dir, paths_taken)
    except (ValueError, OSError, KeyboardInterrupt, SystemExit):
        if lock and new:  # without a lock the folder is another job's
            shutil.rmtree(new[0], ignore_errors=True)
            for parent in new[1:]:
                with contextlib.suppress(OSError):  # another run is in it
                    parent.rmdir()
        raise
    trainer.fit()
    if ranks.is_first:
        finish(trainer, run_dir, paths_taken)
    if lock:
        lock.close()


def _begin(config: Config, ranks: Ranks, run_dir: Path, paths_taken: str) -> Trainer:
    """Everything before the first step: log, data, network, `config.yaml`, a picture of a crop."""
    _start_log(run_dir, ranks)
    asked, settings = apply_deepspeed_json(config, ranks.world_size)
    if asked.resume and ranks.is_first:
        _log_effects_of_resuming(asked)
    config = with_precision(asked, ranks)  # before anything reads it
    data = first_on_node(lambda: load_data(config.data), ranks)
    torch.manual_seed(config.train.seed)
    model = make_model(config.model, config.data.crop_size_voxels, len(data.store.modalities))
    log.info(
        "%s, %s parameters; %d training and %d validation cases of %s; %d rank(s) on %s",
        config.model.name, f"{parameter_count(model):,}", len(data.train), len(data.val),
        ", ".join(data.store.modalities), ranks.world_size, ranks.device.type,
    )  # fmt: skip
    log.info(paths_taken)
    set_up_torch(config.train.precision, config.train.deterministic)
    trainer = Trainer(config, ranks, data, model, settings)
    if ranks.is_first:
        with replacing(run_dir / "config.yaml") as file:  # for `--resume`, and to start the same run from any folder
            yaml.safe_dump(to_portable_dict(asked), file, sort_keys=False)
        _draw_sample(trainer, run_dir / "samples.png")
        (run_dir / "report.html").unlink(missing_ok=True)  # a resumed run is no longer finished
    return trainer


def finish(trainer: Trainer, run_dir: Path, paths_taken: str) -> None:
    """Write tables, pictures and page of a run that is over; `paths_taken` is what `dispatch.use` said."""
    summary, data, config = trainer.summary(), trainer.data, trainer.config
    write_log(run_dir, trainer.history)  # again: a finished run that is resumed may lack it
    write_validation(run_dir, trainer.cases, summary)
    pictures.draw_curves(trainer.history, run_dir / "curves.png")
    samples = len(trainer.train_loader) * config.train.batch_size * trainer.ranks.world_size
    facts = {
        "Data": report.data_facts(config.data, data.train, data.val, data.store.modalities, data.store.coding),
        "Timing": report.timing_facts(trainer.history, epoch_samples=samples),
        "Environment": report.environment_facts(config, trainer.ranks, paths_taken),
    }
    results = report.RunResults(config, summary, trainer.cases, data.train, data.val, facts)
    sections = [
        report.PictureSection("Curves", {"curves.png": "Training loss and validation Dice by epoch"}),
        *_draw_cases(trainer, run_dir),
        report.PictureSection("Training crop", {"samples.png": "A training crop, as the network sees it"}),
    ]
    page = report.write_html(run_dir, results, sections)
    title = f"validation Dice (%), {summary['validated_on'].replace('_', ' ')}"
    print_table(report.DICE_HEAD, report.dice_rows(summary), title)
    print(f"pictures, logs and checkpoints: {printable(str(run_dir))}\nopen {printable(str(page))}")


def _draw_cases(trainer: Trainer, run_dir: Path) -> list[report.PictureSection]:
    """Predict and draw the first validation case, and the best and the worst of the last validation."""
    config, data, device = trainer.config, trainer.data, trainer.ranks.device
    if not data.val:
        return []
    best, worst = report.best_and_worst(case for case in trainer.cases if case.name in data.val)
    places = {
        case.name: (f"{kind}-{place}.png", kind)
        for kind, cases in (("best", best), ("worst", worst))
        for place, case in enumerate(cases, 1)
    }
    trained = load_trained(run_dir, device)  # loaded again, as the trainer's may be sharded over ranks
    modality = pictures.SCAN_TITLES.get(trained.modalities[0], trained.modalities[0])
    drawn = {}
    names = list(dict.fromkeys([data.val[0], *places]))  # all on this rank, whichever validated them
    for name, image, labels in make_val_loader(config.data, config.train.validation, data.store, names, device):
        prediction = trainer.validator.masks(trainer.validator.logits(trained.network, image))
        truth = region_masks(labels, trainer.regions)[0]
        scored = metrics.case_dice(name, prediction, truth)
        dice = scored.dice()
        scan, truth_masks, predicted = (pictures.as_numpy(array) for array in (image[0, 0], truth, prediction))
        if name == data.val[0]:
            pictures.draw_prediction(name, scan, truth_masks, predicted, dice, run_dir / "prediction.png")
        if name in places:
            file, kind = places[name]
            pictures.draw_case(name, scan, truth_masks, predicted, dice, config.data.spacing_mm, run_dir / file)
            drawn[file] = f"{kind.capitalize()}: {name}, mean Dice {percent(scored.mean())}"
    extremes = report.PictureSection(
        "Best and worst cases",
        {file: drawn[file] for file, _ in places.values()},
        f"Chosen by mean Dice in the validation after epoch {trainer.epoch}; shown and scored with the weights of "
        f"epoch {trained.epoch}. Scan: {modality}. Where outlines coincide, the inner region's is on top.",
    )
    caption = f"{data.val[0]} with the weights of epoch {trained.epoch}. Scan: {modality}."
    return [extremes, report.PictureSection("Truth and prediction", {"prediction.png": caption})]


def _draw_sample(trainer: Trainer, path: Path) -> None:
    """Draw the first crop of the run with tumour in it, as the network sees it."""
    for batch in islice(trainer.train_loader.epoch(0), 20):
        masks = region_masks(batch[1], trainer.regions)
        has_tumour = masks.flatten(1).any(dim=1)
        if has_tumour.any():
            break
    index = int(has_tumour.int().argmax())
    scan, truth = (pictures.as_numpy(tensor[index]) for tensor in (batch[0], masks))
    pictures.draw_sample(scan, truth, trainer.data.store.modalities, path)


def _claim(run_dir: Path, is_resumed: bool) -> IO[str]:
    """Lock the run folder for as long as the returned file is open.

    Raises:
        ValueError: it can't be written, another job is training in it, or it holds a run that would be overwritten.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = open_to_append(run_dir / ".lock")
    except OSError as error:
        raise cannot_write(f"--run_dir {run_dir}", error, "give another folder") from error
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # processes that this one starts do not hold it
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(
            f"--run_dir {run_dir}: another job is training in this folder; wait until it ends, or give another folder"
        ) from error
    except OSError as error:
        log.debug("%s: no locks here: %s", run_dir, error)
    if not is_resumed and checkpoint.states(run_dir / "checkpoints"):
        raise ValueError(
            f"--run_dir {run_dir} holds a run with checkpoints, which a new one would replace: resume it with "
            f"--resume {run_dir}, or give another folder"
        )
    return lock


def _start_log(run_dir: Path, ranks: Ranks) -> None:
    """Log everything to files, and from the first rank also to the terminal.

    The first rank writes `run.log`; of several ranks, each also writes its own file, `logs/rank-0003.log`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    files = [make_subfolder(run_dir, "logs") / f"rank-{ranks.rank:04d}.log"] if ranks.world_size > 1 else []
    handlers: list[logging.Handler] = []
    if ranks.is_first:
        files.append(run_dir / "run.log")
        handlers.append(logging.StreamHandler(sys.stdout))
        handlers[0].setLevel(logging.INFO)
        handlers[0].setFormatter(PlainFormatter())
    handlers += map(LogFile, files)
    logging.captureWarnings(True)
    for name in ("launch", "engine", "kernels", "models", "pipelines", "py.warnings"):
        logging.getLogger(name).setLevel(logging.DEBUG)
        if ranks.is_first:
            logging.getLogger(name).handlers = list(handlers)
    if not ranks.is_first:
        logging.getLogger().handlers = handlers  # includes the warnings of other packages


def how_to_resume(config: Config) -> str:
    """Advice for a user whose run was stopped."""
    saved = checkpoint.states(config.run_dir / "checkpoints") if config.run_dir else []
    if saved:
        return f"{saved[0]} is saved; the same command with --resume {config.run_dir} continues from it"
    return "no checkpoint yet (they are written at validations, and every --train.save_every_steps): start again"


def _refuse_links(run_dir: Path) -> None:
    """Raise `ValueError` for a link in the run folder that would have the run write somewhere else."""
    for name in WRITTEN:
        subfolder(run_dir, name)
        if name in ("logs", "tensorboard") and (run_dir / name).is_dir():
            for path in sorted((run_dir / name).iterdir()):
                subfolder(run_dir, name, path.name)


def _log_effects_of_resuming(config: Config) -> None:
    """Log how the configuration differs from that of the newest checkpoint, and what the run makes elsewhere."""
    assert config.run_dir is not None
    data, elsewhere = config.data, []
    if data.store_dir is not None:
        elsewhere.append(f"writes prepared volumes to {data.store_dir} (--data.store_dir)")
    if data.download:
        elsewhere.append(f"downloads 7.1 GB to {data.root} (--data.download true)")
    elif data.root is None:
        elsewhere.append(f"makes {data.phantom.cases} synthetic scans in the cache (no --data.root)")
    recorded = checkpoint.recorded_config(config.run_dir / "checkpoints")
    lines = _changed_options(recorded, to_portable_dict(config)) if recorded else []
    for line in [*lines, *(f"outside its folder, this run {effect}" for effect in elsewhere)]:
        log.warning("--resume: %s", printable(line))


def _changed_options(was: Any, now: Any, name: str = "") -> list[str]:
    """A line for each option that differs between two configurations from `to_portable_dict`.

    What is left to `engine.step_choice` now is as the checkpoint says, and no difference.
    """
    if isinstance(was, dict) and isinstance(now, dict):
        names = dict.fromkeys([*now, *was])
        prefix = f"{name}." if name else "--"
        return [line for key in names for line in _changed_options(was.get(key), now.get(key), f"{prefix}{key}")]
    is_left = now == "auto" and name in {f"--train.{option}" for option in OPTIONS}
    return [] if was == now or is_left else [f"{name} is {now}, and was {was} when the checkpoint was written"]
