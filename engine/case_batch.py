"""Many cases over all ranks, in three stages that overlap on each rank. A case that fails never stops the others."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.ranks.distributed import Ranks, gather
from engine.ranks.memory_limits import is_out_of_memory
from pipelines.basics.errors import DataError, explain
from pipelines.basics.progress_bar import show_progress
from pipelines.basics.text import one_line
from pipelines.layouts.cases import Case

log = logging.getLogger(__name__)
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


class BatchStopped(ValueError):
    """A fault that every further case would meet too, such as a full disk; the message is for the user."""


def run_batch(
    verb: str,
    cases: Sequence[Case],
    ranks: Ranks,
    read: Callable[[Case], B],
    compute: Callable[[B], C],
    finish: Callable[[Case, B, C], D],
) -> list[list[tuple[str, D | DataError]]]:
    """Share cases among the ranks and work on them, with a progress bar.

    Args:
        verb: for the bar, as "Segmenting". read, compute, finish: as in `in_stages`, as are the errors.

    Returns:
        for every rank, on every rank: names of its cases and their outcomes, as `in_stages` yields them.
    """
    mine = cases[ranks.rank :: ranks.world_size]
    shown = show_progress(in_stages(mine, read, compute, finish), verb, len(mine), is_shown=ranks.is_first)
    return gather([(case.name, outcome) for case, outcome in shown], ranks, is_patient=True)


def in_stages(
    items: Sequence[A], read: Callable[[A], B], compute: Callable[[B], C], finish: Callable[[A, B, C], D]
) -> Iterator[tuple[A, D | DataError]]:
    """Work on items one by one, while threads read the next one and finish the last one.

    Args:
        read: runs in a thread, one item ahead. compute: runs here. finish: runs in another thread, one item behind.

    Yields:
        (item, what `finish` returned or why a stage failed), in order. At most three items are in memory.

    Raises:
        BatchStopped: raised by a stage.
        torch.AcceleratorError: the device takes no more work.
    """
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "finish") as finisher:
        ahead = reader.submit(read, items[0]) if items else None
        behind: tuple[A, Future[D]] | None = None
        for i, item in enumerate(items):
            assert ahead is not None
            reading, ahead = ahead, reader.submit(read, items[i + 1]) if i + 1 < len(items) else None
            finishing: Future[D] = Future()
            try:
                content = reading.result()
                finishing = finisher.submit(finish, item, content, compute(content))
            except Exception as error:
                finishing.set_exception(_fault(error))
            if behind:
                yield behind[0], _outcome(behind[1])
            behind = item, finishing
        if behind:
            yield behind[0], _outcome(behind[1])


def _outcome(done: Future) -> Any:
    try:
        return done.result()
    except Exception as error:
        fault = _fault(error)
        if isinstance(fault, DataError):
            return fault
        raise fault from None


def _fault(error: Exception) -> Exception:
    """A case's fault in words, without its traceback, which would keep volumes in memory; or what stops the batch."""
    if isinstance(error, DataError):
        return error.with_traceback(None)
    is_memory = is_out_of_memory(error)
    if isinstance(error, BatchStopped) or (isinstance(error, torch.AcceleratorError) and not is_memory):
        return error
    log.debug("a case failed", exc_info=error)
    message = fault_message(error)
    traceback.clear_frames(error.__traceback__)
    if is_memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return DataError(message)


def fault_message(error: Exception) -> str:
    """Why a case failed, on one line for the user; for a bug in this program, where."""
    text = one_line(error)
    if is_out_of_memory(error):
        return (
            f"out of memory ({text[:200] or type(error).__name__}): end other programs, or use a machine or a device "
            "with more, and run this case again"
        )
    if isinstance(error, OSError):
        return explain(error)
    if isinstance(error, DataError) or type(error) is ValueError:
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}, line {place.lineno})"
