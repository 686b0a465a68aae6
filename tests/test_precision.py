"""Switches of the whole process: set by a run, put back after a library's call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import batch, cuda_graphs_on_a_cpu, make_step, network, plain_step
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.precision import set_up_torch
from engine.ranks.distributed import Ranks
from engine.sharding import full_moments, load_moments
from engine.step import TrainingStep
from models import build_model

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def torchs_own_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that has made a ZeRO 3 engine, DeepSpeed has replaced it, by one that adds a bias in float32."""
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)


def test_float32_means_ieee_products_and_deterministic_means_all() -> None:
    try:
        set_up_torch("tf32", deterministic=True)
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    finally:
        set_up_torch("float32", deterministic=False)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()


def switches() -> tuple[str, ...]:
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn  # type: ignore[attr-defined]
    return tuple(backend.fp32_precision for backend in backends)


BEFORE = {
    "nothing": "",
    "the older functions": "torch.set_float32_matmul_precision('medium'); torch.backends.cudnn.allow_tf32 = True",
    "the backends": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
}


@pytest.mark.parametrize("set_by", BEFORE)
def test_tf32_ends_with_its_context(set_by: str) -> None:
    """In a process of its own, because PyTorch's defaults can't be put back by its functions."""
    script = f"""
import torch
from engine.precision import tf32
from test_precision import switches
{BEFORE[set_by]}
before = switches()
with tf32(True):
    assert switches() == ("tf32", "tf32", "tf32"), switches()
    with tf32(False):
        assert switches()[0] == "ieee" and "tf32" not in switches(), switches()
    assert switches() == ("tf32", "tf32", "tf32"), switches()
assert switches() == before, (switches(), before)
try:
    with tf32(True):
        raise KeyError
except KeyError:
    assert switches() == before, (switches(), before)
if {set_by == "the older functions"}:
    assert torch.get_float32_matmul_precision() == "medium" and torch.backends.cudnn.allow_tf32
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_step_leaves_the_switches_of_the_process_alone(ranks: Ranks) -> None:
    before = switches(), torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    make_step(ranks, precision="tf32", deterministic=True)(*batch(0))
    assert (switches(), torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()) == before


class PaddedLinear(nn.Linear):
    """Takes weights with sizes rounded up to multiples of `copy_multiple`."""

    copy_multiple = 8

    def forward(self, x: Tensor) -> Tensor:
        padded = nn.functional.pad(x, (0, self.weight.shape[1] - x.shape[-1]))
        return nn.functional.linear(padded, self.weight, self.bias)[..., : self.out_features]


class Channels(nn.Module):
    """A linear layer over the channels of (B, C, X, Y, Z)."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.movedim(1, -1)).movedim(-1, 1)


def with_linear(kind: type[nn.Linear] = nn.Linear) -> nn.Module:
    model = network()
    torch.manual_seed(1)
    return nn.Sequential(*model[:4], Channels(kind(7, 6)), nn.ConvTranspose3d(6, 7, 1), model[4])  # type: ignore[index]


def small_unetr() -> nn.Module:
    torch.manual_seed(0)
    widths = {"feature_size": 4, "hidden_size": 40, "mlp_dim": 56, "num_heads": 5}
    return build_model("unetr", 2, 3, (32, 32, 32), **widths)


def crops(model: nn.Module, number: int) -> tuple[Tensor, Tensor]:
    """A batch of the size that a network takes."""
    image, labels = batch(number)
    if isinstance(model, nn.Sequential):
        return image, labels
    return image.repeat(1, 1, 4, 4, 4), labels.repeat(1, 4, 4, 4)


def bits_of(step: TrainingStep) -> list[Tensor]:
    return [parameter.detach() for parameter in step.model.parameters()]


