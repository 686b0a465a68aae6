"""The one configuration of a run, and how it is read.

Every group of options is a dataclass; every field carries its help. Precedence: the defaults here, then the YAML file
of `--config`, then the command line. The defaults are the right recipe for BraTS (as `launch/configs/brats.yaml`);
with neither `--config` nor `--data.root` the demo (`launch/configs/demo.yaml`) is meant, so that `launch/train.py`
alone does something to look at. Units stand in the names (`spacing_mm`, `crop_size_voxels`).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml
from jsonargparse import ArgumentParser

from kernels.dispatch import Kernels
from pipelines.augment import Augment
from pipelines.cases import check_folds
from pipelines.geometry import Spacing, SpacingAxes
from pipelines.labels import Release
from pipelines.prepared import StoreDtype
from pipelines.volumes import Residence

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

STATES = "step-*/about.json"
"""Below `checkpoints`: one for each state that a run can go on from."""
CONFIGS = Path(__file__).resolve().parent.parent / "launch" / "configs"


def cache_dir() -> Path:
    """Where prepared volumes and synthetic scans go: `GLIOFORGE_CACHE`, else `$XDG_CACHE_HOME/glioforge`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GLIOFORGE_CACHE") or Path(base) / "glioforge")


@dataclass
class PhantomConfig:
    """Synthetic scans, made where no `--data.root` is given."""

    cases: int = 20
    """Number of synthetic cases."""
    size_voxels: tuple[int, int, int] = (240, 240, 155)
    """Voxels along each axis; the head always fills the field of view."""
    seed: int = 0
    """Seed of anatomy, tumours, contrast and noise."""


@dataclass
class DataConfig:
    """Which scans, which regions, and how they are cropped."""

    root: Path | None = None
    """A Decathlon task folder, a folder of BraTS cases, or a JSON or CSV list. None: synthetic scans."""
    download: bool = False
    """Fetch Decathlon Task01_BrainTumour (7.1 GB) into `root` first; resumable, checked."""
    release: Release | None = None
    """Label coding of the scans, where file names leave it open."""
    regions: Literal["release", "tutorial"] = "release"
    """TC, WT, ET from the release's coding, or with the published tutorial's swapped one (Decathlon only)."""
    modalities: list[str] | None = None
    """Channels of the network, of flair, t1, t1c, t2, in the order given: '[flair,t1c]'. None: all that there are."""
    val_fraction: float = 0.2
    """Share of the cases held out, by the rule of MONAI's DecathlonDataset."""
    split_seed: int = 0
    """Seed of that split."""
    train_cases: list[str] | None = None
    """Names of the training cases, in place of the split."""
    val_cases: list[str] | None = None
    """Names of the validation cases, in place of the split."""
    folds: int = 0
    """Split into so many folds instead, by `split_seed`: each case validates in one of them. 0: by `val_fraction`."""
    fold: int | None = None
    """The fold that validates, from 0; the others train."""
    spacing_mm: tuple[float, float, float] = (1.5, 1.5, 2.0)
    """Voxel size of the prepared volumes in mm, along the patient's axes R, A and S."""
    spacing_axes: SpacingAxes = "patient"
    """patient: `spacing_mm` is R, A, S however a file stores its axes; file: its first, second and third axis, as in
    MONAI and the published tutorial. No difference for files whose axes are in this order, as those of BraTS."""
    crop_size_voxels: tuple[int, int, int] = (128, 128, 64)
    """Training crop; also the network's input size."""
    crops_per_case: int = 1
    """Crops drawn from each case in an epoch."""
    foreground_prob: float = 0.0
    """Share of the crops centred on a tumour voxel; 0 is the uniform cropping of the tutorial."""
    pad: bool = False
    """Pad volumes smaller than the crop with zeros, instead of refusing them."""
    store_dir: Path | None = None
    """Folder of the prepared volumes. None: below `$GLIOFORGE_CACHE`, else `~/.cache/glioforge`."""
    store_dtype: StoreDtype = "float32"
    """Images on disk and in memory; float16 takes half the bytes, and no voxel is off by more than 0.05 % of itself."""
    residence: Residence = "auto"
    """Where volumes are during training: gpu, pinned (page-locked memory) or mapped (the store's files, by way of the
    page cache); auto: the first of these that fits, on a CPU mapped."""
    skip_faulty: bool = False
    """Leave out cases that can't be read, with a warning that names each, instead of stopping."""
    workers: int | None = None
    """Processes that prepare volumes. None: one for each core, where that is faster than none."""
    augment: Augment = field(default_factory=Augment)
    """Extra augmentations beside flip, scale and shift; all off."""
    prepare_on: Literal["cpu", "gpu"] = "cpu"
    """gpu: resample scans by DALI on the GPU when they are prepared."""
    unprepared: bool = False
    """Make training crops from the scans at each step, and prepare the validation cases alone: nothing to store, but
    every step pays for decoding."""
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    """Synthetic scans."""

    @property
    def spacing(self) -> Spacing:
        """`spacing_mm` along `spacing_axes`."""
        return Spacing(self.spacing_mm, self.spacing_axes)


