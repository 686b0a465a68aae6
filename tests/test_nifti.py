"""nibabel is the oracle of what a file holds; every fault of a file ends in one error that says what to do."""

from __future__ import annotations

import gzip
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipelines.basics.errors import CaseError, DataError
from pipelines.layouts.cases import Case
from pipelines.layouts.labels import CODINGS
from pipelines.scans.nifti import RawCase, read_case, read_grid, read_nifti, write_nifti

SHAPE = (7, 6, 5)
AFFINE = np.array([[-1, 0, 0, 3], [0, -1.5, 0, 9], [0, 0, 2, -4], [0, 0, 0, 1]], float)
CODING = CODINGS["brats2023"]


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = AFFINE, kind: type = nib.Nifti1Image) -> Path:
    nib.save(kind(array, affine), path)
    return path


def voxels(seed: int, dtype: str = "int16") -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, SHAPE).astype(dtype)


def labels() -> np.ndarray:
    return np.random.default_rng(9).integers(0, 4, SHAPE).astype(np.uint8)


def make_case(folder: Path) -> Case:
    images = tuple(save(folder / f"{name}.nii.gz", voxels(seed)) for seed, name in enumerate(("flair", "t1c")))
    return Case("one", images, None, save(folder / "seg.nii.gz", labels()))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float32", "float64", ">i2", ">f4"])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_reads_what_nibabel_reads(tmp_path: Path, dtype: str, suffix: str, kind: type) -> None:
    array = voxels(0, dtype)
    image = kind(array, AFFINE)
    if dtype.startswith(">"):
        image = kind(array, AFFINE, header=image.header.as_byteswapped(">"))
    nib.save(image, tmp_path / f"a{suffix}")
    got, affine = read_nifti(tmp_path / f"a{suffix}")
    np.testing.assert_array_equal(got, array)
    np.testing.assert_array_equal(affine, AFFINE)
    assert got.dtype == np.dtype(dtype)


def test_scaling_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(voxels(0), AFFINE)
    image.header.set_slope_inter(0.25, -3)
    nib.save(image, tmp_path / "a.nii.gz")
    expected = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj)
    np.testing.assert_allclose(read_nifti(tmp_path / "a.nii.gz")[0], expected, rtol=1e-6)


@pytest.mark.parametrize(("sform_code", "qform_code"), [(1, 1), (0, 1), (2, 0), (0, 0)])
def test_affine_is_nibabels_best(tmp_path: Path, sform_code: int, qform_code: int) -> None:
    image = nib.Nifti1Image(voxels(0), None)
    image.header.set_zooms((1.5, 1.5, 2))
    other = AFFINE.copy()
    other[:3, 3] += 5
    image.set_sform(AFFINE, sform_code)
    image.set_qform(other, qform_code)
    nib.save(image, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(read_nifti(tmp_path / "a.nii.gz")[1], nib.load(tmp_path / "a.nii.gz").affine)


def test_case_is_stacked_in_the_order_of_its_files(tmp_path: Path) -> None:
    raw = read_case(make_case(tmp_path), CODING)
    assert raw.image.dtype == np.float32 and raw.image.shape == (*SHAPE, 2)
    np.testing.assert_array_equal(raw.image, np.stack([voxels(0), voxels(1)], axis=3))
    assert raw.label is not None and raw.label.dtype == np.uint8
    np.testing.assert_array_equal(raw.label, labels())
    np.testing.assert_array_equal(raw.affine, AFFINE)


def test_channels_of_a_4d_file_are_picked_in_the_order_asked_for(tmp_path: Path) -> None:
    stacked = np.stack([voxels(i) for i in range(4)], axis=3)
    case = Case("one", (save(tmp_path / "a.nii.gz", stacked),), (3, 0), None)
    raw = read_case(case, CODING)
    np.testing.assert_array_equal(raw.image, stacked[..., [3, 0]])
    assert raw.label is None


def test_axes_of_length_one_after_the_third_are_dropped(tmp_path: Path) -> None:
    case = Case("one", (save(tmp_path / "a.nii.gz", voxels(0)[..., None]),), None, None)
    assert read_case(case, CODING).image.shape == (*SHAPE, 1)


@pytest.mark.parametrize("shape", [(*SHAPE, 1, 4), (*SHAPE, 4, 1), (*SHAPE, 1, 4, 1)])
def test_a_vector_image_of_itk_is_a_4d_image(tmp_path: Path, shape: tuple[int, ...]) -> None:
    stacked = np.stack([voxels(i) for i in range(4)], axis=3)
    path = save(tmp_path / "a.nii.gz", stacked.reshape(shape))
    np.testing.assert_array_equal(read_case(Case("one", (path,), (2, 0), None), CODING).image, stacked[..., [2, 0]])
    assert read_grid(path)[0][:4] == read_nifti(path)[0].shape[:4] == (*SHAPE, 4)


def test_the_voxels_that_are_not_asked_for_may_be_empty(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.stack([voxels(0), voxels(0) * 0], axis=3))
    assert read_case(Case("one", (path,), (0,), None), CODING).image.shape == (*SHAPE, 1)


def test_label_that_reads_as_almost_one_is_rounded(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    save(tmp_path / "seg.nii.gz", (labels() * 0.99999).astype(np.float32))
    raw = read_case(case, CODING)
    assert raw.label is not None
    np.testing.assert_array_equal(raw.label, labels())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-7]))


