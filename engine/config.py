"""The one configuration of a run, and how it is read.

Each group of options is a dataclass beside the code that uses it; every field carries its help, and every number its
bounds. A later source overrides an earlier one: the defaults, the YAML files of `--config`, the command line. The
defaults are the right recipe for BraTS (as in `launch/configs/brats.yaml`); with neither `--config` nor `--data.root`
the demo runs (`launch/configs/demo.yaml`), so that `launch/train.py` alone has something to show. Names carry their
units (`spacing_mm`, `crop_size_voxels`).
"""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from engine.checkpoint import STATES
from engine.data import DataConfig
from engine.network import ModelConfig
from engine.optim import OptimConfig
from engine.parser import Parser, build
from engine.step import LossConfig, TrainConfig
from kernels.dispatch import Kernels
from pipelines.basics.option_values import Misfit, as_typed, check_fields, convert, raise_faults, to_builtins
from pipelines.basics.text import encodable
from pipelines.layouts.cases import check_folds

CONFIGS = Path(__file__).resolve().parent.parent / "launch" / "configs"


@dataclass
class Config:
    """Everything that defines a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: Kernels = "auto"
    """Attention, instance norm and loss by fused Triton kernels or plain PyTorch; auto: the faster one that works."""
    run_dir: Path | None = None
    """Folder of logs, checkpoints and pictures. None: `runs/<config>-<model>-<time>`."""
    resume: str | None = field(default=None, metadata={"bare": "auto"})
    """Resume a run: its folder. Alone or `auto`: `run_dir`, which starts if it has no checkpoint yet, or else the
    newest run in `runs/`."""

    def __post_init__(self) -> None:
        """Refuse what is known to be wrong before any work is done."""
        check_fields(self, "--")
        check_folds(self.data.folds, self.data.fold, self.data.train_cases, self.data.val_cases)
        if self.data.download and self.data.root is None:
            raise ValueError("--data.download needs --data.root, the folder to download to")
        if self.data.unprepared and self.data.skip_faulty:
            raise ValueError(
                "--data.skip_faulty true finds faulty scans by preparing them, which --data.unprepared true does not "
                "do: omit one of the two, or find faulty scans first with launch/prepare.py --check"
            )
        if self.loss.dice_weight == self.loss.ce_weight == 0:
            raise ValueError("--loss.dice_weight 0 and --loss.ce_weight 0 leave no loss: raise one of them")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain values that JSON, YAML and `torch.load(weights_only=True)` take."""
    return to_builtins(dataclasses.asdict(config))


def without_place(config: Config) -> dict[str, Any]:
    """As `to_dict`, without `run_dir` and `resume`, which say where a run is and not what it does."""
    return {name: value for name, value in to_dict(config).items() if name not in ("run_dir", "resume")}


def to_portable_dict(config: Config) -> dict[str, Any]:
    """As `without_place`, with absolute paths.

    Raises:
        ValueError: a path that is not UTF-8, which YAML can't hold.
    """
    values = without_place(config)
    for group, name in (("data", "root"), ("data", "store_dir"), ("train", "deepspeed")):
        if values[group][name]:
            path = values[group][name] = str(Path(values[group][name]).resolve())
            if encodable(path) != path:
                raise ValueError(f"--{group}.{name} {encodable(path)} is not UTF-8: rename the folder")
    return values


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`.

    Raises:
        ValueError: unknown options, or values that they refuse.
    """
    parser, faults = make_parser(""), list[str]()
    found = parser.read_values(parser.flatten(values, "", faults), faults)
    raise_faults(faults)
    return build(Config, found)


def make_parser(description: str) -> Parser:
    """The parser of the commands of `launch/` that take the fields of `Config`."""
    parser = Parser(description, "%(prog)s [--config FILE] [--group.option VALUE ...]")
    parser.add_dataclass(Config)
    return parser


def parse_config(parser: Parser, args: list[str] | None = None) -> tuple[Config, Namespace]:
    """Read a configuration.

    Args:
        parser: from `make_parser`, with the options that a command adds. args: command line; None: the process's own.

    Returns:
        The configuration, and the parser's namespace for a command's own options.

    Raises:
        ValueError: an unknown option, wrong or contradicting values, a file without options, `--resume` without a run
            to resume.
    """
    words = list(sys.argv[1:] if args is None else args)
    given = {each.name: each.raw for each in parser.split(words, [])}
    run_dir = find_run(given["resume"], given.get("run_dir")) if "resume" in given else None
    is_demo = not given.keys() & {"config", "data", "data.root"}
    before = [run_dir / "config.yaml"] if run_dir else [CONFIGS / "demo.yaml"] if is_demo else []
    namespace = parser.parse_args(words, before=before)
    config = build(Config, dict(namespace.items()))
    config.resume = config.resume if run_dir else None
    config.run_dir = run_dir or config.run_dir
    if config.run_dir is None:
        source = namespace.config[0].stem if namespace.config else "run"
        config.run_dir = Path("runs") / f"{source}-{config.model.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return config, namespace


def find_run(resume: str, run_dir: str | None) -> Path | None:
    """The run folder that `--resume` means (options as typed): the one it names, `--run_dir`, or the newest in `runs/`.

    None for `auto` with a `--run_dir` that has no checkpoint yet, so that a job that a scheduler restarts can always
    give both. Raises ValueError if there is no run to resume.
    """
    try:
        folder = convert(run_dir if resume == "auto" else resume, Path | None)
    except Misfit as error:
        raise ValueError(f"--resume {as_typed(resume)} must be {error}") from error
    if resume == "auto" and folder is None:
        saved = sorted(Path("runs").glob(f"*/checkpoints/{STATES}"), key=lambda path: path.stat().st_mtime)
        folder = saved[-1].parents[2] if saved else Path("runs")
    elif resume == "auto" and not any(folder.glob(f"checkpoints/{STATES}")):
        return None
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"--resume: no run with a checkpoint in {folder}; give the folder that a run wrote")
    return folder
