"""The tables of a run: by epoch, by case, and the summary."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.metrics import CaseDice
from pipelines.basics.atomic import make_subfolder, write_texts
from pipelines.basics.lazy import Lazy
from pipelines.basics.tables import table_text, write_table
from pipelines.layouts.labels import REGIONS

tensorboard = Lazy("torch.utils.tensorboard")
log = logging.getLogger(__name__)


class EpochLog:
    """`log.csv` with a row per epoch, and the same as TensorBoard scalars.

    Args:
        run_dir: of the run. done_steps: of a resumed run; TensorBoard drops its records of later steps.
    """

    def __init__(self, run_dir: Path, done_steps: int) -> None:
        self.run_dir = run_dir
        self.folder = make_subfolder(run_dir, "tensorboard")
        self.writer: Any = None
        with self._until_the_disk_is_full():
            self.writer = tensorboard.SummaryWriter(str(self.folder), purge_step=done_steps + 1)

    def write(self, history: list[dict[str, Any]]) -> None:
        """Call after an epoch, whose row is the last of `history`."""
        row = history[-1]
        with self._until_the_disk_is_full() as writer:
            for name, value in row.items():
                if writer and name not in ("epoch", "step") and value is not None:
                    writer.add_scalar(name.replace("val_", "val/"), value, row["step"])
            if writer:
                writer.flush()
        write_log(self.run_dir, history)

    def close(self) -> None:
        """Call at the end of the run."""
        with self._until_the_disk_is_full() as writer:
            if writer:
                writer.close()

    @contextlib.contextmanager
    def _until_the_disk_is_full(self) -> Iterator[Any]:
        """TensorBoard's writer, or None: a full disk stops its records, not the run."""
        try:
            yield self.writer
        except OSError as error:
            self.writer = None
            log.warning("%s can't be written (%s): the run continues without it; log.csv has the same numbers",
                        self.folder, error.strerror or error)  # fmt: skip


def write_log(run_dir: Path, history: list[dict[str, Any]]) -> None:
    """`log.csv` with a row per epoch."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    write_table(run_dir / "log.csv", columns, history)


def write_validation(run_dir: Path, cases: list[CaseDice], summary: dict[str, Any]) -> None:
    """`validation.csv` with a row per case of the last validation, and `metrics.json`: both, or neither."""
    columns = ["case", *REGIONS, *(f"{region}_voxels" for region in REGIONS)]
    rows = []
    for case in cases:
        dice = ["" if math.isnan(value) else f"{value:.4f}" for value in case.dice()]
        rows.append(dict(zip(columns, [case.name, *dice, *case.truth], strict=True)))
    write_texts({
        run_dir / "validation.csv": table_text(columns, rows),
        run_dir / "metrics.json": json.dumps(summary, indent=2) + "\n",
    })  # fmt: skip
