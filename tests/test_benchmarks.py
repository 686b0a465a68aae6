"""The benchmarks without a GPU: decisions, files and messages from given times; limits of scaling."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from fake_gpu import FakeGpu
from rich.console import Console

from benchmarks import (
    bench_attention,
    bench_dice_ce,
    bench_instance_norm,
    bench_train,
    bench_up_conv,
    common,
    parity,
    report,
    scaling,
    step_profile,
    training,
    tune,
    workloads,
)
from benchmarks.common import MARGIN, Roofline
from engine.data import DataConfig, PhantomConfig
from engine.ranks.distributed import Ranks
from kernels import dispatch, self_tuning
from kernels.dice_ce import region_masks
from models import to_reference
from pipelines.phantom import make_phantoms

TOLERANCES = {"step": 1e-4, "float32": 1e-3, "bf16 or seed": 0.01, "Dice": 0.01}  # of losses, but for Dice

ROOT = Path(__file__).resolve().parent.parent
SMALL = tuple(workloads.AttentionWorkload(1, 2, tokens, 16, torch.float32) for tokens in (32, 64))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    """One that runs no kernels, with two small attention workloads; what is measured is the default."""
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path))
    gpu = FakeGpu(monkeypatch)
    monkeypatch.setattr(self_tuning, "milliseconds", lambda run, device: 1.0)
    monkeypatch.setattr(self_tuning, "agree", lambda found, expected: True)
    monkeypatch.setattr(dispatch.Launch, "run", lambda launch, config: None)
    monkeypatch.setattr(bench_attention, "WORKLOADS", SMALL)
    monkeypatch.setattr(tune, "BENCHES", {"attention": bench_attention})
    return gpu


KEYS = [launches[0].key for launches in map(workloads.launches, SMALL)]


def test_tuning_measures_every_configuration_and_way_of_all_workloads_once_more_each_time(gpu: FakeGpu) -> None:
    for again in range(2):
        before = self_tuning.CACHE.entries()
        tune.tune()
        found = self_tuning.CACHE.entries()
        assert not again or found == before
    ways = {name.split(" | ")[3]: entry["times"] for name, entry in found.items()}
    for key, workload in zip(KEYS, SMALL, strict=True):
        for direction in common.DIRECTIONS:
            assert list(ways[f"attention {key} ({direction})"]) == ["triton", *dispatch.SDPA_WAYS]
        for launch in workloads.launches(workload):
            if len(launch.candidates) > 1:
                assert len(ways[f"{launch.name} {key}"]) == len(launch.candidates)


def test_a_prior_has_what_this_gpu_measured_beside_those_of_others(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "priors.json").write_text('{"NVIDIA A100": {"a": 1}, "NVIDIA H100": {"b": 2}}')
    monkeypatch.setattr(self_tuning, "PRIORS_FILE", tmp_path / "priors.json")
    tune.tune()
    (tmp_path / "priors.json").write_text(tune.priors())
    table = json.loads((tmp_path / "priors.json").read_text())
    assert table["NVIDIA A100"] == {"a": 1} and len(table["NVIDIA H100"]) == len(self_tuning.CACHE.entries())
    known = self_tuning.Choices().own
    self_tuning.CACHE.clear()
    assert known == self_tuning.Choices().own


def test_interrupted_tuning_keeps_what_it_measured(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((1.0, 1.0, 1.0, 1.0))

    def stop(run: Any, device: Any) -> float:
        for time in times:
            return time
        raise KeyboardInterrupt

    monkeypatch.setattr(self_tuning, "milliseconds", stop)
    with pytest.raises(KeyboardInterrupt):
        tune.tune()
    assert self_tuning.CACHE.entries() and not dispatch._choices.is_measuring


def row(variant: str, seconds: float, direction: str = "forward", in_cache: bool = False) -> report.Measurement:
    path = "triton" if variant == report.OURS else ""
    return report.Measurement("op", "case", direction, variant, path, seconds, 1.0, 8, 0, 0.5, in_cache)


def test_a_case_is_lost_in_either_direction_beyond_the_margin() -> None:
    both = [row(report.OURS, 1.0, "forward + backward"), row("eager", 1.0, "forward + backward")]
    assert report.lost([row(report.OURS, 0.99 * MARGIN), row("eager", 1.0), *both]) == []
    (line,) = report.lost([row(report.OURS, 1.06), row("eager", 2.0), row("torch.compile", 1.0), *both])
    assert line == "op case forward: torch.compile is 1.06 x as fast as ours (triton path)"


def test_the_summary_has_ceilings_cases_and_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    roofline = Roofline(4e12, {"bfloat16": 8e14, "tf32 x 3": 1.2e14}, 50 * 2**20)
    rows = [row(report.OURS, 2e-6, in_cache=True), row("SDPA cuDNN", 1e-6), row("eager", 3e-6)]
    report.write_json(rows, roofline, {}, tmp_path / "rows.json")
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path / "rows.json")])
    assert report.main() == 0
    said = capsys.readouterr().out
    assert "copy 4000 GB/s; matrix products bfloat16 800, tf32 x 3 120 TFLOP/s" in said
    assert " 50 %*" in said and "0.50 x SDPA cuDNN" in said and "lost: op case forward: SDPA cuDNN" in said


@pytest.mark.parametrize("residual", ["none", "raw", "normalised"])
def test_passes_are_the_maps_that_the_kernels_take(residual: Literal["none", "raw", "normalised"]) -> None:
    workload = workloads.InstanceNormWorkload((2, 16, 64, 64, 64), residual=residual)
    counts = [0, 0]
    for launch in workloads.launches(workload):
        maps = [arg for arg in launch.args.values() if isinstance(arg, torch.Tensor) and arg.shape == workload.shape]
        counts["gradient" in launch.name] += len(maps)
    assert tuple(counts) == bench_instance_norm.PASSES[residual]


def test_the_loss_reads_every_voxel_once_each_way() -> None:
    voxels = 16 * 128 * 128 * 64
    work = [
        bench_dice_ce.work(workloads.DiceCEWorkload((16, 3, 128, 128, 64)), direction)
        for direction in common.DIRECTIONS
    ]
    assert [each.bytes for each in work] == [7 * voxels, (7 + 13) * voxels]


def test_a_doubling_moves_what_its_launches_take_without_partial_sums() -> None:
    workload = workloads.UpConvWorkload((2, 32, 64, 64, 32), 16, sliced=True)
    moved = [
        sum(arg.nbytes for name, arg in launch.args.items() if isinstance(arg, torch.Tensor) and name != "partial_ptr")
        for launch in workloads.launches(workload)
    ]
    forward, both = (bench_up_conv.work(workload, direction) for direction in common.DIRECTIONS)
    assert [forward.bytes, both.bytes] == [moved[0], sum(moved)]
    assert [forward.flops, both.flops] == [2 * 262144 * 32 * 128, 6 * 262144 * 32 * 128]


def test_a_gradient_to_time_with_has_the_strides_of_a_slice() -> None:
    workload = workloads.UpConvWorkload((1, 4, 2, 3, 2), 2, torch.float32, sliced=True)
    y = bench_up_conv.eager(*workload.inputs("cpu"))
    assert common._random_like(y).stride() == y.stride() != torch.randn_like(y).stride()


def test_passes_are_those_of_one_launch_where_a_sample_and_channel_fits_a_program() -> None:
    both = workloads.InstanceNormWorkload((2, 256, 8, 8, 4)), workloads.InstanceNormWorkload(workloads.LARGE)
    passes = [
        [bench_instance_norm.work(each, direction).bytes // (2 * torch.Size(each.shape).numel()) for each in both]
        for direction in common.DIRECTIONS
    ]
    assert passes == [[2, 3], [5, 8]]


def test_a_machine_without_git_takes_the_commit_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("GLIOFORGE_COMMIT", raising=False)
    assert common.machine.__wrapped__()["commit"] == "unknown"
    monkeypatch.setenv("GLIOFORGE_COMMIT", "abc1234")
    assert common.machine.__wrapped__()["commit"] == "abc1234"


def test_without_pytest_benchmark_tests_run_and_benchmarks_name_it() -> None:
    spec = importlib.util.spec_from_file_location("root_conftest", ROOT / "conftest.py")
    assert spec is not None and spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    plugins = SimpleNamespace(hasplugin=lambda name: False)
    for asked in (False, True):
        config = SimpleNamespace(option=SimpleNamespace(), pluginmanager=plugins, getoption={"--benchmark": asked}.get)
        says = pytest.raises(pytest.UsageError, match="pip install pytest-benchmark") if asked else nullcontext()
        with says:
            conftest.pytest_configure(config)


# ---------- training steps


TINY = training.Size((32, 32, 16), {"feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2})


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Iterator[training.Scene]:
    """A small network and two small synthetic scans."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIOFORGE_CACHE", str(folder))
        root = make_phantoms(folder / "scans", 2, (64, 64, 48))
        yield training.Scene.of("unetr_monai", TINY, root, ranks)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few steps as there can be."""
    monkeypatch.setattr(training, "SECONDS", 0.0)
    monkeypatch.setattr(training, "LEAST_STEPS", 1)
    for module in (training, bench_train):
        monkeypatch.setattr(module, "WARM_STEPS", 1)


def test_both_loops_do_the_same_steps(scene: training.Scene) -> None:
    """Same weights, same batch: the same losses before a step, and after one."""
    ours = training.Ours(scene, training.LoopVariant("glioforge float32"), 2)
    plain = training.Plain(scene, training.LoopVariant("plain"), 2)
    plain.network.load_state_dict(to_reference("unetr_monai", ours.network.state_dict()))
    image, labels = next(ours.batches)
    regions = scene.data.store.coding.regions
    values = torch.tensor([0, *{value for region in regions for value in region}], dtype=torch.uint8)
    labels = values[torch.randint(len(values), labels.shape)]
    target = region_masks(labels, regions).float()
    losses = [ours.step(image, labels).loss.item() for _ in range(3)]
    plain_losses = []
    for _ in range(3):
        before = plain.epoch_loss
        plain.step(image, target)
        plain_losses.append(plain.epoch_loss - before)
    assert losses[2] < losses[0] and losses == pytest.approx(plain_losses, rel=TOLERANCES["step"])


def test_the_plain_loop_loads_what_ours_loads(scene: training.Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "WORKERS", 0)  # one forked amid the threads of other tests may crash
    for from_files in (True, False):
        plain = training.Plain(scene, training.LoopVariant("plain", from_files=from_files), 2)
        image, target = next(plain.batches)
        assert type(image) is torch.Tensor and image.shape == (2, 4, *TINY.crop)
        assert target.shape == (2, 3, *TINY.crop) and set(target.unique().tolist()) <= {0.0, 1.0}


def test_a_breakdown_has_every_part_of_the_step(scene: training.Scene, quick: None, tmp_path: Path) -> None:
    found = bench_train.breakdown(scene, training.LoopVariant("glioforge float32"), tmp_path / "trace.json", steps=2)
    parts = found["seconds"]
    assert list(parts) == ["data", "forward", "loss", "backward", "optimizer", "communication", "wait"]
    assert all(parts[name] > 0 for name in ("forward", "loss", "backward", "optimizer")) and parts["wait"] is None
    assert parts["forward"] > parts["loss"] and parts["backward"] > parts["optimizer"]
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    bench_train.print_breakdown(found, Console(file=StringIO()))


class FakeTimed:
    """Takes the seconds in its variant's name; records what is timed in `calls`."""

    calls: list[str] = []
    peak_bytes = 8

    def __init__(self, scene: Any, variant: training.LoopVariant, batch: int = 2) -> None:
        if variant.compiled or batch > 8:
            raise torch.OutOfMemoryError("tried to allocate 2 GiB\nmore")
        self.variant, self.batch = variant, batch

    def step_seconds(self) -> float:
        self.calls.append(self.variant.name)
        return float(self.variant.name.split()[-1]) * max(self.batch, 4)

    def loop_seconds(self) -> float:
        return 2 * self.step_seconds()