@dataclass
class ModelConfig:
    """The network; a width of None is that of the reference, and the UNet has no transformer to set widths of."""

    name: Literal["unetr", "unetr_monai", "unet"] = "unetr"
    """UNETR as in self-attention-cv, UNETR as in MONAI, or MONAI's residual UNet."""
    feature_size: int | None = None
    """Channels at full resolution (16)."""
    hidden_size: int | None = None
    """Width of the transformer (512; MONAI 768)."""
    mlp_dim: int | None = None
    """Hidden width of the transformer's MLP (2048; MONAI 3072)."""
    num_heads: int | None = None
    """Attention heads (10; MONAI 12)."""


@dataclass
class LossConfig:
    """Sigmoid Dice over the regions plus cross-entropy."""

    ce: Literal["multihot", "argmax", "bce"] = "bce"
    """multihot: softmax against the multi-hot target (MONAI today); argmax: against its argmax (MONAI before October
    2022, and so the tutorial); bce: binary, which is what overlapping regions call for."""
    dice_weight: float = 1.0
    """Weight of the Dice term."""
    ce_weight: float = 1.0
    """Weight of the cross-entropy term."""
    squared_pred: bool = False
    """Squared predictions and targets in the Dice denominator."""


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = 1e-4
    """Learning rate."""
    weight_decay: float = 1e-5
    """Decoupled weight decay."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine to zero at the last step."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    grad_clip: float = 0.0
    """Largest norm of all gradients together; a step with more is scaled down. 0: no limit."""
    ema_decay: float = 0.0
    """Validate and keep an exponential moving average of the weights, e.g. 0.999; 0: the weights themselves."""


@dataclass
class TrainConfig:
    """Length, batch, precision and validation."""

    epochs: int = 180
    """Passes over the training cases."""
    batch_size: int = 2
    """Crops per rank and pass."""
    accumulate_steps: int = 1
    """Passes whose gradients are averaged in one optimizer step."""
    save_every_steps: int = 0
    """Write a checkpoint after so many optimizer steps too; 0: after validations alone."""
    keep_checkpoints: int = 2
    """Checkpoints to resume from that are kept, the newest; the one before steps in where the newest is damaged."""
    val_every_epochs: int = 5
    """Validate after this many epochs, and after the last."""
    validation: Literal["center_crop", "full_volume"] = "center_crop"
    """Dice on the centre crop of the tutorial, or by sliding window on the full prepared volume."""
    score: Literal["label_map", "masks"] = "label_map"
    """What validations score and choose the best weights by: the regions of the label map that is written (ET within TC
    within WT), or the network's overlapping masks, as the published tutorial."""
    patience: int = 0
    """Stop after so many validations without a better mean Dice; 0: never."""
    precision: Literal["float32", "tf32", "bf16", "fp16"] = "float32"
    """tf32: float32 with products in TF32 on a GPU; bf16, fp16: torch autocast, fp16 with loss scaling. Weights,
    gradients, losses and Dice are float32 in each."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 1 shards the optimizer's states over ranks, 2 the gradients too, 3 the weights too."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON file; what it sets goes before the options here."""
    compile: bool = False
    """Compile the network with torch.compile; validation runs it as it is."""
    cuda_graph: bool = False
    """Replay forward and backward as one CUDA graph: for small batches, where launches take longer than the work."""
    deterministic: bool = False
    """The same bits at each run on a GPU too, from slower algorithms; a CPU's are the same in any case."""
    max_skipped_steps: int = 10
    """Give up, with a diagnosis, after so many steps in a row whose gradients are not finite."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    seed: int = 0
    """Seed of the weights and of every random draw of the pipelines."""


@dataclass
class Config:
    """Everything that defines a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: Kernels = "auto"
    """Attention, instance norm and loss by fused Triton kernels or by plain PyTorch; auto: the faster that works."""
    run_dir: Path | None = None
    """Folder of logs, checkpoints and pictures. None: `runs/<config>-<model>-<time>`."""
    resume: str | None = None
    """Continue a run: its folder; alone or `auto`: `run_dir`, begun if it has no checkpoint yet, or else the newest
    folder in `runs/`."""

    def __post_init__(self) -> None:
        """Refuse what can be known to be wrong before any work is done."""
        at_least = {
            "data.crops_per_case": 1,
            "data.phantom.cases": 2,
            "data.split_seed": 0,
            "loss.dice_weight": 0,
            "loss.ce_weight": 0,
            "optim.lr": 0,
            "optim.weight_decay": 0,
            "optim.warmup_steps": 0,
            "optim.grad_clip": 0,
            "optim.ema_decay": 0,
            "train.epochs": 1,
            "train.batch_size": 1,
            "train.accumulate_steps": 1,
            "train.save_every_steps": 0,
            "train.keep_checkpoints": 1,
            "train.patience": 0,
            "train.max_skipped_steps": 1,
            "train.seed": 0,
            "train.val_every_epochs": 1,
        }
        for name, least in at_least.items():
            value: Any = self
            for part in name.split("."):
                value = getattr(value, part)
            if value < least:
                raise ValueError(f"--{name} {value} must be at least {least}")
        for name, value in (("val_fraction", self.data.val_fraction), ("foreground_prob", self.data.foreground_prob)):
            if not 0 <= value <= 1:
                raise ValueError(f"--data.{name} {value} must lie between 0 and 1")
        check_folds(self.data.folds, self.data.fold, self.data.train_cases, self.data.val_cases)
        if self.data.workers is not None and self.data.workers < 1:
            raise ValueError(f"--data.workers {self.data.workers} must be at least 1; leave it out for one per core")
        if self.optim.ema_decay >= 1:
            raise ValueError(f"--optim.ema_decay {self.optim.ema_decay} must be below 1, e.g. 0.999")
        if self.data.download and self.data.root is None:
            raise ValueError("--data.download needs --data.root, the folder that the scans go to")
        if self.data.unprepared and self.data.skip_faulty:
            raise ValueError(
                "--data.skip_faulty true finds faulty scans when they are prepared, --data.unprepared true prepares "
                "none: leave one of the two out, or find the faults first with launch/prepare.py --check"
            )
        if min(self.data.crop_size_voxels) < 1 or min(self.data.spacing_mm) <= 0:
            raise ValueError(
                f"--data.crop_size_voxels {self.data.crop_size_voxels} and --data.spacing_mm {self.data.spacing_mm} "
                "must be positive on every axis"
            )


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain values that JSON, YAML and `torch.load(weights_only=True)` take."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def to_portable_dict(config: Config) -> dict[str, Any]:
    """As `to_dict`, with paths that mean the same from any folder, and without what is about one run's folder."""
    values = {name: value for name, value in to_dict(config).items() if name not in ("run_dir", "resume")}
    for group, name in (("data", "root"), ("data", "store_dir"), ("train", "deepspeed")):
        if values[group][name]:
            values[group][name] = str(Path(values[group][name]).resolve())
    return values


