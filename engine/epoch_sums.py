"""The losses of an epoch, summed on the device so that nothing waits for a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.ranks.distributed import Ranks
from engine.step import StepValues

LOSSES, PASSES, SKIPPED = slice(3), 3, 4


class EpochSums:
    """Loss, Dice loss and CE over the passes with a finite loss, the number of those passes, and skipped steps.

    Attributes:
        values: these five, float32 (5,), of this rank.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.zeros(5, device=device)

    def add(self, values: torch.Tensor, stepped: bool) -> None:
        """Add a pass: `TrainingStep.values` after it, and whether it made an optimizer step."""
        losses, was_skipped = values[LOSSES], StepValues(*values).was_skipped
        is_finite = losses.isfinite().all()
        skipped = was_skipped if stepped else torch.zeros_like(was_skipped)
        self.values += torch.cat([losses.where(is_finite, 0), torch.stack([is_finite.float(), skipped])])

    def restore(self, saved: Sequence[Sequence[float]], ranks: Ranks) -> None:
        """Go on from the sums of each rank that saved a checkpoint; the number of ranks may have changed."""
        if len(saved) == ranks.world_size:
            self.values += torch.tensor(saved[ranks.rank], device=ranks.device)
        elif ranks.is_first:
            total = torch.tensor(saved, device=ranks.device).sum(0)
            total[SKIPPED] = saved[0][SKIPPED]  # all ranks skip a step together
            self.values += total


def epoch_means(sums: Sequence[Sequence[float]]) -> tuple[dict[str, float | None], int]:
    """Mean losses over the passes of all ranks, and the skipped steps, from the sums of each rank."""
    passes = sum(rank[PASSES] for rank in sums)
    names = ("loss", "dice_loss", "ce_loss")
    means = {name: sum(rank[i] for rank in sums) / passes if passes else None for i, name in enumerate(names)}
    return means, int(sums[0][SKIPPED])