def test_variants_take_turns_and_a_failure_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "Timed", FakeTimed)
    FakeTimed.calls.clear()
    which = [
        training.LoopVariant("glioforge 1"),
        training.LoopVariant("bad 2", compiled=True),
        training.LoopVariant("plain 3"),
    ]
    notes: list[int] = []
    anywhere: Any = None
    rows = bench_train.measure_steps(
        anywhere, which, 2, lambda rows: notes.append(sum(len(row["step_rounds"]) for row in rows))
    )
    assert FakeTimed.calls == 2 * [*2 * ["glioforge 1"], *2 * ["plain 3"]]
    assert notes == [1, 1, 2, 3, 4]
    assert rows[1]["failed"] == "out of memory: tried to allocate 2 GiB" and "step_seconds" not in rows[1]
    assert (rows[2]["step_seconds"], rows[2]["loop_seconds"], rows[2]["peak_bytes"]) == (12.0, 24.0, 8)
    said = StringIO()
    bench_train.print_steps(rows, "", Console(file=said, width=200))
    (line,) = [line for line in said.getvalue().splitlines() if "plain 3" in line]
    assert line.count("3.00") == 2 and "out of memory" in said.getvalue()


def test_the_best_batch_has_the_largest_throughput_of_those_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_train, "Timed", FakeTimed)
    monkeypatch.setattr(bench_train, "LARGEST_BATCH", 64)
    row = bench_train.best_batch(None, training.LoopVariant("plain 2"))  # type: ignore[arg-type]
    assert row["rates"] == {1: 0.125, 2: 0.25, 4: 0.5, 8: 0.5}
    assert (row["batch"], row["stopped_by"]) == (8, "batch 16: out of memory: tried to allocate 2 GiB")
    row = bench_train.best_batch(None, training.LoopVariant("bad 2", compiled=True))  # type: ignore[arg-type]
    assert row["failed"].startswith("batch 1: out of memory")


