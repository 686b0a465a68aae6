"""nibabel is the oracle of what a file holds; every fault of a file ends in one error that says what to do."""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipelines.cases import Case, DataError
from pipelines.labels import CODINGS
from pipelines.layouts import CaseError
from pipelines.nifti import RawCase, read_case, read_nifti

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


def test_gzip_of_several_members_is_read_whole(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", voxels(0))
    content = path.read_bytes()
    parts = (content[:100], content[100:400], content[400:])
    (tmp_path / "b.nii.gz").write_bytes(b"".join(gzip.compress(part) for part in parts))
    np.testing.assert_array_equal(read_nifti(tmp_path / "b.nii.gz")[0], voxels(0))


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
    array = voxels(1, "float32")
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
    "singular_affine": ("t1c", make_singular, r"can't be inverted.*Correct sform and qform"),
    "nan": ("t1c", lambda p: save(p, two_nan()), r"2 voxels are NaN or Inf, the first at \(1, 2, 3\)"),
    "inf": ("t1c", lambda p: save(p, with_voxel((0, 5, 4), -np.inf)), r"1 voxels are NaN or Inf, .* \(0, 5, 4\)"),
    "label_of_other_shape": ("seg", lambda p: save(p, labels()[:, :-1]), r"\(7, 5, 5\) differs"),
    "label_of_other_affine": ("seg", lambda p: save(p, labels(), moved(1)), r"up to 1 mm apart"),
    "label_outside_coding": (
        "seg",
        lambda p: save(p, np.where(labels() == 3, 4, labels()).astype(np.uint8)),
        r"values 0, 1, 2, 4 do not fit the coding brats2023, which has 0, 1, 2, 3\. 4 is the resection cavity",
    ),
    "negative_label": ("seg", lambda p: save(p, labels().astype("int16") - 1), r"values -1, 0, 1, 2 do not fit"),
    "label_beyond_a_byte": ("seg", lambda p: save(p, labels().astype("int16") + 256), r"values 256, 257, 258, 259 do"),
    "interpolated_label": ("seg", lambda p: save(p, (labels() * 0.5).astype("float32")), r"value .*5 is no integer"),
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
        (np.zeros((*SHAPE, 3), "int16"), (0, 3), r"channel 3 is asked for, and its last axis has 3"),
        (np.zeros(SHAPE, "int16"), (0, 1), r"has 3 dimensions, must have 4"),
        (np.stack([voxels(0, "float32"), with_voxel((6, 0, 1), np.inf)], 3), (0, 1), r"1 voxels in channel 1 are NaN"),
    ],
    ids=["channel_out_of_range", "three_dimensions", "inf_in_a_channel"],
)
def test_fault_of_a_4d_file(tmp_path: Path, array: np.ndarray, channels: tuple[int, ...], message: str) -> None:
    case = Case("one", (save(tmp_path / "a.nii.gz", array),), channels, None)
    with pytest.raises(CaseError, match=message):
        read_case(case, CODING)


def test_a_label_4_among_codes_of_2023_is_offered_those_of_2024_alone(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    save(tmp_path / "seg.nii.gz", np.where(labels() == 3, 4, labels()).astype(np.uint8))
    with pytest.raises(CaseError, match="4 is the resection cavity.*oedema, and the other codes differ") as caught:
        read_case(case, CODINGS["brats2023"])
    assert [name for name in CODINGS if f"--data.release {name}" in caught.value.remedy] == [
        "brats2024",
        "brats2024-ped",
    ]
    assert read_case(case, CODINGS["brats2024"]).label is not None


@pytest.mark.parametrize(
    ("values", "release", "offered"),
    [
        ((0, 1, 2, 3), "brats2018", ("decathlon", "brats2013", "brats2023", "brats2024", "brats2024-ped")),
        ((0, 3, 4), "brats2018", ("brats2013", "brats2024", "brats2024-ped")),
        ((0, 2, 4), "decathlon", ("brats2013", "brats2018", "brats2024", "brats2024-ped")),
        ((0, 5), "brats2013", ()),
    ],
)
def test_only_codings_with_all_values_are_offered_and_the_documentation_decides(
    tmp_path: Path, values: tuple[int, ...], release: str, offered: tuple[str, ...]
) -> None:
    case = make_case(tmp_path)
    save(tmp_path / "seg.nii.gz", np.resize(np.array(values, np.uint8), SHAPE))
    with pytest.raises(CaseError, match="do not fit the coding") as caught:
        read_case(case, CODINGS[release])
    remedy = caught.value.remedy
    assert tuple(name for name in CODINGS if name in remedy) == offered
    assert ("documentation says so: values alone don't tell" in remedy) == bool(offered)


def test_affines_that_differ_by_rounding_are_the_same(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    save(tmp_path / "seg.nii.gz", labels(), moved(1e-4))
    assert read_case(case, CODING).label is not None


def test_error_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(CaseError(Path("a.nii.gz"), "empty", "Copy it again")))
    assert str(error) == "a.nii.gz: empty. Copy it again." and error.remedy == "Copy it again"


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
