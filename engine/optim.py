"""AdamW that looks at its gradients before it takes a step, and the learning rate by step.

A step without waiting for the device: the norm of all gradients is a tensor, and so is whether it is finite. The fused
AdamW of torch takes both, `grad_scale` to divide the gradients by (the loss's scale, and what clipping asks for) and
`found_inf` to leave everything as it is. Under ZeRO, DeepSpeed gives this optimizer flat shards in place of the
parameters; then the norm is summed over ranks. So all stages and precisions share this one way, DeepSpeed's own
clipping, loss scaling and checks are off, and the host reads the results a step later, with the losses.

torch's AdamW and not DeepSpeed's, which builds for minutes and is no faster on these models.
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
    """Learning rate after the warm-up: constant, or a cosine to zero at the last step."""
    warmup_steps: int = number(0, least=0, most=1000 * MANY)
    """Steps of linear warm-up."""
    grad_clip: float = number(0.0, least=0, most=1000 * MANY)
    """Largest norm of all gradients together; a step with more is scaled down. 0: no limit."""
    ema_decay: float = number(0.0, least=0, below=1)
    """Validate and keep an exponential moving average of the weights, e.g. 0.999; 0: the weights themselves."""


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that clips, unscales, and leaves out a step whose gradients are not finite.

    Args:
        parameters: float32.
        config: learning rate, weight decay, clipping.
        scales_loss: dynamic loss scaling, for fp16: multiply the loss by `scale` before its backward.
        is_sharded: each rank holds other elements of the gradients (ZeRO 1 and up, several ranks).

    Attributes:
        scale: of the loss, float32 (); 1 without loss scaling.
        norm: of the gradients of the last step, before clipping, float32 ().
        found_inf: 1 where the last step was left out, else 0, float32 ().
        in_row: steps left out in a row, float32 (); with loss scaling those alone that a lower scale can't help.
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
        """One step from the gradients that are there."""
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
        self._note()

    @torch.no_grad()
    def skip(self) -> None:
        """Take note of a step that was left out before it came here (DeepSpeed's ZeRO 3 looks at the norm itself)."""
        self.found_inf, self.norm = torch.ones_like(self.found_inf), torch.full_like(self.norm, math.nan)
        self._note()

    def scalars(self) -> dict[str, Any]:
        """What a checkpoint needs beside the moments."""
        scale = float(self.scale) if self.scales_loss else None
        return {"scale": scale, "growth": int(self._growth), "in_row": float(self.in_row)}

    def load_scalars(self, values: dict[str, Any]) -> None:
        """Take `scalars` back."""
        if self.scales_loss and values["scale"] is not None:
            self.scale.fill_(values["scale"])
        self._growth.fill_(values["growth"])
        self.in_row.fill_(values["in_row"])

    def _note(self) -> None:
        final = self.found_inf if not self.scales_loss else self.found_inf * (self.scale <= 1)
        self.in_row = (self.in_row + final) * self.found_inf
        if self.scales_loss:
            torch._amp_update_scale_(self.scale, self._growth, self.found_inf, 2.0, 0.5, GROWTH_INTERVAL)


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of step 0, 1, ... `total_steps` - 1: linear warm-up, then constant or a cosine towards zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
