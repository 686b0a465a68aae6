"""Finished runs beside each other, and beside the published figures.

    table.md         model, epochs, mean Dice, Dice of the regions; below it what the numbers are and what they are not
    comparison.json  the same

`engine.reports.comparison_pictures` draws them.

Runs of one model with several seeds share a row: mean and sample standard deviation. The published figures stand beside
ours only where the runs are the published experiment (`launch/configs/seed.yaml` on Decathlon Task01); where they are
not, every condition that is not met is named.
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

from engine.checkpoint import states
from engine.config import CONFIGS, Config, config_from_dict, to_dict
from engine.metrics import SCORED
from engine.progress import percent
from engine.reports.report import is_whole
from engine.yaml_file import read_yaml
from models import NETWORKS
from pipelines.basics.atomic import write_texts
from pipelines.basics.tables import read_table
from pipelines.basics.text import brief, markdown, one_line
from pipelines.basics.text_files import read_json
from pipelines.labels import REGIONS
from pipelines.layouts.names import MODALITIES

SCORES = ("mean", *REGIONS)


PUBLISHED = {name: network.published for name, network in sorted(NETWORKS.items()) if network.published}
VALIDATION_CASES = "validation cases"
TASK01_NAME, TASK01_CASES, TASK01_VALIDATION_CASES = "BRATS", 484, 96
PUBLISHED_CROPS_PER_STEP = 2
FILES = ("config.yaml", "metrics.json", "validation.csv", "log.csv", "report.html")

# Options that say where and how fast, not what is learned and measured; and those with a rule of their own.
OTHERS = {
    "data": {"root", "download", "release", "store_dir", "store_dtype", "residence", "skip_faulty", "workers",
             "prepare_on", "unprepared", "phantom"},
    "train": {"epochs", "batch_size", "accumulate_steps", "save_every_steps", "keep_checkpoints", "precision",
              "zero_stage", "deepspeed", "compile", "cuda_graph", "deterministic", "max_skipped_steps", "device",
              "seed"},
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a finished run left.

    Attributes:
        path: its folder.
        config: its options.
        epochs: trained. history: rows of `log.csv`.
        best: scores of its best validation, as in `metrics.json`; "epoch" is None where nothing was validated.
        definition: of Dice, in words.
        cases: names of the validation cases; `example` is one of them, with every region where there is such a case.
        crops_per_step: of all ranks.
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
    def read(cls, path: Path) -> Run:
        """From a run's folder.

        Raises:
            ValueError: the run has not finished, or is none; a file of it can't be read.
        """
        missing = [name for name in FILES if not (path / name).is_file()]
        if not missing and not is_finished(path):
            missing = ["whole report.html"]
        saved = states(path / "checkpoints")
        if missing or not saved:
            lacks = ", ".join(missing) or "checkpoints"
            raise ValueError(
                f"{path} is no finished run, it has no {lacks}: one that was interrupted goes on by "
                f"python launch/train.py --resume {path}"
            )
        try:
            return cls._read(path, saved[0])
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)
            raise ValueError(
                f"{path} can't be read, a file in it is damaged or of another version of this program: {reason}; copy "
                f"it again, or write its tables once more by python launch/train.py --resume {path}"
            ) from error

    @classmethod
    def _read(cls, path: Path, state: Path) -> Run:
        config = config_from_dict(read_yaml(path / "config.yaml"))
        metrics = _read_json(path / "metrics.json")
        scored = metrics.get("scored", "masks")  # older versions scored these, and had no option
        if scored not in SCORED:
            raise ValueError(f"metrics.json scored {scored!r}, not {' or '.join(SCORED)}")
        config = replace(config, train=replace(config.train, score=scored))
        validated = read_table(path / "validation.csv")
        whole = [row["case"] for row in validated if all(row[region] for region in REGIONS)]
        names = tuple(row["case"] for row in validated)
        world_size = _whole_number(_read_json(state / "about.json")["world_size"], "world_size")
        crops = config.train.batch_size * config.train.accumulate_steps * world_size
        history = [
            {key: float(value) if value else None for key, value in row.items()} for row in read_table(path / "log.csv")
        ]
        if not history or not {"epoch", "loss"} <= set(history[0]):
            raise ValueError("log.csv has no rows with epoch and loss")
        example = next(iter([*whole, *names]), None)
        epochs = _whole_number(metrics["epochs"], "epochs")
        return cls(
            path, config, epochs, history, _scores(metrics["best"]), str(metrics["definition"]), names, example, crops
        )

    @property
    def model(self) -> str:
        """Key of `NETWORKS`."""
        return self.config.model.name

    def settings(self) -> dict[str, Any]:
        """What decides what is learned and measured, by the name of its option; epochs and seed are not in it."""
        found: dict[str, Any] = {}
        for group in ("data", "model", "loss", "optim", "train"):
            values = to_dict(getattr(self.config, group))
            left_out = OTHERS.get(group, set())
            if group == "model":
                left_out = values.keys() - NETWORKS[self.model].widths.keys()
            found |= by_option({name: value for name, value in values.items() if name not in left_out}, f"--{group}.")
        found["--data.modalities"] = found["--data.modalities"] or list(MODALITIES)
        return found | {"crops of a step": self.crops_per_step}


def _read_json(path: Path) -> dict[str, Any]:
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path.name} is {brief(values)}, and must be an object")
    return values


def _whole_number(value: Any, name: str) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} {brief(value)} must be a whole number of at least 1")
    return value


def _scores(best: Any) -> dict[str, Any]:
    """The best validation, as `metrics.json` has it, with its values checked."""
    epoch = best["epoch"]
    if epoch is not None:
        _whole_number(epoch, "best epoch")
    for name in SCORES:
        value = best.get(name)
        if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
            raise ValueError(f"best {name} {brief(value)} must be a Dice or null")
    return best


def by_option(values: dict[str, Any], prefix: str = "--") -> dict[str, Any]:
    """Values of nested settings by the names that options have on the command line."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= by_option(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def is_finished(run_dir: Path) -> bool:
    """Whether a run came to its end; its report is what it writes last, and must be whole."""
    return is_whole(run_dir / "report.html")


