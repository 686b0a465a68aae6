"""Sliding window over a whole volume: ours beside MONAI's.

    python -m benchmarks.bench_inference        a table, and benchmarks/results/inference_<device>.json
    pytest --benchmark benchmarks/bench_inference.py -s

Volumes of four channels: a head of 0.58 x 0.75 x 0.92 of the volume's length on each axis, and zeros around it; 160 x
160 x 78 is the prepared grid of BraTS, 240 x 240 x 155 its own. Half overlap, Gaussian weights, two windows at once,
each z-scored on its own: by MONAI's `NormalizeIntensity` in "MONAI", so that "MONAI, our z-score" differs from ours by
the sliding window alone. The cheap network is a 1 x 1 x 1 convolution: what is left is the sliding window's own time.
The others are networks that predict.

The variants take turns, `ROUNDS` times after a first call each, in one process; a time is the median per volume. Memory
is the peak of PyTorch's allocator beyond the volume and the weights of the network, with the sum of weights that ours
keeps between volumes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.inferers.utils import sliding_window_inference
from monai.transforms import NormalizeIntensity
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.common import DEVICE, IS_GPU, machine, timed
from benchmarks.report import OURS
from engine import sliding_window
from engine.sliding_window import OVERLAP, WINDOWS_AT_ONCE, sliding_window_logits, zscore_nonzero
from models import build_model

PREPARED = (160, 160, 78)
NATIVE = (240, 240, 155)
SMALL = (96, 96, 64)
HEAD = (0.58, 0.75, 0.92)
CHANNELS = 4
REGIONS = 3
ROUNDS = 5

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class InferenceCase:
    """A network and its window.

    Fields:
        name: of the network. make: builds it. window, size: in voxels. dtype: of autocast; float32 is without.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    window: tuple[int, int, int]
    size: tuple[int, int, int] = PREPARED
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        window, size = ("x".join(map(str, voxels)) for voxels in (self.window, self.size))
        return f"{self.name}, {window} of {size}"

    def network(self) -> Network:
        """On the device, in evaluation, under autocast where `dtype` asks for it."""
        torch.manual_seed(0)
        model = self.make().to(DEVICE).eval()
        if self.dtype == torch.float32:
            return model

        def autocast(windows: Tensor) -> Tensor:
            with torch.autocast(DEVICE.type, self.dtype):
                return model(windows)

        return autocast


def demo_unetr() -> torch.nn.Module:
    """The network of `launch/configs/demo.yaml`."""
    widths = {"feature_size": 8, "hidden_size": 96, "mlp_dim": 192, "num_heads": 4}
    return build_model("unetr", CHANNELS, REGIONS, (48, 48, 48), **widths)


cheap = partial(torch.nn.Conv3d, CHANNELS, REGIONS, 1)
published_unetr = partial(build_model, "unetr", CHANNELS, REGIONS)
CASES = (
    InferenceCase("cheap network", cheap, (128, 128, 64)),
    InferenceCase("cheap network", cheap, (48, 48, 48), NATIVE),
    InferenceCase("demo UNETR", demo_unetr, (48, 48, 48), SMALL),
    *((InferenceCase("UNETR", published_unetr, (128, 128, 64)),) if IS_GPU else ()),
    *((InferenceCase("UNETR in bf16", published_unetr, (128, 128, 64), dtype=torch.bfloat16),) if IS_GPU else ()),
)


def volume(size: tuple[int, int, int]) -> Tensor:
    """A head in the middle, zeros around it, (1, C, X, Y, Z)."""
    axes = [torch.linspace(-1, 1, voxels) / head for voxels, head in zip(size, HEAD)]
    radius = torch.stack(torch.meshgrid(*axes, indexing="ij")).square().sum(0)
    image = 300 + 80 * torch.randn(1, CHANNELS, *size, generator=torch.Generator().manual_seed(0))
    return (image * (radius <= 1)).to(DEVICE)