def test_predictions_stand_beside_what_was_measured_on_a_known_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(bench_train, "predicted_step_s", lambda *args: asked.append(args) or 0.0125)  # type: ignore[func-returns-value]
    row = {"precision": "bf16", "batch": 2, "samples_per_s": 150.0, "peak_bytes": 8, "stopped_by": "the limit"}
    steps = {"step_seconds": 0.0133, "loop_seconds": 0.02}
    rows = [{**row, **steps, "variant": name} for name in ("glioforge bf16", "plain bf16, cached")]
    about = {"machine": {"device": "NVIDIA H100"}, "model": "unetr"}
    result: dict[str, Any] = {**about, "steps": rows, "batches": [{**rows[0]}]}
    bench_train.add_predictions(result)
    assert asked == 2 * [("unetr", 2, "bf16", "NVIDIA H100")]
    said = StringIO()
    bench_train.print_steps(rows, "", Console(file=said, width=200))
    bench_train.print_batches(result["batches"], Console(file=said, width=200))
    ours, plain, best = (line for line in said.getvalue().splitlines() if "bf16" in line)
    assert "12.5" in ours and "12.5" not in plain and "160.00" in best and "150.00" in best


def test_a_variant_brings_its_own_flags_and_leaves_none_behind() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    timed = training.Timed.__new__(training.Timed)
    timed.flags = ("high", False, not before[1], False)
    with pytest.raises(RuntimeError), timed.own_flags():
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == ("high", not before[1])
        raise RuntimeError
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark) == before


