"""Learning rate by step, and weight decay."""

from __future__ import annotations

import pytest
import torch

from engine.config import OptimConfig
from engine.optim import make_optimizer, make_schedule


def rates(config: OptimConfig, steps: int) -> list[float]:
    optimizer = make_optimizer(torch.nn.Linear(2, 2), config)
    schedule = make_schedule(optimizer, config, steps)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


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
    optimizer = make_optimizer(layer, OptimConfig(weight_decay=0.5, lr=0.1))
    layer.weight.grad = torch.ones_like(layer.weight)
    bias, weight = layer.bias.detach().clone(), layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.bias, bias) and not torch.equal(layer.weight, weight)
