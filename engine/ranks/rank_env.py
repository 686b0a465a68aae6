"""Which rank a process is, as its launcher's environment variables say.

`deepspeed` and `torchrun` set RANK and its companions, SLURM's `srun` its own; without a launcher there is one rank,
which needs neither a port nor MPI.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple


class RankEnv(NamedTuple):
    """Rank and number of ranks, in the job and on this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_on_node: int = 1


def read_rank_env() -> RankEnv:
    """Read the variables of `torchrun` and `deepspeed`, or else those of `srun`.

    SLURM's count only where `MASTER_ADDR` is set: a shell inside an allocation has them too.

    Raises:
        ValueError: variables that are missing, not numbers, or contradict each other.
    """
    if "RANK" in os.environ:
        on_node = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in os.environ), "WORLD_SIZE")
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", on_node)
        rank, world_size, ranks_on_node = map(_number, ("RANK", "WORLD_SIZE", on_node))
        return _checked(RankEnv(rank, world_size, _number("LOCAL_RANK", 0), ranks_on_node), names)
    if "MASTER_ADDR" in os.environ and _number("SLURM_NTASKS", 1) > 1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
        rank, world_size, local_rank = map(_number, names[:3])
        return _checked(RankEnv(rank, world_size, local_rank, _tasks_on_node()), names)
    if _number("WORLD_SIZE", 1) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and RANK is not set: start every rank with deepspeed, torchrun "
            "or srun, or unset WORLD_SIZE to train on one"
        )
    return RankEnv()


def export_rank_env(env: RankEnv) -> None:
    """Set the variables that PyTorch and DeepSpeed read, whichever launcher started this process."""
    os.environ["LOCAL_RANK"] = str(env.local_rank)  # DeepSpeed insists on it, of one rank too
    if env.world_size > 1:
        os.environ["RANK"], os.environ["WORLD_SIZE"] = str(env.rank), str(env.world_size)
        os.environ["LOCAL_WORLD_SIZE"] = str(env.ranks_on_node)
        os.environ.setdefault("MASTER_PORT", "29500")  # PyTorch's own choice; srun sets none


def _number(name: str, default: int | None = None) -> int:
    value = os.environ.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        found = "not set" if value is None else f"{value!r}, which is not a number"
        raise ValueError(f"{name} is {found}: deepspeed, torchrun and srun set it for each rank") from error


def _tasks_on_node() -> int:
    """Tasks of the step on this node; SLURM writes "4(x2),3" for 4, 4 and 3."""
    listed = os.environ.get("SLURM_STEP_TASKS_PER_NODE")
    if listed is None:
        return _number("SLURM_NTASKS_PER_NODE")
    counts: list[int] = []
    for part in listed.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE is {listed!r}, which should read like 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    node = _number("SLURM_NODEID", 0)
    if node >= len(counts):
        raise ValueError(f"SLURM_NODEID is {node}, and SLURM_STEP_TASKS_PER_NODE {listed!r} lists {len(counts)} nodes")
    return counts[node]


def _checked(env: RankEnv, names: tuple[str, ...]) -> RankEnv:
    """The ranks, if their numbers fit together; `names` are the variables that they come from."""
    for few, many, is_right, rule in (
        (0, 1, 0 <= env.rank < env.world_size, "ranks count from 0 to one less than their number"),
        (2, 3, 0 <= env.local_rank < env.ranks_on_node, "ranks count from 0 to one less than their number"),
        (3, 1, env.ranks_on_node <= env.world_size, "a node can't hold more ranks than the job has"),
    ):
        if not is_right:
            raise ValueError(
                f"{names[few]} is {env[few]} and {names[many]} {env[many]}: {rule}; is a variable left over from "
                "another job? unset it"
            )
    return env
