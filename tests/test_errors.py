"""Errors of a user's data reach the user whole, from a worker process too."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from pipelines.basics.errors import CaseError, CaseFailure, DataError, StoreError


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("bad \x1b[31m"), "bad \\x1b[31m"),
        (CaseError(Path("a\udce9.nii"), "empty", "Copy it again"), "a\\udce9.nii: empty. Copy it again."),
        (CaseFailure(Path("a.nii"), "killed", "Try again"), "a.nii: killed. Try again."),
        (StoreError(Path("s"), "no space left", 2_500_000), "store s: no space left. It needs about 2.5 MB more. Free"),
    ],
)
def test_an_error_survives_the_way_from_a_worker(error: DataError, message: str) -> None:
    brought = pickle.loads(pickle.dumps(error))
    assert type(brought) is type(error) and str(brought) == str(error) and str(error).startswith(message)
    assert vars(brought) == vars(error)
