"""An optimizer step: every precision and ZeRO stage against torch's AdamW, clipping, skipped steps, averages."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import free_port

from engine.diagnosis import first_nonfinite
from engine.optim import OptimConfig
from engine.precision import LOW_PRECISION
from engine.ranks.distributed import Ranks
from engine.sharding import full_moments, full_weights
from engine.step import CudaGraphPass, LossConfig, StepValues, TrainConfig, TrainingStep
from kernels.dice_ce import dice_ce_loss

ROOT = Path(__file__).resolve().parent.parent
TOLERANCES = {  # relative; and absolute, or 0
    "an update": (1e-3, 0),  # of the whole change, by its norm
    "channels last": (1e-3, 1e-5),
    "fp16": (0.02, 0),
    "moments": (1e-3, 1e-6),
    "accumulation": (1e-4, 1e-6),
    "compiled": (1e-4, 0),
    "ZeRO stages": (1e-5, 0),
    "norms": (1e-4, 0),
    "orders of reduction": (1e-6, 0),
    "a CUDA graph's loss": (1e-3, 0),
    "a CUDA graph's weights": (1e-2, 1e-4),
}
REGIONS = [[2, 3], [1, 2, 3], [3]]
CROP = (8, 8, 8)
RATE = 1e-3


def network() -> torch.nn.Module:
    """Without norms: the true gradient of a bias before one is zero, and Adam makes steps of its rounding."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv3d(2, 5, 3, padding=1), torch.nn.GELU(), torch.nn.Conv3d(5, 7, 3, padding=1), torch.nn.GELU(),
        torch.nn.Conv3d(7, 3, 1),
    )  # fmt: skip


def batch(number: int, size: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 4, (size, *CROP), generator=generator, dtype=torch.uint8)
    return torch.randn(size, 2, *CROP, generator=generator), labels


def near(expected: Any, of: str) -> Any:
    """What equals it within the tolerances of a comparison."""
    rtol, atol = TOLERANCES[of]
    return pytest.approx(expected, rel=rtol, abs=atol)


def assert_near(found: torch.Tensor, expected: torch.Tensor, of: str) -> None:
    rtol, atol = TOLERANCES[of]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def values_of(step: TrainingStep) -> StepValues:
    return StepValues(*step.values.tolist())


def make_step(
    ranks: Ranks, model: torch.nn.Module | None = None, settings: dict[str, Any] | None = None, **options: Any
) -> TrainingStep:
    optim = {"lr": RATE, "weight_decay": 0.1, "grad_clip": options.pop("grad_clip", 0.0)}
    optim["ema_decay"] = options.pop("ema_decay", 0.0)
    train, model = TrainConfig(**options), model or network()
    return TrainingStep(model, train, OptimConfig(**optim), LossConfig(), ranks, REGIONS, 100, settings or {})


def plain_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, pair: tuple[torch.Tensor, torch.Tensor],
    precision: str, grad_clip: float = 0.0,
) -> float:  # fmt: skip
    """What PyTorch's documentation shows."""
    optimizer.zero_grad()
    dtype = LOW_PRECISION.get(precision)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        logits = model(pair[0])
    loss = dice_ce_loss(logits, pair[1], REGIONS, ce="bce").loss
    loss.backward()
    if grad_clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_the_first_updates_are_those_of_torchs_adamw(precision: str, stage: int, ranks: Ranks) -> None:
    """Adam's first steps have the largest corrections for bias: a step counted twice shows at once."""
    plain = network()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=0.1)
    step = make_step(ranks, precision=precision, zero_stage=stage)
    start = full_weights(step.model)
    for number in range(3):
        step(*batch(number))
        plain_step(plain, optimizer, batch(number), precision)
        found, expected = full_weights(step.model), plain.state_dict()
        for name, value in expected.items():
            change = (value - start[name]).norm()
            assert (found[name] - value).norm() <= TOLERANCES["an update"][0] * change, (name, number)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_with_the_channels_last_in_memory_take_the_same_step(stage: int, ranks: Ranks) -> None:
    """As on a GPU. One of a single voxel counts as both formats, with strides of this one."""
    contiguous = make_step(ranks, zero_stage=stage)
    model = network()
    model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    step = make_step(ranks, model, zero_stage=stage)
    first = next(step.model.parameters())
    assert stage or first.is_contiguous(memory_format=torch.channels_last_3d)
    for number in range(2):
        contiguous(*batch(number))
        step(*batch(number))
    expected = full_weights(contiguous.model)
    for name, value in full_weights(step.model).items():
        assert_near(value, expected[name], "channels last")


