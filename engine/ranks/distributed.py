"""Ranks and devices.

One process per GPU (or per `--num_gpus` on a CPU). The `deepspeed` launcher, `torchrun` and SLURM's `srun` say through
the environment which rank a process is; without them there is one rank, which needs neither a port nor MPI. PyTorch's
process group is made here and DeepSpeed takes it as it is: NCCL on GPUs, gloo on a CPU.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from pipelines.basics.processes import cores

T = TypeVar("T")
PREPARATION_LIMIT = timedelta(hours=12)  # one rank of a node prepares the data, or has more cases, while others wait

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h: bytes to keep at most, and bytes of a mapping of its own


class Place(NamedTuple):
    """What a launcher says of a process: its rank of so many, and its local rank of so many on this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_on_node: int = 1


@dataclass(frozen=True)
class Ranks:
    """Who this process is.

    Attributes:
        rank: place among all processes. world_size: how many there are. local_rank: place on this node.
        device: where this process computes. ranks_on_node: how many there are on this node.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    ranks_on_node: int = 1

    @property
    def is_first(self) -> bool:
        """The one rank that logs and writes."""
        return self.rank == 0


class PeerFailed(ValueError):
    """Another rank could not do its part; that rank tells why."""


def read_place(variables: Mapping[str, str] | None = None) -> Place:
    """The place of this process, from the variables of `torchrun` and `deepspeed`, or else of SLURM's `srun`.

    SLURM's are heeded where `MASTER_ADDR` is given: a shell inside an allocation has them too.

    Args:
        variables: None takes the process's environment.

    Raises:
        ValueError: variables that are missing, no numbers, or contradict each other.
    """
    variables = os.environ if variables is None else variables
    if "RANK" in variables:
        on_node = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in variables), "WORLD_SIZE")
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", on_node)
        rank, world_size, ranks_on_node = (_number(name, variables) for name in ("RANK", "WORLD_SIZE", on_node))
        return _checked(Place(rank, world_size, _number("LOCAL_RANK", variables, 0), ranks_on_node), names)
    if "MASTER_ADDR" in variables and _number("SLURM_NTASKS", variables, 1) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        rank, world_size, local_rank = (_number(name, variables) for name in names[:3])
        return _checked(Place(rank, world_size, local_rank, _tasks_on_node(variables)), names)
    if _number("WORLD_SIZE", variables, 1) > 1:
        raise ValueError(
            f"WORLD_SIZE is {variables['WORLD_SIZE']} and RANK is not set: start every rank by deepspeed, torchrun or "
            "srun, or unset WORLD_SIZE to train on one"
        )
    return Place()


def init_ranks(device: str = "auto") -> Ranks:
    """Join the process group.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a GPU that PyTorch can use; more ranks on this node than GPUs; variables of a
            launcher that contradict each other.
        ConnectionError: there is no network between the ranks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--train.device cuda: PyTorch sees no GPU here; use --train.device auto or cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if not use_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is first imported
        keep_memory()
    place = read_place()
    export(place)
    if place.ranks_on_node > 1 and "OMP_NUM_THREADS" not in os.environ:
        # Each would start as many as there are cores: so two ranks on two cores trained at less than half the speed.
        torch.set_num_threads(max(1, cores() // place.ranks_on_node))
    if use_cuda:
        _check_gpu(place, torch.cuda.device_count())
        torch.cuda.set_device(place.local_rank)
    backend = "nccl" if use_cuda else "gloo"
    if not dist.is_initialized():
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        try:
            dist.init_process_group(backend, **(alone if place.world_size == 1 else {}))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"rank {place.rank}: no {backend} process group ({reason}); is the network interface there that "
                "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names, and does this host's name have an address?"
            ) from error
    computes_on = torch.device("cuda", place.local_rank) if use_cuda else torch.device("cpu")
    return Ranks(place.rank, place.world_size, place.local_rank, computes_on, place.ranks_on_node)


def keep_memory() -> None:
    """Let this process keep the memory that it frees, and ask for large pages: of a step on a CPU, a fifth of the time.

    A step frees its activations, and without this the kernel takes them back and hands them out anew, 4 KB by 4 KB.
    PyTorch looks at its variable when it makes its first tensor. Only the GNU C library has these settings.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return
    # Older ones refuse more than 32 MB. The other setting alone would leave this one at 128 KB for good.
    if library.mallopt(_M_MMAP_THRESHOLD, 2**30) or library.mallopt(_M_MMAP_THRESHOLD, 2**25):
        library.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def export(place: Place) -> None:
    """Set the variables that PyTorch and DeepSpeed read, whichever launcher started this process."""
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed insists on it, of one rank too
    if place.world_size > 1:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(place.rank), str(place.world_size)
        os.environ["LOCAL_WORLD_SIZE"] = str(place.ranks_on_node)
        os.environ.setdefault("MASTER_PORT", "29500")  # PyTorch's own choice; srun sets none


def gather(value: T, ranks: Ranks, is_patient: bool = False) -> list[T]:
    """Every rank's value, in order of rank, on every rank.

    Args:
        value: anything that pickles. is_patient: wait for ranks that are at work for `PREPARATION_LIMIT`, and not for
            ten minutes at most, as NCCL does.
    """
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    group = dist.new_group(backend="gloo", timeout=PREPARATION_LIMIT) if is_patient else None
    dist.all_gather_object(values, value, group=group)
    if group is not None:
        dist.destroy_process_group(group)
    return values


def first_on_node(work: Callable[[], T], ranks: Ranks) -> T:
    """Run `work` on one rank of each node, and on the others when it is done there, so that they find it done.

    Raises:
        ValueError, OSError: as `work` raised it; `PeerFailed` with its message on the other ranks.
        TimeoutError: a rank was lost, or one is at work for longer than `PREPARATION_LIMIT`.
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


def _number(name: str, variables: Mapping[str, str], default: int | None = None) -> int:
    """A variable's value; it must be set where there is no default."""
    value = variables.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        found = "not set" if value is None else f"{value!r}, which is no number"
        raise ValueError(f"{name} is {found}: deepspeed, torchrun and srun set it for each rank") from error


def _tasks_on_node(variables: Mapping[str, str]) -> int:
    """How many tasks of the step are on this node; SLURM writes "4(x2),3" for 4, 4 and 3."""
    listed = variables.get("SLURM_STEP_TASKS_PER_NODE")
    if listed is None:
        return _number("SLURM_NTASKS_PER_NODE", variables)
    counts: list[int] = []
    for part in listed.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {listed!r}, which should read like 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number("SLURM_NODEID", variables, 0)
    if node >= len(counts):
        raise ValueError(f"SLURM_NODEID is {node}, and SLURM_STEP_TASKS_PER_NODE {listed!r} lists {len(counts)} nodes")
    return counts[node]


def _checked(place: Place, names: tuple[str, ...]) -> Place:
    """The place, if its numbers can be true together.

    Raises:
        ValueError: naming the two variables that can't.
    """
    for few, many in ((0, 1), (2, 3)):
        if not 0 <= place[few] < place[many]:
            raise ValueError(
                f"{names[few]} is {place[few]} and {names[many]} {place[many]}: ranks count from 0 to one less than "
                "there are; is a variable left over from another job? unset it"
            )
    if place.ranks_on_node > place.world_size:
        raise ValueError(
            f"{names[3]} is {place.ranks_on_node} and {names[1]} {place.world_size}: a node can't hold more ranks than "
            "there are; is a variable left over from another job? unset it"
        )
    return place


def _check_gpu(place: Place, gpus: int) -> None:
    if place.local_rank >= gpus:
        raise ValueError(
            f"local rank {place.local_rank} has no GPU: there are {place.ranks_on_node} ranks on this node and PyTorch "
            f"sees {gpus} GPU(s) (CUDA_VISIBLE_DEVICES: {os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start as "
            "many ranks as GPUs, and under SLURM let each task see all of its node (--gres, not --gpus-per-task)"
        )
