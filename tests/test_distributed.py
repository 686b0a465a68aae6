"""Ranks that end together, stop together, and know their place: two processes, gloo."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from commands import free_port

from engine import run
from engine.config import Config
from engine.ranks import distributed, watchdog
from engine.ranks.distributed import Place, Ranks, first_on_node, gather, init_ranks, read_place
from engine.ranks.signals import Preempted, StopSignal
from engine.ranks.watchdog import join_watch

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
PROMPT_S = 15.0  # 5 to 8 at the most where nothing else runs; a rank that is lost is given up after 20
LIMIT_S = 300.0  # ends a test that hangs, and no other
Work = Callable[[Config], None]


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """What `export` sets in this process is gone after the test."""
    with mock.patch.dict(os.environ):
        yield


@dataclass
class Ended:
    """What two ranks left: exit statuses, all that they wrote to one terminal, seconds from rank 1's `ready`."""

    statuses: list[int | None]
    output: str
    seconds: float

    def lines(self) -> list[str]:
        return self.output.strip().splitlines()


class TwoRanks:
    """Starts two ranks of `engine.run.start_run` whose `run` is replaced by a test's work, on one terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.terminal = folder, folder / "terminal"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["engine.run"])  # torch and the like are imported once, not once per rank
        self.variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                          "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}  # fmt: skip
        self.context = context

    def start(self, work: Work, lost_after_s: float = watchdog.LOST_AFTER_S, **variables: str) -> TwoRanks:
        self.ranks = []
        for rank in range(2):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), **self.variables, **variables}
            process = self.context.Process(target=_rank, args=(self.folder, mine, work, lost_after_s), daemon=True)
            process.start()
            self.ranks.append(process)
        return self

    def pid(self, rank: int) -> int:
        """Of a rank that has called `_ready`."""
        wait_for(self.folder / f"ready{rank}")
        return int((self.folder / f"ready{rank}").read_text())

    def end(self, limit_s: float = LIMIT_S, frozen: int | None = None) -> Ended:
        """Wait for both ranks, or for the one that is not frozen."""
        self.pid(1)
        started = time.monotonic()
        for rank, process in enumerate(self.ranks):
            if rank != frozen:
                process.join(max(0.0, started + limit_s - time.monotonic()))
        seconds, statuses = time.monotonic() - started, [process.exitcode for process in self.ranks]
        for process in self.ranks:
            process.kill()
            process.join()
        return Ended(statuses, self.terminal.read_text(), seconds)


def _rank(folder: Path, variables: dict[str, str], work: Work, lost_after_s: float) -> None:
    terminal = os.open(folder / "terminal", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    os.environ |= variables
    os.chdir(folder)
    watchdog.LOST_AFTER_S = lost_after_s
    vars(run)["run"] = work
    sys.exit(run.start_run(Config))


def _ready(ranks: Ranks) -> None:
    partial = Path(f"ready{ranks.rank}.partial")
    partial.write_text(str(os.getpid()))
    partial.rename(f"ready{ranks.rank}")


def wait_for(path: Path, limit_s: float = LIMIT_S) -> None:
    limit = time.monotonic() + limit_s
    while not path.exists():
        assert time.monotonic() < limit, f"no {path} after {limit_s:.0f} s"
        time.sleep(0.02)


@pytest.fixture
def two_ranks(tmp_path: Path) -> TwoRanks:
    return TwoRanks(tmp_path)


# ---------------------------------------------------------------------------------------------------------- failures


def rank_1_is_wrong_in_a_collective(config: Config) -> None:
    ranks = init_ranks("cpu")
    _ready(ranks)
    if ranks.rank == 1:
        raise ValueError("scan 7 is faulty")
    gather("rank 0 waits here", ranks)


def rank_1_is_wrong_while_rank_0_sleeps(config: Config) -> None:
    ranks = init_ranks("cpu")
    _ready(ranks)
    if ranks.rank == 1:
        raise ValueError("scan 7 is faulty")
    time.sleep(600)


def rank_1_crashes(config: Config) -> None:
    ranks = init_ranks("cpu")
    _ready(ranks)
    if ranks.rank == 1:
        raise KeyError("no such weight")
    gather("rank 0 waits here", ranks)


def rank_0_is_wrong(config: Config) -> None:
    ranks = init_ranks("cpu")
    _ready(ranks)
    wait_for(Path("ready1"))  # which `TwoRanks.end` looks for: this failure may end rank 1 at once
    if ranks.rank == 0:
        raise OSError("disk full")
    time.sleep(600)


@pytest.mark.parametrize(
    ("work", "rank", "message", "status"),
    [
        (rank_1_is_wrong_in_a_collective, 1, "scan 7 is faulty", 2),
        (rank_1_is_wrong_while_rank_0_sleeps, 1, "scan 7 is faulty", 2),
        (rank_1_crashes, 1, "KeyError: 'no such weight'", 1),
        (rank_0_is_wrong, 0, "disk full", 2),
    ],
)
def test_a_failing_rank_ends_all_with_its_message_once_and_last(
    work: Work, rank: int, message: str, status: int, two_ranks: TwoRanks
) -> None:
    ended = two_ranks.start(work).end()
    assert ended.statuses == [status, status], ended.output
    assert ended.lines()[-1] == f"error: rank {rank} on {socket.gethostname()}: {message}", ended.output
    assert ended.output.count("error: rank") == 1
    assert ended.output.count("Traceback") == (status == 1)  # the failing rank's own, not that of its broken peer
    assert ended.seconds < PROMPT_S


def all_sleep(config: Config) -> None:
    _ready(init_ranks("cpu"))
    time.sleep(600)


def rank_0_waits_in_a_collective(config: Config) -> None:
    ranks = init_ranks("cpu")
    _ready(ranks)
    if ranks.rank == 1:
        time.sleep(600)
    gather("rank 0 waits here", ranks)


@pytest.mark.parametrize(
    ("work", "rank"), [(all_sleep, 1), (rank_0_waits_in_a_collective, 1), (all_sleep, 0)]
)  # fmt: skip
def test_a_killed_rank_is_named_and_ends_the_other(work: Work, rank: int, two_ranks: TwoRanks) -> None:
    two_ranks.start(work)
    assert two_ranks.pid(0)
    os.kill(two_ranks.pid(rank), signal.SIGKILL)
    ended = two_ranks.end()
    assert ended.statuses[rank] == -signal.SIGKILL and ended.statuses[1 - rank] == 1, ended.output
    assert ended.lines()[-1].startswith(f"error: rank {rank} on {socket.gethostname()}: "), ended.output
    assert "killed" in ended.lines()[-1] and ended.output.count("error:") == 1
    assert ended.seconds < PROMPT_S


def test_a_rank_without_a_sign_of_life_is_lost(two_ranks: TwoRanks) -> None:
    two_ranks.start(all_sleep, lost_after_s=3.0)
    assert two_ranks.pid(0)
    os.kill(two_ranks.pid(1), signal.SIGSTOP)
    ended = two_ranks.end(frozen=1)
    assert ended.statuses == [1, None], ended.output
    assert ended.lines()[-1].endswith("lost: no sign of life for 3 s")


def test_a_store_that_does_not_answer_is_a_lost_rank_0(two_ranks: TwoRanks) -> None:
    two_ranks.start(all_sleep, lost_after_s=3.0)
    assert two_ranks.pid(1)
    os.kill(two_ranks.pid(0), signal.SIGSTOP)  # the store's thread stands as well
    ended = two_ranks.end(frozen=0)
    assert ended.statuses == [None, 1], ended.output
    assert ended.lines()[-1].startswith(f"error: rank 0 on {socket.gethostname()}: lost")


def test_a_launchers_sigterm_does_not_hide_who_was_killed(two_ranks: TwoRanks) -> None:
    two_ranks.start(all_sleep)
    first, second = two_ranks.pid(0), two_ranks.pid(1)
    os.kill(first, signal.SIGTERM)  # as a launcher that saw rank 1's end before we did
    time.sleep(0.5)
    os.kill(second, signal.SIGKILL)
    ended = two_ranks.end()
    assert ended.statuses[0] == 1 and ended.lines()[-1].startswith("error: rank 1 on"), ended.output


def rank_1_prepares_a_faulty_scan(config: Config) -> None:
    ranks = init_ranks("cpu")
    _ready(ranks)

    def prepare() -> None:
        if ranks.rank == 1:
            raise ValueError("scan 7 is faulty")

    first_on_node(prepare, ranks)


def test_a_fault_of_another_nodes_first_rank_is_told_as_its_own(two_ranks: TwoRanks) -> None:
    ended = two_ranks.start(rank_1_prepares_a_faulty_scan, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1").end()
    assert ended.statuses == [2, 2], ended.output
    assert ended.lines() == [f"error: rank 1 on {socket.gethostname()}: scan 7 is faulty"]


def rank_0_finishes_later(config: Config) -> None:
    ranks = init_ranks("cpu")
    _ready(ranks)
    if ranks.is_first:
        time.sleep(2.5)
        print("finished")


def test_ranks_that_end_well_wait_for_each_other_and_say_nothing(two_ranks: TwoRanks) -> None:
    ended = two_ranks.start(rank_0_finishes_later).end()
    assert ended.statuses == [0, 0] and ended.lines() == ["finished"], ended.output
    assert 2 < ended.seconds < PROMPT_S


def test_one_rank_alone_needs_no_thread_and_no_port(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    threads = threading.active_count()
    assert join_watch() is None
    assert threading.active_count() == threads


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', which is no port"),
        ({"MASTER_PORT": "80000"}, "MASTER_PORT is '80000', which is no port"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR is 'no.such.host.invalid', which has no address"),
        ({"MASTER_PORT": ""}, "at 127.0.0.1:[0-9]+: the port is in use"),
    ],
)
def test_ranks_that_cannot_meet_are_told_why(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "NAME_LIMIT_S", 0)
    with socket.create_server(("", 0)) as taken:
        place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        port = variables.get("MASTER_PORT") or str(taken.getsockname()[1])
        for name, value in (place | variables | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises((ValueError, ConnectionError), match=message):
            join_watch()


def test_a_network_interface_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", mock.Mock(side_effect=RuntimeError("Unable to find address\nat")))
    with pytest.raises(ConnectionError, match=r"no gloo process group \(Unable to find address\); is the network"):
        init_ranks("cpu")


def test_two_torchruns_are_two_nodes_that_end_together(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, time\n"
        "from engine.ranks.watchdog import join_watch\n"
        "from engine.ranks.distributed import read_place\n"
        "watch, place = join_watch(), read_place()\n"
        "print(place, flush=True)\n"
        "if place.rank == 1:\n"
        "    watch.fail(ValueError(), 'scan 7 is faulty', 2)\n"
        "time.sleep(600)\n"
    )
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
             "--node_rank", str(node), "--master_addr", "127.0.0.1", "--master_port", port, str(script)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=LIMIT_S)[0] for node in nodes]
    assert all(node.returncode != 0 for node in nodes), outputs
    for rank, output in enumerate(outputs):
        assert f"Place(rank={rank}, world_size=2, local_rank=0, ranks_on_node=1)" in output, output
    line = f"error: rank 1 on {socket.gethostname()}: scan 7 is faulty"
    assert [output.count(line) for output in outputs] == [1, 0], outputs


# ------------------------------------------------------------------------------------------------------ stop signals


def train_until_stopped(config: Config) -> None:
    ranks = init_ranks("cpu")
    with StopSignal(ranks) as stop:
        for step in range(100_000):
            time.sleep(0.01)
            if step == 50:
                _ready(ranks)
            if step % 10 == 0:
                dist.barrier()  # ranks in step, as gradients keep them
            if stop.due():
                Path(f"stopped{ranks.rank}").write_text(str(step))
                config.run_dir = Path("runs/one")
                raise Preempted(stop.name)


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(
    number: signal.Signals, rank: int, two_ranks: TwoRanks
) -> None:
    two_ranks.start(train_until_stopped)
    assert two_ranks.pid(1 - rank)
    os.kill(two_ranks.pid(rank), number)
    ended = two_ranks.end()
    steps = [(two_ranks.folder / f"stopped{rank}").read_text() for rank in range(2)]
    assert steps[0] == steps[1]
    assert ended.statuses == [os.EX_TEMPFAIL, os.EX_TEMPFAIL], ended.output
    assert len(ended.lines()) == 1 and ended.lines()[0].startswith(f"stopped by {number.name}; "), ended.output
    assert ended.seconds < PROMPT_S


def rank_1_is_late(config: Config) -> None:
    ranks = init_ranks("cpu")
    with StopSignal(ranks) as stop:
        dist.barrier()
        _ready(ranks)
        if ranks.rank == 1:
            time.sleep(4)
        started = time.monotonic()
        stop.due()
        Path(f"waited{ranks.rank}").write_text(str(time.monotonic() - started))


def test_no_step_waits_for_the_other_ranks_to_agree(two_ranks: TwoRanks) -> None:
    assert two_ranks.start(rank_1_is_late).end().statuses == [0, 0]
    assert float((two_ranks.folder / "waited0").read_text()) < 3


def test_one_rank_stops_at_its_next_step_and_puts_the_handlers_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with StopSignal(Ranks(0, 1, 0, distributed.torch.device("cpu"))) as stop:
        assert not stop.due()
        signal.raise_signal(signal.SIGUSR1)
        assert stop.due() and stop.name == "SIGUSR1"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before


def test_a_signal_before_training_ends_one_rank_with_the_status_that_queues_it_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGUSR1)

    def read() -> Config:
        signal.raise_signal(signal.SIGUSR1)
        return Config()

    assert run.start_run(read) == os.EX_TEMPFAIL
    assert capsys.readouterr().err.startswith("stopped by SIGUSR1; there is no checkpoint yet")
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_signal_before_training_to_one_rank_ends_all(two_ranks: TwoRanks) -> None:
    two_ranks.start(all_sleep)
    assert two_ranks.pid(0)
    os.kill(two_ranks.pid(1), signal.SIGTERM)
    ended = two_ranks.end()
    assert ended.statuses == [os.EX_TEMPFAIL, os.EX_TEMPFAIL], ended.output
    assert len(ended.lines()) == 1 and ended.lines()[0].startswith("stopped by SIGTERM; "), ended.output


def slow_to_stop(still_there: Path) -> None:
    with StopSignal(Ranks(0, 1, 0, distributed.torch.device("cpu"))):
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the same, passed on by a launcher
        still_there.touch()
        time.sleep(1.1)
        signal.raise_signal(signal.SIGTERM)
        os._exit(0)


def test_a_second_sigterm_ends_at_once_and_the_same_one_passed_on_does_not(tmp_path: Path) -> None:
    still_there = tmp_path / "still_there"
    process = multiprocessing.get_context("forkserver").Process(target=slow_to_stop, args=(still_there,))
    process.start()
    process.join(LIMIT_S)
    assert process.exitcode == -signal.SIGTERM and still_there.exists()


# --------------------------------------------------------------------------------------------------------------- logs


def both_ranks_warn(config: Config) -> None:
    ranks = init_ranks("cpu")
    _ready(ranks)
    run._start_log(Path("runs/one"), ranks)
    run.log.info("hello from %d", ranks.rank)
    warnings.warn(f"warning of {ranks.rank}", stacklevel=1)


def test_each_rank_has_a_log_and_the_terminal_has_that_of_the_first(two_ranks: TwoRanks) -> None:
    ended = two_ranks.start(both_ranks_warn).end()
    assert ended.statuses == [0, 0], ended.output
    folder = two_ranks.folder / "runs" / "one"
    for rank, file in enumerate(["rank-0000.log", "rank-0001.log"]):
        text = (folder / "logs" / file).read_text()
        assert f"hello from {rank}" in text and f"warning of {rank}" in text and f"of {1 - rank}" not in text
    assert "hello from 0" in (folder / "run.log").read_text() and "from 1" not in (folder / "run.log").read_text()
    assert "hello from 0" in ended.output and "warning of 0" in ended.output
    assert "hello from 1" not in ended.output and "warning of 1" not in ended.output


# -------------------------------------------------------------------------------------------------------------- places

SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
         "SLURM_STEP_TASKS_PER_NODE": "4,3", "MASTER_ADDR": "node1"}  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1"}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place(0, 1, 0, 1)),
        (TORCHRUN, Place(5, 8, 1, 4)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_SIZE": "2"}, Place(5, 8, 1, 2)),  # deepspeed
        (SLURM, Place(5, 7, 1, 3)),
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, Place(5, 8, 1, 4)),
        (without(SLURM, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "6"}, Place(5, 7, 1, 6)),
        (SLURM | TORCHRUN, Place(5, 8, 1, 4)),  # a launcher within a SLURM job
        (without(SLURM, "MASTER_ADDR"), Place(0, 1, 0, 1)),  # a shell within one
        (SLURM | {"SLURM_NTASKS": "1"}, Place(0, 1, 0, 1)),
    ],
)
def test_each_launcher_tells_the_place_of_a_rank(variables: dict[str, str], place: Place) -> None:
    assert read_place(variables) == place


@pytest.mark.parametrize(
    ("on_node", "given", "threads"), [(1, None, []), (3, None, [2]), (16, None, [1]), (3, "4", [])]
)
def test_ranks_of_a_node_share_its_cores(
    on_node: int, given: str | None, threads: list[int], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the number of threads is given; launchers other than torchrun do not set it."""
    taken: list[int] = []
    monkeypatch.setattr(distributed, "read_place", lambda: Place(ranks_on_node=on_node))
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    init_ranks("cpu")
    assert taken == threads


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8 and WORLD_SIZE 8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is -1"),
        (TORCHRUN | {"RANK": "one"}, "RANK is 'one', which is no number"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4 and LOCAL_WORLD_SIZE 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, "LOCAL_WORLD_SIZE is 16 and WORLD_SIZE 8"),
        (SLURM | {"SLURM_PROCID": "7"}, "SLURM_PROCID is 7 and SLURM_NTASKS 7"),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(SLURM, "SLURM_STEP_TASKS_PER_NODE"), "SLURM_NTASKS_PER_NODE is not set"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "four"}, "should read like 4(x2),3"),
        (SLURM | {"SLURM_NODEID": "2"}, "lists 2 nodes"),
    ],
)
def test_variables_that_contradict_each_other_are_refused_by_name(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        read_place(variables)
    assert message in str(refused.value)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    distributed._check_gpu(Place(1, 8, 1, 4), gpus=2)
    with pytest.raises(ValueError, match=r"local rank 2 has no GPU: .* 4 ranks .* sees 2 GPU.*: 0,1"):
        distributed._check_gpu(Place(2, 8, 2, 4), gpus=2)


def test_ranks_of_srun_get_the_variables_that_pytorch_and_deepspeed_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    distributed.export(read_place())
    exported = {name: os.environ[name] for name in LAUNCHERS if name in os.environ}
    assert exported == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
                        "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}  # fmt: skip


@pytest.mark.parametrize("step_s", [0.03, 0.1, 0.4, 3.0])
def test_a_signal_is_heard_of_within_two_seconds_or_three_steps(step_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: steps that take so long, the signal after 100 of them."""
    now = [0.0]
    monkeypatch.setattr("engine.ranks.signals.time.monotonic", lambda: now[0])
    monkeypatch.setattr("engine.ranks.signals.dist.new_group", lambda backend: object())
    monkeypatch.setattr("engine.ranks.signals.dist.all_reduce", lambda *args, **options: mock.Mock())
    stop = StopSignal(Ranks(0, 2, 0, torch.device("cpu")))
    for step in range(200):
        now[0] += step_s
        stop.number = stop.number or (signal.SIGTERM if step == 100 else 0)
        if stop.due():
            break
    assert (step - 100) * step_s <= max(2.5, 3 * step_s)


STEPS = """
import resource
import sys

import torch

from engine.ranks.distributed import init_ranks

if sys.argv[1] == "rank":
    init_ranks("cpu")


def step():
    return [torch.ones(12 << 20) for _ in range(3)]


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


for _ in range(10):
    step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
held = step()
print(*(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")))
"""
"""Of 144 MB each; prints how often the kernel had to find a page for ten, and kB in huge pages."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not GNU's")
def test_a_rank_on_a_cpu_keeps_the_memory_of_a_step_for_the_next() -> None:
    ours = (*LAUNCHERS, "THP_MEM_ALLOC_ENABLE")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(ROOT)}
    (kept, huge), (fresh, _) = (
        map(int, subprocess.check_output([sys.executable, "-c", STEPS, who], env=environment, text=True).split())
        for who in ("rank", "other")
    )
    assert 100 * kept < fresh
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if pages.is_file() and "[never]" not in pages.read_text():
        assert huge > 50_000


def test_an_older_c_library_keeps_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 2.34 or so GNU's refuses thresholds above 32 MB."""
    taken: dict[int, int] = {}

    def mallopt(name: int, value: int) -> int:
        if name == distributed._M_MMAP_THRESHOLD and value > 2**25:
            return 0
        taken[name] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda name: mock.Mock(mallopt=mallopt))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    distributed.keep_memory()
    assert taken == {distributed._M_MMAP_THRESHOLD: 2**25, distributed._M_TRIM_THRESHOLD: 2**31 - 1}
