"""The progress of a run: a bar on a terminal, lines in the log elsewhere, and the numbers that they show.

No step waits for them: losses are summed over an epoch on the device, and read a step late.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from engine.ranks.distributed import Ranks
from engine.step import StepValues
from pipelines.basics.lazy import Lazy
from pipelines.basics.tables import percent
from pipelines.layouts.labels import REGIONS

rich_console, progress = Lazy("rich.console"), Lazy("rich.progress")
log = logging.getLogger(__name__)
SECONDS_BETWEEN_LINES = 60.0
SKIPPED = 4  # where `EpochSums.values` has the skipped steps
T = TypeVar("T")


class DataWait:
    """Time the device spent without a batch to work on.

    On a GPU the host runs ahead, so its own waiting says nothing. Two events on the stream do, one after a step and one
    before the next: the time between them went into waiting for the batch and copying it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.waits: list[tuple[Any, Any]] = []  # from, to

    def over(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches; the wait for each is timed."""
        while True:
            before = self._now()
            batch = next(batches, None)
            if batch is None:
                return
            self.waits.append((before, self._now()))
            yield batch

    def seconds(self) -> float:
        """Total so far; on a GPU this waits for the steps in flight."""
        if self.device.type != "cuda":
            return sum(after - before for before, after in self.waits)
        torch.cuda.synchronize(self.device)
        return sum(before.elapsed_time(after) for before, after in self.waits) / 1e3

    def _now(self) -> Any:
        """The time in seconds, or an event on a GPU's stream."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class TrainingProgress:
    """Steps, loss, samples/s and time left; a context manager.

    Args:
        total_steps: of the whole run. done_steps: before this process began. is_shown: False on all ranks but one.
    """

    def __init__(self, total_steps: int, done_steps: int, is_shown: bool) -> None:
        console = rich_console.Console()
        self.is_shown, self.is_live = is_shown, is_shown and console.is_terminal
        self.total = total_steps
        columns = (progress.SpinnerColumn(), progress.TextColumn("{task.description}"), progress.BarColumn(),
                   progress.MofNCompleteColumn(), progress.TextColumn("{task.fields[detail]}"),
                   progress.TimeRemainingColumn())  # fmt: skip
        self.bar = progress.Progress(*columns, console=console, disable=not self.is_live)
        self.task = self.bar.add_task("training", total=total_steps, completed=done_steps, detail="")
        self.times: deque[float] = deque(maxlen=50)
        self.last_line = time.perf_counter()

    def __enter__(self) -> TrainingProgress:
        self.bar.__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        self.bar.__exit__(*failure)

    def step(self, loss: float | None, done: int, samples: int) -> None:
        """Call after a pass over `samples` crops of all ranks.

        Args:
            loss: of the previous pass, so that nothing waits for this one's. done: optimizer steps so far.
        """
        now = time.perf_counter()
        self.times.append(now)
        if not self.is_shown or loss is None or len(self.times) < 2:
            return
        rate = (len(self.times) - 1) / (self.times[-1] - self.times[0])
        detail = f"loss {loss:.3f}  {rate * samples:.2f} samples/s"
        if self.is_live:
            self.bar.update(self.task, description="training", completed=done, detail=detail)
        elif now - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = now
            log.info("step %d/%d  %s  %.0f min left", done, self.total, detail, (self.total - done) / rate / 60)

    def validating(self, done: int) -> None:
        """Call after a validation case; validation does not count as slow steps."""
        self.times.clear()
        if self.is_live:
            self.bar.update(self.task, description=f"validating, case {done}")

    def epoch(self, row: dict[str, Any], epochs: int) -> None:
        """Call after an epoch: prints one line if it was validated."""
        if not self.is_shown or "val_mean" not in row:
            return
        dice = dice_text(row[f"val_{region}"] for region in REGIONS)
        loss = "n/a" if row["loss"] is None else f"{row['loss']:.3f}"
        line = (
            f"epoch {row['epoch']}/{epochs}  loss {loss}  Dice {percent(row['val_mean'])}  ({dice})  "
            f"{row['samples_per_s']:.2f} samples/s"
        )
        self.last_line = time.perf_counter()
        if self.is_live:
            self.bar.console.print(line, highlight=False)
        else:
            log.info(line)


class LateValues:
    """Numbers of a step, read once the next step is under way, so that nothing waits for them."""

    def __init__(self) -> None:
        self.waiting: tuple[torch.Tensor, torch.cuda.Event | None] | None = None

    def push(self, values: torch.Tensor) -> list[float] | None:
        """Take the values of a step; returns those of the previous step, None at the first."""
        before, event = self.last(), None
        if values.is_cuda:
            # Into page-locked memory: a copy to pageable memory would wait for the step.
            values = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self.waiting = values, event
        return before

    def last(self) -> list[float] | None:
        """Values of the latest step, waiting for them if need be; None if they have been read."""
        if self.waiting is None:
            return None
        (values, event), self.waiting = self.waiting, None
        if event:
            event.synchronize()
        return values.tolist()


class EpochSums:
    """Loss, Dice loss and CE over the passes with a finite loss, the number of those passes, and skipped steps.

    Attributes:
        values: these five, float32 (5,), of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(5, device=device)

    def add(self, values: torch.Tensor, stepped: bool) -> None:
        """Add a pass: `TrainingStep.values` after it, and whether it made an optimizer step."""
        losses, was_skipped = values[:3], StepValues(*values).was_skipped
        is_finite = losses.isfinite().all()
        skipped = was_skipped if stepped else torch.zeros_like(was_skipped)
        self.values += torch.cat([losses.where(is_finite, 0), torch.stack([is_finite.float(), skipped])])

    def restore(self, saved: Sequence[Sequence[float]], ranks: Ranks) -> None:
        """Continue from the sums of the ranks that saved a checkpoint; the number of ranks may have changed."""
        if len(saved) == ranks.world_size:
            self.values += torch.tensor(saved[ranks.rank], device=ranks.device)
        elif ranks.is_first:
            total = torch.tensor(saved, device=ranks.device).sum(0)
            total[SKIPPED] = saved[0][SKIPPED]  # all ranks skip a step together
            self.values += total


def epoch_means(sums: Sequence[Sequence[float]]) -> tuple[dict[str, float | None], int]:
    """Mean losses over the passes of all ranks, and the skipped steps, from the sums of each rank."""
    *losses, passes, _ = map(sum, zip(*sums, strict=True))
    means = {name: loss / passes if passes else None for name, loss in zip(StepValues._fields, losses, strict=False)}
    return means, int(sums[0][SKIPPED])


def dice_text(dice: Iterable[float | None]) -> str:
    """The Dice of the three regions on one line."""
    return "  ".join(f"{region} {percent(value)}" for region, value in zip(REGIONS, dice, strict=True))
