"""Fixtures that several test files share."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine.ranks.distributed import Ranks, init_ranks

ROOT = Path(__file__).resolve().parent.parent
REAL_DATA = Path(os.environ.get("BRATS_DATA", ROOT.parent / "shared" / "data"))

LONGEST = ("test_ranks.py", "test_run.py", "test_sharding.py", "test_trainer.py", "test_watchdog.py")
"""Files that start first: workers take whole files, and so end at about the same time."""


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """A shell makes its background jobs ignore Ctrl-C, which some tests send themselves."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real scans: `BRATS_DATA`, else `../shared/data` beside the checkout. Skips where there is none."""
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real scans in {REAL_DATA}: set BRATS_DATA to a folder that holds some")
    return REAL_DATA


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """This process as the only rank, on the CPU. Once for all files: DeepSpeed keeps groups of the first one made."""
    yield init_ranks("cpu")
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def own_linear() -> Iterator[None]:
    """DeepSpeed's ZeRO 3 replaces PyTorch's `linear` in the whole process, with one that adds a bias apart."""
    before = F.linear
    yield
    F.linear = before


@pytest.fixture
def gpu_ranks(ranks: Ranks) -> Iterator[Ranks]:
    """This process as the only rank, on a GPU. `ranks` has set DeepSpeed to the CPU, where it would move networks."""
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

    before = get_accelerator()
    set_accelerator(CUDA_Accelerator())
    yield dataclasses.replace(ranks, device=torch.device("cuda", 0))
    set_accelerator(before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; `gpu` tests skip where there is no CUDA device, `slow` ones without `--slow`."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="takes half a minute or more: pytest --slow"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, torch sees none"))