def test_peak_memory_is_what_a_step_holds_at_once() -> None:
    mib = 2**18  # of float32
    kept = [torch.zeros(4 * mib)]

    def step() -> None:
        kept.clear()
        first = torch.zeros(8 * mib)
        torch.zeros(16 * mib)
        kept.append(torch.zeros(4 * mib))
        del first

    assert step_profile.allocated_peak(step) == 20 * 2**20


def event(name: str, start: float, end: float, device: str = "CPU", annotation: bool = False) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end)
    kind = getattr(torch.autograd.DeviceType, device)
    return SimpleNamespace(name=name, time_range=span, device_type=kind, is_user_annotation=annotation)


def test_launches_and_waits_are_counted_within_steps_alone() -> None:
    host = [
        event("step", 0, 100), event("step", 200, 300),
        event("cudaLaunchKernel", 10, 11), event("cudaLaunchKernel", 20, 21), event("cuLaunchKernelEx", 210, 211),
        event("cudaLaunchKernel", 150, 151),  # between steps
        event("cudaStreamSynchronize", 30, 60), event("cudaDeviceSynchronize", 400, 500),
        event("aten::_local_scalar_dense", 30, 60),
    ]  # fmt: skip
    kernels = [
        event("gemm", 0, 40, "CUDA"), event("ncclDevKernel_AllReduce", 20, 60, "CUDA"), event("gemm", 80, 100, "CUDA"),
        event("step", 0, 100, "CUDA"), event("Optimizer.step", 0, 100, "CUDA", annotation=True),
    ]  # fmt: skip
    found = step_profile.count_events([*host, *kernels], steps=2)
    assert found["launches"] == {"cudaLaunchKernel": 1.0, "cuLaunchKernelEx": 0.5}
    assert found["waits"] == {"cudaStreamSynchronize": 0.5}
    assert found["communication"] == pytest.approx(20e-6) and found["idle"] == pytest.approx(0.2)
    on_cpu = step_profile.count_events(host, steps=2)
    assert on_cpu["waits"] == {"aten::_local_scalar_dense": 0.5} and on_cpu["idle"] is None


