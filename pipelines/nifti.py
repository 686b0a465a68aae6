"""Read NIfTI files and check the files of a case, without a wasted copy; write segmentations.

The whole file is read, inflated in one call (isal's inflater, about 690 MB/s out of one core; it checks the CRC) and
viewed as an array; nibabel reads the header, so the affine is its best one: sform, else qform, else the voxel size.
NIfTI data are in Fortran order, X fastest. They stay so: a case is one (C, Z, Y, X) buffer, filled channel by channel,
and seen as (X, Y, Z, C). Bringing (240, 240, 155, 4) into C order takes 190 ms blockwise and 490 to 840 ms by a plain
copy, against 100 ms for inflating it; resampling reads it as it is (`geometry.resample_image`), and only the result, a
quarter of the size, is brought into C order.

Every fault of a file is one `CaseError`: which file, what is wrong, what the rule is, what to do. The traps of real
data that are no faults: a label with `sform_code` 0 beside images with 1 (affines are compared as maps, at the corner
voxels), label maps of float32, label maps with a scale factor ("1" reads as 0.99999997, so they are rounded, not cast),
members of a gzip file one after another, axes of length 1 after the third.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import cast

import nibabel as nib
import numpy as np
from isal import igzip, isal_zlib
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from pipelines.atomic import replacing
from pipelines.cases import Case
from pipelines.labels import CODINGS, Coding
from pipelines.layouts import CaseError

CORNER_TOLERANCE_MM = 1e-2
LABEL_TOLERANCE = 1e-3
_GZIP_MAGIC = b"\x1f\x8b"
_COPY_AGAIN = "Copy or download the file again"
_WITHOUT_IT = "or move the case away (off the list, where one names it)"
_RESAMPLE_FIRST = f"Resample them to one grid (the preprocessed BraTS files are on one), {_WITHOUT_IT}"


@dataclass
class RawCase:
    """A case as its files have it: file orientation, own voxel size.

    Args:
        image: float32 (X, Y, Z, C), Fortran order (a view of a (C, Z, Y, X) buffer).
        label: uint8 (X, Y, Z), Fortran order; None where the case has none.
        affine: (4, 4) float64, voxel index to mm (RAS+), of the first image.
        label_affine: that of the label, which may differ from it by rounding; None where there is no label.
    """

    image: np.ndarray
    label: np.ndarray | None
    affine: np.ndarray
    label_affine: np.ndarray | None


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a `.nii` or `.nii.gz` file.

    Args:
        path: the file; that it is compressed is seen from its content.

    Returns:
        array: (X, Y, Z, ...) in file order and Fortran order, read-only; in the file's dtype where the header gives no
            scaling, else scaled, float32.
        affine: (4, 4) float64, voxel index to mm (RAS+).

    Raises:
        CaseError: missing, unreadable, empty, truncated or damaged file, not NIfTI, a dtype that is no number, or an
            affine that can't be inverted.
    """
    data = _inflated(path)
    image = _parse_header(path, data)
    proxy = image.dataobj
    dtype, shape = proxy.dtype, proxy.shape
    if dtype.kind not in "iuf":
        raise CaseError(path, f"voxels are of type {dtype}, must be integers or real numbers", "Convert the file")
    if min(shape) < 1:
        raise CaseError(path, f"has no voxels: shape {shape}", _COPY_AGAIN)
    count = int(np.prod(shape, dtype=np.int64))
    needed = proxy.offset + count * dtype.itemsize
    if len(data) < needed:
        problem = f"truncated: the header announces {needed} bytes for shape {shape} of {dtype}, there are {len(data)}"
        raise CaseError(path, problem, _COPY_AGAIN)
    array = np.frombuffer(data, dtype, count, proxy.offset).reshape(shape, order="F")
    if (proxy.slope, proxy.inter) != (1, 0):
        array = array.astype(np.float32, order="K")
        array *= np.float32(proxy.slope)
        array += np.float32(proxy.inter)
        array.flags.writeable = False
    affine = np.array(image.affine, np.float64)
    fault = affine_fault(affine)
    if fault:
        raise CaseError(path, fault, f"Correct sform and qform of its header, {_WITHOUT_IT}")
    return array, affine


