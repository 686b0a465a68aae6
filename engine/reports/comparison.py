"""Finished runs, read from their folders, compared with each other and with the published figures.

    table.md         model, epochs, mean Dice, Dice of the regions; below it what the numbers mean and what they don't
    comparison.json  the same

`engine.reports.comparison_pictures` draws them.

Runs of one model with several seeds share a row: mean and sample standard deviation. The published figures are given
only if the runs are the published experiment (`launch/configs/seed.yaml` on Decathlon Task01); otherwise every
condition that is not met is named.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from engine.checkpoint import recorded_config, states
from engine.config import CONFIGS, Config, config_from_dict, to_dict
from engine.metrics import SCORED
from engine.parser import read_yaml
from engine.reports.report import is_finished
from models import NETWORKS, Network
from pipelines.basics.atomic import write_texts
from pipelines.basics.input_files import read_json
from pipelines.basics.tables import markdown_table, percent, read_table
from pipelines.basics.text import brief, markdown, one_line
from pipelines.layouts.labels import REGIONS
from pipelines.layouts.names import MODALITIES

SCORES = ("mean", *REGIONS)
HEAD = ("model", "epochs", "best epoch", "mean Dice", *REGIONS, "published")
FILES = ("config.yaml", "metrics.json", "validation.csv", "log.csv", "report.html")
VALIDATION_CASES = "validation cases"
TASK01_NAME, TASK01_CASES, TASK01_VALIDATION_CASES = "BRATS", 484, 96
PUBLISHED_CROPS_PER_STEP = 2

# Options that say where and how fast, not what is learned and measured; and those with rules of their own below.
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
        path: its folder. config: its options, with the precision that it took. epochs: trained.
        history: rows of `log.csv`.
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
        cases = tuple(row["case"] for row in validated)
        world_size = _whole_number(_read_object(state / "about.json")["world_size"], "world_size")
        taken = recorded_config(path / "checkpoints") or {}  # with a precision in place of auto
        precision = taken.get("train", {}).get("precision", config.train.precision)
        history = [
            {key: float(value) if value else None for key, value in row.items()} for row in read_table(path / "log.csv")
        ]
        if not history or not {"epoch", "loss"} <= set(history[0]):
            raise ValueError("log.csv has no rows with epoch and loss")
        return cls(
            path=path,
            config=replace(config, train=replace(config.train, score=scored, precision=precision)),
            epochs=_whole_number(metrics["epochs"], "epochs"),
            history=history,
            best=_checked_scores(metrics["best"]),
            definition=str(metrics["definition"]),
            cases=cases,
            example=next(iter([*with_all_regions, *cases]), None),
            crops_per_step=config.train.batch_size * config.train.accumulate_steps * world_size,
        )

    @property
    def model(self) -> str:
        """Key of `models.NETWORKS`."""
        return self.config.model.name

    def settings(self) -> dict[str, Any]:
        """What decides what is learned and measured, by option; epochs and seed are not included."""
        ignored = NOT_COMPARED | {"model": to_dict(self.config.model).keys() - NETWORKS[self.model].widths.keys()}
        found: dict[str, Any] = {}
        for group in ("data", "model", "loss", "optim", "train"):
            values = to_dict(getattr(self.config, group))
            kept = {name: value for name, value in values.items() if name not in ignored.get(group, ())}
            found |= by_option(kept, f"--{group}.")
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


@cache
def _published_settings() -> dict[str, Any]:
    config = config_from_dict(read_yaml(CONFIGS / "seed.yaml"))
    return FinishedRun(Path(), config, 0, [], {}, "", (), None, PUBLISHED_CROPS_PER_STEP).settings()


def unmet_conditions(run: FinishedRun) -> list[str]:
    """Why a run can't be compared with the published figures: each condition that it does not meet."""
    published = _published_settings()
    unmet = _unmet_by_data(run) + [
        f"{name} {value}, published {published[name]}"
        for name, value in run.settings().items()
        if value != published.get(name, value)
    ]
    figures = NETWORKS[run.model].published
    if figures is None:
        unmet.append("no figures are published")
    elif run.epochs != figures.epochs:
        unmet.append(f"{run.epochs} epochs, published {figures.epochs}")
    return unmet


def _unmet_by_data(run: FinishedRun) -> list[str]:
    root = run.config.data.root
    if root is None:
        return ["the scans are synthetic, not Decathlon Task01"]
    try:
        about = read_json(root / "dataset.json")
        name, cases = about["name"], len(about["training"])
    except (ValueError, KeyError, TypeError):
        return [f"{root} is not Decathlon Task01: its dataset.json is missing or damaged"]
    if (name, cases) != (TASK01_NAME, TASK01_CASES):
        return [f"{root} is not Decathlon Task01: {cases} cases of {name}, not {TASK01_CASES} of {TASK01_NAME}"]
    if len(run.cases) != TASK01_VALIDATION_CASES:
        return [f"{len(run.cases)} validation cases, published {TASK01_VALIDATION_CASES}"]
    return []


def differing_settings(runs: Sequence[FinishedRun]) -> list[str]:
    """Names of the options in which the runs differ, model, epochs and seed aside; also `VALIDATION_CASES`."""
    found: dict[str, list[Any]] = {}  # values by name; not every network has every width
    for run in runs:
        data = run.config.data
        more = {"--data.root": data.root, "--data.release": data.release, "--data.phantom": data.phantom,
                "--train.precision": run.config.train.precision, VALIDATION_CASES: run.cases}  # fmt: skip
        for name, value in (run.settings() | more).items():
            found.setdefault(name, []).append(value)
    return [name for name, values in sorted(found.items()) if any(value != values[0] for value in values)]