def with_voxel(position: tuple[int, ...], value: float) -> np.ndarray:
    array = voxels(1, "float64" if 1e39 < abs(value) < np.inf else "float32")
    array[position] = value
    return array


def two_nan() -> np.ndarray:
    array = with_voxel((1, 2, 3), np.nan)
    array[3, 0, 0] = np.nan
    return array


def moved(mm: float) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += mm
    return affine


def make_singular(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[280:296] = content[296:312]  # srow_x = srow_y
    path.write_bytes(gzip.compress(bytes(content)))


def negate_an_axis(path: Path) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[42:44] = (-SHAPE[0]).to_bytes(2, "little", signed=True)
    path.write_bytes(gzip.compress(bytes(content)))


FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("t1c", Path.unlink, r"no such file\. Put it there"),
    "empty": ("t1c", lambda p: p.write_bytes(b""), r"empty file: 0 bytes\. Copy or download"),
    "empty_gzip": ("t1c", lambda p: p.write_bytes(gzip.compress(b"")), r"empty gzip.*Copy or download"),
    "truncated_gzip": ("t1c", truncate, r"truncated gzip.*Copy or download"),
    "damaged_gzip": ("t1c", flip_bit, r"damaged gzip.*Copy or download"),
    "truncated_inside": ("t1c", shorten, r"truncated: the header announces 772 bytes .* there are 765\. Copy"),
    "not_nifti": ("t1c", lambda p: p.write_bytes(gzip.compress(b"hello" * 100)), r"not a NIfTI file.*b'hellohel'"),
    "not_gzip": ("t1c", lambda p: p.write_text("<html>404 Not Found</html>" * 20), r"not a NIfTI file.*<html>"),
    "four_dimensions": (
        "t1c",
        lambda p: save(p, np.zeros((*SHAPE, 2), "int16")),
        r"\(7, 6, 5, 2\).*4 dim.*must have 3",
    ),
    "two_dimensions": ("t1c", lambda p: save(p, np.zeros(SHAPE[:2], "int16")), r"has 2 dimensions, must have 3"),
    "other_shape": ("t1c", lambda p: save(p, voxels(1)[:-1]), r"\(6, 6, 5\) differs from \(7, 6, 5\) of .*flair"),
    "other_affine": ("t1c", lambda p: save(p, voxels(1), moved(0.1)), r"up to 0\.1 mm apart, 0\.01 mm is allowed"),
    "negative_axis": ("t1c", negate_an_axis, r"has no voxels: shape \(-7, 6, 5\)"),
    "zero": ("t1c", lambda p: save(p, np.zeros(SHAPE, "int16")), r"an empty scan: all 210 voxels are 0\. Put the scan"),
    "constant": ("t1c", lambda p: save(p, np.full(SHAPE, 2.5, "float32")), r"all 210 voxels are 2\.5"),
    "beyond_float32": ("t1c", lambda p: save(p, with_voxel((1, 0, 0), 1e300)), r"1 voxels are NaN or Inf.*\(1, 0, 0\)"),
    "singular_affine": ("t1c", make_singular, r"can't be inverted.*Correct the sform"),
    "nan": ("t1c", lambda p: save(p, two_nan()), r"2 voxels are NaN or Inf, the first at \(1, 2, 3\)"),
    "inf": ("t1c", lambda p: save(p, with_voxel((0, 5, 4), -np.inf)), r"1 voxels are NaN or Inf, .* \(0, 5, 4\)"),
    "label_of_other_shape": ("seg", lambda p: save(p, labels()[:, :-1]), r"\(7, 5, 5\) differs"),
    "label_of_other_affine": ("seg", lambda p: save(p, labels(), moved(1)), r"up to 1 mm apart"),
    "label_outside_coding": (
        "seg",
        lambda p: save(p, np.where(labels() == 3, 4, labels()).astype(np.uint8)),
        r"values 0, 1, 2, 4 do not fit the coding brats2023, which has 0, 1, 2, 3\. Correct the label map, or choose",
    ),
    "negative_label": ("seg", lambda p: save(p, labels().astype("int16") - 1), r"values -1, 0, 1, 2 do not fit"),
    "label_beyond_a_byte": ("seg", lambda p: save(p, labels().astype("int16") + 256), r"values 256, 257, 258, 259 do"),
    "interpolated_label": (
        "seg",
        lambda p: save(p, (labels() * 0.5).astype("float32")),
        r".5 is not an integer",
    ),
    "nan_label": ("seg", lambda p: save(p, with_voxel((1, 1, 1), np.nan)), r"1 voxels are NaN"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_one_error_with_file_value_and_remedy(tmp_path: Path, fault: str) -> None:
    case = make_case(tmp_path)
    assert isinstance(read_case(case, CODING), RawCase)
    stem, spoil, message = FAULTS[fault]
    path = tmp_path / f"{stem}.nii.gz"
    spoil(path)
    with pytest.raises(CaseError, match=message) as caught:
        read_case(case, CODING)
    assert caught.value.path == path
    assert str(caught.value).startswith(f"{path}: ")
    assert isinstance(caught.value, DataError)


@pytest.mark.parametrize(
    ("array", "channels", "message"),
    [
        (np.zeros((*SHAPE, 3), "int16"), (0, 3), r"channel 3 was requested, but its last axis has 3"),
        (np.zeros(SHAPE, "int16"), (0, 1), r"has 3 dimensions, must have 4"),
        (np.stack([voxels(0, "float32"), with_voxel((6, 0, 1), np.inf)], 3), (0, 1), r"1 voxels in channel 1 are NaN"),
        (np.stack([voxels(0), voxels(0) * 0], 3), (0, 1), r"an empty scan: all 210 voxels in channel 1 are 0"),
    ],
    ids=["channel_out_of_range", "three_dimensions", "inf_in_a_channel", "zero_channel"],
)
def test_fault_of_a_4d_file(tmp_path: Path, array: np.ndarray, channels: tuple[int, ...], message: str) -> None:
    case = Case("one", (save(tmp_path / "a.nii.gz", array),), channels, None)
    with pytest.raises(CaseError, match=message):
        read_case(case, CODING)


def test_affines_that_differ_by_rounding_are_the_same(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    save(tmp_path / "seg.nii.gz", labels(), moved(1e-4))
    assert read_case(case, CODING).label is not None


@pytest.mark.parametrize("blank", ["t1c", "flair", "seg"])
@pytest.mark.parametrize("how", ["identity", "itk", "spacing", "none"])
def test_a_file_without_orientation_is_offered_its_neighbours_header(tmp_path: Path, blank: str, how: str) -> None:
    case = make_case(tmp_path)
    path = tmp_path / f"{blank}.nii.gz"
    array = labels() if blank == "seg" else voxels(0)
    diagonals = {"identity": (1, 1, 1, 1), "itk": (-1, -1, 1, 1), "spacing": (1, 1.5, 2, 1)}
    save(path, array, np.diag(diagonals[how]) if how in diagonals else None)
    other = "t1c" if blank == "flair" else "flair"
    with pytest.raises(CaseError, match="mm apart") as caught:
        read_case(case, CODING)
    reason = "without origin" if how in diagonals else "only its voxel size, sform and qform unset"
    assert f"That of {path} is {reason}" in caught.value.problem
    assert f"(fslcpgeom {tmp_path / other}.nii.gz {path}); resampling would move them" in caught.value.remedy


def test_a_case_that_memory_does_not_hold_is_a_fault_of_that_case(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(1 << 24, dtype=np.uint8).reshape(256, 256, 256), AFFINE)
    nib.save(image, tmp_path / "a.nii")
    code = (
        "import resource, sys; import nibabel; from pathlib import Path; from pipelines.layouts.cases import Case;"
        "from pipelines.layouts.labels import CODINGS; from pipelines.basics.errors import CaseError;"
        "from pipelines.scans.nifti import read_case; path = Path(sys.argv[1]);"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize();"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (40 << 20), -1));\n"
        "try: read_case(Case('one', (path,), None, None), CODINGS['brats2023'])\n"
        "except CaseError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.nii")]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"{tmp_path / 'a.nii'}: too little memory to read it"), found.stderr


def identifying(kind: type = nib.Nifti1Image) -> nib.Nifti1Image:
    """A scan whose header names a patient in every field that can."""
    image = kind(voxels(0), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(AFFINE, 1)
    image.header.set_xyzt_units("mm", "sec")
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"JANE DOE"))
    for field, value in (("descrip", b"JANE DOE 08:15"), ("aux_file", b"JANE DOE.txt"), ("intent_name", b"JANE DOE")):
        image.header[field] = value
    if kind is nib.Nifti1Image:
        image.header["db_name"] = b"JANE DOE"
        image.header["data_type"] = b"JANE DOE"
    else:
        image.header["unused_str"] = b"JANE DOE"
    return image


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_segmentation_has_the_geometry_of_its_scan_and_no_name(tmp_path: Path, kind: type) -> None:
    nib.save(identifying(kind), tmp_path / "scan.nii")
    assert (tmp_path / "scan.nii").read_bytes().count(b"JANE DOE") >= 4
    write_nifti(tmp_path / "found.nii", labels(), AFFINE, tmp_path / "scan.nii")
    assert b"DOE" not in (tmp_path / "found.nii").read_bytes()
    scan, found = nib.load(tmp_path / "scan.nii"), nib.load(tmp_path / "found.nii")
    assert type(found) is type(scan) and found.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(found.get_fdata(), labels())
    np.testing.assert_array_equal(found.affine, scan.affine)
    for field in ("qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_y", "srow_x", "pixdim"):
        np.testing.assert_array_equal(found.header[field], scan.header[field])
    assert found.header.get_xyzt_units() == ("mm", "sec")


