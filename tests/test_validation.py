"""What a validation scores, and what it says of logits that are no numbers."""

# ruff: noqa: F811  fixtures of another file

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from test_trainer import data, make  # noqa: F401  # fixtures

from engine.data import Data
from engine.inference import compose_labels
from engine.metrics import SCORED, case_dice, summarise
from engine.trainer import Trainer
from engine.validation import Validator
from kernels.dice_ce import region_masks
from pipelines.layouts.labels import regions_from_labels


def test_a_validation_scores_the_label_map_that_is_written_or_the_masks_where_asked(
    make: Callable[..., Trainer], data: Data
) -> None:
    """The best weights are those whose files would score best, so counts are of the map that a file would hold."""
    coding, found = data.store.coding, {}
    for score in ("label_map", "masks"):
        trainer = make(score, score=score)
        row = trainer.validate()
        assert trainer.validator.loader is not None
        with trainer.step.evaluating() as network:
            for name, image, labels in trainer.validator.loader:
                masks = (network(image) > 0)[0]
                written = regions_from_labels(compose_labels(masks.numpy(), coding), coding)
                expected = torch.from_numpy(written) if score == "label_map" else masks
                truth = region_masks(labels, coding.regions)[0]
                (counts,) = [case for case in trainer.cases if case.name == name]
                assert counts == case_dice(name, expected, truth)
                found[score] = (written == masks.numpy()).all(), counts
        assert row["val_mean"] == summarise(trainer.cases)["mean"]
        summary = trainer.summary()
        assert summary["scored"] == score and SCORED[score] in summary["definition"]
    assert not found["masks"][0] and found["label_map"][1] != found["masks"][1]  # else the two could not be told apart


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_names_the_cases_whose_logits_are_not_finite(
    value: float, make: Callable[..., Trainer], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count as background; without a word a run of NaN looked like one that learns nothing."""
    trainer, logits, seen = make("run"), Validator.logits, []

    def broken(self: Validator, network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        seen.append(image)
        found = logits(self, network, image)
        return found * value if len(seen) == 1 else found

    trainer.validate()
    assert not caplog.records
    monkeypatch.setattr(Validator, "logits", broken)
    trainer.validate()
    assert trainer.validator.loader is not None
    first = next(iter(trainer.validator.loader))[0]
    assert [record.getMessage() for record in caplog.records][0].startswith(
        f"the logits of 1 validation cases are NaN or infinite ({first}) and count as background: lower --optim.lr"
    )
