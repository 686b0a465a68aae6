"""A header is believed only as far as a scan of a head goes, and each fault has its own cause and remedy."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from pipelines.basics.errors import CaseError
from pipelines.scans.nifti import read_grid, read_nifti

SHAPE = (7, 6, 5)
AFFINE = np.array([[-1, 0, 0, 3], [0, -1.5, 0, 9], [0, 0, 2, -4], [0, 0, 0, 1]], float)


def write(
    path: Path,
    spoil: Callable[[nib.Nifti1Header], object],
    kind: type[nib.Nifti1Header] = nib.Nifti1Header,
    extra: int = 0,
) -> Path:
    """A scan whose header is changed byte for byte, without nibabel's corrections."""
    image_kind = nib.Nifti1Image if kind is nib.Nifti1Header else nib.Nifti2Image
    image = image_kind(np.arange(210, dtype=np.int16).reshape(SHAPE), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    data = image.to_bytes()
    fields = kind(data[: kind.sizeof_hdr])
    spoil(fields)
    path.write_bytes(fields.binaryblock + data[kind.sizeof_hdr :] + bytes(extra))
    return path


def put(**values: object) -> Callable[[nib.Nifti1Header], None]:
    """Sets fields: a number, or {index: number}."""

    def spoil(fields: nib.Nifti1Header) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                for index, number in value.items():
                    fields[name][index] = number
            else:
                fields[name] = value

    return spoil


def metres_not_said(fields: nib.Nifti1Header) -> None:
    fields["srow_x"], fields["srow_y"], fields["srow_z"] = AFFINE[:3] / 1000


NO_CODES = {"sform_code": 0, "qform_code": 0}
LONG = {"pixdim": {1: 10.0}, "dim": {1: 300, 2: 1, 3: 1}, **NO_CODES}
FAULTS: dict[str, tuple[Callable[[nib.Nifti1Header], None], str, str]] = {
    "sizeof_hdr": (put(sizeof_hdr=0), r"sizeof_hdr is 0, must be 348", "Copy or download"),
    "datatype": (put(datatype=3), r"damaged NIfTI header \(data code 3 not recognized\)", "Copy or download"),
    "complex": (put(datatype=32), r"voxels are of type complex64", "Convert"),
    "offset_0": (put(vox_offset=0), r"begin at byte 0 \(vox_offset\), .* ends at 352", "vox_offset to 352"),
    "offset_inside": (put(vox_offset=348), r"vox offset 348 too low", "Copy"),
    "offset_negative": (put(vox_offset=-16), r"vox offset -16 too low", "Copy"),
    "offset_infinite": (put(vox_offset=np.inf), r"begin at byte inf", "Copy"),
    "offset_nan": (put(vox_offset=np.nan), r"begin at byte nan", "Copy"),
    "offset_between": (put(vox_offset=352.5), r"begin at byte 352\.5", "Copy"),
    "no_dimensions": (put(dim={0: 0}), r"has no voxels: shape \(0,\)", "Copy"),
    "zero_axis": (put(dim={3: 0}), r"has no voxels: shape \(7, 6, 0\)", "Copy"),
    "too_many": (put(dim={1: 30000, 2: 30000, 3: 2}), r"is 1800000000 voxels, at most 536870912", "resample it"),
    "intercept_nan": (
        put(scl_slope=2, scl_inter=np.nan),
        r"scaling is 2 \* voxel \+ nan",
        "scl_inter of its header to 0",
    ),
    "quaternion": (
        put(sform_code=0, quatern_b=2),
        r"qform can't be read.*quaternion \[2\.0, .*at most 1 long",
        "sform",
    ),
    "no_pixdim": (
        put(pixdim={2: 0.0}, **NO_CODES),
        r"no voxel size: pixdim is \[1\.0, 0\.0, 2\.0\]",
        "Copy the header",
    ),
    "qform_no_pixdim": (put(pixdim={3: 0.0}, sform_code=0), r"no voxel size.* and sform_code is 0", "Copy the header"),
    "metres_not_meant": (
        put(xyzt_units=1),
        r"1000 x 1500 x 2000 mm.*scans of heads they are .* to 50 mm; .*states metres",
        "2 mm",
    ),
    "micron_not_meant": (
        put(xyzt_units=3),
        r"0\.001 x 0\.0015 x 0\.002 mm.*micrometres \(xyzt_units 3\)",
        "2 mm",
    ),
    "metres_not_said": (metres_not_said, r"voxels are 0\.001 x.*states no unit", "1 metres"),
    "too_small": (
        put(dim={1: 24, 2: 24, 3: 15}, srow_x={0: 0.1}, srow_y={1: 0.1}, srow_z={2: 0.1}),
        r"shape \(24, 24, 15\) is 2.4 x 2.4 x 1.5 mm, a scan of a head is at least 60 mm",
        "xyzt_units",
    ),
    "too_long": (
        put(**LONG),
        r"shape \(300, 1, 1\) is 3000 x .* mm, a scan .* at most 2000 mm",
        "the sform",
    ),
    "far_away": (put(srow_x={3: 1e9}), r"first voxel is at \[1000000000\.0, 9\.0, -4\.0\] mm", "the sform"),
    "infinite": (put(srow_y={1: np.inf}), r"can't be inverted", "the sform"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_header_has_its_own_cause_and_remedy(tmp_path: Path, fault: str) -> None:
    spoil, message, remedy = FAULTS[fault]
    path = write(tmp_path / "a.nii", spoil, extra=2000)
    for read in (read_nifti, read_grid):
        with pytest.raises(CaseError, match=message) as caught:
            read(path)
        assert caught.value.path == path
        assert remedy in caught.value.remedy


FAULTS_2 = {
    "sizeof_hdr": (put(sizeof_hdr=348), r"sizeof_hdr is 348, must be 540"),
    "near_2_to_the_61": (put(dim={1: 2**61, 2: 2**61, 3: 2**61}), r"voxels, at most 536870912 are read"),
    "product_wraps_to_0": (put(dim={1: 2**32, 2: 2**32, 3: 1}), r"18446744073709551616 voxels"),
    "offset_near_2_to_the_63": (put(vox_offset=2**63 - 1024), r"truncated: the header announces 9223372036854775"),
    "slope_beyond_float32": (put(scl_slope=1e300, scl_inter=0), r"must be finite in float32"),
    "slope_below_float32": (put(scl_slope=1e-300, scl_inter=0), r"must be finite in float32"),
    "line_ends": (put(eol_check={2: 10, 3: 0}), r"EOL check"),
}


@pytest.mark.parametrize("fault", FAULTS_2)
def test_a_fault_of_a_nifti_2_header_is_refused(tmp_path: Path, fault: str) -> None:
    spoil, message = FAULTS_2[fault]
    with pytest.raises(CaseError, match=message):
        read_nifti(write(tmp_path / "a.nii", spoil, nib.Nifti2Header))


@pytest.mark.parametrize(("code", "mm"), [(0, 1), (1, 1000), (2, 1), (3, 0.001), (7, 1)])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (0, 0)])
def test_lengths_are_brought_to_mm(tmp_path: Path, code: int, mm: float, codes: tuple[int, int]) -> None:
    own = AFFINE.copy()
    own[:3] /= mm
    image = nib.Nifti1Image(np.arange(210, dtype=np.int16).reshape(SHAPE), own)
    image.set_sform(own, codes[0])
    image.set_qform(own, codes[1])
    image.header["xyzt_units"] = code + 16  # and milliseconds
    nib.save(image, tmp_path / "a.nii")
    expected = nib.load(tmp_path / "a.nii").affine
    expected[:3] *= mm
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii")[1], expected)  # bit for bit where it is mm
    np.testing.assert_allclose(np.abs(np.diag(expected)), np.abs(np.diag(AFFINE)), rtol=1e-5)


def test_what_nibabel_repairs_by_guessing_is_one_warning_with_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    codes = write(tmp_path / "codes.nii", put(sform_code=99))
    sign = write(tmp_path / "sign.nii", put(pixdim={1: -1.0}, **NO_CODES))
    handedness = write(tmp_path / "handedness.nii", put(pixdim={0: 7.0}, sform_code=0))
    with caplog.at_level(logging.DEBUG):
        for path in (codes, sign, handedness):
            for _ in range(3):
                read_nifti(path)
                read_grid(path)
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(": ")[0] for text in said] == [str(codes), str(sign), str(handedness)]
    assert "sform_code is 99, which NIfTI does not define" in said[0]
    assert "pixdim is [-1.0, 1.5, 2.0]" in said[1] and "pixdim[0]" in said[2]
    for path in (codes, sign, handedness):
        np.testing.assert_array_equal(read_nifti(path)[1], nib.load(path).affine)