def config_from_dict(values: dict[str, Any]) -> Config:
    """A configuration from what `to_dict` made of one.

    Raises:
        ValueError: an option that there is not, or a value that it refuses.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Config, as_group=False)
    try:
        parsed = parser.instantiate(parser.parse_object(values))
    except jsonargparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    return Config(**{item.name: parsed[item.name] for item in dataclasses.fields(Config)})


def make_parser(description: str) -> ArgumentParser:
    """The parser that every command of `launch/` starts from: the fields of `Config`, `--config`, `--print_config`."""
    usage = "%(prog)s [--config FILE] [--group.option VALUE ...]"
    # A shortened option would be guessed at; here it is refused, as any typo.
    parser = ArgumentParser(description=description, usage=usage, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file of options; the command line goes before it.")
    parser.add_class_arguments(Config, as_group=False)
    return parser


def parse_config(parser: ArgumentParser, args: list[str] | None = None) -> tuple[Config, jsonargparse.Namespace]:
    """Read a configuration.

    Args:
        parser: what `make_parser` gave, with the options that a command adds.
        args: command line; None takes the process's own.

    Returns:
        The configuration, and the parser's namespace for a command's own options. An unknown option or a value that
        its type refuses ends the process with a message, as command lines do.

    Raises:
        ValueError: values that contradict a rule; `--resume` without a run to resume; a file that holds no options.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--resume", nargs="?", const="auto")
    first.add_argument("--local_rank", type=int)  # the DeepSpeed launcher passes it; the environment says the same
    known, rest = first.parse_known_args(sys.argv[1:] if args is None else args)
    named = {arg.split("=")[0] for arg in rest}
    run_dir = find_run(known.resume, rest) if known.resume else None
    if run_dir:
        rest = ["--config", str(run_dir / "config.yaml"), *rest, "--run_dir", str(run_dir)]
    elif not named & {"--config", "--data", "--data.root", "--help", "-h"}:
        rest = ["--config", str(CONFIGS / "demo.yaml"), *rest]
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", type=Path, action="append", default=[])
    for path in files.parse_known_args(rest)[0].config:
        if path.is_file():
            _check_file(path)
    namespace = parser.parse_args(rest)
    values = parser.instantiate(namespace)
    fields = {item.name: values[item.name] for item in dataclasses.fields(Config)}
    config = Config(**fields | {"resume": known.resume if run_dir else None})
    if config.run_dir is None:
        source = Path(str(namespace.config[0])).stem if namespace.config else "run"
        config.run_dir = Path("runs") / f"{source}-{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return config, namespace


