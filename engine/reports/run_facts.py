"""Facts about a run, each a text with a name: its data, how long it took, and the environment it ran in."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipelines.labels import REGIONS, Coding

if TYPE_CHECKING:
    from engine.config import Config
    from engine.data import DataConfig
    from engine.ranks.distributed import Ranks

ROOT = Path(__file__).resolve().parents[2]


def data_facts(
    config: DataConfig, train: Sequence[str], val: Sequence[str], modalities: Sequence[str], coding: Coding
) -> dict[str, str]:
    """What a run was trained on.

    Args:
        config: of the data. train, val: names of the cases. modalities: in channel order. coding: of the labels.
    """
    fold = f" (fold {config.fold} of {config.folds}, counted from 0)" if config.folds else ""
    tissues = ", ".join(f"{value} {tissue}" for value, tissue in sorted(coding.tissues.items()))
    regions = ", ".join(
        f"{region} {' + '.join(map(str, values))}" for region, values in zip(REGIONS, coding.regions, strict=True)
    )
    return {
        "scans": config.root.resolve().name if config.root else "synthetic",
        "cases": f"{len(train)} for training, {len(val)} for validation{fold}",
        "modalities": ", ".join(modalities),
        "spacing": f"{' x '.join(f'{mm:g}' for mm in config.spacing_mm)} mm",
        "crop": f"{' x '.join(map(str, config.crop_size_voxels))} voxels",
        "labels": f"{coding.release}: {tissues}",
        "regions": f"{regions} (label values)",
    }


def timing_facts(history: Sequence[Mapping[str, Any]], epoch_samples: int) -> dict[str, str]:
    """How long training and validation took.

    Args:
        history: rows of `log.csv`, in order of epoch. epoch_samples: crops per epoch over all ranks.
    """
    timed = [row for row in history if row["samples_per_s"] > 0]  # 0: resumed after the epoch's last step
    seconds = [epoch_samples / row["samples_per_s"] for row in timed]
    validations = [row["val_seconds"] for row in history if "val_seconds" in row]
    skipped = sum(row["skipped_steps"] for row in history)
    steps = f"{history[-1]['step']:,}"
    facts = {"epochs": str(len(history)), "steps": f"{steps} ({skipped} skipped)" if skipped else steps}
    if timed:
        first = f" (the first {seconds[0]:,.1f} s)" if len(timed) > 1 else ""
        waited = sum(row["data_wait"] * duration for row, duration in zip(timed, seconds))
        facts["training"] = f"{statistics.median(seconds):,.1f} s per epoch{first}"
        facts["throughput"] = f"{statistics.median(row['samples_per_s'] for row in timed):.2f} crops/s over all ranks"
        facts["waiting for data"] = f"{100 * waited / sum(seconds):.1f} % of the training time"
    if validations:
        facts["validation"] = f"{statistics.median(validations):,.1f} s each, {len(validations)} times"
    return facts | {"total": _clock(sum(seconds) + sum(validations))}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def environment_facts(config: Config, ranks: Ranks, kernels: str) -> dict[str, str]:
    """What a run is computed with.

    Args:
        config: of the run. ranks: who this process is. kernels: the result of `dispatch.use`.
    """
    train = config.train
    versions = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda,
        "cuDNN": str(torch.backends.cudnn.version()) if torch.backends.cudnn.is_available() else None,
        "Triton": _version("triton"),
        "MONAI": _version("monai"),
        "DALI": _version("nvidia-dali-cuda"),
        "DeepSpeed": _version("deepspeed"),
        "glioforge": _version("glioforge"),
    }
    nodes = "one node" if ranks.ranks_on_node == ranks.world_size else f"{ranks.ranks_on_node} of them on this node"
    return {
        "device": _device_name(ranks.device),
        "ranks": "1" if ranks.world_size == 1 else f"{ranks.world_size}, {nodes}",
        "kernels": kernels.removeprefix("kernels: "),
        "precision": train.precision,
        "ZeRO stage": str(train.zero_stage),
        "seed": str(train.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "commit": _commit(),
        "system": platform.platform(),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"CPU, {names[0] if names else platform.machine()}, {torch.get_num_threads()} thread(s)"


def _version(prefix: str) -> str | None:
    """Version of the installed distribution of that name, or of that name followed by a CUDA version."""
    for found in metadata.distributions():
        name = (found.metadata["Name"] or "").lower()
        if name == prefix or name.removeprefix(prefix).isdigit():
            return found.version
    return None


def _commit() -> str:
    """Of the checkout that the program runs from, or else `GLIOFORGE_COMMIT`."""
    commit = ""
    if (ROOT / ".git").exists():  # if not, git would report a repository around this folder
        command = ["git", "describe", "--always", "--dirty"]
        try:
            commit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            commit = ""
    return commit or os.environ.get("GLIOFORGE_COMMIT") or "unknown"