# ---------- scaling


STEP = scaling.Step(0.1, 0.03, 0.06, gradients=200_000_000, weights=200_000_000, batch=2)
NODES = scaling.Cluster(8, scaling.Link(400e9, 2e-6), scaling.Link(50e9, 5e-6))
FREE = scaling.Cluster(8, scaling.Link(math.inf, 0.0), scaling.Link(math.inf, 0.0))


@pytest.mark.parametrize("stage", range(4))
def test_one_gpu_takes_the_step_and_a_network_without_limits_scales_wholly(stage: int) -> None:
    (row,) = scaling.predict(STEP, stage, NODES, 40e6, [1])
    assert (row["step_seconds"], row["efficiency"], row["samples_per_s"]) == (0.1, 1.0, 20.0)
    for row in scaling.predict(STEP, stage, FREE, 40e6):
        assert row["efficiency"] == 1.0 and row["samples_per_s"] == pytest.approx(20.0 * row["gpus"])


def test_a_ring_and_a_tree_are_as_computed_by_hand() -> None:
    link = scaling.Link(100e9, 1e-6)
    # 8 GB over 8 ranks: 14 messages of 1 GB, 10 ms each, and 14 latencies; a tree would take 160 ms and 6 latencies.
    assert scaling.all_reduce(8e9, 8, link) == pytest.approx(0.14 + 14e-6)
    # 100 KB over 1024 ranks: a tree of ten levels, 2 us and 20 latencies; a ring would take 2046.
    assert scaling.all_reduce(1e5, 1024, link) == pytest.approx(22e-6)


def test_an_all_reduce_over_nodes_goes_through_each_node_twice() -> None:
    # 200 MB, 2 nodes of 8: half a ring of 7 messages of 25 MB at 400 GB/s, twice; between the nodes 25 MB by each GPU.
    inside = 7 * (25e6 / 400e9 + 2e-6)
    between = 2 * (12.5e6 / 50e9 + 5e-6)
    assert scaling.over_nodes(scaling.all_reduce, 2e8, 16, NODES) == pytest.approx(2 * inside + between)
    assert scaling.over_nodes(scaling.half_ring, 2e8, 16, NODES) == pytest.approx(inside + between / 2)
    assert scaling.over_nodes(scaling.all_reduce, 2e8, 8, NODES) == pytest.approx(2 * inside)


