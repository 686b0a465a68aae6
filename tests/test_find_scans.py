"""What a prediction is given: files of a case, 4D files, folders."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from launch.segment_cases import cases_from_files, find_scans
from pipelines.basics.errors import DataError
from pipelines.layouts.labels import CODINGS

ORDER = ("flair", "t1", "t1c", "t2")


def network(*modalities: str) -> Any:
    return SimpleNamespace(modalities=modalities or ORDER, coding=CODINGS["decathlon"])


def write(path: Path, shape: tuple[int, ...] = (2, 2, 2)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), np.eye(4)), path)
    return path


def test_files_are_taken_by_their_names_in_whatever_order_a_shell_gives_them(tmp_path: Path) -> None:
    names = ("t1c", "t1n", "t2f", "t2w")  # sorted
    paths = [write(tmp_path / f"BraTS-GLI-00000-000-{name}.nii.gz") for name in names]
    for given, modalities in ((paths, None), (paths, names), (paths[::-1], names[::-1])):
        ((case,), faults) = cases_from_files(given, network(), modalities)
        assert not faults and case.images == (paths[2], paths[1], paths[0], paths[3])
    with pytest.raises(ValueError, match="t1c.nii.gz is given as flair, but its name says t1c"):
        cases_from_files(paths, network(), ORDER)


def test_a_file_of_another_modality_is_refused_for_a_network_of_one(tmp_path: Path) -> None:
    paths = [write(tmp_path / name) for name in ("a_t1c.nii", "b.nii")]
    cases, _ = cases_from_files(paths, network("t1c"), None)
    assert [case.images for case in cases] == [(path,) for path in paths]
    with pytest.raises(ValueError, match=r"no t1c among c_flair.nii \(flair\): the network needs t1c"):
        cases_from_files([*paths, write(tmp_path / "c_flair.nii")], network("t1c"), None)


def test_dimensions_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    stacked, scan = write(tmp_path / "stacked.nii", (2, 2, 2, 4)), write(tmp_path / "scan.nii")
    with pytest.raises(ValueError, match=r"stacked.nii \(4D\), scan.nii \(3D\): give 4D files with flair, t1, t1c, t2"):
        cases_from_files([stacked, scan], network(), None)
    with pytest.raises(ValueError, match=r"stacked.nii \(4D\): give 3D files, each a case"):
        cases_from_files([stacked], network("t1c"), None)


def case_folder(root: Path, name: str, ends: tuple[str, ...] = ("t2f", "t1n", "t1c", "t2w"), mark: str = "-") -> Path:
    for end in ends:
        write(root / name / f"{name}{mark}{end}.nii.gz")
    return root / name


def test_a_folder_without_cases_does_not_stop_the_others(tmp_path: Path) -> None:
    good = [case_folder(tmp_path, f"BraTS-GLI-0000{i}-000") for i in (1, 2)]
    (tmp_path / "empty").mkdir()
    found, faults = find_scans([good[0], tmp_path / "empty", tmp_path / "gone", good[1]], network(), None)
    assert found.names == tuple(folder.name for folder in good)
    assert [path.name for path, _ in faults] == ["empty", "gone"]
    assert "no cases found" in str(faults[0][1]) and "does not exist" in str(faults[1][1])
    with pytest.raises(DataError, match="no cases found"):
        find_scans([tmp_path / "empty"], network(), None)


def test_a_folder_that_is_named_like_a_file_is_a_folder(tmp_path: Path) -> None:
    folder = case_folder(tmp_path, "BraTS-GLI-00001-000.nii")
    found, _ = find_scans([folder], network(), None)
    assert len(found.cases) == 1


def test_folders_of_one_release_are_written_in_it_and_those_of_several_in_the_networks(tmp_path: Path) -> None:
    of_2023 = [case_folder(tmp_path, f"BraTS-GLI-0000{i}-000") for i in (1, 2)]
    of_2020 = case_folder(tmp_path, "BraTS20_Training_001", ("flair", "t1", "t1ce", "t2"), "_")
    file = write(tmp_path / "stacked.nii", (2, 2, 2, 4))
    for inputs, release in (
        (of_2023[:1], "brats2023"),
        (of_2023, "brats2023"),
        ([of_2020], "brats2018"),
        ([*of_2023, of_2020], "decathlon"),
        ([*of_2023, file], "decathlon"),
        ([file], "decathlon"),
    ):
        assert find_scans(inputs, network(), None)[0].coding.release == release
