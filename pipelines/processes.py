"""A task on each of many cases, in several processes, with a progress bar.

Processes come from a fork server: a fork of a process that has used torch may hang. Each takes one case at a time and
runs one thread. A case that is faulty (CaseError) is a result like any other and the rest go on; any other error ends
the run. Server and workers ignore Ctrl-C: the parent cancels what has not begun, and cases in hand are finished.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.synchronize import Semaphore
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.cases import Case, DataError
from pipelines.layouts import CaseError

log = logging.getLogger(__name__)
T = TypeVar("T")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_on_cases(
    task: Callable[[Case], T], cases: Sequence[Case], workers: int | None, title: str
) -> Generator[tuple[Case, T | CaseError], None, None]:
    """Run a task on each case and show a progress bar, on a terminal, or log one line elsewhere.

    Args:
        task: takes a case; a function of a module, or a `partial` of one, so that it can be sent to a process.
        cases: what to run it on, at least one.
        workers: processes, at most one per case; 1 runs in this process. None: one per core.
        title: verb for the bar, as "Preparing".

    Yields:
        (case, what the task returned, or the CaseError that it raised), in the order in which they finish. Closing the
        generator cancels the cases that have not begun and waits for those that have.

    Raises:
        DataError: `workers` is below 1, or a worker process was killed.
        Exception: whatever else the task raised, which ends the run.
    """
    if workers is not None and workers < 1:
        raise DataError(f"workers {workers} must be at least 1 (--data.workers); leave it out for one per core")
    workers = min(workers or cores(), len(cases))
    finished = _in_this_process(task, cases) if workers == 1 else _in_processes(task, cases, workers)
    console = Console(stderr=True)
    columns = (TextColumn(f"{title} {len(cases)} cases"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with contextlib.closing(finished), Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        row = bar.add_task(title, total=len(cases))
        if not console.is_terminal:
            log.info("%s %d cases, %d at a time", title.lower(), len(cases), workers)
        for case, result in finished:
            bar.advance(row)
            yield case, result


def _in_this_process(
    task: Callable[[Case], T], cases: Sequence[Case]
) -> Generator[tuple[Case, T | CaseError], None, None]:
    for case in cases:
        try:
            yield case, task(case)
        except CaseError as error:
            yield case, error


def _in_processes(
    task: Callable[[Case], T], cases: Sequence[Case], workers: int
) -> Generator[tuple[Case, T | CaseError], None, None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.store"])  # torch is imported once, not once per worker
    begin = context.Semaphore(0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(begin,))
    try:
        try:
            with _interrupt_held_back():  # server and workers start here
                futures: dict[Future[T], Case] = {pool.submit(task, case): case for case in cases}
        finally:
            for _ in range(workers):
                begin.release()
        for future in as_completed(futures):
            try:
                yield futures[future], future.result()
            except CaseError as error:
                yield futures[future], error
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} worker processes was killed, by the system if memory ran out (about 0.4 GB each): "
            f"try --data.workers {max(1, workers // 2)}. Cases that are done stay done. (In a script of your own, "
            "calls belong under if __name__ == '__main__': each worker runs its other lines again.)"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Deliver Ctrl-C at the end of the block, and never to processes that are started in it.

    They inherit the blocked signal; the fork server would otherwise die of it while it imports torch. This process
    needs a handler too, for any of its threads may take the signal; an interrupt between the start of a worker and its
    registration would leave the worker behind.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone sets handlers, and is interrupted
        yield
        return
    resource_tracker.ensure_running()  # its start unblocks the signal
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if held:
            signal.raise_signal(signal.SIGINT)


def _start_worker(begin: Semaphore) -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which lets the cases in hand be finished
    begin.acquire()  # once all are there: one that dies before breaks the pool while the next is being started
