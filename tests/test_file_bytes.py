"""Only regular files are read, no further than their header announces, and whatever else lies there is named."""

from __future__ import annotations

import gzip
import struct
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipelines.basics.errors import CaseError
from pipelines.basics.text import escape_controls
from pipelines.scans.nifti import read_grid, read_nifti

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


def content(shape: tuple[int, ...] = (7, 6, 5), dtype: str = "int16") -> bytes:
    """A whole .nii file."""
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    return nib.Nifti1Image(array, AFFINE).to_bytes()


def refused(path: Path, match: str) -> CaseError:
    with pytest.raises(CaseError, match=match) as caught:
        read_nifti(path)
    assert caught.value.path == Path(escape_controls(str(path)))
    return caught.value


OTHER = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s9--0.nii.gz\n", "a git-annex pointer", "git annex get"),
    "html": (b"\n <!DOCTYPE html>\n<html>404</html>", "a web page", "server's answer"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML text", "server's answer"),
    "json": (b'{"message": "Not Found"}', "a JSON text", "server's answer"),
    "twice": (gzip.compress(content()), "compressed twice", "gunzip"),
    "bzip2": (b"BZh91AY&SY", "compressed by bzip2", "gzip or not at all"),
    "zip": (b"PK\x03\x04....", "a zip archive", "Unpack"),
    "nrrd": (b"NRRD0005\n", "an NRRD image", "Convert"),
    "dicom": (bytes(128) + b"DICM....", "a DICOM file", "dcm2niix"),
    "text": (b"hello", "not a NIfTI file: it starts with b'hello'", "Convert"),
}


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_file_that_is_not_a_scan_is_named_for_what_it_is(tmp_path: Path, kind: str, zipped: bool) -> None:
    data, what, remedy = OTHER[kind]
    if kind == "twice" and not zipped:
        pytest.skip("once is as it should be")
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert remedy in refused(path, f"not a NIfTI file.*{what}" if kind != "text" else what).remedy


@contextmanager
def little_memory() -> Iterator[None]:
    """Fails where more than 10 MB are taken at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def zeros(megabytes: int, start: bytes) -> bytes:
    """A gzip file of a start and then so many megabytes of zeros, a thousandth as long."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    parts = [packer.compress(start)]
    parts += [packer.compress(bytes(1 << 20)) for _ in range(megabytes)]
    return b"".join([*parts, packer.flush()])


@pytest.mark.parametrize("start", [content(), b"", b"hello"], ids=["a_scan", "zeros", "a_text"])
def test_gzip_is_inflated_no_further_than_its_header_announces(tmp_path: Path, start: bytes) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(zeros(64, start))
    with little_memory():
        refused(path, "goes on for over 1048576 bytes after the 772 that the" if len(start) > 9 else "not a NIfTI")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_size_that_the_file_cannot_hold_is_refused_before_memory_is_taken(tmp_path: Path, zipped: bool) -> None:
    data = bytearray(content())
    data[42:48] = struct.pack("<3h", 1000, 1000, 500)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(bytes(data)) if zipped else bytes(data))
    there = "at most" if zipped else str(len(data))
    with little_memory():
        refused(path, f"truncated: the header announces 1000000352 bytes for shape .1000, 1000, 500.*are {there}")


@pytest.mark.parametrize("zipped", [False, True])
def test_padding_after_the_voxels_is_not_a_fault(tmp_path: Path, zipped: bool) -> None:
    data = content() + bytes(1000)
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert read_nifti(path)[0].shape == (7, 6, 5)


def test_a_checksum_counts_where_padding_follows(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(content() + bytes(1000)))
    data[-8] ^= 1
    (tmp_path / "a.nii.gz").write_bytes(bytes(data))
    refused(tmp_path / "a.nii.gz", "damaged gzip")


def block_gzip(data: bytes, size: int) -> bytes:
    return b"".join(gzip.compress(data[i : i + size], 1) for i in range(0, len(data), size))


def test_members_of_bgzip_are_read_in_linear_time(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"

    def seconds(slices: int) -> float:
        data = content((256, 256, slices), "uint8")
        path.write_bytes(block_gzip(data, 2048))
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            array, _ = read_nifti(path)
            taken.append(time.perf_counter() - start)
        assert array.tobytes("F") == data[352:]
        return min(taken)

    assert seconds(128) < 8 * seconds(32)  # 4 times the bytes; 16 times the time where each member copies the rest


@pytest.mark.parametrize("size", [1, 7, 100, 351, 543, 1 << 16])
def test_members_of_any_size_are_joined(tmp_path: Path, size: int) -> None:
    data = content()
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(b"") + block_gzip(data, size) + gzip.compress(b""))
    assert read_nifti(tmp_path / "a.nii.gz")[0].tobytes("F") == data[352:]
    assert read_grid(tmp_path / "a.nii.gz")[0] == (7, 6, 5)


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_a_gzip_file_may_end_anywhere_and_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    data = gzip.compress(content())
    (tmp_path / "a.nii.gz").write_bytes(data[: len(data) * cut // 60])
    refused(tmp_path / "a.nii.gz", r"empty file|truncated|damaged gzip|not a NIfTI")