def test_gradients_of_one_rank_are_not_reduced(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would copy all of them into one buffer, reduce it over one rank, and copy them back."""
    step = make_step(ranks)
    monkeypatch.setattr(type(step.engine), "buffered_allreduce_fallback", lambda *_, **__: pytest.fail("reduced"))
    step(*batch(0))


def test_fp16_scales_the_loss_and_takes_the_step_of_float32(ranks: Ranks) -> None:
    plain = network()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=0.1)
    step = make_step(ranks, precision="fp16")
    losses = []
    for number in range(8):  # the first scale of 65,536 may be too large
        step(*batch(number))
        losses.append((values_of(step).loss, plain_step(plain, optimizer, batch(number), "float32")))
    assert step.optimizer.scale.item() >= 256
    assert step.optimizer.state[next(step.model.parameters())]["step"].item() >= 4
    assert all(ours == near(theirs, "fp16") for ours, theirs in losses)


def test_an_overflow_in_fp16_halves_the_scale_and_leaves_the_weights(ranks: Ranks) -> None:
    step = make_step(ranks, precision="fp16")
    step.optimizer.scale.fill_(2.0**127)
    before = full_weights(step.model)
    step(*batch(0))
    assert step.optimizer.scale.item() == 2.0**126
    assert (
        values_of(step).was_skipped == 1 and values_of(step).skipped_in_row == 0
    )  # a lower scale can help: no sign of divergence
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())


def test_the_loss_scale_doubles_after_many_finite_steps(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.optim.GROWTH_INTERVAL", 2)
    step = make_step(ranks, precision="fp16")
    step.optimizer.scale.fill_(16.0)
    for number in range(2):
        step(*batch(number))
    assert step.optimizer.scale.item() == 32.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_with_nonfinite_gradients_is_skipped_and_counted(stage: int, ranks: Ranks) -> None:
    step = make_step(ranks, zero_stage=stage)
    step(*batch(0))
    before, moments = full_weights(step.model), full_moments(step.engine, step.optimizer)
    image, labels = batch(1)
    image[0, 0, 0, 0, 0] = float("inf")
    for count in (1, 2):
        step(image, labels)
        assert values_of(step).was_skipped == 1 and values_of(step).skipped_in_row == count
        assert not math.isfinite(values_of(step).gradient_norm)
    after = full_weights(step.model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    again = full_moments(step.engine, step.optimizer)
    assert again["step"] == moments["step"] == 1
    assert all(torch.equal(again["exp_avg"][name], value) for name, value in moments["exp_avg"].items())
    step(*batch(2))
    assert values_of(step).was_skipped == 0 and values_of(step).skipped_in_row == 0
    assert any(not torch.equal(value, before[name]) for name, value in full_weights(step.model).items())
    assert step.done == 4


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_validation_is_in_the_precision_of_training_at_every_stage(stage: int, ranks: Ranks) -> None:
    step = make_step(ranks, precision="bf16", zero_stage=stage)
    step(*batch(0))
    with step.evaluating() as network:
        found = network(batch(1)[0])
    with step.inspecting() as network:
        expected = network(batch(1)[0])
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_never_waits_for_the_device(stage: int, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its throughput timer did, twice a step."""
    from deepspeed.accelerator import get_accelerator

    step = make_step(ranks, zero_stage=stage)
    waits: list[tuple] = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *args: waits.append(args))
    for number in range(5):
        step(*batch(number))
    assert not waits


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_divergence_in_the_backward_is_found_at_every_stage(stage: int, ranks: Ranks) -> None:
    step = make_step(ranks, zero_stage=stage)
    step(*batch(0))

    def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return (logits * 0).sqrt().sum()  # an infinite gradient times zero

    with step.inspecting() as network:
        found = first_nonfinite(network, loss_of, *batch(1))
    assert found == "the gradient of the output of 4"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradients_are_clipped_to_their_common_norm(stage: int, ranks: Ranks) -> None:
    """Against clip_grad_norm_; with a weight decay and two sizes of gradients, for Adam itself ignores their scale."""
    plain = network()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=0.1)
    step = make_step(ranks, zero_stage=stage, grad_clip=0.05)
    norms = []
    for number in range(4):
        step(*batch(number))
        plain_step(plain, optimizer, batch(number), "float32", grad_clip=0.05)
        norms.append(values_of(step).gradient_norm)
    assert min(norms) > 0.05
    moments = full_moments(step.engine, step.optimizer)
    for name, parameter in plain.named_parameters():
        expected = optimizer.state[parameter]["exp_avg"]
        assert_near(moments["exp_avg"][name], expected, "moments")


