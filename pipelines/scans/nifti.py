"""Read NIfTI files and check the files of a case, without a wasted copy; write segmentations.

A file is read, inflated in one call (`file_bytes`) and viewed as an array, once its header is known to be sound
(`nifti_header`). NIfTI data are in Fortran order, X fastest, and stay so: a case is one (C, Z, Y, X) buffer, filled
channel by channel, and seen as (X, Y, Z, C). Bringing (240, 240, 155, 4) into C order takes 190 ms blockwise, 490 to
840 ms by a plain copy, against 100 ms for inflating it, so only the resampled result, a quarter of the size, is.

Every fault of a file is one `CaseError`: which file, what is wrong, what the rule is, what to do. Real data also holds
traps that are not faults: a label with `sform_code` 0 beside images with 1 (affines are compared as maps, at the corner
voxels), label maps of float32, label maps with a scale factor ("1" reads as 0.99999997, so they are rounded, not cast),
gzip files of several members, axes of length 1 after the third.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from isal import igzip

from pipelines.basics.atomic import replacing
from pipelines.basics.errors import CaseError
from pipelines.basics.input_files import open_regular
from pipelines.basics.lazy import Lazy
from pipelines.layouts.cases import Case
from pipelines.layouts.labels import Coding
from pipelines.scans.file_bytes import ScanFile
from pipelines.scans.nifti_header import WITHOUT_IT, NiftiHeader, check_extensions, parse_header
from pipelines.scans.voxels import check_image, to_labels

if TYPE_CHECKING:
    import nibabel as nib
else:
    nib = Lazy("nibabel")

CORNER_TOLERANCE_MM = 1e-2
_RESAMPLE_FIRST = f"Resample them to one grid (the preprocessed BraTS files share one), {WITHOUT_IT}"
# The fields that say where the voxels lie; the rest of a header can hold names, dates and notes.
_QFORM = ("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z")
_GEOMETRY = ("xyzt_units", "sform_code", "srow_x", "srow_y", "srow_z", *_QFORM)


@dataclass
class RawCase:
    """A case as its files have it: file orientation, own voxel size."""

    image: np.ndarray  # float32 (X, Y, Z, C), Fortran order (a view of a (C, Z, Y, X) buffer)
    label: np.ndarray | None  # uint8 (X, Y, Z), Fortran order; None where the case has none
    affine: np.ndarray  # (4, 4) float64, voxel index to mm (RAS+), of the first image
    label_affine: np.ndarray | None  # that of the label, which may differ by rounding


def read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a `.nii` or `.nii.gz` file.

    Args:
        path: the file; its content, not its name, shows whether it is compressed.

    Returns:
        array: (X, Y, Z, ...) in file order and Fortran order, read-only; in the file's dtype where the header gives no
            scaling, else scaled, float32. ITK's vector images, (X, Y, Z, 1, C) in the file, are (X, Y, Z, C).
        affine: (4, 4) float64, voxel index to mm (RAS+), whatever unit the header states.

    Raises:
        CaseError: missing, unreadable, empty, truncated or damaged file, not a regular file, not NIfTI, a dtype that
            is not a number, a size that no head has, an affine that can't be inverted, or too little memory.
    """
    array, header = _read(path)
    return array, header.affine


def _read(path: Path) -> tuple[np.ndarray, NiftiHeader]:
    with _memory_for(path), open_regular(path) as file:
        scan = ScanFile(path, file)
        header = parse_header(path, scan.head)
        voxels = math.prod(header.shape)
        needed = header.offset + voxels * header.dtype.itemsize
        data = scan.content(needed, f"shape {header.shape} of {header.dtype}")
        check_extensions(data, header)
        array = np.frombuffer(data, header.dtype, voxels, header.offset).reshape(header.shape, order="F")
        if header.scaling:
            slope, intercept = map(np.float32, header.scaling)
            with np.errstate(over="ignore", invalid="ignore"):  # makes Inf, which is found later
                array = array.astype(np.float32, order="K")
                array *= slope
                array += intercept
            array.flags.writeable = False
    return array, header


