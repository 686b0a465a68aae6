"""The one configuration of a run, and how it is read.

Every group of options is a dataclass; every field carries its help, and every number its bounds. Precedence: the
defaults here, then the YAML files of `--config`, then the command line. The defaults are the right recipe for BraTS (as
`launch/configs/brats.yaml`); with neither `--config` nor `--data.root` the demo (`launch/configs/demo.yaml`) is meant,
so that `launch/train.py` alone does something to look at. Units stand in the names (`spacing_mm`, `crop_size_voxels`).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace

from engine.parser import Parser, build
from kernels.dispatch import Kernels
from pipelines.augment import Augment
from pipelines.basics.text import encodable
from pipelines.basics.values import Misfit, convert, faults, number, plain, refuse, shown
from pipelines.cases import check_folds
from pipelines.geometry import Spacing, SpacingAxes
from pipelines.labels import Release
from pipelines.prepared import StoreDtype
from pipelines.volumes import Residence

MANY = 1_000_000
MOST_SEED = 2**63 - 1
STATES = "step-*/about.json"
"""Below `checkpoints`: one for each state that a run can go on from."""
CONFIGS = Path(__file__).resolve().parent.parent / "launch" / "configs"


@dataclass
class PhantomConfig:
    """Synthetic scans, made where no `--data.root` is given."""

    cases: int = number(20, least=2, most=10_000)
    """Number of synthetic cases."""
    size_voxels: tuple[int, int, int] = number((240, 240, 155), least=16, most=512)
    """Voxels along each axis; the head always fills the field of view."""
    seed: int = number(0, least=0, most=MOST_SEED)
    """Seed of anatomy, tumours, contrast and noise."""


@dataclass
class DataConfig:
    """Which scans, which regions, and how they are cropped."""

    root: Path | None = None
    """A Decathlon task folder, a folder of BraTS cases, nnU-Net's raw folder, or a JSON or CSV list. None: synthetic
    scans."""
    download: bool = False
    """Fetch Decathlon Task01_BrainTumour (7.1 GB) into `root` first; resumable, checked."""
    release: Release | None = None
    """Label coding of the scans, where file names leave it open."""
    regions: Literal["release", "tutorial"] = "release"
    """TC, WT, ET from the release's coding, or with the published tutorial's swapped one (Decathlon only)."""
    modalities: list[str] | None = None
    """Channels of the network, of flair, t1, t1c, t2, in the order given: flair,t1c. None: all that there are."""
    val_fraction: float = number(0.2, least=0, below=1)
    """Share of the cases held out, by the rule of MONAI's DecathlonDataset."""
    split_seed: int = number(0, least=0, most=MOST_SEED)
    """Seed of that split."""
    train_cases: list[str] | None = None
    """Names of the training cases, in place of the split."""
    val_cases: list[str] | None = None
    """Names of the validation cases, in place of the split."""
    folds: int = number(0, least=0, most=MANY)
    """Split into so many folds instead, by `split_seed`: each case validates in one of them. 0: by `val_fraction`."""
    fold: int | None = number(None, least=0, most=MANY)
    """The fold that validates, from 0; the others train."""
    spacing_mm: tuple[float, float, float] = number((1.5, 1.5, 2.0), least=0.1, most=100)
    """Voxel size of the prepared volumes in mm, along the patient's axes R, A and S."""
    spacing_axes: SpacingAxes = "patient"
    """patient: `spacing_mm` is R, A, S however a file stores its axes; file: its first, second and third axis, as in
    MONAI and the published tutorial. No difference for files whose axes are in this order, as those of BraTS."""
    crop_size_voxels: tuple[int, int, int] = number((128, 128, 64), least=1, most=2048)
    """Training crop; also the network's input size."""
    crops_per_case: int = number(1, least=1, most=MANY)
    """Crops drawn from each case in an epoch."""
    foreground_prob: float = number(0.0, least=0, most=1)
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
    workers: int | None = number(None, least=1, most=1024)
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
    feature_size: int | None = number(None, least=1, most=1024)
    """Channels at full resolution (16)."""
    hidden_size: int | None = number(None, least=1, most=65_536)
    """Width of the transformer (512; MONAI 768)."""
    mlp_dim: int | None = number(None, least=1, most=262_144)
    """Hidden width of the transformer's MLP (2048; MONAI 3072)."""
    num_heads: int | None = number(None, least=1, most=1024)
    """Attention heads (10; MONAI 12)."""


