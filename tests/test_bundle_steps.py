"""Steps of a MONAI bundle: which scans it finds, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from engine.export.bundle import FILE_NAMES
from engine.export.bundle_steps import SelectChannelsd, find_scans
from pipelines.phantom import draw_phantom


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """A folder with a synthetic scan, LPS, as a 4D file and as a folder with a file for each modality."""
    image_XYZC = draw_phantom((40, 36, 24), 0, 0)[0].astype(np.float32)
    affine = np.diag([-1.5, -1.5, 2.25, 1.0])
    affine[:3, 3] = 30, 28, -20
    nib.save(nib.Nifti1Image(image_XYZC, affine), tmp_path / "stacked.nii.gz")
    (tmp_path / "scans" / "A").mkdir(parents=True)
    for i, name in enumerate(("FLAIR", "t1", "t1ce", "t2")):
        nib.save(nib.Nifti1Image(image_XYZC[..., i], affine), tmp_path / "scans" / "A" / f"A_{name}.nii.gz")
    (tmp_path / "stacked.nii.gz").rename(tmp_path / "scans" / "B.nii.gz")
    return tmp_path / "scans"


def test_files_of_every_release_are_found(tmp_path: Path) -> None:
    endings = [
        ("A_flair", "A_t1", "A_t1ce", "A_t2"),
        ("A-t2f", "A-t1n", "A-t1c", "A-t2W"),
        ("Flair_subtrMeanDivStd", "T1_subtrMeanDivStd", "T1c_subtrMeanDivStd", "T2_subtrMeanDivStd"),
    ]
    for i, names in enumerate(endings):
        for name in (*names, "A-seg", "OTMultiClass", "brainmask"):
            path = tmp_path / str(i) / f"{name}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            path.touch()
        assert find_scans(str(tmp_path), FILE_NAMES, [])[i]["image"] == [
            str(tmp_path / str(i) / f"{name}.nii.gz") for name in names
        ]


def test_scans_with_missing_channels_or_nan_voxels_are_refused() -> None:
    meta = {"filename_or_obj": "scan.nii.gz"}
    image = MetaTensor(torch.arange(2.0)[:, None, None, None].expand(2, 4, 4, 4).clone(), meta=meta)
    select = SelectChannelsd()
    assert select({"image": image, "channels": [1, 0]})["image"][:, 0, 0, 0].tolist() == [1, 0]
    with pytest.raises(ValueError, match=r"scan.nii.gz has 2 channel\(s\), but \[0, 2\] are needed.*--channels"):
        select({"image": image, "channels": [0, 2]})
    image[1, 2, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="scan.nii.gz has voxels that are NaN or Inf"):
        select({"image": image, "channels": None})


def test_scans_with_a_file_missing_or_twice_are_named(scan: Path) -> None:
    names = {"t1c": ("t1c", "t1ce"), "t1": ("t1",)}
    stacked, apart = find_scans(str(scan), names, [2, 1])[::-1]
    assert stacked == {"image": str(scan / "B.nii.gz"), "channels": [2, 1]}
    assert [Path(path).name for path in apart["image"]] == ["A_t1ce.nii.gz", "A_t1.nii.gz"]
    with pytest.raises(ValueError, match="A has 0 files of flair, .*_t2f"):
        find_scans(str(scan), {"flair": ("t2f",)}, [0])
    with pytest.raises(ValueError, match="A has 2 files of t1, "):
        find_scans(str(scan), {"t1": ("t1", "t1ce")}, [0])
    shutil.copy(scan / "B.nii.gz", scan / "._B.nii.gz")  # as macOS leaves them in archives
    shutil.copy(scan / "A" / "A_t2.nii.gz", scan / "A" / "._A_t1.nii.gz")
    assert len(find_scans(str(scan), names, [2, 1])) == 2
    (scan / "A" / "empty").mkdir()
    with pytest.raises(ValueError, match="no scan in"):
        find_scans(str(scan / "A" / "empty"), names, [2, 1])
    with pytest.raises(ValueError, match="no folder"):
        find_scans(str(scan / "none"), names, [2, 1])
