"""What a run writes to go on from, and what its users take away.

    checkpoints/last/     everything that training needs to continue, in DeepSpeed's format
    checkpoints/last.pt   weights, model and data settings of the same moment
    checkpoints/best.pt   the same of the epoch with the best validation Dice

A `.pt` file holds plain values and tensors and loads with `torch.load(weights_only=True)`. Each write goes to another
name first and is moved into place when complete, so that a crash leaves the previous one whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.distributed import Ranks

log = logging.getLogger(__name__)

FORMAT = 1


def save_weights(path: Path, model: torch.nn.Module, about: dict[str, Any]) -> None:
    """Write weights for evaluation and prediction.

    Args:
        path: the `.pt` file. model: the plain module. about: plain values: configuration, coding, metrics.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({"format": FORMAT, "weights": model.state_dict(), **about}, partial)
    os.replace(partial, path)


def load_weights(path: Path) -> dict[str, Any]:
    """Read what `save_weights` wrote, onto the CPU, without running code from the file.

    Raises:
        ValueError: no such file, another format, or a damaged one.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}; a run writes checkpoints/best.pt and checkpoints/last.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} can't be read as a checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of this program's format {FORMAT}")
    return content


def save_state(engine: Any, folder: Path, state: dict[str, Any], ranks: Ranks, zero_stage: int) -> None:
    """Write `folder/last` on every rank: weights, optimizer, schedule and `state` (plain values)."""
    engine.save_checkpoint(str(folder), tag="last.partial", client_state=state, save_latest=False)
    dist.barrier()
    if ranks.is_first:
        partial, last, previous = (folder / name for name in ("last.partial", "last", "last.previous"))
        (partial / "ranks.json").write_text(json.dumps({"world_size": ranks.world_size, "zero_stage": zero_stage}))
        shutil.rmtree(previous, ignore_errors=True)
        if last.exists():
            last.rename(previous)
        partial.rename(last)
        shutil.rmtree(previous, ignore_errors=True)
    dist.barrier()


def load_state(engine: Any, folder: Path, ranks: Ranks, zero_stage: int) -> dict[str, Any]:
    """Load `folder/last` into the engine, or the one before where a crash came between the two moves.

    Returns:
        The `state` that was saved.

    Raises:
        ValueError: neither is there; saved by another number of ranks or at another ZeRO stage; another model.
    """
    tag = next((tag for tag in ("last", "last.previous") if (folder / tag / "ranks.json").is_file()), None)
    if tag is None:
        raise ValueError(f"--resume: no checkpoint in {folder}; the run ended before it wrote one")
    saved = json.loads((folder / tag / "ranks.json").read_text())
    found = {"world_size": ranks.world_size, "zero_stage": zero_stage}
    if saved != found and (saved["zero_stage"] or zero_stage):
        raise ValueError(
            f"--resume: {folder / tag} was saved by {saved['world_size']} rank(s) at ZeRO stage {saved['zero_stage']}, "
            f"this is {found['world_size']} at stage {found['zero_stage']}; optimizer states are sharded by both, so "
            "resume with the same --num_gpus and --train.zero_stage"
        )
    if saved != found:
        log.warning("saved by %d rank(s), resumed by %d: a step now has another number of crops",
                    saved["world_size"], found["world_size"])  # fmt: skip
    try:
        _, state = engine.load_checkpoint(str(folder), tag=tag)
    except RuntimeError as error:
        raise ValueError(f"--resume: {folder / tag} holds the weights of another model: {error}") from error
    return state
