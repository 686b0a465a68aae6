"""Cases processed in parallel: each has a result or a fault, with any number of workers, and the run ends cleanly."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from pipelines.basics.errors import CaseError, CaseFailure, DataError
from pipelines.layouts.cases import Case
from pipelines.preparing.processes import run_on_cases, worker_index

ROOT = Path(__file__).resolve().parent.parent
CASES = [Case(name, (Path(name),), None, None) for name in ("a", "b", "c", "d")]


def name_unless(faulty: str, case: Case) -> str:
    if case.name == faulty:
        raise CaseError(case.images[0], "is faulty", "Repair it")
    return case.name.upper()


def process_of(case: Case) -> int:
    return os.getpid()


class TakesTwo(Exception):
    """Like some errors of libraries: it can't be unpickled, as its arguments are not those it was made with."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one}{two}")


ERRORS = {
    "a": (MemoryError(), Path("a"), "not enough memory for it"),
    "b": (OSError(errno.EIO, "Input/output error", "b.nii"), Path("b.nii"), "can't be processed (Input/output error)"),
    "c": (TakesTwo("1", "2"), Path("c"), "TakesTwo: 12 (test_processes.py, line "),
    "e": (RuntimeError("Can't allocate 9 bytes on device 0."), Path("e"), "not enough memory for it"),  # DALI's
}


def index_of(case: Case) -> int:
    time.sleep(0.5)  # so that no worker takes all cases
    return worker_index()


def fail_of(case: Case) -> str:
    if case.name in ERRORS:
        raise ERRORS[case.name][0]
    return case.name


def fill_the_disk(case: Case) -> None:
    raise DataError("no space left")


def kill_the_worker_of(names: str, case: Case) -> str:
    if case.name in names:
        os.kill(os.getpid(), signal.SIGKILL)
    return case.name


def sleep_and_name_process(seconds: float, case: Case) -> int:
    time.sleep(seconds)
    return os.getpid()


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


def test_each_worker_has_an_index_of_its_own() -> None:
    assert {index for _, index in run_on_cases(index_of, CASES, 2, "Asking")} == {0, 1}
    assert {index for _, index in run_on_cases(index_of, CASES, 1, "Asking")} == {0}


@pytest.mark.parametrize("workers", [4, None])
def test_no_more_processes_work_than_the_task_allows(workers: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.preparing.processes.cores", lambda: 4)
    monkeypatch.setattr("pipelines.preparing.processes.START_S", 0.0)
    found = [pid for _, pid in run_on_cases(partial(sleep_and_name_process, 0.2), CASES * 2, workers, "Asking", 2)]
    assert len(set(found) - {os.getpid()}) == 2
    assert {pid for _, pid in run_on_cases(process_of, CASES, workers, "Asking", 1)} == {os.getpid()}


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_goes_wrong_with_a_case_is_named_and_the_others_are_done(workers: int) -> None:
    results = {
        case.name: result
        for case, result in run_on_cases(fail_of, [*CASES, Case("e", (Path("e"),), None, None)], workers, "Failing")
    }
    assert results.pop("d") == "d"
    for name, (_, path, problem) in ERRORS.items():
        failure = results[name]
        assert isinstance(failure, CaseFailure) and failure.path == path and failure.problem.startswith(problem)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_no_particular_case_ends_the_run(workers: int) -> None:
    with pytest.raises(DataError, match="no space left"):
        list(run_on_cases(fill_the_disk, CASES, workers, "Filling"))


def test_a_few_quick_cases_start_no_process() -> None:
    assert {pid for _, pid in run_on_cases(process_of, CASES, None, "Asking")} == {os.getpid()}


def test_processes_start_once_they_save_more_than_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.2 s a case: of 30 two processes save about 3 s, of 20 cases 2 s."""
    monkeypatch.setattr("pipelines.preparing.processes.cores", lambda: 2)
    monkeypatch.setattr("pipelines.preparing.processes.START_S", 2.5)
    pids = [pid for _, pid in run_on_cases(partial(sleep_and_name_process, 0.2), CASES * 5, None, "Asking")]
    assert set(pids) == {os.getpid()}
    more = [Case(str(i), (Path("a"),), None, None) for i in range(30)]
    pids = [pid for _, pid in run_on_cases(partial(sleep_and_name_process, 0.2), more, None, "Asking")]
    assert pids[0] == os.getpid() and pids.count(os.getpid()) <= 3 and len(set(pids)) == 3 and len(pids) == 30


def test_an_early_interrupt_ends_the_run_once_the_workers_have_started_and_spares_their_server() -> None:
    """Ctrl-C reaches the whole group: here a process of its own, while its fork server imports torch."""
    script = (
        "import os, signal, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's job in the background ignores it
        "from pathlib import Path\n"
        "from pipelines.layouts.cases import Case\n"
        "from pipelines.preparing.processes import run_on_cases\n"
        "threading.Timer(0.2, os.killpg, (os.getpgid(0), signal.SIGINT)).start()\n"
        "try:\n"
        "    list(run_on_cases(repr, [Case(str(i), (Path('a'),), None, None) for i in range(4)], 2, 'Naming'))\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, start_new_session=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


@pytest.mark.parametrize("seconds_before_each_start", [0, 1])
@pytest.mark.parametrize("killed", ["b", "abcd"])
def test_a_case_whose_process_is_killed_is_named_and_the_others_are_done(
    killed: str, seconds_before_each_start: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start = ForkServerProcess.start

    def start_slowly(process: ForkServerProcess) -> None:
        time.sleep(seconds_before_each_start)
        start(process)

    monkeypatch.setattr(ForkServerProcess, "start", start_slowly)
    results = {
        case.name: result for case, result in run_on_cases(partial(kill_the_worker_of, killed), CASES, 2, "Killing")
    }
    assert set(results) == set("abcd")
    for name, result in results.items():
        if name not in killed:
            assert result == name
        else:
            assert isinstance(result, CaseFailure) and "killed, perhaps because memory ran out" in result.problem
            assert "--data.workers 1" in result.remedy
    assert "one of 2 worker processes was killed: continuing with 1" in caplog.text


def test_processes_do_not_import_the_script_that_runs(tmp_path: Path) -> None:
    """It takes seconds to import, and without `if __name__ == "__main__"` it would begin again in each."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('begins', flush=True)\n"
        "from pathlib import Path\n"
        "from pipelines.layouts.cases import Case\n"
        "from pipelines.preparing.processes import run_on_cases\n"
        "cases = [Case(str(i), (Path('a'),), None, None) for i in range(4)]\n"
        "print(sorted(case.name for case, _ in run_on_cases(repr, cases, 2, 'Naming')))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "begins\n['0', '1', '2', '3']\n", "")


def report_and_wait(folder: Path, case: Case) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked for in Linux's /proc")
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from test_processes import CASES, report_and_wait\n"
        "from pipelines.preparing.processes import run_on_cases\n"
        f"list(run_on_cases(partial(report_and_wait, Path({str(tmp_path)!r})), CASES, 2, 'Waiting'))\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    with subprocess.Popen([sys.executable, "-c", script], env=environment) as process:
        wait_until(lambda: len(os.listdir(tmp_path)) == 2)
        process.kill()
    wait_until(lambda: not any(Path("/proc", pid).exists() for pid in os.listdir(tmp_path)))


def wait_until(is_so: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_less_than_one_worker_is_refused() -> None:
    with pytest.raises(DataError, match="workers 0 must be at least 1"):
        list(run_on_cases(process_of, CASES, 0, "Asking"))
