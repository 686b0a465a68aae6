"""AdamW that checks its gradients before a step, and the learning rate of each step.

A step never waits for the device: the norm of all gradients is a tensor, and so is whether it is finite. torch's fused
AdamW takes both: it divides the gradients by `grad_scale` (the loss's scale, times what clipping asks for) and, if
`found_inf` is 1, changes nothing. Under ZeRO, DeepSpeed gives this optimizer flat shards instead of the parameters, and
the norm is summed over ranks. So all stages and precisions work in the same way, DeepSpeed's own clipping, loss scaling
and checks are off, and the host reads the results a step later, with the losses.

It is torch's AdamW rather than DeepSpeed's, which builds for minutes and is no faster on these models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist

from pipelines.basics.option_values import MANY, number

FIRST_SCALE = 2.0**16  # of the loss in fp16
GROWTH_INTERVAL = 2000  # steps with finite gradients before the scale is doubled, as in torch.amp.GradScaler


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = number(1e-4, least=0, most=1000)
    """Learning rate."""
    weight_decay: float = number(1e-5, least=0, most=1000)
    """Decoupled weight decay."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or a cosine that reaches zero at the last step."""
    warmup_steps: int = number(0, least=0, most=1000 * MANY)
    """Steps of linear warm-up."""
    grad_clip: float = number(0.0, least=0, most=1000 * MANY)
    """Largest norm of all gradients together; above it they are scaled down. 0: no limit."""
    ema_decay: float = number(0.0, least=0, below=1)
    """Validate and save an exponential moving average of the weights with this decay, e.g. 0.999. 0: no average."""


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that clips, unscales, and skips a step whose gradients are not finite.

    Args:
        parameters: float32.
        config: learning rate, weight decay, clipping.
        scales_loss: dynamic loss scaling, for fp16: multiply the loss by `scale` before its backward.
        is_sharded: each rank has different elements of the gradients (ZeRO 1 and up, several ranks).

    Attributes:
        scale: of the loss, float32 (); 1 without loss scaling.
        norm: of the gradients of the last step, before clipping, float32 ().
        found_inf: 1 if the last step was skipped, else 0, float32 ().
        in_row: steps skipped in a row, float32 (); with loss scaling, only those that a lower scale can't help.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        config: OptimConfig,
        scales_loss: bool = False,
        is_sharded: bool = False,
    ) -> None:
        parameters = list(parameters)
        super().__init__(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        device = parameters[0].device
        self.grad_clip, self.scales_loss, self.is_sharded = config.grad_clip, scales_loss, is_sharded
        self.scale = torch.full((), FIRST_SCALE if scales_loss else 1.0, device=device)
        self.norm, self.found_inf, self.in_row = (torch.zeros((), device=device) for _ in range(3))
        self._growth = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step by the current gradients."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        total = torch.linalg.vector_norm(norms)
        if self.is_sharded:
            total = total.square()
            dist.all_reduce(total)
            total = total.sqrt()
        self.norm = total / self.scale
        self.found_inf = 1 - torch.isfinite(total).float()
        self.grad_scale = self.scale.clone()
        if self.grad_clip:
            self.grad_scale *= (self.norm / self.grad_clip).nan_to_num(1.0, 1.0).clamp(min=1)
        super().step()
        self._count_skipped()

    @torch.no_grad()
    def skip(self) -> None:
        """Count a step that DeepSpeed skipped itself: at ZeRO 3 it checks the norm before it calls `step`."""
        self.found_inf, self.norm = torch.ones_like(self.found_inf), torch.full_like(self.norm, math.nan)
        self._count_skipped()

    def scalars(self) -> dict[str, Any]:
        """What a checkpoint needs besides the moments."""
        scale = float(self.scale) if self.scales_loss else None
        return {"scale": scale, "growth": int(self._growth), "in_row": float(self.in_row)}

    def load_scalars(self, values: dict[str, Any]) -> None:
        """Restore what `scalars` gave."""
        if self.scales_loss and values["scale"] is not None:
            self.scale.fill_(values["scale"])
        self._growth.fill_(values["growth"])
        self.in_row.fill_(values["in_row"])

    def _count_skipped(self) -> None:
        final = self.found_inf if not self.scales_loss else self.found_inf * (self.scale <= 1)
        self.in_row = (self.in_row + final) * self.found_inf
        if self.scales_loss:
            torch._amp_update_scale_(self.scale, self._growth, self.found_inf, 2.0, 0.5, GROWTH_INTERVAL)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of step 0 to `total_steps` - 1: linear warm-up, then constant or a cosine towards zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
