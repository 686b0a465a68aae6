"""Dice of the validation cases, by the `--train.validation` and `--train.score` of the run."""

from __future__ import annotations

import logging
import time

import torch

from engine.config import Config
from engine.metrics import CaseDice, count_voxels, scored_regions
from engine.progress import TrainingProgress
from engine.ranks.distributed import Ranks, gather
from engine.sliding_window import sliding_window_logits
from kernels.dice_ce import region_masks
from pipelines.basics.text import first_few
from pipelines.layouts.labels import Coding
from pipelines.loading.loaders import ValLoader

log = logging.getLogger(__name__)


class Validator:
    """Scores a network on the validation cases of all ranks.

    Args:
        config: of the run. ranks: who this process is.
        coding: of the labels. loader: this rank's cases, if any.
    """

    def __init__(self, config: Config, ranks: Ranks, coding: Coding, loader: ValLoader | None) -> None:
        self.config, self.ranks, self.coding, self.loader = config, ranks, coding, loader

    def score(self, network: torch.nn.Module, progress: TrainingProgress | None = None) -> tuple[list[CaseDice], float]:
        """All cases, sorted by name, and the seconds of the slowest rank; all ranks must call it."""
        started, scored = time.perf_counter(), []
        for name, image, labels in self.loader or ():
            image, labels = image.to(self.ranks.device), labels.to(self.ranks.device)
            logits, truth = self.logits(network, image), region_masks(labels, self.coding.regions)[0]
            is_finite = torch.stack(torch.aminmax(logits)).isfinite().all()
            scored.append((name, count_voxels(name, self.masks(logits), truth), is_finite))
            if progress:
                progress.validating(len(scored))
        own = [CaseDice.of(name, counts) for name, counts, _ in scored]
        broken = [name for name, _, is_finite in scored if not is_finite]
        found = gather((own, broken, time.perf_counter() - started), self.ranks)
        cases, overflowed, seconds = zip(*found, strict=True)
        names = sorted(name for part in overflowed for name in part)
        if names:
            log.warning(
                "the logits of %d validation cases are NaN or infinite (%s) and count as background: lower --optim.lr, "
                "or take --train.precision bf16 instead of fp16", len(names), first_few(names),
            )  # fmt: skip
        return sorted((case for part in cases for case in part), key=lambda case: case.name), max(seconds)

    @torch.no_grad()
    def logits(self, network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        """Logits (1, R, X, Y, Z) of a loader's batch (1, C, X, Y, Z), by sliding window if volumes are full."""
        if self.config.train.validation == "full_volume":
            return sliding_window_logits(network, image, self.config.data.crop_size_voxels)
        return network(image)

    def masks(self, logits: torch.Tensor) -> torch.Tensor:
        """What is scored, bool (R, X, Y, Z), of logits (1, R, X, Y, Z)."""
        return scored_regions((logits > 0)[0], self.coding, self.config.train.score)  # sigmoid(x) > 0.5
