"""The layer in which a diverged training first breaks down.

One more pass over the same batch checks every layer's output, then their gradients, in order of computation. It costs a
pass or two, once, before the run gives up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Diverged(ValueError):
    """Training can't go on; the message says since when, where, and what to change."""


def first_nonfinite(
    model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor], image: Tensor, labels: Tensor
) -> str | None:
    """The first non-finite tensor of a pass over this batch, in words, or None.

    Args:
        model: uncompiled, so that hooks work. loss_of: (logits, labels) -> scalar.
        image: (B, C, X, Y, Z). labels: as `loss_of` takes them.
    """
    if not torch.isfinite(image).all():
        return "the images themselves"
    calls: list[tuple[str, Any]] = []
    hooks = [
        module.register_forward_hook(lambda *call, name=name: calls.append((name, call[-1])))
        for name, module in model.named_modules()
        if name and not list(module.children())
    ]
    try:
        logits = model(image)
    finally:
        for hook in hooks:
            hook.remove()
    outputs = [(name, output) for name, output in calls if isinstance(output, Tensor)]
    for name, output in outputs:
        if not torch.isfinite(output).all():
            return f"the output of {name}"
    loss = loss_of(logits, labels)
    if not torch.isfinite(loss):
        return "the loss, from finite logits"
    tracked = [(name, output) for name, output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(loss, [output for _, output in tracked], allow_unused=True)
    for (name, _), gradient in reversed(list(zip(tracked, gradients, strict=True))):
        if gradient is not None and not torch.isfinite(gradient).all():
            return f"the gradient of the output of {name}"
    return None