def test_zero_3_steps_all_parameters_as_one_group(ranks: Ranks) -> None:
    """Each would have a norm of its own, and could be skipped by itself."""
    settings = {"zero_optimization": {"sub_group_size": 50, "stage3_param_persistence_threshold": 1000}}
    plain, grouped = (make_step(ranks, settings=each, zero_stage=3, grad_clip=0.05) for each in ({}, settings))
    for number in range(2):
        plain(*batch(number))
        grouped(*batch(number))
        assert torch.equal(plain.values, grouped.values)


def test_accumulated_passes_are_one_step_over_all_their_crops(ranks: Ranks) -> None:
    """BCE alone is a mean over crops, so two passes of two crops are one of four."""
    whole, parts = make_step(ranks, batch_size=4), make_step(ranks, batch_size=2, accumulate_steps=2)
    for step in (whole, parts):
        step.loss_config.dice_weight = 0
    image, labels = batch(0, size=4)
    whole(image, labels)
    parts(image[:2], labels[:2])
    assert parts.done == 0
    parts(image[2:], labels[2:])
    assert parts.done == whole.done == 1
    for name, value in full_weights(whole.model).items():
        assert_near(full_weights(parts.model)[name], value, "accumulation")


def test_the_average_follows_the_weights_and_is_what_is_validated(ranks: Ranks) -> None:
    step = make_step(ranks, ema_decay=0.5)
    expected = full_weights(step.model)
    for number in range(1, 6):
        step(*batch(number))
        decay = min(0.5, (1 + number) / (10 + number))
        expected = {
            name: decay * value + (1 - decay) * step.model.state_dict()[name] for name, value in expected.items()
        }
    assert step.average
    weights = full_weights(step.model)
    for name, value in step.average.full_weights().items():
        torch.testing.assert_close(value, expected[name])
    with step.evaluating():
        inside = full_weights(step.model)
    assert all(torch.allclose(inside[name], value) for name, value in expected.items())
    assert all(torch.equal(value, weights[name]) for name, value in step.model.state_dict().items())


def test_a_compiled_network_takes_the_same_steps_and_is_validated_uncompiled(ranks: Ranks) -> None:
    plain, compiled = make_step(ranks), make_step(ranks, compile=True)
    for number in range(2):
        plain(*batch(number))
        compiled(*batch(number))
        assert values_of(compiled).loss == near(values_of(plain).loss, "compiled")
    with compiled.evaluating() as network, torch._dynamo.config.patch(error_on_recompile=True):
        network(batch(0, size=3)[0])  # compiled code would be recompiled for another shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": True, "zero_stage": 3}, "take a stage from 0 to 2"),
        ({"cuda_graph": True}, "needs a GPU"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str, ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=message):
        make_step(ranks, **options)


TWO_RANKS = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from engine.ranks.distributed import init_ranks
from engine.sharding import full_moments, full_weights, load_moments
from test_step import batch, cuda_graphs_on_a_cpu, make_step, network, values_of
import pytest
ranks = init_ranks("cpu")
result, states = {}, {}
CLIP = 0.02

def run(step, numbers):
    losses = []
    for number in numbers:
        image, labels = batch(number, size=4)
        step(image[ranks.rank::2], labels[ranks.rank::2])
        loss = step.values[:1].clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / 2)
    return losses

with pytest.MonkeyPatch.context() as patch:
    cuda_graphs_on_a_cpu(patch)
    result["CUDA graph"] = run(make_step(ranks, cuda_graph=True, grad_clip=CLIP), range(20))
