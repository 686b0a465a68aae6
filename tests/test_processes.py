"""Cases worked on in processes: each one's result or fault, whatever the number of processes, and clear ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from pipelines.cases import Case, DataError
from pipelines.layouts import CaseError
from pipelines.processes import run_on_cases

ROOT = Path(__file__).resolve().parent.parent
CASES = [Case(name, (Path(name),), None, None) for name in ("a", "b", "c", "d")]


def name_unless(faulty: str, case: Case) -> str:
    if case.name == faulty:
        raise CaseError(case.images[0], "is faulty", "Repair it")
    return case.name.upper()


def process_of(case: Case) -> int:
    return os.getpid()


def divide_by_zero(case: Case) -> None:
    raise ZeroDivisionError(case.name)


def kill_the_worker(case: Case) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [1, 2])
def test_each_case_comes_with_its_result_or_its_fault(workers: int) -> None:
    results = {case.name: result for case, result in run_on_cases(partial(name_unless, "b"), CASES, workers, "Naming")}
    fault = results.pop("b")
    assert isinstance(fault, CaseError) and fault.path == Path("b") and fault.remedy == "Repair it"
    assert results == {"a": "A", "c": "C", "d": "D"}


def test_one_worker_is_this_process_and_two_are_others() -> None:
    assert {pid for _, pid in run_on_cases(process_of, CASES, 1, "Asking")} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid in run_on_cases(process_of, CASES, 2, "Asking")}
    assert {pid for _, pid in run_on_cases(process_of, CASES[:1], 2, "Asking")} == {os.getpid()}


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_that_is_no_fault_of_a_case_ends_the_run(workers: int) -> None:
    with pytest.raises(ZeroDivisionError):
        list(run_on_cases(divide_by_zero, CASES, workers, "Dividing"))


def test_early_interrupt_ends_the_run_once_the_workers_are_there_and_spares_their_server() -> None:
    """Ctrl-C reaches the whole group: here a process of its own, while its fork server imports torch."""
    script = (
        "import os, signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's job in the background ignores it
        "from pathlib import Path\n"
        "from pipelines.cases import Case\n"
        "from pipelines.processes import run_on_cases\n"
        "threading.Timer(0.2, os.killpg, (os.getpgid(0), signal.SIGINT)).start()\n"
        "try:\n"
        "    list(run_on_cases(repr, [Case(str(i), (Path('a'),), None, None) for i in range(4)], 2, 'Naming'))\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


@pytest.mark.parametrize("seconds_before_each_start", [0, 3])
def test_killed_worker_is_one_clear_error(seconds_before_each_start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    start = ForkServerProcess.start

    def start_slowly(process: ForkServerProcess) -> None:
        time.sleep(seconds_before_each_start)
        start(process)

    monkeypatch.setattr(ForkServerProcess, "start", start_slowly)
    with pytest.raises(DataError, match=r"2 worker processes was killed.*try --data\.workers 1"):
        list(run_on_cases(kill_the_worker, CASES, 2, "Killing"))


def test_less_than_one_worker_is_refused() -> None:
    with pytest.raises(DataError, match="workers 0 must be at least 1"):
        list(run_on_cases(process_of, CASES, 0, "Asking"))