@pytest.mark.parametrize(("unit", "mm"), [("meter", 1000.0), ("micron", 0.001), ("mm", 1.0), ("unknown", 1.0)])
@pytest.mark.parametrize("codes", [(1, 0), (0, 1), (0, 0)])
def test_a_segmentation_overlays_its_scan_in_the_scans_own_unit(
    tmp_path: Path, unit: str, mm: float, codes: tuple[int, int]
) -> None:
    own = AFFINE.copy()
    own[:3] /= mm
    image = nib.Nifti1Image(voxels(0), own)
    image.set_sform(own, codes[0])
    image.set_qform(own, codes[1])
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "scan.nii")
    affine = read_nifti(tmp_path / "scan.nii")[1]
    write_nifti(tmp_path / "found.nii.gz", labels(), affine, tmp_path / "scan.nii")
    write_nifti(tmp_path / "found_4d.nii.gz", np.stack([labels()] * 3, 3), affine, tmp_path / "scan.nii")
    for name in ("found.nii.gz", "found_4d.nii.gz"):
        found, scan = nib.load(tmp_path / name), nib.load(tmp_path / "scan.nii")
        np.testing.assert_array_equal(found.affine, scan.affine)
        assert found.header.get_xyzt_units()[0] == unit
        assert (int(found.header["sform_code"]), int(found.header["qform_code"])) == codes
        np.testing.assert_array_equal(read_grid(tmp_path / name)[1], affine)


