"""The first non-finite tensor of a pass is found by the layer that made it."""

from __future__ import annotations

import pytest
import torch

from engine.diagnosis import first_nonfinite


class Layers(torch.nn.Module):
    """`second` gives what `weight` makes of it; its square root has no finite gradient at zero."""

    def __init__(self, factor: float, takes_root: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(2, 2) for _ in range(3))
        self.takes_root = takes_root
        torch.nn.init.constant_(self.second.weight, factor)
        torch.nn.init.zeros_(self.second.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        return self.third(x.square().sqrt() if self.takes_root else x)


@pytest.mark.parametrize(
    ("model", "image", "found"),
    [
        (Layers(1.0), torch.ones(1, 2), None),
        (Layers(1.0), torch.full((1, 2), float("nan")), "the images themselves"),
        (Layers(float("inf")), torch.ones(1, 2), "the output of second"),
        (Layers(0.0, takes_root=True), torch.ones(1, 2), "the gradient of the output of second"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_found(model: Layers, image: torch.Tensor, found: str | None) -> None:
    assert first_nonfinite(model, lambda logits, labels: logits.sum(), image, torch.zeros(1)) == found


def test_a_nonfinite_loss_from_finite_logits_is_named() -> None:
    loss_of = lambda logits, labels: logits.sum() * float("nan")  # noqa: E731
    model = Layers(1.0)
    found = first_nonfinite(model, loss_of, torch.ones(1, 2), torch.zeros(1))
    assert found == "the loss, from finite logits"
