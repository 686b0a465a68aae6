"""Many cases over all ranks, in three stages that overlap on each rank. A case that fails never stops the others."""

from __future__ import annotations

import logging
import math
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from engine.ranks.distributed import Ranks, gather
from engine.ranks.memory_limits import is_out_of_memory, limit_bytes
from pipelines.basics.errors import CaseError, DataError, explain
from pipelines.basics.machine import cores
from pipelines.basics.progress_bar import show_progress
from pipelines.basics.text import one_line
from pipelines.layouts.cases import Case
from pipelines.scans.nifti import read_grid

log = logging.getLogger(__name__)
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
MOST = 8  # threads that read, and that finish
MEMORY_SHARE = 0.5  # of a rank's memory, for the cases under way
MEASURED = 16  # cases whose headers are read, at most
FLOAT32 = 4


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
    outcomes = in_stages(mine, read, compute, finish, threads_for(mine, ranks))
    shown = show_progress(outcomes, verb, len(mine), is_shown=ranks.is_first)
    return gather([(case.name, outcome) for case, outcome in shown], ranks, is_patient=True)


def threads_for(cases: Sequence[Case], ranks: Ranks) -> int:
    """How many threads read cases, and as many finish them, beside the one that computes.

    One on a CPU, whose cores are busy. A GPU is done with a case before a thread has read the next one: up to `MOST`,
    as far as there are cores, and memory for the cases that are then under way.
    """
    if ranks.device.type == "cpu" or not cases:
        return 1
    room = MEMORY_SHARE * limit_bytes(torch.device("cpu"), ranks.ranks_on_node)
    under_way = room / max(map(case_bytes, cases[:: -(-len(cases) // MEASURED)]))  # n are read, n finished, 1 computed
    return max(1, min(MOST, cores() // ranks.ranks_on_node // 2, int((under_way - 1) / 2)))


def case_bytes(case: Case) -> int:
    """About the memory that a case takes while it is read: its images in float32 and as much for what is made of them.

    By the header of its first image; 1 where that can't be read, which is a fault of the case.
    """
    try:
        shape = read_grid(case.images[0])[0]
    except CaseError:
        return 1
    return 2 * FLOAT32 * math.prod(shape[:3]) * len(case.channels or case.images)


def in_stages(
    items: Sequence[A],
    read: Callable[[A], B],
    compute: Callable[[B], C],
    finish: Callable[[A, B, C], D],
    threads: int = 1,
) -> Iterator[tuple[A, D | DataError]]:
    """Work on items one by one, while threads read the next ones and finish the last ones.

    Args:
        read: runs in a thread, up to `threads` items ahead. compute: runs here, in order. finish: runs in another
            thread, up to `threads` items behind.
        threads: that read, and as many that finish.

    Yields:
        (item, what `finish` returned or why a stage failed), in order. At most 2 `threads` + 1 items are in memory.

    Raises:
        BatchStopped: raised by a stage.
        torch.AcceleratorError: the device takes no more work.
    """
    with ThreadPoolExecutor(threads, "read") as reader, ThreadPoolExecutor(threads, "finish") as finisher:
        to_come = iter(items)
        ahead = deque((item, reader.submit(read, item)) for item in islice(to_come, threads))
        behind: deque[tuple[A, Future[D]]] = deque()
        while ahead:
            item, reading = ahead.popleft()
            ahead.extend((following, reader.submit(read, following)) for following in islice(to_come, 1))
            finishing: Future[D] = Future()
            try:
                content = reading.result()
                finishing = finisher.submit(finish, item, content, compute(content))
            except Exception as error:
                finishing.set_exception(_fault(error))
            behind.append((item, finishing))
            if len(behind) > threads:
                done, outcome = behind.popleft()
                yield done, _outcome(outcome)
        for done, outcome in behind:
            yield done, _outcome(outcome)


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
