"""AdamW that checks its gradients before a step, and the learning rate of each step.

A step never waits for the device: the norm of all gradients is a tensor, and so is whether it is finite. Both are used
where they are made, in `kernels.adamw`: gradients are divided by the loss's scale, times what clipping asks for, and if
they are not finite nothing changes. Under ZeRO, DeepSpeed gives this optimizer flat shards instead of the parameters,
and the norm is summed over ranks. So all stages and precisions work in the same way, DeepSpeed's own clipping, loss
scaling and checks are off, and the host reads the results a step later, with the losses.

It is torch's AdamW rather than DeepSpeed's, which builds for minutes and is no faster on these models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from engine.precision import WeightCopies
from kernels.adamw import AdamWOptions, AdamWStep, AdamWTensors, Guard, count_skipped
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
        copies: of parameters, in low precision: the gradient of a copy is that of its parameter, and a step writes the
            copy too.

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
        copies: WeightCopies | None = None,
    ) -> None:
        parameters = list(parameters)
        super().__init__(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)
        device = parameters[0].device
        self.grad_clip, self.scales_loss, self.is_sharded = config.grad_clip, scales_loss, is_sharded
        self.copies = copies
        self.scale = torch.full((), FIRST_SCALE if scales_loss else 1.0, device=device)
        self.norm, self.found_inf, self.in_row = (torch.zeros((), device=device) for _ in range(3))
        self._growth = torch.zeros((), dtype=torch.int32, device=device)
        self._guard = Guard(self.scale, self._growth, self.norm, self.found_inf, self.in_row)
        self._step = AdamWStep()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step by the current gradients."""
        self._step(self._tensors(), self._guard, self._options(), dist.all_reduce if self.is_sharded else None)
        if self.copies:
            self.copies.stepped()

    @torch.no_grad()
    def skip(self) -> None:
        """Count a step that DeepSpeed skipped itself: at ZeRO 3 it checks the norm before it calls `step`."""
        self.found_inf.fill_(1)
        self.norm.fill_(math.nan)
        count_skipped(self._guard, self._options())

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

    def _options(self) -> AdamWOptions:
        (group,) = self.param_groups
        return AdamWOptions(
            group["lr"], group["betas"], group["eps"], group["weight_decay"], self.grad_clip, self.scales_loss,
            GROWTH_INTERVAL,
        )  # fmt: skip

    def _tensors(self) -> AdamWTensors:
        """Of all parameters that have a gradient, which a copy has in place of its parameter."""
        rows = []
        for parameter in self.param_groups[0]["params"]:
            copy = self.copies[parameter] if self.copies else None
            gradient = parameter.grad if copy is None else copy.grad
            if gradient is not None:
                state = self.state[parameter] or self._start(parameter)
                rows.append((parameter, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"], copy))
        return AdamWTensors.of(rows)

    def _start(self, parameter: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step, as torch's AdamW makes it."""
        zeros = (torch.zeros_like(parameter, memory_format=torch.preserve_format) for _ in range(2))
        moments = dict(zip(("exp_avg", "exp_avg_sq"), zeros))
        self.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
        return self.state[parameter]


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of step 0 to `total_steps` - 1: linear warm-up, then constant or a cosine towards zero."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
