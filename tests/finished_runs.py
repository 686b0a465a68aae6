"""Folders of finished runs with made-up tables, for the files that read and compare them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from engine.config import CONFIGS, Config, config_from_dict, to_dict
from engine.reports.comparison import FinishedRun
from engine.reports.report import END

DEFINITION = "Dice per case and region"


def settings(name: str, **changes: Any) -> Config:
    """The options of a file in `launch/configs`; changes as model_name="unet"."""
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    for key, value in changes.items():
        group, option = key.split("_", 1)
        values.setdefault(group, {})[option] = value
    return config_from_dict(values)


def write_run(folder: Path, config: Config, mean: float = 0.5, epochs: int = 3, cases: int = 2, ranks: int = 1) -> Path:
    """A folder as a finished run leaves it, without weights."""
    state = folder / "checkpoints" / "step-00000001-validated"
    state.mkdir(parents=True)
    (state / "about.json").write_text(json.dumps({"world_size": ranks}))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config) | {"run_dir": None, "resume": None}))
    scores = {"mean": mean, "TC": mean, "WT": mean + 0.1, "ET": None}
    best = {"epoch": 2, **scores, "cases": cases}
    metrics = {"definition": DEFINITION, "scored": config.train.score, "epochs": epochs, "best": best}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    history = [{"epoch": e, "loss": 2 / e, "val_mean": mean if e > 1 else ""} for e in range(1, epochs + 1)]
    for name, rows in (("log.csv", history), ("validation.csv", [case_row(i) for i in range(cases)])):
        with open(folder / name, "w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
    (folder / "report.html").write_text(f"<p>a page</p>{END}")
    return folder


def read_run(folder: Path, config: Config, **results: Any) -> FinishedRun:
    """The run that `write_run` writes."""
    return FinishedRun.read(write_run(folder, config, **results))


def case_row(number: int) -> dict[str, Any]:
    return {"case": f"case{number}", "TC": 0.5, "WT": 0.6, "ET": 0.4 if number else ""}
