"""Ranks, devices and DeepSpeed.

One process per GPU (or per `--num_gpus` on a CPU). The `deepspeed` launcher and `torchrun` say through the environment
which rank a process is; without them there is one rank, which needs neither a port nor MPI. PyTorch's process group is
made here and DeepSpeed takes it as it is: NCCL on GPUs, gloo on a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
PREPARATION_LIMIT = timedelta(hours=12)  # one rank of a node prepares the data while the others wait


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


def init_ranks(device: str = "auto") -> Ranks:
    """Join the process group.

    Args:
        device: "auto" (a GPU where there is one), "cpu" or "cuda".

    Raises:
        ValueError: "cuda" without a GPU that PyTorch can use.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--train.device cuda: PyTorch sees no GPU here; use --train.device auto or cpu")
    use_cuda = device != "cpu" and torch.cuda.is_available()
    if not use_cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is first imported
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))  # DeepSpeed insists on the variable
    if use_cuda:
        torch.cuda.set_device(local_rank)
    backend = "nccl" if use_cuda else "gloo"
    if not dist.is_initialized():
        if world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        else:
            dist.init_process_group(backend)
    computes_on = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    return Ranks(rank, world_size, local_rank, computes_on, int(os.environ.get("LOCAL_WORLD_SIZE", world_size)))


def gather(value: T, ranks: Ranks) -> list[T]:
    """Every rank's value, in order of rank, on every rank."""
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def first_on_node(work: Callable[[], T], ranks: Ranks) -> T:
    """Run `work` on one rank of each node, and on the others when it is done there, so that they find it done.

    Raises:
        ValueError, OSError: as `work` raised it; a ValueError with its message on the other ranks.
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
        messages: list[str | None] = [None] * ranks.world_size
        try:
            group = dist.new_group(backend="gloo", timeout=PREPARATION_LIMIT)
            dist.all_gather_object(messages, str(failure) if failure else None, group=group)
        except RuntimeError as error:
            raise TimeoutError(
                f"rank {ranks.rank} waited for the first rank of each node to prepare the data, and lost it or waited "
                f"for {PREPARATION_LIMIT}: see the messages above; launch/prepare.py prepares the data beforehand"
            ) from error
        dist.destroy_process_group(group)
        elsewhere = next((message for message in messages if message), None)
        failure = failure or (ValueError(elsewhere) if elsewhere else None)
    if failure:
        raise failure
    return result if result is not None else work()


def deepspeed_engine(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    batch_size: int,
    zero_stage: int,
) -> Any:
    """The model under DeepSpeed: gradients averaged over ranks, optimizer states sharded from ZeRO 1 on.

    Args:
        model: float32 weights, on the device already.
        optimizer: of its parameters. schedule: of the optimizer, stepped by the engine after each step.
        batch_size: crops per rank and step.
        zero_stage: 0, 1 or 2.

    Returns:
        `deepspeed.DeepSpeedEngine`.
    """
    import deepspeed
    import deepspeed.ops

    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # Left to itself, DeepSpeed probes all its ops at start and compiles this one, for which it wants ninja and a
        # C++ compiler on PATH.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=schedule,
        config={
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": 1,
            "zero_optimization": {"stage": zero_stage},
            "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at norm 1.0 unless told otherwise
            "steps_per_print": 1_000_000_000,  # the trainer logs
        },
    )
    return engine
