"""Measured choices, on a GPU whose times the tests decide: what is measured, taken, kept, and the same on all ranks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import free_port
from fake_gpu import CANDIDATES, FakeGpu
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kernels import dispatch, measured_cache, self_tuning

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of this machine's measurements."""
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path))
    monkeypatch.setattr(measured_cache, "_has_warned", False)
    return tmp_path / "measured" / "kernels.json"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    with dispatch.using("auto", "cpu"):
        yield FakeGpu(monkeypatch)


X = torch.arange(4.0)
GRADIENT = X.clone().requires_grad_()


def tuned(gpu: FakeGpu, **options: Any) -> int:
    """Measure the kernel; returns the configuration that is taken afterwards."""
    with dispatch.tuning("cpu", **options):
        gpu.launch(X)
    return gpu.launch(X)


def way_of(gpu: FakeGpu, x: Tensor) -> str:
    gpu.double(x)
    return gpu.ran[-1]


def test_the_faster_configuration_is_taken_once_it_is_measured(gpu: FakeGpu) -> None:
    gpu.times = {64: 0.5}
    assert gpu.launch(X) == 128 and not gpu.timed
    with dispatch.tuning("cpu"):
        gpu.launch(X)
        assert gpu.timed == [128, 64, 32]
    assert gpu.launch(X) == 64 and gpu.launch(X, "N512") == 128


@pytest.mark.parametrize(("time", "taken"), [(1 / 1.029, 128), (1 / 1.031, 64)])
def test_a_lead_of_three_percent_is_needed_to_leave_the_default(time: float, taken: int, gpu: FakeGpu) -> None:
    gpu.times = {64: time}
    assert tuned(gpu) == taken


