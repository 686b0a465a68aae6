"""An exponential moving average of the weights, which is what is then validated and kept.

Each rank averages what it holds: whole weights, or its shards under ZeRO 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from engine.parallel import copy_weights, held_by_rank, shard_of


class WeightAverage:
    """average = decay * average + (1 - decay) * weights after every step.

    The first steps decay faster, (1 + n) / (10 + n) after n of them, so that the initial weights are soon forgotten.

    Args:
        model: as DeepSpeed left it. decay: below 1.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.averages = [tensor.clone() for tensor in self._weights()]

    def update(self) -> None:
        """After a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, self._weights(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averages for weights."""
        weights = self._weights()
        kept = [tensor.clone() for tensor in weights]
        torch._foreach_copy_(weights, self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def copy(self) -> dict[str, torch.Tensor]:
        """Whole, by name, on the CPU; every rank takes part."""
        with self.applied():
            return copy_weights(self.model)

    def load(self, weights: dict[str, torch.Tensor], steps: int) -> None:
        """Take what `copy` gave, after so many updates."""
        self.steps = steps
        for (name, parameter), average in zip(self.model.named_parameters(), self.averages, strict=True):
            average.copy_(shard_of(parameter, weights[name]).view_as(average))

    def _weights(self) -> list[torch.Tensor]:
        return [held_by_rank(parameter) for parameter in self.model.parameters()]
