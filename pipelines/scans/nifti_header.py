"""What the header of a NIfTI file says: shape, type, scaling, and where the voxels lie, in mm.

nibabel parses it, so the affine is its best one: sform, else qform, else the voxel size. It repairs some fields and
logs that without the file's name; here what it repairs by guessing is an error, or one warning per file with its name.
Two things differ from nibabel. Lengths are converted to mm where the header states metres or micrometres, which nibabel
and MONAI ignore. ITK's vector images, (X, Y, Z, 1, C), are read as the 4D images that they are: (X, Y, Z, C).

A header can announce anything, so a size that no scan of a head has is an error before memory is taken for it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.basics.errors import CaseError
from pipelines.basics.lazy import Lazy
from pipelines.scans.file_bytes import COPY_AGAIN, not_nifti

if TYPE_CHECKING:
    import nibabel as nib
else:
    nib = Lazy("nibabel")

log = logging.getLogger(__name__)

WITHOUT_IT = "or move the case away (off the list, where one names it)"
SPACING_MM = (0.02, 50.0)  # of scans of heads: the finest are of specimens, the coarsest a few thick slices
LEAST_MM, FINE_MM = 60.0, 0.25  # a scan with finer voxels is at least this long; others may be part of a head
MOST_MM = 2000.0  # along an axis, the length of a scanner's table
FARTHEST_MM = 1e5  # of the first voxel from the scanner's centre
MOST_VOXELS = 1 << 29  # 2 GiB in float32; a BraTS case has 36 million, an 0.5 mm scan 70 million a modality
LARGEST = float(np.finfo(np.float32).max)
_UNITS = {1: ("metres", 1e3), 2: ("mm", 1.0), 3: ("micrometres", 1e-3)}  # xyzt_units % 8: unit, mm
_CORRECT_AFFINE = (
    f"Correct the sform, qform or unit (xyzt_units: 1 metres, 2 mm, 3 micrometres) of its header, {WITHOUT_IT}"
)
_SILENT = logging.Logger("nibabel", logging.CRITICAL + 1)  # it would log repairs without the file's name


@dataclass(frozen=True)
class NiftiHeader:
    """The part of a header that reading needs."""

    path: Path
    shape: tuple[int, ...]  # (X, Y, Z, ...)
    dtype: np.dtype  # of the voxels in the file: integers or real numbers, in its byte order
    offset: int  # of the first voxel, in bytes
    scaling: tuple[float, float] | None  # slope and intercept of the values, None where they are not scaled
    affine: np.ndarray  # (4, 4) float64, voxel index to mm (RAS+)
    mm_per_unit: float  # the factor by which the header's own lengths were multiplied
    has_orientation: bool  # whether sform or qform is set
    fields: nib.Nifti1Header  # all of them, as nibabel has them

    @property
    def is_blank(self) -> bool:
        """Whether it looks as if written by software that ignores orientation."""
        # ITK's identity has X and Y negative here.
        return not self.has_orientation or np.array_equal(self.affine, np.diag(np.diag(self.affine)))


def parse_header(path: Path, head: bytes) -> NiftiHeader:
    """The header in a file's first bytes.

    Args:
        path: of the file.
        head: its first 544 bytes or more, or all if there are fewer.

    Raises:
        CaseError: not NIfTI, or a header that is damaged or states what no scan of a head has.
    """
    kind = _kind(path, head)
    fields = kind(head[: kind.sizeof_hdr], check=False)
    if fields["sizeof_hdr"] != kind.sizeof_hdr:
        problem = f"damaged NIfTI header: sizeof_hdr is {fields['sizeof_hdr']}, must be {kind.sizeof_hdr}"
        raise CaseError(path, problem, COPY_AGAIN)
    stored = fields.copy()  # before nibabel repairs it
    try:
        fields.check_fix(_SILENT, 40)  # the level at which nibabel refuses a file
        shape = tuple(int(n) for n in fields.get_data_shape())
        dtype = fields.get_data_dtype()
    except (nib.spatialimages.HeaderDataError, ValueError, OverflowError) as error:
        raise CaseError(path, f"damaged NIfTI header ({error})", COPY_AGAIN) from error
    if len(shape) >= 5 and shape[3] == 1 and shape[4] > 1:
        shape = (*shape[:3], *shape[4:])
    _check_voxels(path, shape, dtype)
    scaling = _scaling(path, fields)
    units = int(fields["xyzt_units"])
    unit, mm_per_unit = _UNITS.get(units % 8, ("no unit, read as mm", 1.0))
    affine = _affine(path, fields, stored)
    affine[:3] *= mm_per_unit
    fault = affine_fault(affine) or _extent_fault(shape, affine)
    if fault:
        raise CaseError(path, f"{fault}; its header states {unit} (xyzt_units {units})", _CORRECT_AFFINE)
    has_orientation = bool(fields["sform_code"] or fields["qform_code"])
    return NiftiHeader(path, shape, dtype, _offset(path, fields), scaling, affine, mm_per_unit, has_orientation, fields)


def _kind(path: Path, head: bytes) -> type[nib.Nifti1Header]:
    if head[344:348] == b"n+1\0":
        return nib.Nifti1Header
    if head[4:8] == b"n+2\0" and len(head) < nib.Nifti2Header.sizeof_hdr:
        raise CaseError(path, f"truncated: {len(head)} bytes, a NIfTI-2 header has 540", COPY_AGAIN)
    if head[4:8] == b"n+2\0":
        return nib.Nifti2Header
    if head[344:348] == b"ni1\0" or head[4:8] == b"ni2\0":
        raise CaseError(path, "the header of a .hdr/.img pair", "Convert the pair to one .nii.gz file")
    raise not_nifti(path, head)


def _check_voxels(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    if dtype.kind not in "iuf":
        raise CaseError(path, f"voxels are of type {dtype}, must be integers or real numbers", "Convert the file")
    if min(shape, default=0) < 1:
        raise CaseError(path, f"has no voxels: shape {shape}", COPY_AGAIN)
    if math.prod(shape) > MOST_VOXELS:
        problem = f"shape {shape} is {math.prod(shape)} voxels, at most {MOST_VOXELS} are read"
        raise CaseError(path, problem, f"If that is right, resample it; else correct its header, {WITHOUT_IT}")


def _offset(path: Path, fields: nib.Nifti1Header) -> int:
    offset, least = float(fields["vox_offset"]), fields.single_vox_offset
    if not (offset >= least and offset.is_integer()):  # nibabel reads voxels out of the header where it is 0
        problem = f"damaged NIfTI header: voxels begin at byte {offset:g} (vox_offset), but the header ends at {least}"
        raise CaseError(path, problem, f"{COPY_AGAIN}, or set vox_offset to {least} if they begin there")
    return int(offset)


def _scaling(path: Path, fields: nib.Nifti1Header) -> tuple[float, float] | None:
    slope, intercept = float(fields["scl_slope"]), float(fields["scl_inter"])
    if slope == 0 or not math.isfinite(slope):
        return None
    if not abs(intercept) <= LARGEST or not 1 / LARGEST <= abs(slope) <= LARGEST:
        problem = f"its scaling is {slope:g} * voxel + {intercept:g} (scl_slope, scl_inter), must be finite in float32"
        remedy = f"Set scl_inter of its header to 0 and scl_slope to 1 if nothing needs scaling, {WITHOUT_IT}"
        raise CaseError(path, problem, remedy)
    return None if (slope, intercept) == (1, 0) else (slope, intercept)


def _affine(path: Path, fields: nib.Nifti1Header, stored: nib.Nifti1Header) -> np.ndarray:
    """nibabel's best affine (4, 4), in the header's own unit."""
    for code in ("sform_code", "qform_code"):
        if fields[code] != stored[code]:
            _warn(path, f"{code} is {stored[code]}, which NIfTI does not define: taken as 0 (not set)")
    if not fields["sform_code"]:
        _check_pixdim(path, stored, bool(fields["qform_code"]))
    try:
        return np.array(fields.get_best_affine(), np.float64)
    except (nib.spatialimages.HeaderDataError, ValueError) as error:
        quaternion = [float(fields[f"quatern_{axis}"]) for axis in "bcd"]
        problem = f"its qform can't be read ({error}): quaternion {quaternion}, must be at most 1 long"
        remedy = f"Correct the quaternion in its header or set the sform, {WITHOUT_IT}"
        raise CaseError(path, problem, remedy) from error


def _check_pixdim(path: Path, stored: nib.Nifti1Header, has_qform: bool) -> None:
    """Check voxel size and handedness as stored, for an affine that is made of them."""
    handedness, *sizes = (float(n) for n in stored["pixdim"][: 1 + min(3, max(1, int(stored["dim"][0])))])
    if 0 in sizes:
        lacking = "sform_code is 0" if has_qform else "sform_code and qform_code are 0"
        problem = f"states no voxel size: pixdim is {sizes}, and {lacking}"
        raise CaseError(path, problem, f"Copy the header of the scan it was made from, {WITHOUT_IT}")
    if any(size < 0 for size in sizes):
        _warn(path, f"pixdim is {sizes}: the sign is ignored, as in nibabel")
    if has_qform and handedness not in (-1, 0, 1):
        _warn(path, f"pixdim[0], the handedness of the qform, is {handedness:g}, not 1 or -1, and is taken as 1")


@lru_cache(4096)
def _warn(path: Path, what: str) -> None:
    log.warning("%s: %s", path, what)  # only once, though a file is read many times


def affine_fault(affine: np.ndarray) -> str | None:
    """What is wrong with an affine (4, 4) in mm, or None."""
    axes, (low, high) = affine[:3, :3], SPACING_MM
    with np.errstate(all="ignore"):
        x, y, z = sizes = np.linalg.norm(axes, axis=0)
        is_volume = np.isfinite(affine).all() and abs(np.linalg.det(axes)) > 1e-3 * np.prod(sizes)
    if not is_volume:
        return f"its affine {affine[:3].tolist()} can't be inverted: the three axes must span a volume"
    if sizes.min() < low or sizes.max() > high:
        return f"its voxels are {x:.4g} x {y:.4g} x {z:.4g} mm, in scans of heads they are {low:g} to {high:g} mm"
    if np.abs(affine[:3, 3]).max() > FARTHEST_MM:
        return f"its first voxel is at {affine[:3, 3].tolist()} mm, at most {FARTHEST_MM:g} from the scanner's centre"
    return None


def _extent_fault(shape: tuple[int, ...], affine: np.ndarray) -> str | None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    lengths = [n * size for n, size in zip(shape, sizes, strict=False)]
    listing = " x ".join(f"{length:.4g}" for length in lengths)
    is_short = max(lengths) < LEAST_MM and sizes.max() < FINE_MM
    if max(lengths) <= MOST_MM and not is_short:
        return None
    rule = f"least {LEAST_MM:g}" if is_short else f"most {MOST_MM:g}"
    return f"shape {shape} is {listing} mm, a scan of a head is at {rule} mm long"


def check_extensions(data: bytes, header: NiftiHeader) -> None:
    """Refuse a file whose header extensions (not used here) run into its voxels: a sign of damage.

    Raises:
        CaseError: one of them is shorter than its own size, or reaches into the voxels.
    """
    position = header.fields.single_vox_offset
    if data[position - 4] == 0:
        return
    while header.offset - position >= 16:
        size = int(np.frombuffer(data, f"{header.fields.endianness}i4", 1, position)[0])
        if size < 8 or position + size > header.offset:
            problem = f"an extension of {size} bytes at byte {position}, voxels from {header.offset}"
            raise CaseError(header.path, f"damaged NIfTI header: {problem}", COPY_AGAIN)
        position += size