def _check_file(path: Path) -> None:
    """Refuse what jsonargparse would pass over or fail at: no YAML, and a group that is none.

    Raises:
        ValueError: naming the file.
    """
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    _check_group(values, Config, str(path), "")


def _check_group(values: Any, kind: type, where: str, prefix: str) -> None:
    if not isinstance(values, dict):
        raise ValueError(
            f"{where}: {prefix.rstrip('.') or 'the file'} is {values!r} and must be a group of options, as "
            "{name: value}; leave it out to take the defaults"
        )
    for item in dataclasses.fields(kind):
        if item.name in values and dataclasses.is_dataclass(item.default_factory):
            _check_group(values[item.name], item.default_factory, where, f"{prefix}{item.name}.")


def find_run(resume: str, args: list[str]) -> Path | None:
    """The run folder that `--resume` means: named itself, by `--run_dir`, or the newest in `runs/`.

    None for `auto` with a `--run_dir` that has no checkpoint yet: a job that is started again whenever it was stopped
    can always be given both.

    Raises:
        ValueError: no run to go on with.
    """
    if resume != "auto":
        run_dir = Path(resume)
    else:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--run_dir", type=Path)
        run_dir = parser.parse_known_args(args)[0].run_dir
        if run_dir is not None and not any(run_dir.glob(f"checkpoints/{STATES}")):
            return None
        if run_dir is None:
            saved = sorted(Path("runs").glob(f"*/checkpoints/{STATES}"), key=lambda path: path.stat().st_mtime)
            run_dir = saved[-1].parent.parent.parent if saved else Path("runs")
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"--resume: no run with a checkpoint in {run_dir}; give the folder that a run wrote")
    return run_dir
