"""A training run from configuration to report, and how its failures are told."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from rich.console import Console
from rich.table import Table

from engine import checkpoint, metrics, report
from engine.config import Config, ModelConfig, to_dict
from engine.data import Data, load_data
from engine.distributed import Ranks, first_on_node, gather, init_ranks
from engine.progress import percent
from engine.trainer import Trainer
from kernels import dispatch
from kernels.dice_ce import region_masks
from models import build_model, check_img_size, parameter_count
from pipelines.labels import REGIONS

log = logging.getLogger(__name__)


def start_run(read: Callable[[], Config]) -> int:
    """Run a command's work; returns the exit status.

    A user's mistake (`ValueError`: a bad value, a faulty scan) becomes one line on standard error and status 2; the
    traceback goes to the run's log. Ctrl-C says how to go on.
    """
    config: Config | None = None
    try:
        config = read()
        run(config)
    except (ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr)
        log.debug("traceback", exc_info=True)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted; {_how_to_go_on(config)}", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


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
    run_dir = config.run_dir
    assert run_dir is not None

    def begin() -> Data:
        _start_log(run_dir, ranks)
        return load_data(config.data)

    data = first_on_node(begin, ranks)
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


def make_model(config: Config, channels: int) -> torch.nn.Module:
    """The network that `config` describes, for images of so many channels.

    Raises:
        ValueError: naming the option that does not fit.
    """
    chosen = config.model
    transformer = ModelConfig() if chosen.name == "unet" else chosen
    size = config.data.crop_size_voxels
    try:
        check_img_size(size)
    except ValueError as error:
        raise ValueError(f"--data.crop_size_voxels: {error}") from error
    try:
        return build_model(
            chosen.name,
            in_channels=channels,
            out_channels=len(REGIONS),
            img_size=size,
            feature_size=chosen.feature_size,
            hidden_size=transformer.hidden_size,
            mlp_dim=transformer.mlp_dim,
            num_heads=transformer.num_heads,
        )
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error


def finish(trainer: Trainer, run_dir: Path) -> None:
    """Pictures, page and the closing table, from the best weights."""
    best = run_dir / "checkpoints" / "best.pt"
    if best.is_file():
        trainer.model.load_state_dict(checkpoint.load_weights(best)["weights"])
    pictures = ["curves.png", "samples.png"]
    example = next(iter(trainer.val_loader), None)
    if example:
        name, image, labels = example
        prediction, truth = trainer.predict(image), trainer.truth(labels)
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
    """Lines on the terminal and everything in `run.log`, from the first rank alone."""
    if not ranks.is_first:
        warnings.simplefilter("ignore")
        logging.lastResort = None
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    logging.captureWarnings(True)
    terminal, file = logging.StreamHandler(sys.stdout), logging.FileHandler(run_dir / "run.log")
    terminal.setLevel(logging.INFO)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("engine", "models", "pipelines", "py.warnings"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.DEBUG)
        logger.handlers = [terminal, file]


def _how_to_go_on(config: Config | None) -> str:
    if config and config.run_dir and (config.run_dir / "checkpoints" / "last").is_dir():
        return f"the same command with --resume {config.run_dir} continues from its last checkpoint"
    return (
        "there is no checkpoint yet (they are written at validations, and every --train.save_every_steps): start again"
    )


def _write_config(config: Config, run_dir: Path) -> None:
    """`config.yaml`, from which `--resume` continues and anyone can start the same run again, from any folder."""
    values = {name: value for name, value in to_dict(config).items() if name not in ("run_dir", "resume")}
    for name in ("root", "store_dir"):
        if values["data"][name]:
            values["data"][name] = str(Path(values["data"][name]).resolve())
    (run_dir / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
