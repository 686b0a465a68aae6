"""The tables that a run leaves: by epoch, by case, and what they come to."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from engine.metrics import CaseDice
from pipelines.basics.atomic import own_folder, write_texts
from pipelines.basics.tables import table_text, write_table
from pipelines.labels import REGIONS

log = logging.getLogger(__name__)


class EpochLog:
    """`log.csv` with a row for each epoch, and the same as TensorBoard scalars.

    Args:
        run_dir: of the run. done_steps: of a run that goes on; what TensorBoard has of later ones is dropped.
    """

    def __init__(self, run_dir: Path, done_steps: int) -> None:
        self.run_dir = run_dir
        self.folder = own_folder(run_dir, "tensorboard")
        self.writer: SummaryWriter | None = None
        with self._failures_told():
            self.writer = SummaryWriter(str(self.folder), purge_step=done_steps + 1)

    def write(self, history: list[dict[str, Any]]) -> None:
        """After an epoch: its row is the last of `history`."""
        row = history[-1]
        if self.writer:
            with self._failures_told():
                for name, value in row.items():
                    if name not in ("epoch", "step") and value is not None:
                        self.writer.add_scalar(name.replace("val_", "val/"), value, row["step"])
                self.writer.flush()
        write_log(self.run_dir, history)

    def close(self) -> None:
        """At the end of the run."""
        if self.writer:
            with self._failures_told():
                self.writer.close()

    @contextlib.contextmanager
    def _failures_told(self) -> Iterator[None]:
        """A full disk ends TensorBoard's part and not the run."""
        try:
            yield
        except OSError as error:
            self.writer = None
            log.warning("%s can't be written (%s): the run goes on without it; log.csv has the same numbers",
                        self.folder, error.strerror or error)  # fmt: skip


def write_log(run_dir: Path, history: list[dict[str, Any]]) -> None:
    """`log.csv` with a row for each epoch."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    write_table(run_dir / "log.csv", columns, history)


def write_validation(run_dir: Path, cases: list[CaseDice], summary: dict[str, Any]) -> None:
    """`validation.csv` by case (of the last validation), `metrics.json`: both, or neither."""
    columns = ["case", *REGIONS, *(f"{region}_voxels" for region in REGIONS)]
    rows = []
    for case in cases:
        dice = ["" if math.isnan(value) else f"{value:.4f}" for value in case.dice()]
        rows.append(dict(zip(columns, [case.name, *dice, *case.truth], strict=True)))
    write_texts({
        run_dir / "validation.csv": table_text(columns, rows),
        run_dir / "metrics.json": json.dumps(summary, indent=2) + "\n",
    })  # fmt: skip
