"""A finished run, read from its folder."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.checkpoint import states
from engine.config import Config, config_from_dict, to_dict
from engine.metrics import SCORED
from engine.reports.report import is_finished
from engine.yaml_file import read_yaml
from models import NETWORKS
from pipelines.basics.tables import read_table
from pipelines.basics.text import brief, one_line
from pipelines.basics.text_files import read_json
from pipelines.labels import REGIONS
from pipelines.layouts.names import MODALITIES

SCORES = ("mean", *REGIONS)
FILES = ("config.yaml", "metrics.json", "validation.csv", "log.csv", "report.html")

# Options that say where and how fast, not what is learned and measured; and those that `engine.reports.comparison` has
# rules of its own for.
NOT_COMPARED = {
    "data": {"root", "download", "release", "store_dir", "store_dtype", "residence", "skip_faulty", "workers",
             "prepare_on", "unprepared", "phantom"},
    "train": {"epochs", "batch_size", "accumulate_steps", "save_every_steps", "keep_checkpoints", "precision",
              "zero_stage", "deepspeed", "compile", "cuda_graph", "deterministic", "max_skipped_steps", "device",
              "seed"},
}  # fmt: skip


@dataclass(frozen=True)
class FinishedRun:
    """The results of a run.

    Attributes:
        path: its folder.
        config: its options.
        epochs: trained. history: rows of `log.csv`.
        best: scores of its best validation, as in `metrics.json`; "epoch" is None if nothing was validated.
        definition: of Dice, in words.
        cases: names of the validation cases; `example` is one of them, with every region if there is such a case.
        crops_per_step: over all ranks.
    """

    path: Path
    config: Config
    epochs: int
    history: list[dict[str, float | None]]
    best: dict[str, Any]
    definition: str
    cases: tuple[str, ...]
    example: str | None
    crops_per_step: int

    @classmethod
    def read(cls, path: Path) -> FinishedRun:
        """Read a run's folder.

        Raises:
            ValueError: the run has not finished, or the folder holds no run; a file of it can't be read.
        """
        missing = [name for name in FILES if not (path / name).is_file()]
        if not missing and not is_finished(path):
            missing = ["the end of report.html"]
        saved = states(path / "checkpoints")
        if missing or not saved:
            raise ValueError(
                f"{path} is not a finished run, it lacks {', '.join(missing) or 'checkpoints'}: if it was interrupted, "
                f"continue it with python launch/train.py --resume {path}"
            )
        try:
            return cls._read(path, saved[0])
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
            raise ValueError(
                f"{path} can't be read, a file in it is damaged or from another version of this program: {reason}; "
                f"copy it again, or rewrite its tables with python launch/train.py --resume {path}"
            ) from error

    @classmethod
    def _read(cls, path: Path, state: Path) -> FinishedRun:
        config = config_from_dict(read_yaml(path / "config.yaml"))
        metrics = _read_object(path / "metrics.json")
        scored = metrics.get("scored", "masks")  # older versions scored these, and had no option
        if scored not in SCORED:
            raise ValueError(f"metrics.json scored {scored!r}, not {' or '.join(SCORED)}")
        validated = read_table(path / "validation.csv")
        with_all_regions = [row["case"] for row in validated if all(row[region] for region in REGIONS)]
        names = tuple(row["case"] for row in validated)
        world_size = _whole_number(_read_object(state / "about.json")["world_size"], "world_size")
        history = [
            {key: float(value) if value else None for key, value in row.items()} for row in read_table(path / "log.csv")
        ]
        if not history or not {"epoch", "loss"} <= set(history[0]):
            raise ValueError("log.csv has no rows with epoch and loss")
        return cls(
            path=path,
            config=replace(config, train=replace(config.train, score=scored)),
            epochs=_whole_number(metrics["epochs"], "epochs"),
            history=history,
            best=_checked_scores(metrics["best"]),
            definition=str(metrics["definition"]),
            cases=names,
            example=next(iter([*with_all_regions, *names]), None),
            crops_per_step=config.train.batch_size * config.train.accumulate_steps * world_size,
        )

    @property
    def model(self) -> str:
        """Key of `models.NETWORKS`."""
        return self.config.model.name

    def settings(self) -> dict[str, Any]:
        """What decides what is learned and measured, by option; epochs and seed are not included."""
        found: dict[str, Any] = {}
        for group in ("data", "model", "loss", "optim", "train"):
            values, ignored = to_dict(getattr(self.config, group)), NOT_COMPARED.get(group, set())
            if group == "model":
                ignored = values.keys() - NETWORKS[self.model].widths.keys()
            found |= by_option({name: value for name, value in values.items() if name not in ignored}, f"--{group}.")
        found["--data.modalities"] = found["--data.modalities"] or list(MODALITIES)
        return found | {"crops per step": self.crops_per_step}


def by_option(values: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Nested settings by the names of their options on the command line."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= by_option(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _read_object(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is {brief(values)}, and must be an object")
    return values


def _whole_number(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} {brief(value)} must be a whole number of at least 1")
    return value


def _checked_scores(best: Any) -> dict[str, Any]:
    if best["epoch"] is not None:
        _whole_number(best["epoch"], "best epoch")
    for name in SCORES:
        value = best.get(name)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"best {name} {brief(value)} must be a Dice or null")
    return best