@pytest.mark.parametrize("name", ["a.nii.gz", "a.NII.GZ", "a.nii", "a.NII"])
def test_what_ends_in_gz_is_compressed_in_any_letter_case(tmp_path: Path, name: str) -> None:
    write_nifti(tmp_path / name, labels(), AFFINE)
    assert ((tmp_path / name).read_bytes()[:2] == b"\x1f\x8b") == name.lower().endswith(".gz")
    np.testing.assert_array_equal(read_nifti(tmp_path / name)[0], labels())


def test_real_label_with_sform_code_0_belongs_to_its_images(real_data: Path) -> None:
    folder = real_data / "BraTS-GLI-00000-000"
    image, label = (folder / f"{folder.name}-{end}.nii.gz" for end in ("t2W", "seg"))
    assert int(nib.load(label).header["sform_code"]) == 0 and int(nib.load(image).header["sform_code"]) == 1
    raw = read_case(Case(folder.name, (image,), None, label), CODINGS["brats2023"])
    assert raw.label is not None
    assert np.unique(raw.label).tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(raw.image[..., 0], np.asarray(nib.load(image).dataobj))


def test_real_mask_with_a_scale_factor_is_not_lost(real_data: Path) -> None:
    """Its 1 reads as 0.99999997 in float64; cast to an integer, the mask would be empty."""
    folder = real_data / "brats_2013_pat0003_1"
    image, mask = folder / "T1c_subtrMeanDivStd.nii.gz", folder / "brainmask.nii.gz"
    exact = np.asarray(nib.load(mask).dataobj)
    assert exact.dtype == np.float64 and np.count_nonzero(exact.astype(np.uint8)) == 0
    raw = read_case(Case("one", (image,), None, mask), CODINGS["brats2013"])
    assert raw.label is not None
    np.testing.assert_array_equal(raw.label, np.rint(exact))
    assert np.count_nonzero(raw.label) > 1_000_000