for stage in range(4):
    step = make_step(ranks, zero_stage=stage, grad_clip=CLIP, ema_decay=0.9)
    losses = run(step, range(20))
    result[f"norm at {stage}"] = values_of(step).gradient_norm
    states[stage] = full_weights(step.model), full_moments(step.engine, step.optimizer), step.average.full_weights()
    result[stage] = losses + run(step, range(20, 23))
    wrong = batch(0, size=4)[0]
    if ranks.rank == 1:
        wrong[3] = float("nan")
    step(wrong[ranks.rank::2], batch(0, size=4)[1][ranks.rank::2])
    result[f"skipped at {stage}"] = values_of(step).was_skipped
for stage in range(4):  # each continues from the state of the one before it
    weights, moments, average = states[(stage - 1) % 4]
    model = network()
    model.load_state_dict(weights)
    step = make_step(ranks, model, zero_stage=stage, grad_clip=CLIP, ema_decay=0.9)
    load_moments(step.engine, step.optimizer, moments)
    step.average.load(average, 20)
    step.done = 20
    result[f"resumed at {stage}"] = run(step, range(20, 23))
    result[f"average at {stage}"] = sum(float(value.double().sum()) for value in average.values())

def first_updates(**options):  # weights after two steps of eight crops each
    step = make_step(ranks, batch_size=4, grad_clip=CLIP, **options)
    step.loss_config.dice_weight = 0  # what is left is a mean over crops
    for number in range(2):
        image, labels = (tensor[ranks.rank::2] for tensor in batch(number, size=8))
        passes = step.train.accumulate_steps
        for part in range(passes):
            step(image[part::passes], labels[part::passes])
    return step, sum(float(value.double().abs().sum()) for value in full_weights(step.model).values())

_, result["whole"] = first_updates()
_, result["in parts"] = first_updates(accumulate_steps=2)
_, result["compiled"] = first_updates(compile=True)
_, result["channels last"] = first_updates(model=network().to(memory_format=torch.channels_last_3d))
one_channel = torch.nn.Sequential(torch.nn.Conv3d(2, 1, 1), torch.nn.Conv3d(1, 3, 3, padding=1))
first_updates(model=one_channel.to(memory_format=torch.channels_last_3d))
step, result["by DeepSpeed"] = first_updates(settings={"prescale_gradients": True})
result["by DeepSpeed alone"] = step.ddp is None
sent = []
step = make_step(ranks, torch.nn.Sequential(network(), torch.nn.Dropout()), accumulate_steps=2)
step.ddp.register_comm_hook(None, lambda state, bucket: sent.append(1) or allreduce_hook(None, bucket))
torch.manual_seed(3)
for number in range(2):
    torch.manual_seed(3)
    step(*batch(number))
    result[f"draws {number}"] = float(torch.rand(1))
    result.setdefault("laid out", step.ddp._has_rebuilt_buckets)