def copies_of(step: TrainingStep) -> dict[str, Tensor]:
    """Copies by the name of their parameter."""
    named = ((name, step.copies[parameter]) for name, parameter in step.model.named_parameters())
    return {name: copy for name, copy in named if copy is not None}


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("make", [network, with_linear])
def test_low_precision_copies_give_the_bits_of_autocasts_own_casts(
    make: Any, recorded: bool, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of layers whose gradients have the same bits each time: in the deepest of a UNETR oneDNN's have not."""
    cuda_graphs_on_a_cpu(monkeypatch)
    plain, step = make(), make_step(ranks, make(), precision="bf16", cuda_graph=recorded)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    for number in range(4):
        loss = plain_step(plain, optimizer, batch(number), "bf16")
        assert step(*batch(number)).loss.item() == loss
    assert copies_of(step)
    assert all(torch.equal(*pair) for pair in zip(bits_of(step), plain.parameters(), strict=True))


class Casts(TorchDispatchMode):
    """Counts casts of some tensors, by their storage."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.known, self.count = {tensor.untyped_storage()._cdata for tensor in tensors}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].untyped_storage()._cdata in self.known
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", [network, small_unetr])
def test_a_training_pass_casts_no_weight(make: Any, ranks: Ranks) -> None:
    step = make_step(ranks, make(), precision="bf16")
    with Casts(bits_of(step)) as casts:
        step.loss(*crops(step.model, 0))
    assert casts.count == 0
    with step.evaluating() as model, Casts(bits_of(step)) as casts:
        model(crops(step.model, 0)[0])
    frozen = [bias for bias in step.model.parameters() if not bias.requires_grad]  # before norms: never used
    assert casts.count == len(copies_of(step)) - len(frozen)


def test_norms_and_position_embeddings_have_no_copies(ranks: Ranks) -> None:
    step = make_step(ranks, small_unetr(), precision="bf16")
    kinds = nn.Linear | nn.Conv3d | nn.ConvTranspose3d
    layers = [name for name, module in step.model.named_modules() if isinstance(module, kinds)]
    assert {name.rpartition(".")[0] for name in copies_of(step)} == set(layers)


@pytest.mark.parametrize(
    "options",
    [{"precision": "float32"}, {"precision": "bf16", "accumulate_steps": 2}, {"precision": "bf16", "zero_stage": 1}],
    ids=str,
)
def test_there_are_copies_only_where_gradients_are_final_when_they_arrive(
    options: dict[str, Any], ranks: Ranks
) -> None:
    assert not copies_of(make_step(ranks, **options))


def assert_fresh(step: TrainingStep, number: int) -> None:
    """A training forward sees the weights as they are, as a forward by autocast's own casts does."""
    image, labels = batch(number)
    with step.inspecting() as model:
        expected = step.loss_of(model(image), labels).loss
    assert torch.equal(step.loss(image, labels).loss, expected)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_copies_follow_the_weights_whatever_changes_them(precision: str, ranks: Ranks) -> None:
    step = make_step(ranks, precision=precision, ema_decay=0.5)
    first = {name: value.clone() for name, value in step.model.state_dict().items()}
    for number in range(3):
        assert_fresh(step, number)
        step(*batch(number))
    with step.evaluating():  # the averages
        pass
    assert_fresh(step, 3)
    step.model.load_state_dict(first)
    assert_fresh(step, 3)
    resumed = make_step(ranks, step.model, precision=precision)
    load_moments(resumed.engine, resumed.optimizer, full_moments(step.engine, step.optimizer))
    assert_fresh(resumed, 4)
    resumed(*batch(4))
    assert_fresh(resumed, 5)


def test_validation_and_inspection_see_the_float32_weights(ranks: Ranks) -> None:
    step = make_step(ranks, precision="bf16")
    step(*batch(0))
    for look in (step.evaluating, step.inspecting):
        with look() as model:
            assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_layer_may_ask_for_longer_rows_whose_padding_stays_zero(ranks: Ranks) -> None:
    plain, padded = (make_step(ranks, with_linear(kind), precision="bf16") for kind in (nn.Linear, PaddedLinear))
    for number in range(3):
        expected, found = plain(*batch(number)).loss, padded(*batch(number)).loss
        torch.testing.assert_close(found, expected)
    copy = copies_of(padded)["4.linear.weight"]
    assert copy.shape == (8, 8) and copies_of(padded)["4.linear.bias"].shape == (8,)
    assert copy[6:].count_nonzero() == 0 and copy[:, 7:].count_nonzero() == 0
    weight = padded.model.get_parameter("4.linear.weight")
    assert torch.equal(copy[:6, :7], weight.to(torch.bfloat16))


def test_frozen_weights_have_copies_without_gradients(ranks: Ranks) -> None:
    model = network()
    model.get_parameter("2.bias").requires_grad_(False)
    step = make_step(ranks, model, precision="bf16")
    step(*batch(0))
    assert not copies_of(step)["2.bias"].requires_grad
    assert_fresh(step, 1)


def test_a_compiled_network_trains_on_the_copies(ranks: Ranks) -> None:
    plain, compiled = (make_step(ranks, precision="bf16", compile=compile) for compile in (False, True))
    for number in range(3):
        torch.testing.assert_close(compiled(*batch(number)).loss, plain(*batch(number)).loss, rtol=1e-3, atol=0)
        with torch._dynamo.config.patch(error_on_recompile=True), compiled.evaluating() as model:
            model(batch(number)[0])
    assert copies_of(compiled)
