"""Ranks that end together when one of them fails: two processes, gloo."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from commands import free_port
from two_ranks import LAUNCHER_VARIABLES, LIMIT_S, PROMPT_S, TwoRanks, Work, ready, wait_for

from engine.ranks import watchdog
from engine.ranks.distributed import gather
from engine.ranks.watchdog import start_watchdog

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Restores the variables that `start_watchdog` sets in this process."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def two_ranks(tmp_path: Path) -> TwoRanks:
    return TwoRanks(tmp_path)


def rank_1_is_wrong_in_a_collective() -> None:
    ranks = ready()
    if ranks.rank == 1:
        raise ValueError("scan 7 is faulty")
    gather("rank 0 waits here", ranks)


def rank_1_is_wrong_while_rank_0_sleeps() -> None:
    ranks = ready()
    if ranks.rank == 1:
        raise ValueError("scan 7 is faulty")
    time.sleep(600)


def rank_1_crashes() -> None:
    ranks = ready()
    if ranks.rank == 1:
        raise KeyError("no such weight")
    gather("rank 0 waits here", ranks)


def rank_0_is_wrong() -> None:
    ranks = ready()
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


def all_sleep() -> None:
    ready()
    time.sleep(600)


def rank_0_waits_in_a_collective() -> None:
    ranks = ready()
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


def test_a_signal_before_training_to_one_rank_ends_all(two_ranks: TwoRanks) -> None:
    two_ranks.start(all_sleep)
    assert two_ranks.pid(0)
    os.kill(two_ranks.pid(1), signal.SIGTERM)
    ended = two_ranks.end()
    assert ended.statuses == [os.EX_TEMPFAIL, os.EX_TEMPFAIL], ended.output
    assert len(ended.lines()) == 1 and ended.lines()[0].startswith("stopped by SIGTERM; "), ended.output


def rank_0_finishes_later() -> None:
    ranks = ready()
    if ranks.is_first:
        time.sleep(2.5)
        print("finished")


def test_ranks_that_end_well_wait_for_each_other_and_say_nothing(two_ranks: TwoRanks) -> None:
    ended = two_ranks.start(rank_0_finishes_later).end()
    assert ended.statuses == [0, 0] and ended.lines() == ["finished"], ended.output
    assert 2 < ended.seconds < PROMPT_S


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', which is not a port"),
        ({"MASTER_PORT": "80000"}, "MASTER_PORT is '80000', which is not a port"),
        ({"MASTER_ADDR": "no.such.host.invalid"}, "MASTER_ADDR is 'no.such.host.invalid', which has no address"),
        ({"MASTER_PORT": ""}, "at 127.0.0.1:[0-9]+: the port is in use"),
    ],
)
def test_ranks_that_cannot_meet_say_why(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "NAME_LIMIT_S", 0)
    with socket.create_server(("", 0)) as taken:
        env = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        port = variables.get("MASTER_PORT") or str(taken.getsockname()[1])
        for name, value in (env | variables | {"MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises((ValueError, ConnectionError), match=message):
            start_watchdog()


def test_two_torchruns_are_two_nodes_that_end_together(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, time\n"
        "from engine.ranks.watchdog import start_watchdog\n"
        "from engine.ranks.rank_env import read_rank_env\n"
        "watchdog, env = start_watchdog(), read_rank_env()\n"
        "print(env, flush=True)\n"
        "if env.rank == 1:\n"
        "    watchdog.fail(ValueError(), 'scan 7 is faulty', 2)\n"
        "time.sleep(600)\n"
    )
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
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
        assert f"RankEnv(rank={rank}, world_size=2, local_rank=0, ranks_on_node=1)" in output, output
    line = f"error: rank 1 on {socket.gethostname()}: scan 7 is faulty"
    assert [output.count(line) for output in outputs] == [1, 0], outputs
