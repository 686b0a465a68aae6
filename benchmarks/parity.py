"""Training parity: this engine beside a plain MONAI loop, from the same weights, on the same crops.

    python -m benchmarks.parity --data.root Task01_BrainTumour                       tables, a plot, a JSON file
    python -m benchmarks.parity --data.root FOLDER --data.release brats2013 --steps 150

Four trainings of `--steps` steps, AdamW at 1e-4 as published, MONAI's DiceCELoss:

    plain             the reference network of its package, eager, float32, under `benchmarks.training.Plain`
    glioforge float32 the same weights, the same batches at the same steps: only the code differs
    glioforge bf16    the same again in bf16, with every fused kernel
    plain, other seed other weights and other batches: what differs between two seeds of the same code

A difference means something only compared with that between the seeds. Dice is that of the networks' masks, as in a
plain loop. float32 is IEEE in both, convolutions too. On a CPU PyTorch replaces the fused kernels, so everything else
is compared there; bf16 is skipped on a CPU without instructions for it. Networks and crops are the published ones on a
GPU, and small on a CPU.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import ArgumentParser
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from benchmarks.common import DEVICE, IS_GPU, machine
from benchmarks.report import OURS
from benchmarks.training import BATCH, FULL, SMALL, LoopVariant, Plain, Scene, Size, free
from engine.config import Config
from engine.data import DataConfig, list_cases, load_data, obtain_root
from engine.metrics import summarise
from engine.network import ModelConfig, make_model
from engine.precision import set_up_torch
from engine.ranks.distributed import Ranks, init_ranks
from engine.step import LossConfig, TrainConfig
from engine.trainer import Trainer
from kernels import dispatch
from kernels.dice_ce import region_masks
from models import NETWORKS, to_reference
from pipelines.basics.machine import cache_dir
from pipelines.basics.tables import percent
from pipelines.layouts.labels import REGIONS

HEADS = 10  # of self-attention-cv, where `--model.num_heads` would be None
LATE = 0.1
"""Share of the steps at the end whose mean loss is compared, too."""
PLAIN, OTHER_SEED, FLOAT32, BF16 = "plain", "plain, other seed", f"{OURS} float32", f"{OURS} bf16"
COLOURS = {PLAIN: "#000000", OTHER_SEED: "#999999", FLOAT32: "#d55e00", BF16: "#0072b2"}
PAIRS = ((FLOAT32, PLAIN), (BF16, FLOAT32), (BF16, PLAIN), (OTHER_SEED, PLAIN))


@dataclass
class Curve:
    """One training.

    Attributes:
        losses: of each step. dice: of the validation cases after the last, as `metrics.summarise` gives it.
    """

    losses: list[float] = field(default_factory=list)
    dice: dict[str, Any] = field(default_factory=dict)


# ---------- trainings


def make_trainer(scene: Scene, config: DataConfig, precision: str, seed: int) -> Trainer:
    """The trainer of this engine; weights and batches come from the seed alone."""
    options: Any = {
        "precision": precision,
        "compile": False,
        "cuda_graph": False,
        "validation": "center_crop" if IS_GPU else "full_volume",
        "score": "masks",
    }
    full = Config(
        data=config,
        model=ModelConfig(scene.model, **scene.size.widths),
        loss=LossConfig(ce="multihot"),  # MONAI's own
        train=TrainConfig(batch_size=BATCH, seed=seed, **options),
        run_dir=cache_dir() / "benchmark",  # nothing is saved
    )
    torch.manual_seed(seed)
    model = make_model(full.model, full.data.crop_size_voxels, len(scene.data.store.modalities))
    set_up_torch(full.train.precision, full.train.deterministic)
    return Trainer(full, scene.ranks, scene.data, model)


def batches_of(trainer: Trainer, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Image and labels of `steps` steps, from the first epoch on."""
    return islice((batch for epoch in count() for batch in trainer.train_loader.epoch(epoch)), steps)


def train_plain(scene: Scene, trainer: Trainer, steps: int, ours: Curve | None = None) -> Curve:
    """The plain loop, from a trainer's weights and on its batches.

    Args:
        ours: gets what the trainer itself makes of the same batches; None: it makes no steps.
    """
    plain, curve = Plain(scene, LoopVariant(PLAIN), BATCH), Curve()
    weights = to_reference(scene.model, trainer.step.model.state_dict(), scene.size.widths.get("num_heads", HEADS))
    plain.network.load_state_dict(weights)
    for image, labels in batches_of(trainer, steps):
        before = plain.epoch_loss
        plain.step(image.contiguous(), region_masks(labels, trainer.regions).float())
        curve.losses.append(plain.epoch_loss - before)
        if ours is not None:
            ours.losses.append(trainer.step(image, labels).loss.item())
    curve.dice = score(trainer, plain.network.eval())
    if ours is not None:
        ours.dice = score_ours(trainer)
    return curve