def read_grid(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of a file, as `read_nifti` has them, from the first 64 KiB of it.

    Raises:
        CaseError: missing or unreadable file, not NIfTI, or a damaged header.
    """
    image = _header_of(path)
    return tuple(int(n) for n in image.shape), np.array(image.affine, np.float64)


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray, like: Path | None = None) -> None:
    """Write a volume, whole or not at all.

    Args:
        path: `.nii.gz`, or `.nii`, which is not compressed.
        array: (X, Y, Z) or (X, Y, Z, C), of a dtype that NIfTI has.
        affine: (4, 4), voxel index to mm (RAS+).
        like: a file on the same grid, whose NIfTI version, units, codes of sform and qform and description the new one
            takes; None: NIfTI-1, mm.

    Raises:
        OSError: it can't be written.
        CaseError: `like` can't be read.
    """
    source = None if like is None else _header_of(like)
    header = None if source is None else source.header.copy()
    if header is not None:
        header.set_data_dtype(array.dtype)
        header["cal_min"] = header["cal_max"] = 0
    kind = nib.Nifti2Image if isinstance(source, nib.Nifti2Image) else nib.Nifti1Image
    image = kind(array, affine, header)
    if header is None:
        image.header.set_xyzt_units("mm")
    data = image.to_bytes()
    if path.name.endswith(".gz"):
        data = igzip.compress(data, 2)  # of a label map 1 % is left
    with replacing(path, "wb") as file:
        file.write(data)


def _header_of(path: Path) -> nib.Nifti1Image:
    """The image with its header, from the first 64 KiB of the file."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(1 << 16)
        if data[:2] == _GZIP_MAGIC:
            data = isal_zlib.decompressobj(31).decompress(data, 1 << 16)
        return _parse_header(path, data)
    except (OSError, isal_zlib.error, CaseError):  # type: ignore[misc]  # as in _inflated
        return _parse_header(path, _inflated(path))  # an extension longer than that, or a fault, which it names


def _inflated(path: Path) -> bytes:
    """The content of a file, inflated where it is gzip."""
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise CaseError(path, "there is no such file", "Put it there, or correct the path or the list") from None
    except OSError as error:
        raise CaseError(path, f"can't be read ({error.strerror})", "Check its permissions and the disk") from error
    if not raw:
        raise CaseError(path, "empty file: 0 bytes", _COPY_AGAIN)
    if raw[:2] != _GZIP_MAGIC:
        return raw
    members: list[bytes] = []
    rest = raw
    while rest[:2] == _GZIP_MAGIC:
        member = isal_zlib.decompressobj(31)
        try:
            members.append(member.decompress(rest))
        except isal_zlib.error as error:  # type: ignore[misc]  # a class; isal's stub has an instance
            raise CaseError(path, f"damaged gzip ({error})", _COPY_AGAIN) from error
        if not member.eof:
            raise CaseError(path, f"truncated gzip: ends within its data, after {len(raw)} bytes", _COPY_AGAIN)
        rest = member.unused_data
    data = b"".join(members)
    if not data:
        raise CaseError(path, "empty gzip: nothing inside", _COPY_AGAIN)
    return data


def _parse_header(path: Path, data: bytes) -> nib.Nifti1Image:
    is_nifti1, is_nifti2 = data[344:348] == b"n+1\0", data[4:8] == b"n+2\0"
    if not is_nifti1 and not is_nifti2:
        if data[344:348] == b"ni1\0":
            raise CaseError(path, "the header of a .hdr/.img pair", "Convert the pair to one .nii.gz file")
        raise CaseError(path, f"not a NIfTI file: it starts with {data[:8]!r}", "Convert the image to .nii.gz")
    kind = nib.Nifti1Image if is_nifti1 else nib.Nifti2Image
    try:
        return cast(nib.Nifti1Image, kind.from_stream(BytesIO(data)))
    except (HeaderDataError, ImageFileError, WrapStructError, ValueError, OSError) as error:
        raise CaseError(path, f"damaged NIfTI header ({error})", _COPY_AGAIN) from error


def affine_fault(affine: np.ndarray) -> str | None:
    """What is wrong with an affine (4, 4), or None."""
    axes = affine[:3, :3]
    if np.isfinite(affine).all() and abs(np.linalg.det(axes)) > 1e-3 * np.prod(np.linalg.norm(axes, axis=0)):
        return None
    return f"its affine {affine[:3].tolist()} can't be inverted: the three axes must span a volume"


def read_case(case: Case, coding: Coding) -> RawCase:
    """Read and check the files of a case.

    Args:
        case: its files.
        coding: the values that its label may hold.

    Returns:
        the volumes in file orientation.

    Raises:
        CaseError: any fault of `read_nifti`; a wrong number of dimensions; a channel that the 4D file has not; images
            and label of different shapes or affines; NaN or Inf voxels; a label value that is no integer or not in the
            coding.
    """
    buffer_CZYX, affine = _read_4d(case) if case.channels is not None else _read_3d(case)
    label, label_affine = None, None
    if case.label is not None:
        array, label_affine = read_nifti(case.label)
        array = _spatial(case.label, array)
        reference = (case.images[0], buffer_CZYX.shape[:0:-1], affine)
        _check_same_grid(case.label, array.shape, label_affine, reference)
        label = _to_labels(case.label, array, coding)
    return RawCase(buffer_CZYX.transpose(3, 2, 1, 0), label, affine, label_affine)


def _read_3d(case: Case) -> tuple[np.ndarray, np.ndarray]:
    buffer_CZYX, reference = np.empty(0), None
    for index, path in enumerate(case.images):
        array, affine = read_nifti(path)
        array = _spatial(path, array)
        if reference is None:
            reference = (path, array.shape, affine)
            buffer_CZYX = np.empty((len(case.images), *array.shape[::-1]), np.float32)
        _check_same_grid(path, array.shape, affine, reference)
        buffer_CZYX[index] = array.T
        if array.dtype.kind == "f":
            _check_finite(path, buffer_CZYX[index].T, "")
    assert reference is not None, "a case has at least one image"
    return buffer_CZYX, reference[2]


def _read_4d(case: Case) -> tuple[np.ndarray, np.ndarray]:
    assert case.channels is not None
    (path,) = case.images
    array, affine = read_nifti(path)
    if array.ndim != 4:
        problem = f"shape {array.shape} has {array.ndim} dimensions, must have 4 (X, Y, Z, modality)"
        raise CaseError(path, problem, "Give one file per modality, or the stacked file")
    beyond = [c for c in case.channels if c >= array.shape[3]]
    if beyond:
        problem = f"channel {beyond[0]} is asked for, and its last axis has {array.shape[3]} (shape {array.shape})"
        raise CaseError(path, problem, "Correct 'modality' in dataset.json or the list, or --data.modalities")
    buffer_CZYX = np.empty((len(case.channels), *array.shape[2::-1]), np.float32)
    for index, channel in enumerate(case.channels):
        buffer_CZYX[index] = array[..., channel].T
        if array.dtype.kind == "f":
            _check_finite(path, buffer_CZYX[index].T, f" in channel {channel}")
    return buffer_CZYX, affine


def _spatial(path: Path, array: np.ndarray) -> np.ndarray:
    """The array as (X, Y, Z); axes of length 1 after the third are dropped."""
    if array.ndim < 3 or any(n > 1 for n in array.shape[3:]):
        problem = f"shape {array.shape} has {array.ndim} dimensions, must have 3 (X, Y, Z)"
        raise CaseError(path, problem, "Give one 3D file per modality, or list it as a 4D file")
    return array.reshape(array.shape[:3], order="F")


def _check_same_grid(
    path: Path, shape: tuple[int, ...], affine: np.ndarray, reference: tuple[Path, tuple[int, ...], np.ndarray]
) -> None:
    first, first_shape, first_affine = reference
    if tuple(shape) != tuple(first_shape):
        problem = f"shape {tuple(shape)} differs from {tuple(first_shape)} of {first}; the files of a case share a grid"
        raise CaseError(path, problem, _RESAMPLE_FIRST)
    corners = np.array([[x, y, z, 1] for x in (0, shape[0] - 1) for y in (0, shape[1] - 1) for z in (0, shape[2] - 1)])
    distance = float(np.linalg.norm((corners @ (affine - first_affine).T)[:, :3], axis=1).max())
    if distance > CORNER_TOLERANCE_MM:
        problem = (
            f"its affine {affine[:3].tolist()} differs from {first_affine[:3].tolist()} of {first}: corners are up to "
            f"{distance:.3g} mm apart, {CORNER_TOLERANCE_MM} mm is allowed"
        )
        raise CaseError(path, problem, _RESAMPLE_FIRST)


def _check_finite(path: Path, array_XYZ: np.ndarray, which: str) -> None:
    bad = ~np.isfinite(array_XYZ)
    if not bad.any():
        return
    position = tuple(int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape))
    problem = f"{int(bad.sum())} voxels{which} are NaN or Inf, the first at {position}; all must be finite numbers"
    raise CaseError(path, problem, f"Repair the file (0 is the usual background), {_WITHOUT_IT}")