@dataclass
class LossConfig:
    """Sigmoid Dice over the regions plus cross-entropy."""

    ce: Literal["multihot", "argmax", "bce"] = "bce"
    """multihot: softmax against the multi-hot target (MONAI today); argmax: against its argmax (MONAI before October
    2022, and so the tutorial); bce: binary, which is what overlapping regions call for."""
    dice_weight: float = number(1.0, least=0, most=MANY)
    """Weight of the Dice term."""
    ce_weight: float = number(1.0, least=0, most=MANY)
    """Weight of the cross-entropy term."""
    squared_pred: bool = False
    """Squared predictions and targets in the Dice denominator."""


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = number(1e-4, least=0, most=1000)
    """Learning rate."""
    weight_decay: float = number(1e-5, least=0, most=1000)
    """Decoupled weight decay."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine to zero at the last step."""
    warmup_steps: int = number(0, least=0, most=1000 * MANY)
    """Steps of linear warm-up."""
    grad_clip: float = number(0.0, least=0, most=1000 * MANY)
    """Largest norm of all gradients together; a step with more is scaled down. 0: no limit."""
    ema_decay: float = number(0.0, least=0, below=1)
    """Validate and keep an exponential moving average of the weights, e.g. 0.999; 0: the weights themselves."""


@dataclass
class TrainConfig:
    """Length, batch, precision and validation."""

    epochs: int = number(180, least=1, most=MANY)
    """Passes over the training cases."""
    batch_size: int = number(2, least=1, most=65_536)
    """Crops per rank and pass."""
    accumulate_steps: int = number(1, least=1, most=MANY)
    """Passes whose gradients are averaged in one optimizer step."""
    save_every_steps: int = number(0, least=0, most=1000 * MANY)
    """Write a checkpoint after so many optimizer steps too; 0: after validations alone."""
    keep_checkpoints: int = number(2, least=1, most=MANY)
    """Checkpoints to resume from that are kept, the newest; the one before steps in where the newest is damaged."""
    val_every_epochs: int = number(5, least=1, most=MANY)
    """Validate after this many epochs, and after the last."""
    validation: Literal["center_crop", "full_volume"] = "center_crop"
    """Dice on the centre crop of the tutorial, or by sliding window on the full prepared volume."""
    score: Literal["label_map", "masks"] = "label_map"
    """What validations score and choose the best weights by: the regions of the label map that is written (ET within TC
    within WT), or the network's overlapping masks, as the published tutorial."""
    patience: int = number(0, least=0, most=MANY)
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
    max_skipped_steps: int = number(10, least=1, most=MANY)
    """Give up, with a diagnosis, after so many steps in a row whose gradients are not finite."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    seed: int = number(0, least=0, most=MOST_SEED)
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
    resume: str | None = field(default=None, metadata={"bare": "auto"})
    """Continue a run: its folder; alone or `auto`: `run_dir`, begun if it has no checkpoint yet, or else the newest
    folder in `runs/`."""

    def __post_init__(self) -> None:
        """Refuse what can be known to be wrong before any work is done."""
        refuse([f"--{fault}" for fault in faults(self)])
        check_folds(self.data.folds, self.data.fold, self.data.train_cases, self.data.val_cases)
        if self.data.download and self.data.root is None:
            raise ValueError("--data.download needs --data.root, the folder that the scans go to")
        if self.data.unprepared and self.data.skip_faulty:
            raise ValueError(
                "--data.skip_faulty true finds faulty scans when they are prepared, --data.unprepared true prepares "
                "none: leave one of the two out, or find the faults first with launch/prepare.py --check"
            )
        if self.loss.dice_weight == self.loss.ce_weight == 0:
            raise ValueError("--loss.dice_weight 0 and --loss.ce_weight 0 leave nothing to train by: raise one of them")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain values that JSON, YAML and `torch.load(weights_only=True)` take."""
    return plain(dataclasses.asdict(config))