def train_ours(trainer: Trainer, steps: int) -> Curve:
    """The trainer alone."""
    curve = Curve([trainer.step(*batch).loss.item() for batch in batches_of(trainer, steps)])
    curve.dice = score_ours(trainer)
    return curve


def score_ours(trainer: Trainer) -> dict[str, Any]:
    with trainer.step.evaluating() as network:
        return score(trainer, network)


def score(trainer: Trainer, network: torch.nn.Module) -> dict[str, Any]:
    """Dice of a network on the trainer's validation cases."""
    return summarise(trainer.validator.score(network)[0])


def train_all(scene: Scene, config: DataConfig, steps: int, seed: int, with_bf16: bool) -> dict[str, Curve]:
    """All trainings, one after the other (the first two in turns)."""
    curves = {FLOAT32: Curve()}
    curves[PLAIN] = train_plain(scene, make_trainer(scene, config, "float32", seed), steps, curves[FLOAT32])
    free()
    curves[OTHER_SEED] = train_plain(scene, make_trainer(scene, config, "float32", seed + 1), steps)
    free()
    if with_bf16:
        with dispatch.using("triton" if IS_GPU else "auto", scene.ranks.device):
            curves[BF16] = train_ours(make_trainer(scene, config, "bf16", seed), steps)
    return {name: curves[name] for name in COLOURS if name in curves}


# ---------- what differs


def difference(one: Curve, other: Curve) -> dict[str, float]:
    """Of two trainings: of their losses, step by step and at the end, and of their Dice, where both have it."""
    late = max(1, round(LATE * len(one.losses)))
    gaps = [abs(a - b) for a, b in zip(one.losses, other.losses)]
    found = {
        "loss": statistics.mean(gaps),
        "largest": max(gaps),
        "late": statistics.mean(one.losses[-late:]) - statistics.mean(other.losses[-late:]),
    }
    dice = {name: (one.dice[name], other.dice[name]) for name in ("mean", *REGIONS)}
    return found | {name: a - b for name, (a, b) in dice.items() if a is not None and b is not None}


def differences(curves: dict[str, Curve]) -> dict[str, dict[str, float]]:
    """Every pair of `PAIRS` that was trained."""
    return {f"{a} - {b}": difference(curves[a], curves[b]) for a, b in PAIRS if a in curves and b in curves}


def beyond_noise(found: dict[str, dict[str, float]]) -> list[str]:
    """Pairs whose losses differ, step by step, at least as much as those of two seeds of the same code, or are NaN."""
    noise = found[f"{OTHER_SEED} - {PLAIN}"]["loss"]
    return [pair for pair, values in found.items() if OTHER_SEED not in pair and not values["loss"] < noise]


# ---------- report


def print_all(curves: dict[str, Curve], about: dict[str, Any], console: Console) -> None:
    """Dice and losses of each training, then the differences."""
    late = max(1, round(LATE * about["steps"]))
    table = Table(title=f"{about['model']}, {about['steps']} steps on {about['data']}, {about['machine']['device']}")
    for column in ("", "first loss", f"mean of the last {late}", "mean Dice", *REGIONS):
        table.add_column(column, justify="right" if column else "left")
    for name, curve in curves.items():
        losses = [f"{curve.losses[0]:.4f}", f"{statistics.mean(curve.losses[-late:]):.4f}"]
        table.add_row(name, *losses, *(percent(curve.dice[region]) for region in ("mean", *REGIONS)))
    console.print(table)
    table = Table(title="differences")
    for column in ("", "mean |loss|", "largest", f"last {late}", "mean Dice", *REGIONS):
        table.add_column(column, justify="right" if column else "left")
    for pair, values in about["differences"].items():
        cells = [f"{values['loss']:.1e}", f"{values['largest']:.1e}", f"{values['late']:+.1e}"]
        dice = [f"{100 * values[name]:+.2f}" if name in values else "n/a" for name in ("mean", *REGIONS)]
        table.add_row(pair, *cells, *dice)
    console.print(table)
    for note in about["notes"]:
        console.print(note, highlight=False, markup=False)