def _to_labels(path: Path, array: np.ndarray, coding: Coding) -> np.ndarray:
    """The label map as uint8, its values checked against the coding."""
    labels = _exact_uint8(array)
    if labels is None and array.dtype.kind == "f":
        array = _rounded(path, array)
        labels = _exact_uint8(array)
    allowed = coding.values
    if labels is not None and sum(int(np.count_nonzero(labels == value)) for value in allowed) == labels.size:
        return labels
    found = [int(v) for v in np.unique(array)]
    listing = ", ".join(map(str, found[:10])) + (f", ... ({len(found)} values)" if len(found) > 10 else "")
    problem = f"label values {listing} do not fit the coding {coding.release}, which has {', '.join(map(str, allowed))}"
    raise CaseError(path, problem, _coding_remedy(found, coding))


def _exact_uint8(array: np.ndarray) -> np.ndarray | None:
    """The array as uint8; None where that changes a value."""
    with np.errstate(invalid="ignore"):  # NaN and huge values become numbers that they don't equal
        labels = array.astype(np.uint8, order="K")
    return labels if np.array_equal(labels, array) else None


def _rounded(path: Path, array: np.ndarray) -> np.ndarray:
    _check_finite(path, array, "")
    rounded = np.rint(array)
    error = np.abs(array - rounded)
    if error.max() > LABEL_TOLERANCE:
        value = array[np.unravel_index(int(error.argmax()), error.shape)]
        problem = f"label value {value:.6g} is no integer"
        raise CaseError(path, problem, "Use the original label map, or resample it with nearest neighbour")
    return rounded


def _coding_remedy(found: list[int], coding: Coding) -> str:
    """What to do about label values outside the coding; never a coding that would make another tissue of one."""
    if coding.release == "brats2023" and 4 in found and set(found) <= set(CODINGS["brats2024"].values):
        # brats2013 has a 4 as well, its enhancing tumour, and would score the cavity as that.
        return (
            "4 is the resection cavity in scans of 2024 on, which are named alike: --data.release brats2024; in those "
            "of children it is the oedema, and the other codes differ too: --data.release brats2024-ped"
        )
    fits = [release for release, other in CODINGS.items() if set(found) <= set(other.values)]
    if not fits:
        return "No coding has all these values: correct the label map"
    return (
        f"Correct the label map, or choose --data.release {' or '.join(fits)} if the release's documentation says so: "
        "values alone don't tell the coding"
    )