def test_buckets_hide_behind_the_backward_all_but_the_last() -> None:
    assert scaling.exposed_after([1.0] * 4, backward=4.0) == pytest.approx(1.0)
    assert scaling.exposed_after([2.0] * 4, backward=4.0) == pytest.approx(5.0)  # done at 3, 5, 7 and 9
    assert scaling.exposed_after([4.0], backward=4.0) == pytest.approx(4.0)


def test_zero_stages_send_what_they_must() -> None:
    whole = scaling.over_nodes(scaling.all_reduce, 2e8, 64, NODES)
    half = scaling.over_nodes(scaling.half_ring, 2e8, 64, NODES)
    sent = [scaling.communication(STEP, stage, 64, NODES, 1e9) for stage in range(4)]
    assert sent[0] == pytest.approx((whole, whole))
    assert sent[1] == sent[2] == pytest.approx((whole + half, whole + half))
    assert sent[3][0] == pytest.approx(3 * half) and half <= sent[3][1] < 3 * half
    for stage in (0, 1):  # buckets of 40 MB are sent during the backward
        assert scaling.communication(STEP, stage, 64, NODES, 40e6)[1] < sent[stage][1]
    assert scaling.communication(STEP, 0, 64, NODES, 40e6, after=True) == pytest.approx((whole, whole))


def test_eight_gpus_keep_97_percent_of_a_step_of_13_ms() -> None:
    """150 crops a second of the published UNETR on one GPU, and the links that are assumed."""
    options = scaling.make_parser().parse_args(["--step_ms", "13.3"])
    step, _ = scaling.read_step(options)
    link = scaling.Link(options.nvlink_gbs * 1e9, options.nvlink_us / 1e6)
    (row,) = scaling.predict(step, 0, scaling.Cluster(8, link, link), 4 * options.bucket_elements, [8])
    assert row["efficiency"] > 0.97


def test_latency_and_bandwidth_come_out_of_two_times() -> None:
    link = scaling.Link(2e9, 1e-4)
    found = scaling.fit({size: scaling.all_reduce(size, 2, link) for size in scaling.SIZES})
    assert (found.bandwidth, found.latency) == (pytest.approx(2e9), pytest.approx(1e-4))


def test_a_measured_step_brings_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"data": 9.0, "forward": 1.0, "loss": 0.5, "backward": 2.0, "optimizer": 0.5, "wait": None}
    row = {"variant": "glioforge bf16", "step_rounds": [0.08], "step_seconds": 0.08, "batch": 2}
    result = {"machine": {"device": "H100"}, "model": "unetr", "parameters": 10**6, "steps": [row],
              "breakdown": {"seconds": parts}}  # fmt: skip
    path = tmp_path / "train.json"
    path.write_text(json.dumps(result))
    step, source = scaling.read_step(scaling.make_parser().parse_args(["--results", str(path)]))
    assert step == scaling.Step(0.08, 0.02, 0.04, 4_000_000, 4_000_000, 2) and source == "unetr on H100"
    for content, says in (({**result, "steps": []}, "no step of ours"), (None, "run python -m benchmarks.bench_train")):
        path.unlink() if content is None else path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=says):
            scaling.read_step(scaling.make_parser().parse_args(["--results", str(path)]))


# ---------- parity


