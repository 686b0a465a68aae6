"""Learning rate by step, and weight decay. Steps themselves: tests/test_step.py."""

from __future__ import annotations

import pytest
import torch

from engine.optim import FIRST_SCALE, GuardedAdamW, OptimConfig, learning_rate


def rates(config: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(config, step, steps) for step in range(steps)]


def test_a_constant_rate_is_constant() -> None:
    assert rates(OptimConfig(lr=1e-4), 7) == pytest.approx([1e-4] * 7)


def test_warmup_rises_linearly_to_the_rate() -> None:
    assert rates(OptimConfig(lr=1.0, warmup_steps=3), 5) == pytest.approx([0.25, 0.5, 0.75, 1, 1])


def test_the_cosine_ends_near_zero_and_halves_in_the_middle() -> None:
    found = rates(OptimConfig(lr=1.0, schedule="cosine", warmup_steps=2), 22)
    assert found[2] == pytest.approx(1.0)
    assert found[12] == pytest.approx(0.5)
    assert 0 < found[-1] < 0.01
    assert found[2:] == sorted(found[2:], reverse=True)


def test_a_parameter_without_a_gradient_is_not_decayed() -> None:
    layer = torch.nn.Linear(2, 2)
    optimizer = GuardedAdamW(layer.parameters(), OptimConfig(weight_decay=0.5, lr=0.1))
    layer.weight.grad = torch.ones_like(layer.weight)
    bias, weight = layer.bias.detach().clone(), layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.bias, bias) and not torch.equal(layer.weight, weight)


def test_gradients_that_were_scaled_give_the_step_of_those_that_were_not() -> None:
    """The norm that is reported is that of the loss itself, before clipping."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = GuardedAdamW([parameter], OptimConfig(grad_clip=1.0), scales_loss=True)
    parameter.grad = torch.tensor([3.0, 4.0]) * optimizer.scale
    optimizer.step()
    assert optimizer.norm.item() == pytest.approx(5.0)
    assert optimizer.state[parameter]["exp_avg"].tolist() == pytest.approx([0.06, 0.08])


def test_a_run_resumed_in_fp16_starts_with_the_first_scale() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = GuardedAdamW([parameter], OptimConfig(), scales_loss=True)
    optimizer.load_scalars(GuardedAdamW([parameter], OptimConfig()).scalars())
    assert optimizer.scale.item() == FIRST_SCALE
