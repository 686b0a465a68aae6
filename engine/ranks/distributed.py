"""The process group, and this process's device: one process per GPU (or per `--num_gpus` on a CPU).

PyTorch's process group is made here and DeepSpeed takes it as it is: NCCL on GPUs, gloo on a CPU.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from engine.ranks.rank_env import RankEnv, export_rank_env, read_rank_env
from pipelines.basics.machine import cores

log = logging.getLogger(__name__)
T = TypeVar("T")
PREPARATION_LIMIT = timedelta(hours=12)  # while one rank of a node prepares the data, or has more cases than others

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h: bytes to keep at most, and bytes of a mapping of its own


@dataclass(frozen=True)
class Ranks:
    """Who this process is, among all and on this node, and the device on which it computes."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    ranks_on_node: int = 1

    @property
    def is_first(self) -> bool:
        """The one rank that logs and writes."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The GPU's name, or the processor's with the number of threads in use."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        about = Path("/proc/cpuinfo")
        named = re.search(r"^model name\s*: (.+)", about.read_text(), re.MULTILINE) if about.is_file() else None
        return f"CPU, {named[1] if named else platform.machine()}, {torch.get_num_threads()} thread(s)"


class PeerFailed(ValueError):
    """Another rank could not do its part; it reports why."""


def init_ranks(device: str = "auto") -> Ranks:
    """Join the process group.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a GPU that PyTorch can use; more ranks on this node than GPUs; a launcher's variables
            that contradict each other.
        ConnectionError: there is no network between the ranks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--train.device cuda: PyTorch sees no GPU here; use --train.device auto or cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if not use_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is first imported
        keep_memory()
    env = read_rank_env()
    export_rank_env(env)
    if env.ranks_on_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        # By default each rank starts a thread per core: two ranks on two cores trained at less than half the speed.
        torch.set_num_threads(max(1, cores() // env.ranks_on_node))
    if use_cuda:
        _check_gpu(env, torch.cuda.device_count())
        torch.cuda.set_device(env.local_rank)
    if env.world_size > env.ranks_on_node and (address := _unreachable_address()):
        log.warning(
            "other nodes can't reach this one by its name, %s, which stands for %s here: set GLOO_SOCKET_IFNAME to the "
            "network interface that the nodes share (`ip -brief address` lists them)", socket.gethostname(), address,
        )  # fmt: skip
    backend = "nccl" if use_cuda else "gloo"
    if not dist.is_initialized():
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        try:
            dist.init_process_group(backend, **(alone if env.world_size == 1 else {}))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"rank {env.rank}: no {backend} process group ({reason}); does the network interface named by "
                "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME exist, and does this host's name have an address?"
            ) from error
    computes_on = torch.device("cuda", env.local_rank) if use_cuda else torch.device("cpu")
    return Ranks(env.rank, env.world_size, env.local_rank, computes_on, env.ranks_on_node)


def keep_memory() -> None:
    """Let this process keep the memory that it frees, and ask for large pages: a step on a CPU takes a fifth less time.

    A step frees its activations; without this the kernel takes them back and hands them out again, 4 KB by 4 KB.
    PyTorch reads its variable when it makes its first tensor. Only the GNU C library has these settings.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    # Older ones refuse more than 32 MB. The other setting alone would leave this one at 128 KB for good.
    if library.mallopt(_M_MMAP_THRESHOLD, 2**30) or library.mallopt(_M_MMAP_THRESHOLD, 2**25):
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def gather(value: T, ranks: Ranks, is_patient: bool = False) -> list[T]:
    """Every rank's value (anything that pickles), in order of rank, on every rank.

    If it `is_patient`, it waits `PREPARATION_LIMIT` for ranks that are still working, not NCCL's ten minutes.
    """
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    group = dist.new_group(backend="gloo", timeout=PREPARATION_LIMIT) if is_patient else None
    dist.all_gather_object(values, value, group=group)
    if group is not None:
        dist.destroy_process_group(group)
    return values


def gather_on_node(value: T, ranks: Ranks) -> list[T]:
    """The values of the ranks of this node, as `gather` gives them, waiting patiently; all ranks must call it."""
    first = ranks.rank - ranks.local_rank  # ranks are numbered node by node
    return gather(value, ranks, is_patient=True)[first : first + ranks.ranks_on_node]


def first_on_node(work: Callable[[], T], ranks: Ranks) -> T:
    """Run `work` on one rank of each node, then on the others, which find it done.

    Raises:
        ValueError, OSError: as `work` raised it; `PeerFailed` with its message on the other ranks.
        TimeoutError: a rank was lost, or one works for longer than `PREPARATION_LIMIT`.
    """
    result: T | None = None
    failure: Exception | None = None
    if ranks.local_rank == 0:
        try:
            result = work()
        except (ValueError, OSError) as error:
            failure = error
    if ranks.world_size > 1:
        try:
            messages = gather(str(failure) if failure else None, ranks, is_patient=True)
        except RuntimeError as error:
            raise TimeoutError(
                f"rank {ranks.rank} waited for the first rank of each node to prepare the data, and lost it or waited "
                f"for {PREPARATION_LIMIT}: see the messages above; launch/prepare.py prepares the data beforehand"
            ) from error
        elsewhere = next((message for message in messages if message), None)
        failure = failure or (PeerFailed(elsewhere) if elsewhere else None)
    if failure:
        raise failure
    return result if result is not None else work()


def _unreachable_address() -> str:
    """The loopback address that gloo takes for this node, because its name stands for it; else empty."""
    master = os.environ.get("MASTER_ADDR", "")
    if "GLOO_SOCKET_IFNAME" in os.environ or master == "localhost" or master.startswith("127."):
        return ""  # the last two: all "nodes" are this machine
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return ""  # gloo says so itself
    return address if address.startswith("127.") else ""


def _check_gpu(env: RankEnv, gpus: int) -> None:
    if env.local_rank >= gpus:
        raise ValueError(
            f"local rank {env.local_rank} has no GPU: there are {env.ranks_on_node} ranks on this node and PyTorch "
            f"sees {gpus} GPU(s) (CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start as "
            "many ranks as GPUs, and under SLURM let each task see all of its node (--gres, not --gpus-per-task)"
        )
