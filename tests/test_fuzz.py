"""A few seconds of the fuzzer on every target; hours of it: `python tests/fuzz.py`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz import TARGETS, run_one

COUNTS = {"nifti": 1500, "config": 500, "weights": 100, "lists": 300, "tables": 300}


def test_every_target_is_tried() -> None:
    assert set(COUNTS) == set(TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_input_is_read_correctly_or_refused(target: str) -> None:
    outcomes = [run_one(target, seed=0, number=number) for number in range(COUNTS[target])]
    assert {"read", "refused"} == set(outcomes), "inputs of one kind alone show nothing"


def test_the_same_number_is_the_same_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []

    def note(rng: random.Random, folder: Path) -> str:
        drawn.append(rng.random())
        return "read"

    monkeypatch.setitem(TARGETS, "lists", note)
    for number in (7, 8, 7):
        run_one("lists", seed=3, number=number)
    assert drawn[0] == drawn[2] != drawn[1]
