"""The estimate of a step's memory against what steps on real tensors take, and what is said when it was too much."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine import memory
from engine.config import Config
from engine.data import DataConfig
from engine.memory import HEADROOM, MemoryEstimate, out_of_memory_message, saved_bytes
from engine.optim import OptimConfig
from engine.precision import LOW_PRECISION
from engine.ranks.distributed import Ranks
from engine.sharding import BUCKET_ELEMENTS
from engine.step import LossConfig, TrainConfig, training_loss
from kernels import dispatch
from models import build_model

ROOT = Path(__file__).resolve().parent.parent
REGIONS = ((2, 3), (1, 2, 3), (3,))
TOLERANCES = {  # relative
    "saved bytes in float32": 0,
    "saved bytes in bf16": 1e-4,
    "a larger batch": 0.03,
    "the peak on a CPU": 0.25,
    "the peak on a GPU": 0.15,
}
SIZE = (32, 32, 16)
WIDTHS: dict[str, dict[str, Any]] = {
    "unetr": {"feature_size": 4, "hidden_size": 40, "mlp_dim": 56, "num_heads": 6},
    "unetr_monai": {"feature_size": 4, "hidden_size": 40, "mlp_dim": 56, "num_heads": 5},
    "unet": {"feature_size": 4},
}
GB = 10**9


def network(name: str, size: tuple[int, int, int] = SIZE, **widths: int) -> torch.nn.Module:
    return build_model(name, in_channels=4, img_size=size, **(widths or WIDTHS[name]))


def batch(count: int, size: tuple[int, int, int], device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.randn(count, 4, *size, device=device)
    return image, torch.randint(0, 4, (count, *size), dtype=torch.uint8, device=device)


def estimate(
    model: torch.nn.Module, count: int, size: tuple[int, int, int] = SIZE, device: str = "cpu",
    train: Mapping[str, Any] = {}, world_size: int = 1, ema_decay: float = 0.0,
) -> MemoryEstimate:  # fmt: skip
    """Of so many crops of four channels; `train` are options of `TrainConfig`."""
    train_config = TrainConfig(**{"batch_size": count, "precision": "float32", **train})
    optim = OptimConfig(ema_decay=ema_decay)
    config = Config(data=DataConfig(crop_size_voxels=size), train=train_config, optim=optim)
    return memory.estimate(model, config, 4, REGIONS, Ranks(0, world_size, 0, torch.device(device)))


def run_forward(model: torch.nn.Module, image: torch.Tensor, labels: torch.Tensor, precision: str) -> torch.Tensor:
    """Forward and loss, as a training step runs them."""
    dtype = LOW_PRECISION.get(precision)
    with torch.autocast(image.device.type, dtype, enabled=dtype is not None):
        logits = model(image)
    return training_loss(logits, labels, REGIONS, LossConfig()).loss


def saved_by_real_tensors(name: str, count: int, precision: str) -> int:
    model = network(name)
    with saved_bytes([*model.parameters(), *model.buffers()]) as saved:
        run_forward(model, *batch(count, SIZE), precision)
    return sum(saved.values())


def known(**changes: Any) -> MemoryEstimate:
    """60 GB: 10 lasting, 50 of activations, of which 2 don't grow with the batch."""
    plain = MemoryEstimate(
        weights=2 * GB, gradients=2 * GB, optimizer=4 * GB, buffers=0, ema=0, volumes=3 * GB, batches=GB, saved=40 * GB,
        activations=50 * GB, activations_per_crop=6 * GB, accumulates=False, crop=(4, 128, 128, 64),
        train=TrainConfig(batch_size=8, precision="float32", cuda_graph=True), world_size=4,
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", WIDTHS)
def test_fake_tensors_save_the_bytes_that_real_ones_do(name: str, precision: str) -> None:
    """In bf16 but for a group norm's statistics: float32, which PyTorch's fake ones take for bf16."""
    within = TOLERANCES[f"saved bytes in {precision}"]
    for count in (1, 3):
        guess = estimate(network(name), count, train={"precision": precision})
        assert guess.saved == pytest.approx(saved_by_real_tensors(name, count, precision), rel=within, abs=0)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_frozen_weights_have_no_gradients_moments_or_average(stage: int) -> None:
    options: dict[str, Any] = {"train": {"zero_stage": stage}, "ema_decay": 0.9, "world_size": 2}
    model = network("unet")
    whole = estimate(model, 1, **options)
    frozen = max(model.parameters(), key=torch.numel).requires_grad_(False).numel()
    part = estimate(model, 1, **options)
    assert part.weights == whole.weights
    shares = {"gradients": stage >= 2, "optimizer": stage > 0, "ema": stage == 3}
    for name, is_sharded in shares.items():
        per_weight = {"gradients": 4, "optimizer": 12 if stage else 8, "ema": 4}[name]
        spared = getattr(whole, name) - getattr(part, name)
        assert spared == pytest.approx(frozen * per_weight / (2 if is_sharded else 1), abs=8), name


@pytest.mark.slow
def test_through_the_kernels_too_they_save_exactly_what_real_ones_do() -> None:
    """In Triton's interpreter, which a process chooses before it imports triton."""
    code = (
        "import test_memory as t; from kernels import dispatch; assert dispatch.INTERPRETED\n"
        "guess = t.estimate(t.network('unetr'), 1)\n"
        "print(guess.saved, t.saved_by_real_tensors('unetr', 1, 'float32'))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    guess, real = done.stdout.split()
    assert guess == real
    plain = estimate(network("unetr"), 1)
    assert int(guess) < 0.8 * plain.saved


@pytest.mark.parametrize(
    ("name", "size", "widths"),
    [
        ("unetr", (64, 64, 32), {"feature_size": 8, "hidden_size": 96, "mlp_dim": 192, "num_heads": 4}),
        ("unet", (64, 64, 32), {"feature_size": 16}),
    ],
)
def test_the_peak_of_real_steps_is_within_a_quarter_of_the_estimate(name: str, size: Any, widths: Any) -> None:
    """Two optimizer steps in float32, every allocation of PyTorch's on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = network(name, size, **widths)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            run_forward(model, *batch(2, size), "float32").backward()
            optimizer.step()
            optimizer.zero_grad()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak = np.cumsum(sizes).max()
    guess = estimate(model, 2, size)
    assert guess.total == pytest.approx(peak, rel=TOLERANCES["the peak on a CPU"])


def test_a_window_takes_its_input_and_what_is_alive_at_once() -> None:
    """Beside 4 channels of input 8 before and 8 after the ReLU; more than the 8 and 3 around the last convolution."""
    model = torch.nn.Sequential(torch.nn.Conv3d(4, 8, 1), torch.nn.ReLU(), torch.nn.Conv3d(8, 3, 1))
    assert memory.forward_bytes(model, SIZE, 4) == 4 * (4 + 8 + 8) * 32 * 32 * 16


@pytest.mark.parametrize("name", WIDTHS)
def test_a_window_takes_as_much_as_one_of_real_tensors(name: str) -> None:
    """But for the workspaces of convolutions, which the allocator's peak has and no operation returns."""
    model, image = network(name).eval(), batch(1, SIZE)[0]
    with memory.LiveBytes([*model.parameters(), *model.buffers()]) as live, torch.no_grad():
        live.count(image)
        model(image)
    assert memory.forward_bytes(model, SIZE, 4) == live.peak


def test_a_gigabyte_model_costs_seconds_and_no_memory_to_ask_about() -> None:
    with torch.device("meta"):
        model = build_model("unetr", in_channels=4)
    before = psutil.Process().memory_info().rss
    guess = estimate(model, 2, (128, 128, 64))
    assert guess.total > 3 * GB
    assert psutil.Process().memory_info().rss - before < 0.2 * GB


def test_in_bf16_a_crop_takes_less_through_autocast() -> None:
    full, half = (estimate(network("unetr"), 2, train={"precision": precision})
                  for precision in ("float32", "bf16"))  # fmt: skip
    assert half.activations_per_crop < 0.95 * full.activations_per_crop


def test_the_estimate_of_a_batch_predicts_that_of_a_larger_one() -> None:
    for precision in ("float32", "bf16"):
        two, nine = (estimate(network("unetr"), count, train={"precision": precision}) for count in (2, 9))
        assert two.activations + 7 * two.activations_per_crop == pytest.approx(
            nine.activations, rel=TOLERANCES["a larger batch"]
        )


def test_parts_are_sharded_as_the_zero_stage_says() -> None:
    model = network("unet")
    size = sum(parameter.numel() for parameter in model.parameters()) * 4
    trained = size - sum(bias.numel() for bias in model.parameters() if not bias.requires_grad) * 4
    shard, of_all, bucket = -(-trained // 4), -(-size // 4), 4 * BUCKET_ELEMENTS

    def parts(stage: int) -> tuple[int, ...]:
        it = estimate(model, 1, train={"zero_stage": stage}, world_size=4, ema_decay=0.9)
        return it.weights, it.gradients, it.optimizer, it.buffers, it.ema

    assert trained < size
    assert parts(0) == (size, trained, 2 * trained, 0, trained)
    assert parts(1) == (size, trained, 3 * shard, bucket, trained)
    assert parts(2) == (size, shard, 3 * shard, bucket, trained)
    assert parts(3) == (size + of_all, shard, 3 * shard, bucket, shard)


def test_gradients_accumulated_or_kept_in_buckets_are_there_during_the_forward() -> None:
    ways: tuple[dict[str, Any], ...] = ({}, {"train": {"accumulate_steps": 2}}, {"world_size": 2})
    once, twice, on_two_ranks = (estimate(network("unet"), 1, **way) for way in ways)
    assert twice.total == on_two_ranks.total == once.total + once.gradients


def test_batches_on_their_way_take_memory_of_a_gpu_beside_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """14 sets of crops: 6 of the loader, 2 that DALI was fed, 3 results and 3 in work."""
    live = SimpleNamespace(peak=9 * GB, gradients=0)
    monkeypatch.setattr(memory, "_simulate", lambda *args, **keywords: (args[-1] * GB, live))  # PyTorch for a CPU can't
    one, three = (estimate(network("unet"), count, device="cuda") for count in (1, 3))
    voxels = SIZE[0] * SIZE[1] * SIZE[2]
    assert one.batches == 14 * voxels * (4 * 4 + 1) and three.batches == 3 * one.batches
    assert estimate(network("unet"), 1).batches == 0
    assert one.total == dataclasses.replace(one, batches=0).total + one.batches


@pytest.mark.parametrize("accumulates", [False, True])
def test_the_largest_batch_fits_and_one_crop_more_does_not(accumulates: bool) -> None:
    it, limit = known(accumulates=accumulates, gradients=7 * GB), 139 * GB
    fits = it.largest_batch(limit)

    def total(count: int) -> int:
        more = count - it.train.batch_size
        batches = it.batches + more * it.batches // it.train.batch_size
        activations = it.activations + more * it.activations_per_crop
        return dataclasses.replace(it, batches=batches, activations=activations).total

    assert total(fits) <= limit * (1 - HEADROOM) < total(fits + 1)


def test_nothing_fits_where_weights_alone_do_not() -> None:
    assert known().largest_batch(9 * GB) == 0
    assert known(weights=200 * GB).largest_batch(139 * GB) == 0
    assert known(gradients=120 * GB).largest_batch(139 * GB) == 0
    assert known(activations=53 * GB).largest_batch(27 * GB // 2) == 0
    assert "not even one crop would fit" in known().describe(9 * GB, "cpu")


def test_the_line_before_training_names_every_part_and_the_batch_that_fits() -> None:
    assert known().describe(139 * GB, "cuda:0") == (
        "memory: weights 2.0 GB, gradients 2.0 GB, optimizer 4.0 GB, activations 50.0 GB (6.0 GB per crop), "
        "volumes 3.0 GB, batches 1.0 GB; about 60.0 GB of 139 GB on cuda:0: --train.batch_size up to 18 would fit"
    )
    assert "EMA 3.9 MB" in known(ema=3_900_000).describe(139 * GB, "cuda:0")
    assert "EMA 0.25 GB" in known(ema=GB // 4).describe(139 * GB, "cuda:0")


def test_the_message_says_what_to_lower_and_to_what() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
    text = out_of_memory_message(error, known(), torch.device("cpu"), 40 * GB)
    assert "\n" not in text and "More" not in text
    for part in ("Tried to allocate 2.00 GiB", "about 60.0 GB of 40.0 GB", "--train.batch_size 4,",
                 "--train.precision bf16,", "--train.cuda_graph false,", "'[96,96,64]', which takes 56%",
                 "--train.zero_stage 2, which saves about 4.5 GB per rank",
                 "--data.residence mapped, which saves the 3.0 GB"):  # fmt: skip
        assert part in text, (part, text)


def test_the_message_omits_what_is_done_already() -> None:
    it = known(train=TrainConfig(precision="bf16", zero_stage=2, batch_size=1), volumes=0, crop=(4, 32, 32, 32))
    text = out_of_memory_message(MemoryError(), it, torch.device("cpu"), 40 * GB)
    for option in ("precision bf16,", "cuda_graph", "zero_stage 2,", "--data.residence", "--data.crop_size_voxels"):
        assert option not in text, (option, text)
    assert "MemoryError" in text and text.endswith("use a device with more memory")


def test_what_should_have_fitted_is_halved() -> None:
    text = out_of_memory_message(MemoryError(), known(), torch.device("cpu"), 139 * GB)
    assert "--train.batch_size 4, with --train.accumulate_steps" in text


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("name", WIDTHS)
def test_the_peak_on_a_gpu_is_within_15_percent_of_the_estimate(name: str, precision: str) -> None:
    dispatch.use("auto", "cuda")
    size = (128, 128, 64)
    before = torch.cuda.memory_allocated()
    model = build_model(name, in_channels=4, img_size=size).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    image, labels = batch(2, size, "cuda")
    if precision == "bf16":
        image = image.bfloat16()
    image = image.contiguous(memory_format=torch.channels_last_3d)
    guess = estimate(model, 2, size, "cuda", {"precision": precision})
    for step in range(3):
        if step == 1:  # the first finds cuDNN's algorithms
            torch.cuda.reset_peak_memory_stats()
        run_forward(model, image, labels, precision).backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = torch.cuda.max_memory_allocated() - before  # no loader, so no batches on their way
    assert guess.total - guess.batches == pytest.approx(peak, rel=TOLERANCES["the peak on a GPU"])