def to_portable_dict(config: Config) -> dict[str, Any]:
    """As `to_dict`, with paths that mean the same from any folder, and without what is about one run's folder.

    Raises:
        ValueError: a path that is not UTF-8, which no file of options takes.
    """
    values = {name: value for name, value in to_dict(config).items() if name not in ("run_dir", "resume")}
    for group, name in (("data", "root"), ("data", "store_dir"), ("train", "deepspeed")):
        if values[group][name]:
            path = str(Path(values[group][name]).resolve())
            if encodable(path) != path:
                raise ValueError(f"--{group}.{name} {encodable(path)} is not UTF-8: rename the folder")
            values[group][name] = path
    return values


def config_from_dict(values: dict[str, Any]) -> Config:
    """A configuration from what `to_dict` made of one.

    Raises:
        ValueError: options that there are not, or values that they refuse.
    """
    parser, faults = make_parser(""), list[str]()
    found = parser.read_values(parser.flatten(values, "", faults), faults)
    refuse(faults)
    return build(Config, found)


def make_parser(description: str) -> Parser:
    """The parser of the commands of `launch/` that take the fields of `Config`."""
    parser = Parser(description, "%(prog)s [--config FILE] [--group.option VALUE ...]")
    parser.add_dataclass(Config)
    return parser


def parse_config(parser: Parser, args: list[str] | None = None) -> tuple[Config, Namespace]:
    """Read a configuration.

    Args:
        parser: what `make_parser` gave, with the options that a command adds.
        args: command line; None takes the process's own.

    Returns:
        The configuration, and the parser's namespace for a command's own options.

    Raises:
        ValueError: an option that there is not, values that their options refuse or that contradict each other, a file
            that holds no options, `--resume` without a run to resume.
    """
    words = list(sys.argv[1:] if args is None else args)
    given = {each.name: each.raw for each in parser.split(words, [])}
    run_dir = find_run(given["resume"], given.get("run_dir")) if "resume" in given else None
    before = []
    if run_dir:
        before = [run_dir / "config.yaml"]
    elif not given.keys() & {"config", "data", "data.root"}:
        before = [CONFIGS / "demo.yaml"]
    namespace = parser.parse_args(words, before=before)
    config = build(Config, dict(namespace.items()))
    config.resume = config.resume if run_dir else None
    config.run_dir = run_dir or config.run_dir
    if config.run_dir is None:
        source = namespace.config[0].stem if namespace.config else "run"
        config.run_dir = Path("runs") / f"{source}-{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return config, namespace


def find_run(resume: str, run_dir: str | None) -> Path | None:
    """The run folder that `--resume` means: named itself, by `--run_dir`, or the newest in `runs/`.

    None for `auto` with a `--run_dir` that has no checkpoint yet: a job that is started again whenever it was stopped
    can always be given both.

    Args:
        resume, run_dir: the options as typed.

    Raises:
        ValueError: no run to go on with.
    """
    try:
        folder = convert(run_dir if resume == "auto" else resume, Path | None)
    except Misfit as error:
        raise ValueError(f"--resume {shown(resume)} must be {error}") from error
    if resume == "auto":
        if folder is not None and not any(folder.glob(f"checkpoints/{STATES}")):
            return None
        if folder is None:
            saved = sorted(Path("runs").glob(f"*/checkpoints/{STATES}"), key=lambda path: path.stat().st_mtime)
            folder = saved[-1].parent.parent.parent if saved else Path("runs")
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"--resume: no run with a checkpoint in {folder}; give the folder that a run wrote")
    return folder