result["sent"] = len(sent)
if ranks.is_first:
    print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, Any]:
    """What `TWO_RANKS` prints, from two processes."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error:Grad strides", "-c", TWO_RANKS],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=400) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][1] + outputs[1][1]
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_gives_the_losses_of_stage_0(stage: int, on_two_ranks: dict[str, Any]) -> None:
    """Two ranks, float32, 20 steps and more."""
    assert on_two_ranks[str(stage)] == near(on_two_ranks["0"], "ZeRO stages")
    assert on_two_ranks["0"][19] < on_two_ranks["0"][0]
    assert on_two_ranks[f"norm at {stage}"] == near(on_two_ranks["norm at 0"], "norms")
    assert on_two_ranks["norm at 0"] > 0.02  # clipping was at work


def test_gradients_of_cuda_graphs_are_averaged_over_ranks(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["CUDA graph"] == near(on_two_ranks["0"][:20], "orders of reduction")


@pytest.mark.parametrize("way", ["in parts", "compiled", "channels last", "by DeepSpeed"])
def test_gradients_reduced_during_the_backward_are_those_reduced_after_it(
    way: str, on_two_ranks: dict[str, Any]
) -> None:
    assert on_two_ranks[way] == near(on_two_ranks["whole"], "orders of reduction")
    assert on_two_ranks["by DeepSpeed alone"]


def test_ddps_bucket_order_is_fixed_before_the_first_step(on_two_ranks: dict[str, Any]) -> None:
    """Else a resumed run would sum over ranks in another order. The pass for it leaves the random state alone."""
    assert on_two_ranks["laid out"] and on_two_ranks["draws 0"] == on_two_ranks["draws 1"]


def test_gradients_are_sent_once_for_all_passes_of_a_step(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["sent"] == 2  # when buckets are laid out, and after the second pass


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_saved_at_one_zero_stage_resumes_at_another(stage: int, on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks[f"resumed at {stage}"] == near(on_two_ranks["0"][20:], "ZeRO stages")
    assert on_two_ranks[f"average at {stage}"] == near(on_two_ranks["average at 0"], "ZeRO stages")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_ranks_skip_a_step_when_one_has_nonfinite_gradients(stage: int, on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks[f"skipped at {stage}"] == 1


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing(gpu_ranks: Ranks) -> None:
    step = make_step(gpu_ranks, grad_clip=1.0, ema_decay=0.9, precision="bf16")
    image, labels = (tensor.cuda() for tensor in batch(0))
    for _ in range(3):  # compilation, allocation and cuDNN's search wait
        step(image, labels)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step(image, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert values_of(step).was_skipped == 0


def test_a_step_does_not_check_labels_again(ranks: Ranks) -> None:
    """They were checked when they were read; on a GPU the check would wait for the device."""
    step, (image, labels) = make_step(ranks), batch(0)
    labels[0, 0, 0, 0] = 200
    step(image, labels)
    assert step.values.isfinite().all()


class Replay:
    """What a CUDA graph does, on a CPU: the same pass again, into the memory of the first."""

    def __init__(self, cuda_graph: CudaGraphPass) -> None:
        self.cuda_graph = cuda_graph

    def replay(self) -> None:
        cuda_graph = self.cuda_graph
        cuda_graph._drop_gradients()
        loss = cuda_graph.run(cuda_graph.image, cuda_graph.labels)
        for parameter, kept in zip(cuda_graph.parameters, cuda_graph.gradients, strict=True):
            assert parameter.grad is not None and kept is not None
            kept.copy_(parameter.grad)
        cuda_graph._drop_gradients()  # the optimizer's side has seen nothing of this
        for kept, value in zip(cuda_graph.loss, loss, strict=True):
            kept.detach().copy_(value.detach())


def record(cuda_graph: CudaGraphPass, image: torch.Tensor, labels: torch.Tensor) -> None:
    cuda_graph.image, cuda_graph.labels = image.clone(), labels.clone()
    cuda_graph.loss = cuda_graph.run(image, labels)
    cuda_graph.gradients = [parameter.grad for parameter in cuda_graph.parameters]
    cuda_graph.cuda_graph = Replay(cuda_graph)  # type: ignore[assignment]


def cuda_graphs_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaGraphPass, "_record", record)
    patch.setattr("engine.step._check_options", lambda train, ranks: None)


def test_gradients_of_a_replayed_cuda_graph_reach_the_optimizer(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_graphs_on_a_cpu(monkeypatch)
    eager, recorded = make_step(ranks, grad_clip=0.1), make_step(ranks, grad_clip=0.1, cuda_graph=True)
    for number in range(4):
        eager(*batch(number))
        recorded(*batch(number))
        assert torch.equal(recorded.values, eager.values)
    expected = full_weights(eager.model)
    assert all(torch.equal(value, expected[name]) for name, value in full_weights(recorded.model).items())
    with pytest.raises(ValueError, match="in a CUDA graph recorded for"):
        recorded(*batch(0, size=3))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_cuda_graph_takes_the_steps_of_eager_code(precision: str, gpu_ranks: Ranks) -> None:
    eager = make_step(gpu_ranks, precision=precision)
    recorded = make_step(gpu_ranks, precision=precision, cuda_graph=True)
    for number in range(6):
        image, labels = (tensor.cuda() for tensor in batch(number))
        eager(image, labels)
        recorded(image, labels)
        assert values_of(recorded).loss == near(values_of(eager).loss, "a CUDA graph's loss")
    for name, value in full_weights(eager.model).items():
        assert_near(full_weights(recorded.model)[name], value, "a CUDA graph's weights")