# Conditions


@cache
def _published_settings() -> dict[str, Any]:
    config = config_from_dict(read_yaml(CONFIGS / "seed.yaml"))
    one = Run(Path(), config, 0, [], {}, "", (), None, PUBLISHED_CROPS_PER_STEP)
    return one.settings()


def unmet_conditions(run: Run) -> list[str]:
    """What keeps a run from being compared with the published figures, in words."""
    published = _published_settings()
    unmet = [
        f"{name} {value}, published {published[name]}"
        for name, value in run.settings().items()
        if value != published.get(name, value)
    ]
    figures = PUBLISHED.get(run.model)
    if figures is None:
        unmet.append("no figures are published")
    elif run.epochs != figures.epochs:
        unmet.append(f"{run.epochs} epochs, published {figures.epochs}")
    return [*_not_task01(run), *unmet]


def _not_task01(run: Run) -> list[str]:
    root = run.config.data.root
    if root is None:
        return ["the scans are synthetic, not Decathlon Task01"]
    try:
        about = json.loads((root / "dataset.json").read_text())
        name, cases = about["name"], len(about["training"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{root} is not Decathlon Task01: it has no dataset.json that says so"]
    if (name, cases) != (TASK01_NAME, TASK01_CASES):
        return [f"{root} is not Decathlon Task01: {cases} cases of {name}, not {TASK01_CASES} of {TASK01_NAME}"]
    if len(run.cases) != TASK01_VALIDATION_CASES:
        return [f"{len(run.cases)} validation cases, published {TASK01_VALIDATION_CASES}"]
    return []


def differences(runs: Sequence[Run]) -> list[str]:
    """In what the runs differ beside model, epochs and seed: names of options, and what else."""
    found: dict[str, Any] = {}  # values by name; not every network has every width
    for run in runs:
        data = run.config.data
        more = {"--data.root": data.root, "--data.release": data.release, "--data.phantom": data.phantom,
                "--train.precision": run.config.train.precision, VALIDATION_CASES: run.cases}  # fmt: skip
        for name, value in (run.settings() | more).items():
            found.setdefault(name, []).append(value)
    return [name for name, values in sorted(found.items()) if any(value != values[0] for value in values)]


# Table


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        dice: by score, of each run in the order of `runs`; None where no truth has the region.
        unmet: as `unmet_conditions` says, of all runs.
    """

    model: str
    runs: tuple[Run, ...]
    dice: dict[str, tuple[float | None, ...]]
    unmet: tuple[str, ...]

    def cell(self, score: str) -> str:
        """Mean and, of several seeds, spread, in percent."""
        values = [value for value in self.dice[score] if value is not None]
        if len(values) < 2:
            return percent(values[0] if values else None)
        return f"{percent(statistics.mean(values))} ± {percent(statistics.stdev(values))}"


def make_rows(runs: Sequence[Run]) -> list[Row]:
    """A row for each model, in the order of their names.

    Raises:
        ValueError: two runs of one model with the same seed.
    """
    rows = []
    for model in sorted(NETWORKS):
        of_model = tuple(sorted((run for run in runs if run.model == model), key=lambda run: run.config.train.seed))
        for one, two in zip(of_model, of_model[1:]):
            if one.config.train.seed == two.config.train.seed:
                raise ValueError(
                    f"{one.path} and {two.path} are both {model} with --train.seed {one.config.train.seed}: a model's "
                    "row is the mean over seeds, so leave one of them out"
                )
        if of_model:
            dice = {score: tuple(run.best.get(score) for run in of_model) for score in SCORES}
            unmet = tuple(dict.fromkeys(reason for run in of_model for reason in unmet_conditions(run)))
            rows.append(Row(model, of_model, dice, unmet))
    return rows


HEAD = ("model", "epochs", "best epoch", "mean Dice", *REGIONS, "published")


def table_cells(rows: Sequence[Row]) -> list[list[str]]:
    """A line of `HEAD` for each row."""
    cells = []
    for row in rows:
        epochs, best = ([run.epochs for run in row.runs], [run.best["epoch"] for run in row.runs])
        cells.append([
            NETWORKS[row.model].title,
            _joined(epochs),
            _joined(best),
            *(row.cell(score) for score in SCORES),
            "not comparable" if row.unmet else percent(PUBLISHED[row.model].dice),
        ])  # fmt: skip
    return cells


def _joined(values: Sequence[int | None]) -> str:
    return ", ".join(dict.fromkeys("n/a" if value is None else str(value) for value in values))


def notes(rows: Sequence[Row]) -> list[str]:
    """What stands under the table: what the numbers are, what they may be compared with, in what the runs differ."""
    runs = [run for row in rows for run in row.runs]
    validated_on = " and ".join(dict.fromkeys(run.config.train.validation.replace("_", " ") for run in runs))
    definitions = "; or: ".join(dict.fromkeys(run.definition for run in runs))
    lines = [f"Dice (%) at each run's best validation, on {validated_on}. {definitions}."]
    counts = {len(row.runs) for row in rows}
    if max(counts) > 1:
        lines.append(f"± is the sample standard deviation over {' or '.join(map(str, sorted(counts)))} seeds.")
    published = [f"{percent(PUBLISHED[row.model].dice)} ({NETWORKS[row.model].title})" for row in rows
                 if row.model in PUBLISHED]  # fmt: skip
    if any(not row.unmet for row in rows):
        lines.append(
            "Published: best mean Dice, averaged by MONAI's DiceMetric, which weighs cases otherwise where truths lack "
            "a region."
        )
    if any(row.unmet for row in rows):
        lines.append(f"Not comparable with the published {' / '.join(published) or 'figures'}:")
        reasons = dict.fromkeys(reason for row in rows for reason in row.unmet)
        for reason in reasons:
            where = [row for row in rows if reason in row.unmet]
            who = "" if len(where) == len(rows) else ", ".join(NETWORKS[row.model].title for row in where) + ": "
            lines.append(f"- {who}{reason}")
    differing = differences(runs)
    if differing:
        lines.append(f"The runs differ from each other in: {', '.join(differing)}.")
    return lines


def write_table(rows: Sequence[Row], folder: Path) -> None:
    """`table.md` and `comparison.json`."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *table_cells(rows))]
    said = notes(rows)
    below = "\n\n".join(map(markdown, said)).replace("\n\n- ", "\n- ")
    content = {"rows": [_plain(row) for row in rows], "notes": said}
    write_texts({
        folder / "table.md": "\n".join([*lines, "", below, ""]),
        folder / "comparison.json": json.dumps(content, indent=2) + "\n",
    })  # fmt: skip


def _plain(row: Row) -> dict[str, Any]:
    known = {score: [value for value in values if value is not None] for score, values in row.dice.items()}
    return {
        "model": row.model,
        "runs": [str(run.path) for run in row.runs],
        "seeds": [run.config.train.seed for run in row.runs],
        "epochs": [run.epochs for run in row.runs],
        "best_epochs": [run.best["epoch"] for run in row.runs],
        "dice": row.dice,
        "mean": {score: statistics.mean(values) if values else None for score, values in known.items()},
        "spread": {score: statistics.stdev(values) if len(values) > 1 else None for score, values in known.items()},
        "published": PUBLISHED[row.model].dice if row.model in PUBLISHED else None,
        "not_comparable_because": list(row.unmet),
    }