def monais_zscore(windows: Tensor) -> Tensor:
    """MONAI's, of each window."""
    normalise = NormalizeIntensity(nonzero=True, channel_wise=True)
    return torch.stack([torch.as_tensor(normalise(window)) for window in windows])


def monai(zscore: Network, network: Network, image: Tensor, window: tuple[int, int, int]) -> Tensor:
    """MONAI's sliding window over windows z-scored by `zscore`."""

    def predictor(windows: Tensor) -> Tensor:
        return network(zscore(windows)).float()

    return sliding_window_inference(image, window, WINDOWS_AT_ONCE, predictor, overlap=OVERLAP, mode="gaussian")


Sliding = Callable[[Network, Tensor, tuple[int, int, int]], Tensor]
VARIANTS: dict[str, Sliding] = {
    OURS: sliding_window_logits,
    "MONAI": partial(monai, monais_zscore),
    "MONAI, our z-score": partial(monai, zscore_nonzero),
}


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that PyTorch held at one time for `run`, beyond what it held before."""
    if IS_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@torch.inference_mode()
def measure(case: InferenceCase, rounds: int = ROUNDS) -> list[dict[str, Any]]:
    """A row for each variant: median seconds of a volume, its rounds, peak memory, windows that the network saw."""
    network, image = case.network(), volume(case.size)
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    rows = {name: _first_call(run, network, image, case.window) for name, run in VARIANTS.items()}
    for _ in range(rounds):
        for name, run in VARIANTS.items():
            times[name].append(timed(partial(run, network, image, case.window)))
    return [
        {"case": str(case), "variant": name, "seconds": statistics.median(times[name]), "rounds": times[name], **row}
        for name, row in rows.items()
    ]


def _first_call(run: Sliding, network: Network, image: Tensor, window: tuple[int, int, int]) -> dict[str, int]:
    """Windows that the network saw, and the peak of memory, in a call that makes all that is kept."""
    seen = 0

    def counted(windows: Tensor) -> Tensor:
        nonlocal seen
        seen += len(windows)
        return network(windows)

    sliding_window._weights.cache_clear()
    peak = peak_bytes(partial(run, counted, image, window))
    return {"windows": seen, "peak_bytes": peak}


def print_table(rows: list[dict[str, Any]]) -> None:
    """Time, ratio to ours, windows and memory of each row."""
    table = Table(title=f"{machine()['device']}, {torch.get_num_threads()} threads")
    for column in ("", "", "ms per volume", "x ours", "windows predicted", "peak memory"):
        table.add_column(column, justify="right" if column else "left")
    ours = {row["case"]: row["seconds"] for row in rows if row["variant"] == OURS}
    for row in rows:
        ratio, peak = row["seconds"] / ours[row["case"]], f"{row['peak_bytes'] / 1e6:.0f} MB"
        milliseconds = f"{row['seconds'] * 1e3:.1f}"
        table.add_row(row["case"], row["variant"], milliseconds, f"{ratio:.2f}", str(row["windows"]), peak)
    Console(width=140).print(table)


def write_json(rows: list[dict[str, Any]]) -> Path:
    """The JSON file of all rows; its path."""
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results"))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"inference_{'gpu' if IS_GPU else 'cpu'}.json"
    about = {**machine(), "threads": torch.get_num_threads()}
    path.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    return path


@pytest.mark.parametrize("case", CASES, ids=str)
def bench_inference(benchmark: Any, case: InferenceCase) -> None:
    """Every variant in turns; the table is printed with `-s`."""
    rows = benchmark.pedantic(partial(measure, case, rounds=3), rounds=1)
    benchmark.extra_info["rows"] = rows
    print_table(rows)
    ours, monais, _ = rows
    assert ours["peak_bytes"] <= monais["peak_bytes"] and ours["seconds"] < monais["seconds"]


def main() -> int:
    """Measure everything and report."""
    parser = argparse.ArgumentParser(description="Sliding window over a volume, beside MONAI's.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="How often the variants take turns.")
    rounds = parser.parse_args().rounds
    rows = [row for case in CASES for row in measure(case, rounds)]
    print_table(rows)
    print(f"wrote {write_json(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
