"""A task on each of many cases, in several processes, with a progress bar.

Processes come from a fork server: a fork of a process that has used torch may hang. Each takes one case at a time and
runs one thread. They start only where they save time; a few small cases are done sooner in this process. A fault of
one case is a result like any other and the rest go on, even if its process was killed; an error that concerns no single
case, such as a full disk, ends the run. Server and workers ignore Ctrl-C: the parent cancels what has not begun, and
cases in progress are finished.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Semaphore
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from pipelines.basics.errors import CaseError, CaseFailure, DataError
from pipelines.basics.machine import cores
from pipelines.basics.progress_bar import show_progress
from pipelines.layouts.cases import Case

log = logging.getLogger(__name__)
T = TypeVar("T")
START_S = 3.0
"""How long the first worker takes to start, as the fork server imports torch; all workers are forks of it."""
_index = 0
_LESS_MEMORY = "Work on fewer cases at a time (--data.workers 1; about 0.4 GB each), or give it more memory"


def run_on_cases(
    task: Callable[[Case], T], cases: Sequence[Case], workers: int | None, title: str, most_workers: int | None = None
) -> Generator[tuple[Case, T | CaseError], None, None]:
    """Run a task on each case and show a progress bar, on a terminal, or log one line elsewhere.

    Args:
        task: takes a case; a function of a module, not of the script that runs, or a `partial` of one: it is sent to
            processes that import the module alone.
        cases: what to run it on, at least one.
        workers: processes, at most one per case; 1 runs in this process. None: this process, until the cases that are
            done show that one per core would save more than the `START_S` they take to start.
        title: verb for the bar, such as "Preparing".
        most_workers: processes that the task allows; None: any number.

    Yields:
        (case, result or error), in the order in which they finish: what the task returned; the CaseError that it
        raised; a CaseFailure for any other error, and where its process was killed. Closing the generator cancels the
        cases that have not begun and waits for those that have.

    Raises:
        DataError: `workers` is below 1; or the task raised one that concerns no single case, which ends the run.
    """
    if workers is not None and workers < 1:
        raise DataError(f"workers {workers} must be at least 1 (--data.workers); leave it out for one per core")
    most = len(cases) if most_workers is None else min(most_workers, len(cases))
    if workers is None:
        finished = _where_it_is_faster(task, cases, min(cores(), most))
    else:
        finished = _by_workers(task, cases, min(workers, most))
    with contextlib.closing(finished):
        yield from show_progress(finished, title, len(cases))


def worker_index() -> int:
    """Which of the worker processes this one is, from 0; 0 in any other process."""
    return _index


def attempt(task: Callable[[Case], T], case: Case) -> T | CaseError:
    """What the task returns for a case, or its error. Raises DataError for an error that concerns no single case."""
    try:
        return task(case)
    except CaseError as error:
        return error
    except DataError:
        raise
    except OSError as error:
        path = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else case.images[0]
        problem = f"can't be processed ({error.strerror or error})"
        return CaseFailure(path, problem, "Check the disk and its permissions")
    except Exception as error:
        import torch

        said = str(error).lower()
        without_memory = "can't allocate" in said or "cuda allocation failed" in said  # the CPU allocator; DALI
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or without_memory:
            return CaseFailure(case.images[0], "not enough memory for it", _LESS_MEMORY)
        place = traceback.extract_tb(error.__traceback__)[-1]
        problem = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        return CaseFailure(case.images[0], problem, "Report this line, and leave the case out until it is fixed")


def _where_it_is_faster(
    task: Callable[[Case], T], cases: Sequence[Case], workers: int
) -> Generator[tuple[Case, T | CaseError], None, None]:
    seconds = 0.0
    for done, case in enumerate(cases, 1):
        started = time.perf_counter()
        result = attempt(task, case)
        seconds += time.perf_counter() - started
        yield case, result
        left = cases[done:]
        used = min(workers, len(left))
        if used > 1 and seconds / done * len(left) * (1 - 1 / used) > START_S:
            yield from _by_workers(task, left, used)
            return


def _by_workers(
    task: Callable[[Case], T], cases: Sequence[Case], workers: int
) -> Generator[tuple[Case, T | CaseError], None, None]:
    """In that many processes. Where one is killed, the cases that were in progress are tried one at a time."""
    if workers == 1:
        for case in cases:
            yield case, attempt(task, case)
        return
    parts = [(list(cases), workers)]
    while parts:
        left, count = parts.pop()
        finished = contextlib.closing(_in_processes(task, list(left), count))
        with contextlib.suppress(BrokenProcessPool), finished as results:
            for case, result in results:
                left.remove(case)
                yield case, result
        if left and count == 1:
            problem = "its process was killed, perhaps because memory ran out"
            yield left[0], CaseFailure(left[0].images[0], problem, _LESS_MEMORY)
            parts += [(left[1:], 1)] if left[1:] else []
        elif left:
            fewer = max(count // 2, 1)
            log.warning("one of %d worker processes was killed: continuing with %d (--data.workers)", count, fewer)
            parts += [(part, n) for part, n in ((left[count:], fewer), (left[:count], 1)) if part]


def _in_processes(
    task: Callable[[Case], T], cases: Sequence[Case], workers: int
) -> Generator[tuple[Case, T | CaseError], None, None]:
    """Raises BrokenProcessPool where a process was killed, once the finished results are out."""
    workers = min(workers, len(cases))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipelines.preparing.store"])  # torch is imported once, not once per worker
    begin, started = context.Semaphore(0), context.Value("i", 0)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(begin, started))
    try:
        try:
            with _interrupt_held_back(), _without_main():  # server and workers start here
                futures = {pool.submit(attempt, task, case): case for case in cases}
        finally:
            for _ in range(workers):
                begin.release()
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Start processes that don't import the running script: `launch/train.py` takes seconds, and a script without
    `if __name__ == "__main__"` would run again in each."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _interrupt_held_back() -> Iterator[None]:
    """Deliver Ctrl-C at the end of the block, and never to processes that are started in it.

    They inherit the blocked signal; the fork server would otherwise die of it while it imports torch. This process
    needs a handler too, since any of its threads may take the signal; an interrupt between the start of a worker and
    its registration would leave the worker behind.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread sets handlers
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


def _end_with_parent() -> None:
    """A worker whose parent was killed would finish the queued cases and then wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker(begin: Semaphore, started: Synchronized[int]) -> None:
    import torch

    global _index
    with started.get_lock():
        _index = started.value
        started.value += 1
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and waits for the cases in progress
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin.acquire()  # released once all have started: an earlier death would break the pool while the next one starts