def test_a_wrong_result_is_never_taken_and_is_named(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    gpu.times, gpu.wrong = {64: 0.1, 32: 0.9}, {64}
    assert tuned(gpu) == 32 and 64 not in gpu.timed
    (line,) = caplog.messages
    assert "a_kernel N256" in line and line.endswith("not taken: BLOCK=64 num_warps=8 (wrong result)")


def test_one_that_raises_is_never_taken_and_is_named(gpu: FakeGpu, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    gpu.times, gpu.broken = {64: 0.1}, {64}
    assert tuned(gpu) == 128
    assert caplog.messages[0].endswith("not taken: BLOCK=64 num_warps=8 (out of resource: shared memory)")


@pytest.mark.parametrize("fault", ["broken", "wrong"])
def test_where_our_kernel_fails_or_is_wrong_a_slower_way_is_taken(fault: str, gpu: FakeGpu) -> None:
    gpu.times = {"MATH": 5.0, "FLASH_ATTENTION": 6.0}
    getattr(gpu, fault).add("triton")
    with dispatch.tuning("cpu"):
        gpu.double(X)
    assert way_of(gpu, X) == "MATH"


def test_memory_that_runs_out_is_no_fault_of_a_way(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_out(run: Any, device: Any) -> float:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    gpu.times = {64: 0.5, "MATH": 0.5}
    with monkeypatch.context() as patch, dispatch.tuning("cpu"):
        patch.setattr(self_tuning, "milliseconds", runs_out)
        gpu.double(X)
        assert gpu.launch(X) == 128
    assert tuned(gpu) == 64 and way_of(gpu, X) == "triton"


def test_where_no_way_is_right_the_reference_is_taken(gpu: FakeGpu) -> None:
    gpu.wrong = {"triton", "FLASH_ATTENTION", "MATH"}
    with dispatch.tuning("cpu"):
        gpu.double(X)
    assert way_of(gpu, X) == "reference"


def test_forward_alone_and_with_the_backward_are_chosen_apart(gpu: FakeGpu) -> None:
    gpu.times = {"FLASH_ATTENTION": 0.5}
    with dispatch.tuning("cpu"):
        gpu.double(X)
    gpu.times = {"MATH": 0.5}
    assert way_of(gpu, GRADIENT) == "triton"
    with dispatch.tuning("cpu"):
        gpu.double(GRADIENT)
    assert way_of(gpu, X) == "FLASH_ATTENTION" and way_of(gpu, GRADIENT) == "MATH"
    with torch.no_grad():
        assert way_of(gpu, GRADIENT) == "FLASH_ATTENTION"


def test_a_wrong_gradient_is_a_wrong_result(gpu: FakeGpu) -> None:
    def without_gradient(x: Tensor) -> Tensor:
        return 2 * x + gpu.result("fast", x - x.detach())

    ways = {"triton": lambda x: gpu.result("ours", 2 * x), "fast": without_gradient}
    gpu.times = {"fast": 0.1}
    with dispatch.tuning("cpu"):
        assert dispatch.choose("fused", "N4", ways, (GRADIENT,), lambda x: 2 * x) == "triton"
        assert dispatch.choose("fused", "N4", ways, (X,), lambda x: 2 * x) == "fast"
    assert dispatch.choose("fused", "N4", ways, (GRADIENT,), lambda x: 2 * x) == "triton"
    assert dispatch.choose("fused", "N4", ways, (X,), lambda x: 2 * x) == "fast"


def test_ways_are_compared_with_their_tuned_launches(gpu: FakeGpu) -> None:
    def ours(x: Tensor) -> Tensor:
        gpu.launch(x.detach())
        return 2 * x

    gpu.times = {64: 0.5, "torch": 0.8}
    ways = {"triton": ours, "torch": lambda x: gpu.result("torch", 2 * x)}
    with dispatch.tuning("cpu"):
        dispatch.choose("fused", "N4", ways, (X,), lambda x: 2 * x)
    assert gpu.timed == [128, 64, 32, 64, "torch"]
    assert dispatch.choose("fused", "N4", ways, (X,), lambda x: 2 * x) == "triton"


def test_measuring_changes_no_result_no_gradient_and_no_random_state(gpu: FakeGpu) -> None:
    torch.manual_seed(7)
    x, before = X.clone().requires_grad_(), torch.get_rng_state()
    with dispatch.tuning("cpu"):
        y = gpu.double(x)
        gpu.launch(x.detach())  # which checks its result, added in place
    assert x.grad is None and torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((4,), 2.0))
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_known_is_not_measured_again_in_another_process_unless_thoroughly(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.times = {64: 0.5}
    assert tuned(gpu) == 64
    gpu.start_again(monkeypatch)
    assert gpu.launch(X) == 64 and tuned(gpu) == 64 and not gpu.timed
    gpu.times = {}
    with dispatch.tuning("cpu", thorough=True):
        gpu.launch(X)
        gpu.launch(X)
    assert gpu.launch(X) == 128 and gpu.timed == [128, 64, 32]


def test_another_gpu_torch_triton_or_source_is_measured_again(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.times = {64: 0.5}
    assert tuned(gpu) == 64
    for change in (
        (gpu, "name", "NVIDIA A100"),
        (torch, "__version__", "9.9"),
        (self_tuning.triton, "__version__", "9.9"),
        (self_tuning, "version", lambda file: "12345678"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(*change)
            gpu.start_again(patch)
            assert gpu.launch(X) == 128
            assert tuned(gpu) == 64 and gpu.timed


def test_only_three_configurations_are_measured_unless_thoroughly(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fake_gpu.CANDIDATES", [*CANDIDATES, {"BLOCK": 16, "num_warps": 1}])
    gpu.times = {16: 0.5}
    assert tuned(gpu) == 128
    assert tuned(gpu, thorough=True) == 16


class Labelled(Tensor):
    """As MONAI's MetaTensor."""


def test_nothing_is_measured_under_capture_compilation_or_on_fake_tensors(
    gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    torch.compiler.reset()
    with dispatch.tuning("cpu"):
        gpu.is_capturing = True
        assert gpu.launch(X) == 128
        gpu.is_capturing = False
        gpu.launch(X.to("meta"))
        gpu.launch(X.as_subclass(Labelled))
        with FakeTensorMode():
            dispatch.compare("double", "N256", gpu.double, (torch.zeros(4),), ("MATH",))
        with FlopCounterMode(display=False):
            gpu.launch(X)
        torch.compile(partial(chosen, gpu), backend="eager", fullgraph=True)(X)
    assert not gpu.timed and not caplog.messages


def chosen(gpu: FakeGpu, x: Tensor) -> Tensor:
    dispatch.compare("double", "N256", gpu.double, (x,), ("MATH",))
    ways = {"triton": lambda x: 2 * x, "torch": lambda x: x + x}
    return ways[dispatch.choose("fused", "N256", ways, (x,), lambda x: 2 * x)](x)


def test_a_launch_that_is_not_repeatable_is_never_measured(gpu: FakeGpu) -> None:
    with dispatch.tuning("cpu"):
        assert gpu.launch(X, repeatable=False) == 128
    assert gpu.ran == [128]


def test_without_a_block_only_one_who_asks_measures(gpu: FakeGpu) -> None:
    gpu.times = {64: 0.5}
    dispatch.use("auto", "cpu", "measure")
    assert gpu.launch(X) == 64 and gpu.timed
    with pytest.raises(ValueError, match="measurements 'all' must be one of known, measure, default"):
        dispatch.use("auto", "cpu", "all")  # type: ignore[arg-type]


def test_a_pass_for_measurements_is_worth_it_on_a_gpu_unless_the_choice_is_made(gpu: FakeGpu) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert dispatch.may_measure(cuda) and not dispatch.may_measure(cpu)
    for mode, measurements in (("reference", "known"), ("auto", "default")):
        with dispatch.using(mode, "cpu", measurements):  # type: ignore[arg-type]
            assert not dispatch.may_measure(cuda)


def test_modes_that_insist_and_default_measurements(gpu: FakeGpu) -> None:
    gpu.times = {64: 0.5, "MATH": 0.5}
    with dispatch.tuning("cpu"):
        gpu.double(X)
        gpu.launch(X)
    assert (way_of(gpu, X), gpu.launch(X)) == ("MATH", 64)
    with dispatch.using("triton", "cpu"):
        assert (way_of(gpu, X), gpu.launch(X)) == ("triton", 64)
    with dispatch.using("auto", "cpu", "default") as line:
        assert line.endswith("default configurations")
        gpu.timed.clear()
        with dispatch.tuning("cpu", thorough=True):
            assert (way_of(gpu, X), gpu.launch(X)) == ("triton", 128)
        assert not gpu.timed
    with dispatch.using("reference", "cpu"):
        assert way_of(gpu, X) == "reference"
    assert (way_of(gpu, X), gpu.launch(X)) == ("MATH", 64)


def test_insisting_on_our_kernels_tunes_them_and_measures_nothing_else(gpu: FakeGpu) -> None:
    with dispatch.using("triton", "cpu"), dispatch.tuning("cpu"):
        gpu.double(X)
        gpu.launch(X)
    assert gpu.timed == [128, 64, 32]


def test_a_resumed_run_takes_what_the_run_before_it_took(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    gpu.times = {64: 0.5, "MATH": 0.5}
    with dispatch.tuning("cpu"):
        gpu.double(X)
        gpu.launch(X)
    gpu.double(X)
    gpu.launch(X)
    gpu.launch(X, "N512")
    saved = json.loads(json.dumps(dispatch.choices()))
    assert list(saved.values()) == ["MATH", CANDIDATES[1], CANDIDATES[0]]
    cache.unlink()
    gpu.start_again(monkeypatch)
    gpu.times = {32: 0.5, "FLASH_ATTENTION": 0.5}
    with dispatch.tuning("cpu"):
        gpu.double(X)
        gpu.launch(X, "N512")
    assert way_of(gpu, X) == "FLASH_ATTENTION"
    dispatch.restore_choices(saved)
    assert dispatch.choices() == saved  # also before it meets them
    assert (way_of(gpu, X), gpu.launch(X), gpu.launch(X, "N512")) == ("MATH", 64, 128)
    assert dispatch.choices() == saved


def test_a_choice_that_is_no_candidate_any_more_is_not_taken(gpu: FakeGpu) -> None:
    gpu.launch(X)
    (name,) = dispatch.choices()
    for stale in ({"BLOCK": 7}, "gone", None, [1]):
        dispatch.restore_choices({name: stale})
        assert gpu.launch(X) == 128
    way_of(gpu, X)
    dispatch.restore_choices(dict.fromkeys(dispatch.choices()))
    assert way_of(gpu, X) == "triton"


def test_a_damaged_cache_is_empty_and_measured_again(
    gpu: FakeGpu, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text('{"version": 1, "entries": {"a": 3}}')
    assert gpu.launch(X) == 128
    cache.write_text("[")
    dispatch._choices._own = None
    gpu.times = {64: 0.5}
    assert tuned(gpu) == 64 and len(caplog.messages) == 1
    assert len(json.loads(cache.read_text())["entries"]) == 1


def test_priors_are_taken_until_this_gpu_has_measurements(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu.times = {64: 0.5}
    tuned(gpu)
    (name,) = dispatch.choices()
    what = name.split(" | ", 3)[3]
    self_tuning.CACHE.clear()
    file = tmp_path / "priors.json"
    file.write_text(json.dumps({"NVIDIA H100": {what: CANDIDATES[2]}, "NVIDIA A100": {what: CANDIDATES[1]}}))
    monkeypatch.setattr(self_tuning, "PRIORS_FILE", file)
    gpu.start_again(monkeypatch)
    assert gpu.launch(X) == 32
    assert tuned(gpu, thorough=True) == 64
    gpu.start_again(monkeypatch)
    assert gpu.launch(X) == 64


def test_time_that_runs_out_leaves_defaults_and_the_summary_says_so(
    gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gpu.times = {64: 0.5}
    monkeypatch.setattr(self_tuning, "SECONDS", -1.0)
    assert tuned(gpu) == 128
    assert caplog.messages[-1].endswith("faster than the default: 0; left to the next run: 1")
    monkeypatch.setattr(self_tuning, "SECONDS", 100.0)
    assert tuned(gpu) == 64
    assert caplog.messages[-1].startswith("kernels: choices measured: 1, in 0.0 s; faster than the default: 1")


def test_results_agree_by_their_norm_and_dtype() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf")])
    near = x * (1 + 5e-5)
    assert self_tuning.agree([[x]], [[x]]) and self_tuning.agree([[near]], [[x]])
    assert not self_tuning.agree([[x * (1 + 2e-4)]], [[x]])
    assert self_tuning.agree([[(x * 1.005).bfloat16()]], [[x.bfloat16()]])
    assert not self_tuning.agree([[torch.tensor([1.0, 0.0, float("inf")])]], [[x]])
    assert not self_tuning.agree([[torch.tensor([1, 2])]], [[torch.tensor([1, 3])]])
    assert not self_tuning.agree([[x[:2]]], [[x]]) and not self_tuning.agree([], [[x]])
    noise, whole = torch.full((3,), 1e-6), torch.ones(3)
    assert self_tuning.agree([[noise, whole]], [[-noise, whole]])  # a gradient that is truly zero


def test_scratch_copies_keep_strides_and_alignment() -> None:
    projection = torch.randn(2, 8, 3, 2, 5).bfloat16()
    for view in projection.permute(2, 0, 3, 1, 4).unbind(0):
        copy = self_tuning.scratch(view)
        assert copy.stride() == view.stride() and torch.equal(copy, view)
        assert copy.data_ptr() % 16 == view.data_ptr() % 16 and copy.data_ptr() != view.data_ptr()
    for odd in (torch.zeros(0), torch.tensor(3.0), torch.ones(1).expand(4)):
        assert torch.equal(self_tuning.scratch(odd), odd)


RANKS = """
import json, sys, time
import pytest, torch, torch.distributed as dist
from fake_gpu import FakeGpu
from kernels import dispatch
dist.init_process_group("gloo")
rank, patch, x = dist.get_rank(), pytest.MonkeyPatch(), torch.ones(4)
gpu = FakeGpu(patch, sys.argv[1 + rank])
gpu.times = {64: 0.5, "MATH": 0.5} if rank == 0 else {32: 0.5}
before = gpu.launch(x)
with dispatch.tuning("cpu"):
    inside = [gpu.launch(x)]
    gpu.double(x)
    if rank == 1:
        gpu.launch(x, "only here")
after = [gpu.launch(x), gpu.launch(x, "only here")]
gpu.double(x)
after.append(gpu.ran[-1])
gathered = [None, None]
dist.all_gather_object(gathered, [before, inside, after, sorted(map(str, gpu.timed)), dispatch.choices()])
if rank == 0:
    print(json.dumps(gathered))
dist.destroy_process_group()
"""


def on_two_ranks(*names: str) -> tuple[list[Any], str]:
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    environment.pop("TRITON_INTERPRET", None)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, *names],
            env=environment | {"RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][1] + outputs[1][1]
    return json.loads(outputs[0][0].splitlines()[-1]), outputs[0][1]


def test_two_ranks_take_what_the_first_measured_and_only_from_the_end_of_the_block_on() -> None:
    (first, second), _ = on_two_ranks("NVIDIA H100", "NVIDIA H100")
    assert first[:3] == second[:3] == [128, [128], [64, 128, "MATH"]]
    assert first[3] == ["128", "32", "64", *["FLASH_ATTENTION", "MATH", "triton"]] and second[3] == []
    assert first[4] == second[4]


def test_ranks_of_different_gpus_take_the_defaults_and_say_so() -> None:
    (first, second), said = on_two_ranks("NVIDIA H100", "NVIDIA A100")
    assert first[2] == second[2] == [128, 128, "triton"]
    assert said.count("default configurations, as the ranks differ: NVIDIA A100") == 1