@dataclass(frozen=True)
class ComparisonRow:
    """All runs of one model, in order of their seeds, and the `unmet_conditions` of all of them."""

    model: str
    runs: tuple[FinishedRun, ...]
    unmet: tuple[str, ...]

    @property
    def network(self) -> Network:
        """The model's entry in `models.NETWORKS`."""
        return NETWORKS[self.model]

    @property
    def published(self) -> float | None:
        """Mean Dice."""
        return self.network.published.dice if self.network.published else None

    def scores(self, name: str) -> list[float]:
        """A Dice ("mean" or a region) of each run, without runs where no truth has the region."""
        return [run.best[name] for run in self.runs if run.best.get(name) is not None]

    def cell(self, name: str) -> str:
        """Mean and, over several seeds, standard deviation of a Dice in percent."""
        scores = self.scores(name)
        if len(scores) < 2:
            return percent(scores[0] if scores else None)
        return f"{percent(statistics.mean(scores))} ± {percent(statistics.stdev(scores))}"

    def cells(self) -> list[str]:
        """The row as text, below `HEAD`."""
        return [
            self.network.title,
            _joined([run.epochs for run in self.runs]),
            _joined([run.best["epoch"] for run in self.runs]),
            *map(self.cell, SCORES),
            "not comparable" if self.unmet else percent(self.published),
        ]

    def as_json(self) -> dict[str, Any]:
        """The row for `comparison.json`."""
        scores = {name: self.scores(name) for name in SCORES}
        return {
            "model": self.model,
            "runs": [str(run.path) for run in self.runs],
            "seeds": [run.config.train.seed for run in self.runs],
            "epochs": [run.epochs for run in self.runs],
            "best_epochs": [run.best["epoch"] for run in self.runs],
            "dice": {name: [run.best.get(name) for run in self.runs] for name in SCORES},
            "mean": {name: statistics.mean(values) if values else None for name, values in scores.items()},
            "spread": {name: statistics.stdev(values) if len(values) > 1 else None for name, values in scores.items()},
            "published": self.published,
            "not_comparable_because": list(self.unmet),
        }


def _joined(values: Sequence[int | None]) -> str:
    return ", ".join(dict.fromkeys("n/a" if value is None else str(value) for value in values))


def make_rows(runs: Sequence[FinishedRun]) -> list[ComparisonRow]:
    """A row for each model, in the order of their names.

    Raises:
        ValueError: two runs of one model with the same seed.
    """
    rows = []
    for model in sorted({run.model for run in runs}):
        of_model = sorted((run for run in runs if run.model == model), key=lambda run: run.config.train.seed)
        for one, two in zip(of_model, of_model[1:]):
            if one.config.train.seed == two.config.train.seed:
                raise ValueError(
                    f"{one.path} and {two.path} are both {model} with --train.seed {one.config.train.seed}: a model's "
                    "row is the mean over seeds, so omit one of them"
                )
        unmet = dict.fromkeys(reason for run in of_model for reason in unmet_conditions(run))
        rows.append(ComparisonRow(model, tuple(of_model), tuple(unmet)))
    return rows


def table_notes(rows: Sequence[ComparisonRow]) -> list[str]:
    """The lines below the table: what the numbers mean, what they may be compared with, how the runs differ."""
    runs = [run for row in rows for run in row.runs]
    validated_on = " and ".join(dict.fromkeys(run.config.train.validation.replace("_", " ") for run in runs))
    definitions = "; or: ".join(dict.fromkeys(run.definition for run in runs))
    lines = [f"Dice (%) at each run's best validation, on {validated_on}. {definitions}."]
    counts = {len(row.runs) for row in rows}
    if max(counts) > 1:
        lines.append(f"± is the sample standard deviation over {' or '.join(map(str, sorted(counts)))} seeds.")
    if any(not row.unmet for row in rows):
        lines.append(
            "Published: best mean Dice as averaged by MONAI's DiceMetric, which weights cases differently when a truth "
            "lacks a region."
        )
    if any(row.unmet for row in rows):
        published = [f"{percent(row.published)} ({row.network.title})" for row in rows if row.published]
        lines.append(f"Not comparable with the published {' / '.join(published) or 'figures'}:")
        for reason in dict.fromkeys(reason for row in rows for reason in row.unmet):
            titles = [row.network.title for row in rows if reason in row.unmet]
            lines.append(f"- {'' if len(titles) == len(rows) else ', '.join(titles) + ': '}{reason}")
    differing = differing_settings(runs)
    if differing:
        lines.append(f"The runs differ from each other in: {', '.join(differing)}.")
    return lines


def write_table(rows: Sequence[ComparisonRow], folder: Path) -> None:
    """`table.md` and `comparison.json`."""
    notes = table_notes(rows)
    below = "\n\n".join(map(markdown, notes)).replace("\n\n- ", "\n- ")
    content = {"rows": [row.as_json() for row in rows], "notes": notes}
    write_texts({
        folder / "table.md": f"{markdown_table(HEAD, [row.cells() for row in rows])}\n\n{below}\n",
        folder / "comparison.json": json.dumps(content, indent=2) + "\n",
    })  # fmt: skip
