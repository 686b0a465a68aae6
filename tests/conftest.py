"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("BRATS_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real scans: `BRATS_DATA`, else `../shared/data` beside the checkout. Skips where there is none."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real scans in {REAL_DATA}: set BRATS_DATA to a folder that holds some")
    return REAL_DATA