def notes_of(found: dict[str, dict[str, float]], kernels: str, cases: int) -> list[str]:
    """What the tables mean."""
    noise = f"{OTHER_SEED} - {PLAIN}"
    lines = [
        kernels,
        f"Dice of {cases} validation case(s); {noise} is the difference between two seeds of the same code.",
    ]
    if not IS_GPU:
        lines.append("On a CPU PyTorch replaces the fused kernels: this compares the rest of the engine.")
    if f"{BF16} - {PLAIN}" not in found:
        lines.append("bf16 was skipped: this CPU has no instructions for it.")
    beyond = beyond_noise(found)
    for pair, values in found.items():
        if pair != noise:
            share = values["loss"] / found[noise]["loss"]
            verdict = "NOT within" if pair in beyond else "within"
            lines.append(
                f"{pair}: losses differ by {share:.2g} x the difference between two seeds, {verdict} the "
                "noise of seeds."
            )
    return lines


def draw(curves: dict[str, Curve], about: dict[str, Any], path: Path) -> None:
    """Losses by step, and below them how far each is from the plain loop's."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    plain = curves[PLAIN].losses
    steps = range(1, len(plain) + 1)
    for name, curve in curves.items():
        style, layer = ("--", 3) if name == PLAIN else ("-", 2)  # the plain loop's stays visible on top of ours
        upper.plot(steps, curve.losses, style, color=COLOURS[name], lw=1.2, label=name, zorder=layer)
        if name != PLAIN:
            gaps = [abs(a - b) or float("nan") for a, b in zip(curve.losses, plain)]  # a zero has no place on the axis
            lower.plot(steps, gaps, color=COLOURS[name], lw=1.2)
    upper.set(ylabel="training loss", ylim=(0, None))
    lower.set(xlabel="step", ylabel=f"|loss - {PLAIN}|", yscale="log")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    upper.set_title(f"{about['model']}, {about['machine']['device']}", loc="left", fontsize=10)
    figure.legend(loc="outside lower center", ncols=len(curves), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def result_file(ending: str) -> Path:
    """Where the results of this device are."""
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "_", machine()["device"].removeprefix("NVIDIA ")).lower()
    return folder / f"parity_{name}.{ending}"


def make_scene(model: str, size: Size, config: DataConfig, ranks: Ranks) -> Scene:
    """Cases as `--data.*` says, split.

    Raises:
        ValueError: what is wrong with the scans; nothing to validate on.
    """
    data = load_data(config)
    if not data.val:
        raise ValueError("--data.val_fraction 0 leaves no case whose Dice could be compared: give at least one")
    return Scene(model, size, list_cases(config, obtain_root(config)), data, ranks)


def make_parser() -> ArgumentParser:
    size = FULL if IS_GPU else SMALL
    parser = ArgumentParser(description="Training parity with a plain MONAI loop.", allow_abbrev=False)
    parser.add_argument("--model", choices=NETWORKS, default="unetr")
    parser.add_argument("--steps", type=int, default=150, help="Of each training.")
    parser.add_argument("--seed", type=int, default=0, help="The other seed is the next.")
    parser.add_class_arguments(DataConfig, "data")
    parser.set_defaults({"data.crop_size_voxels": size.crop, "data.foreground_prob": 0.0 if IS_GPU else 0.7})
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Train and report; status 1 where a difference is not within the noise of seeds, 2 for a user's mistake."""
    parser = make_parser()
    options = parser.parse_args(args)
    config = parser.instantiate(options).data
    if options.steps < 2:
        print(
            f"error: --steps {options.steps} must be at least 2: before the first nothing can differ", file=sys.stderr
        )
        return 2
    widths = {} if IS_GPU else {k: v for k, v in SMALL.widths.items() if k in NETWORKS[options.model].widths}
    ranks = init_ranks(DEVICE.type)
    kernels = dispatch.use("auto", ranks.device)
    try:
        scene = make_scene(options.model, Size(config.crop_size_voxels, widths), config, ranks)
        with_bf16 = IS_GPU or torch.cpu._is_avx512_bf16_supported()
        curves = train_all(scene, config, options.steps, options.seed, with_bf16)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()
    found = differences(curves)
    about = {
        "machine": machine(), "model": options.model, "crop": list(config.crop_size_voxels), "widths": widths,
        "steps": options.steps, "seed": options.seed, "data": scene.cases.coding.release,
        "training_cases": len(scene.data.train), "notes": notes_of(found, kernels, len(scene.data.val)),
        "differences": found,
    }  # fmt: skip
    console = Console(width=140)
    print_all(curves, about, console)
    trainings = {name: {"losses": curve.losses, "dice": curve.dice} for name, curve in curves.items()}
    result_file("json").write_text(json.dumps({**about, "trainings": trainings}, indent=1) + "\n")
    draw(curves, about, result_file("png"))
    console.print(f"wrote {result_file('json')} and {result_file('png')}", highlight=False)
    return int(bool(beyond_noise(found)))


if __name__ == "__main__":
    sys.exit(main())
