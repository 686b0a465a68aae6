"""The process group, the threads and the memory of a rank, and work that one rank of each node does first."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from two_ranks import LAUNCHER_VARIABLES, TwoRanks, ready

from engine.ranks import distributed
from engine.ranks.distributed import Ranks, first_on_node, init_ranks
from engine.ranks.rank_env import RankEnv

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Restores the variables that `init_ranks` sets in this process."""
    with mock.patch.dict(os.environ):
        yield


def rank_1_prepares_a_faulty_scan() -> None:
    ranks = ready()

    def prepare() -> None:
        if ranks.rank == 1:
            raise ValueError("scan 7 is faulty")

    first_on_node(prepare, ranks)


def test_a_fault_of_another_nodes_first_rank_is_reported_as_its_own(tmp_path: Path) -> None:
    ended = TwoRanks(tmp_path).start(rank_1_prepares_a_faulty_scan, LOCAL_RANK="0", LOCAL_WORLD_SIZE="1").end()
    assert ended.statuses == [2, 2], ended.output
    assert ended.lines() == [f"error: rank 1 on {socket.gethostname()}: scan 7 is faulty"]


def test_a_missing_network_interface_is_named_as_the_likely_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", mock.Mock(side_effect=RuntimeError("Unable to find address\nat")))
    with pytest.raises(ConnectionError, match=r"no gloo process group \(Unable to find address\); does the network"):
        init_ranks("cpu")


@pytest.mark.parametrize(
    ("address", "ranks_on_node", "interface", "warns"),
    [("127.0.1.1", 1, None, True), ("127.0.1.1", 2, None, False), ("127.0.1.1", 1, "eth0", False),
     ("10.0.0.7", 1, None, False)],
)  # fmt: skip
def test_a_node_whose_name_others_cannot_reach_is_warned_of(
    address: str, ranks_on_node: int, interface: str | None, warns: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    if interface:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", interface)
    monkeypatch.setattr(distributed.socket, "gethostbyname", lambda name: address)
    monkeypatch.setattr(distributed, "read_rank_env", lambda: RankEnv(0, 2, 0, ranks_on_node))
    monkeypatch.setattr(distributed, "export_rank_env", lambda env: None)
    monkeypatch.setattr(distributed, "keep_memory", lambda: None)
    monkeypatch.setattr(distributed.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    init_ranks("cpu")
    assert ("stands for 127.0.1.1 here: set GLOO_SOCKET_IFNAME" in caplog.text) == warns


def test_a_node_gathers_from_its_own_ranks_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of 2, 3 and 1 ranks, whose values are their ranks."""
    monkeypatch.setattr(distributed, "gather", lambda value, ranks, is_patient: list(range(6)))
    for rank, local, size, expected in ((0, 0, 2, [0, 1]), (1, 1, 2, [0, 1]), (3, 1, 3, [2, 3, 4]), (5, 0, 1, [5])):
        ranks = Ranks(rank, 6, local, torch.device("cpu"), size)
        assert distributed.gather_on_node(rank, ranks) == expected


@pytest.mark.parametrize(
    ("on_node", "given", "threads"), [(1, None, []), (3, None, [2]), (16, None, [1]), (3, "4", [])]
)
def test_ranks_of_a_node_share_its_cores(
    on_node: int, given: str | None, threads: list[int], ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the number of threads is given; launchers other than torchrun do not set it."""
    taken: list[int] = []
    monkeypatch.setattr(distributed, "read_rank_env", lambda: RankEnv(ranks_on_node=on_node))
    monkeypatch.setattr(distributed, "cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    init_ranks("cpu")
    assert taken == threads


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    distributed._check_gpu(RankEnv(1, 8, 1, 4), gpus=2)
    with pytest.raises(ValueError, match=r"local rank 2 has no GPU: .* 4 ranks .* sees 2 GPU.*: 0,1"):
        distributed._check_gpu(RankEnv(2, 8, 2, 4), gpus=2)


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
"""Steps of 144 MB each; prints the page faults of ten of them, and kB in huge pages."""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not GNU's")
def test_a_rank_on_a_cpu_keeps_the_memory_of_a_step_for_the_next() -> None:
    ours = (*LAUNCHER_VARIABLES, "THP_MEM_ALLOC_ENABLE")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {"PYTHONPATH": str(ROOT)}
    (kept, huge), (fresh, _) = (
        map(int, subprocess.check_output([sys.executable, "-c", STEPS, who], env=environment, text=True).split())
        for who in ("rank", "other")
    )
    assert 20 * kept < fresh
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