def test_fields_the_affine_does_not_use_may_hold_anything(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spoil = put(pixdim={0: 0.0, 1: 0.0, 2: -1.0}, quatern_b=5, intent_code=999, slice_code=77, dim_info=255)
    np.testing.assert_array_equal(read_nifti(write(tmp_path / "a.nii", spoil))[1], AFFINE)
    assert not caplog.records


def with_extensions(path: Path, *contents: bytes) -> bytearray:
    image = nib.Nifti1Image(np.arange(210, dtype=np.int16).reshape(SHAPE), AFFINE)
    image.header.extensions.extend(nib.nifti1.Nifti1Extension("comment", content) for content in contents)
    nib.save(image, path)
    return bytearray(path.read_bytes())


def test_extensions_are_stepped_over(tmp_path: Path) -> None:
    with_extensions(tmp_path / "a.nii", b"x" * 100_000, b"short")
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii")[0].ravel(), np.arange(210))


@pytest.mark.filterwarnings("ignore:Extension size")  # nibabel's
@pytest.mark.parametrize("size", [-16, 0, 7, 64, 1 << 30])
def test_an_extension_that_reaches_into_the_voxels_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.nii"
    data = with_extensions(path, b"note", b"note")
    data[352:356] = size.to_bytes(4, "little", signed=True)
    path.write_bytes(bytes(data))
    with pytest.raises((ImageFileError, HeaderDataError, ValueError)):
        np.asarray(nib.load(path).dataobj)
    with pytest.raises(CaseError, match=f"damaged NIfTI header: an extension of {size} bytes at byte 352"):
        read_nifti(path)
