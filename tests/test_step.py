"""An optimizer step: every precision and ZeRO stage against torch's AdamW, clipping, skipped steps, averages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.diagnosis import first_nonfinite
from engine.optim import OptimConfig
from engine.precision import LOW_PRECISION
from engine.ranks.distributed import Ranks
from engine.sharding import full_moments, full_weights
from engine.step import CudaGraphPass, LossConfig, StepValues, TrainConfig, TrainingStep
from kernels import dispatch
from kernels.dice_ce import dice_ce_loss

TOLERANCES = {  # relative; and absolute, or 0
    "an update": (1e-3, 0),  # of the whole change, by its norm
    "fp16": (0.02, 0),
    "moments": (1e-3, 1e-6),
    "accumulation": (1e-4, 1e-6),
    "compiled": (1e-4, 0),
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
    train = TrainConfig(**{"precision": "float32", "compile": False, "cuda_graph": False, **options})
    model = model or network()
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
        ({"precision": "auto"}, "--train.precision auto is decided before a step is made"),
        ({"compile": "auto"}, "--train.compile auto is decided before a step is made"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str, ranks: Ranks) -> None:
    with pytest.raises(ValueError, match=message):
        make_step(ranks, **options)


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
        for leaf, kept in zip(cuda_graph.leaves, cuda_graph.gradients, strict=True):
            assert leaf.grad is not None and kept is not None
            kept.copy_(leaf.grad)
        cuda_graph._drop_gradients()  # the optimizer's side has seen nothing of this
        for kept, value in zip(cuda_graph.loss, loss, strict=True):
            kept.detach().copy_(value.detach())


def record(cuda_graph: CudaGraphPass, image: torch.Tensor, labels: torch.Tensor) -> None:
    cuda_graph.image, cuda_graph.labels = image.clone(), labels.clone()
    cuda_graph.loss = cuda_graph.run(image, labels)
    cuda_graph.gradients = [leaf.grad for leaf in cuda_graph.leaves]
    cuda_graph.cuda_graph = Replay(cuda_graph)  # type: ignore[assignment]


def cuda_graphs_on_a_cpu(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(CudaGraphPass, "_record", record)
    patch.setattr("engine.step.check_options", lambda train, ranks: None)


@pytest.mark.parametrize("frozen", ["", "2.bias"])
def test_gradients_of_a_replayed_cuda_graph_reach_the_optimizer(
    frozen: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_graphs_on_a_cpu(monkeypatch)
    models = network(), network()
    for model in models:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name != frozen)
    eager = make_step(ranks, models[0], grad_clip=0.1)
    recorded = make_step(ranks, models[1], grad_clip=0.1, cuda_graph=True)
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


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_kernels_are_tuned_in_a_throw_away_pass_before_the_first_step(
    stage: int, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which changes no weight, gradient or draw. Under ZeRO 3 there is none: no rank has the weights."""
    entered = []

    @contextmanager
    def tuning(device: torch.device) -> Iterator[None]:
        entered.append(device.type)
        yield
        entered.append("left")

    expected = make_step(ranks, zero_stage=stage)
    expected(*batch(0))
    monkeypatch.setattr(dispatch, "tuning", tuning)
    monkeypatch.setattr(dispatch, "may_measure", lambda device: True)
    step, before = make_step(ranks, zero_stage=stage), torch.get_rng_state()
    for number in range(2):
        step(*batch(number))
        if number == 0:
            assert torch.equal(step.values, expected.values) and torch.equal(torch.get_rng_state(), before)
            for name, value in full_weights(step.model).items():
                assert torch.equal(value, full_weights(expected.model)[name])
    assert entered == ([] if stage == 3 else ["cpu", "left"])