HAS_BF16 = torch.cpu._is_avx512_bf16_supported()


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> dict[str, parity.Curve]:
    """Six steps of each training, over the end of an epoch; bf16 where the CPU has instructions for it."""
    phantom = PhantomConfig(cases=4, size_voxels=(48, 48, 32))
    config = DataConfig(phantom=phantom, spacing_mm=(5.0, 5.0, 5.0), crop_size_voxels=TINY.crop, foreground_prob=1.0,
                        crops_per_case=3, val_fraction=0.25, workers=1)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIOFORGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        scene = parity.make_scene("unetr_monai", TINY, config, ranks)
        return parity.train_all(scene, config, steps=6, seed=0, with_bf16=HAS_BF16)


@pytest.mark.slow
def test_only_the_code_differs_between_ours_and_plain(curves: dict[str, parity.Curve]) -> None:
    assert list(curves) == [parity.PLAIN, parity.OTHER_SEED, parity.FLOAT32, *([parity.BF16] if HAS_BF16 else [])]
    assert all(len(curve.losses) == 6 for curve in curves.values())
    plain, float32 = curves[parity.PLAIN], curves[parity.FLOAT32]
    assert float32.losses == pytest.approx(plain.losses, rel=TOLERANCES["float32"]) and len(set(plain.losses)) == 6
    assert float32.dice["WT"] == pytest.approx(plain.dice["WT"], abs=TOLERANCES["Dice"])
    assert curves[parity.OTHER_SEED].losses[0] != pytest.approx(plain.losses[0], rel=TOLERANCES["bf16 or seed"])
    if HAS_BF16:
        assert curves[parity.BF16].losses[0] == pytest.approx(plain.losses[0], rel=TOLERANCES["bf16 or seed"])
        assert curves[parity.BF16].losses != float32.losses


@pytest.mark.slow
def test_differences_are_shown_next_to_those_of_two_seeds(curves: dict[str, parity.Curve], tmp_path: Path) -> None:
    found = parity.differences(curves)
    assert list(found) == [f"{a} - {b}" for a, b in parity.PAIRS if HAS_BF16 or parity.BF16 not in (a, b)]
    assert parity.beyond_noise(found) == []
    notes = parity.notes_of(found, "kernels: reference", 1)
    assert "within the noise of seeds" in notes[-1] and "PyTorch replaces the fused kernels" in " ".join(notes)
    about = {"model": "unetr", "steps": 6, "data": "phantom", "machine": {"device": "cpu"}, "notes": notes}
    said = StringIO()
    parity.print_all(curves, {**about, "differences": found}, Console(file=said, width=160))
    assert "glioforge float32 - plain" in said.getvalue()
    parity.draw(curves, about, tmp_path / "parity.png")
    assert (tmp_path / "parity.png").stat().st_size > 0


def test_a_difference_as_large_as_between_seeds_is_reported() -> None:
    dice = {"mean": 0.5, "TC": 0.4, "WT": 0.6, "ET": None}
    curves = {
        parity.PLAIN: parity.Curve([1.0, 0.8], dice),
        parity.OTHER_SEED: parity.Curve([1.1, 0.9], {**dice, "mean": 0.6}),
        parity.FLOAT32: parity.Curve([1.0, 0.5], {**dice, "TC": 0.45}),
    }
    found = parity.differences(curves)
    ours = found["glioforge float32 - plain"]
    assert ours["loss"] == pytest.approx(0.15) and ours["largest"] == pytest.approx(0.3)
    assert ours["late"] == pytest.approx(-0.3) and ours["TC"] == pytest.approx(0.05) and "ET" not in ours
    assert parity.beyond_noise(found) == ["glioforge float32 - plain"]
    notes = parity.notes_of(found, "", 1)
    assert "differ by 1.5 x the difference between two seeds, NOT within" in notes[-1]
    assert any("bf16 was skipped" in note for note in notes)
    curves[parity.FLOAT32] = parity.Curve([1.0, math.nan], dice)
    assert parity.beyond_noise(parity.differences(curves)) == ["glioforge float32 - plain"]


def test_one_step_is_too_few_to_compare(capsys: pytest.CaptureFixture[str]) -> None:
    assert parity.main(["--steps", "1"]) == 2
    assert "error: --steps 1 must be at least 2" in capsys.readouterr().err
