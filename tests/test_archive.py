"""Files of `torch.save`: read without running code, decompressing, or believing the sizes that they name."""

from __future__ import annotations

import io
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.weights_file import Unreadable, read_archive

MIB = 2**20


@pytest.fixture
def little_memory() -> Iterator[None]:
    """No more than 2 GiB on top of what this process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2048 * MIB, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def repacked(content: Any, change: Any = lambda name, data: data, compression: int = zipfile.ZIP_STORED) -> bytes:
    """What `torch.save` writes, with its parts changed."""
    saved, crafted = io.BytesIO(), io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(crafted, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return crafted.getvalue()


@pytest.mark.usefixtures("little_memory")
def test_compressed_parts_are_refused_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    zeros = torch.zeros(16 * MIB)
    path.write_bytes(repacked({"weights": {"a": zeros}}, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < MIB
    with pytest.raises(Unreadable, match="compressed or overlap"):
        read_archive(path)


def test_a_tensor_larger_than_its_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "crafted.pt"

    def enlarge(name: str, data: bytes) -> bytes:
        return data.replace(b"K@", b"M\xff\x3f") if name.endswith("data.pkl") else data  # 64 elements to 16,383

    path.write_bytes(repacked({"a": torch.zeros(64)}, enlarge))
    with pytest.raises(Unreadable, match="damaged"):
        read_archive(path)