def read_grid(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine of a file, as `read_nifti` has them, from its first bytes.

    Raises:
        CaseError: missing or unreadable file, not NIfTI, or a header that `read_nifti` refuses.
    """
    header = _header_of(path)
    return header.shape, header.affine


def read_description(path: Path) -> str:
    """The description in the header of a file (`descrip`). Raises CaseError as `read_grid`."""
    return bytes(_header_of(path).fields["descrip"].item()).decode("utf-8", "replace")


def _header_of(path: Path) -> NiftiHeader:
    with open_regular(path) as file:
        return parse_header(path, ScanFile(path, file).head)


@contextmanager
def _memory_for(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        problem = f"too little memory to read it ({error})" if str(error) else "too little memory to read it"
        raise CaseError(path, problem, "Use fewer workers, or a machine with more memory") from error


def write_nifti(
    path: Path, array: np.ndarray, affine: np.ndarray, like: Path | None = None, description: str = ""
) -> None:
    """Write a volume, whole or not at all; the same volume gives the same bytes.

    Args:
        path: `.nii.gz`, or `.nii` for no compression; in any letter case.
        array: (X, Y, Z) or (X, Y, Z, C), of a dtype that NIfTI has.
        affine: (4, 4), voxel index to mm (RAS+).
        like: a file on the same grid; the new one takes its NIfTI version, units, sform and qform codes and nothing
            else, as descriptions and extensions can name a patient. None: NIfTI-1, mm, both codes 1.
        description: for the header, at most 79 characters.

    Raises:
        ValueError: a path with another ending.
        OSError: it can't be written.
        CaseError: `like` can't be read.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise ValueError(f"{path} must end in .nii.gz, or in .nii for a file that is not compressed")
    if like is not None:
        image = _on_grid_of(_header_of(like), array, affine)
    else:
        image = nib.Nifti1Image(array, affine)
        image.header.set_xyzt_units("mm")
        image.set_sform(affine, code=1)
        image.set_qform(affine, code=1)
    image.header["descrip"] = description
    data = image.to_bytes()
    if path.name.lower().endswith(".gz"):
        data = igzip.compress(data, 2, mtime=0)  # leaves 1 % of a label map
    with replacing(path, "wb") as file:
        file.write(data)


def _on_grid_of(source: NiftiHeader, array: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    """An image with the geometry of another header, in its unit: software that ignores units still overlays them."""
    of_version = nib.Nifti2Image if isinstance(source.fields, nib.Nifti2Header) else nib.Nifti1Image
    header = of_version.header_class()
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    for name in _GEOMETRY:
        header[name] = source.fields[name]
    header["pixdim"][:4] = source.fields["pixdim"][:4]
    in_unit = affine.copy()
    in_unit[:3] /= source.mm_per_unit
    return of_version(array, in_unit, header)


def read_case(case: Case, coding: Coding) -> RawCase:
    """Read and check the files of a case; `coding` has the values that its label may hold.

    Raises:
        CaseError: any fault of `read_nifti`; a wrong number of dimensions; a channel that the 4D file does not have;
            images and label of different shapes or affines; NaN or Inf voxels; a modality that is the same everywhere;
            a label value that is not an integer or not in the coding; too little memory.
    """
    with _memory_for(case.images[0]):
        buffer_CZYX, first = _read_4d(case) if case.channels is not None else _read_3d(case)
        label, label_affine = None, None
        if case.label is not None:
            array, header = _read_one_3d(case.label)
            _check_same_grid(header, first)
            label, label_affine = to_labels(case.label, array, coding), header.affine
    return RawCase(buffer_CZYX.transpose(3, 2, 1, 0), label, first.affine, label_affine)


def _read_3d(case: Case) -> tuple[np.ndarray, NiftiHeader]:
    array, first = _read_one_3d(case.images[0])
    buffer_CZYX = np.empty((len(case.images), *array.shape[::-1]), np.float32)
    _fill(buffer_CZYX[0], array, case.images[0])
    for path, channel_ZYX in zip(case.images[1:], buffer_CZYX[1:], strict=True):
        array, header = _read_one_3d(path)
        _check_same_grid(header, first)
        _fill(channel_ZYX, array, path)
    return buffer_CZYX, first


def _read_one_3d(path: Path) -> tuple[np.ndarray, NiftiHeader]:
    """A file as (X, Y, Z); axes of length 1 after the third are dropped."""
    array, header = _read(path)
    if array.ndim < 3 or any(n > 1 for n in array.shape[3:]):
        problem = f"shape {array.shape} has {array.ndim} dimensions, must have 3 (X, Y, Z)"
        raise CaseError(path, problem, "Give one 3D file per modality, or list it as a 4D file")
    return array.reshape(array.shape[:3], order="F"), header


def _read_4d(case: Case) -> tuple[np.ndarray, NiftiHeader]:
    assert case.channels is not None
    (path,) = case.images
    array, header = _read(path)
    if array.ndim < 4 or any(n > 1 for n in array.shape[4:]):
        problem = f"shape {array.shape} has {array.ndim} dimensions, must have 4 (X, Y, Z, modality)"
        raise CaseError(path, problem, "Give one file per modality, or the stacked file")
    x, y, z, count = header.shape[:4]
    array = array.reshape(x, y, z, count, order="F")
    beyond = [c for c in case.channels if c >= count]
    if beyond:
        problem = f"channel {beyond[0]} was requested, but its last axis has {count} (shape {array.shape})"
        raise CaseError(path, problem, "Correct 'modality' in dataset.json or the list, or --data.modalities")
    buffer_CZYX = np.empty((len(case.channels), z, y, x), np.float32)
    for channel_ZYX, channel in zip(buffer_CZYX, case.channels, strict=True):
        _fill(channel_ZYX, array[..., channel], path, f" in channel {channel}")
    return buffer_CZYX, header


def _fill(channel_ZYX: np.ndarray, array_XYZ: np.ndarray, path: Path, which: str = "") -> None:
    """Put one modality into its place in a case, and check it."""
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf, which is found
        channel_ZYX[:] = array_XYZ.T
    check_image(path, channel_ZYX.T, which, maybe_infinite=array_XYZ.dtype.kind == "f")


def _check_same_grid(header: NiftiHeader, first: NiftiHeader) -> None:
    shape, first_shape = header.shape[:3], first.shape[:3]
    if shape != first_shape:
        problem = f"shape {shape} differs from {first_shape} of {first.path}; the files of a case share a grid"
        raise CaseError(header.path, problem, _RESAMPLE_FIRST)
    corners = np.array(list(product(*((0, n - 1) for n in shape), (1,))))
    distance = float(np.linalg.norm((corners @ (header.affine - first.affine).T)[:, :3], axis=1).max())
    if distance <= CORNER_TOLERANCE_MM:
        return
    problem = (
        f"its affine {header.affine[:3].tolist()} differs from {first.affine[:3].tolist()} of {first.path}: corners "
        f"are up to {distance:.3g} mm apart, {CORNER_TOLERANCE_MM} mm is allowed"
    )
    for blank, other in ((header, first), (first, header)):
        if blank.is_blank and not other.is_blank:
            lack = "without origin" if blank.has_orientation else "only its voxel size, sform and qform unset"
            raise CaseError(
                header.path,
                f"{problem}. That of {blank.path} is {lack}, as written by software that ignores orientation",
                f"If its voxels are in the order of {other.path}, copy that file's header (fslcpgeom {other.path} "
                f"{blank.path}); resampling would move them. Otherwise resample it to one grid, {WITHOUT_IT}",
            )
    raise CaseError(header.path, problem, _RESAMPLE_FIRST)
