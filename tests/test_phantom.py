"""Phantoms: layout and headers of the real Task01, reproducible, restartable, and neither empty nor trivial."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from test_store import files_of_at_most

from pipelines import phantom
from pipelines.basics.atomic import temporary_name
from pipelines.basics.errors import DataError
from pipelines.layouts.cases import find_cases
from pipelines.layouts.labels import CODINGS, regions_from_labels
from pipelines.phantom import draw_phantom, make_phantoms

SIZE = (48, 48, 32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_phantoms(tmp_path_factory.mktemp("phantoms") / "Task01", cases=10, size=SIZE)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, np.ndarray]]:
    return [draw_phantom((96, 96, 64), seed=0, index=i) for i in range(10)]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def test_phantoms_are_found_as_a_decathlon_task(folder: Path) -> None:
    found = find_cases(folder)
    assert found.names == tuple(f"BRATS_{i:03d}" for i in range(1, 11))
    assert found.modalities == ("flair", "t1", "t1c", "t2")
    assert found.coding == CODINGS["decathlon"]
    info = json.loads((folder / "dataset.json").read_text())
    assert info["numTraining"] == 10 and info["tensorImageSize"] == "4D"


def test_files_have_the_types_and_the_lps_affine_of_task01(folder: Path) -> None:
    image = nib.load(folder / "imagesTr/BRATS_001.nii.gz")
    label = nib.load(folder / "labelsTr/BRATS_001.nii.gz")
    assert image.shape == (*SIZE, 4) and image.get_data_dtype() == np.int16
    assert label.shape == SIZE and label.get_data_dtype() == np.uint8
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert np.allclose(np.abs(np.diag(image.affine)[:3]), (5, 5, 155 / 32))
    assert np.array_equal(image.affine, label.affine)
    assert np.allclose(image.affine @ (0, SIZE[1] - 1, 0, 1), (0, 0, 0, 1))


def test_one_millimetre_has_the_affine_of_brats(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "full", cases=1, size=(240, 240, 16), spacing_mm=(1, 1, 1))
    image = nib.load(tmp_path / "full/imagesTr/BRATS_001.nii.gz")
    assert np.array_equal(image.affine, [[-1, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])


def test_spacing_is_stated_as_asked(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "s", cases=1, size=(20, 20, 16), spacing_mm=(1.5, 1.5, 2.0))
    zooms = nib.load(tmp_path / "s/imagesTr/BRATS_001.nii.gz").header.get_zooms()
    assert np.allclose(zooms[:3], (1.5, 1.5, 2.0))


def test_a_second_run_does_nothing(folder: Path) -> None:
    before = contents(folder)
    make_phantoms(folder, cases=10, size=SIZE)
    assert contents(folder) == before


def test_an_interrupted_set_is_finished_to_the_same_volumes(folder: Path, tmp_path: Path) -> None:
    broken = make_phantoms(tmp_path / "broken", cases=10, size=SIZE, workers=1)
    (broken / "dataset.json").unlink()
    (broken / "imagesTr/BRATS_003.nii.gz").unlink()
    (broken / "imagesTr/.BRATS_003.nii.gz.1.part").write_bytes(b"half")
    make_phantoms(broken, cases=10, size=SIZE)
    (broken / "imagesTr/.BRATS_003.nii.gz.1.part").unlink()
    finished, whole = contents(broken), contents(folder)
    assert finished.keys() == whole.keys()
    for name, (_, data) in whole.items():
        ours, theirs = (gzip.decompress(each) if name.endswith(".gz") else each for each in (finished[name][1], data))
        assert ours[:352] == theirs[:352], f"header of {name}"
        assert ours == theirs, f"voxels of {name}"


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    folder = make_phantoms(tmp_path / "set", cases=1, size=SIZE, workers=1)
    dead = temporary_name(Path("x")).name.replace(f"-{os.getpid()}-", "-4194305-")  # above the largest number
    for each in ("", "imagesTr", "labelsTr"):
        (folder / each / dead).write_bytes(b"half")
    make_phantoms(folder, cases=1, size=SIZE)
    assert list(folder.rglob("*.tmp-*")) == []


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    with files_of_at_most(5_000), pytest.raises(OSError, match=r"BRATS_001\.nii\.gz"):
        make_phantoms(tmp_path / "set", cases=1, size=SIZE)
    assert [path for path in (tmp_path / "set").rglob("*") if "tmp-" in path.name or path.name.endswith("gz")] == []


def test_other_parameters_and_other_data_are_refused(folder: Path, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{"seed": 1}, {"cases": 9}, {"size": (48, 48, 33)}, {"spacing_mm": (1.0, 1.0, 1.0)}]
    for change in changes:
        with pytest.raises(DataError, match="another folder"):
            make_phantoms(folder, **{"cases": 10, "size": SIZE, **change})
    (tmp_path / "dataset.json").touch()
    with pytest.raises(DataError, match="is not empty"):
        make_phantoms(tmp_path, cases=1, size=SIZE)


def test_sizes_that_hold_no_head_are_refused(tmp_path: Path) -> None:
    faulty: list[dict[str, Any]] = [{"cases": 0}, {"size": (8, 48, 32)}]
    for arguments in faulty:
        with pytest.raises(DataError, match="at least"):
            make_phantoms(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_a_case_is_a_function_of_seed_and_index_alone() -> None:
    image, label = draw_phantom(SIZE, 3, 2)
    again_image, again_label = draw_phantom(SIZE, 3, 2)
    assert np.array_equal(image, again_image) and np.array_equal(label, again_label)
    for seed, index in ((4, 2), (3, 3)):
        assert not np.array_equal(label, draw_phantom(SIZE, seed, index)[1])


def test_background_is_exactly_zero_and_no_label_lies_in_it(drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    for image, label in drawn:
        brain = image[..., 0] > 0
        assert np.array_equal(image > 0, np.repeat(brain[..., None], 4, axis=-1))
        assert not label[~brain].any() and 0.10 < brain.mean() < 0.25
        assert not brain[[0, -1]].any() and not brain[:, [0, -1]].any(), "cut off by the field of view"


def test_the_same_head_is_drawn_at_any_size(drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    image, label = draw_phantom((160, 160, 96), seed=0, index=0)
    for coarse, fine in ((drawn[0][0][..., 0] > 0, image[..., 0] > 0), (drawn[0][1] > 0, label > 0)):
        assert coarse.mean() == pytest.approx(fine.mean(), rel=0.05)


def test_tumours_are_nested_and_of_the_size_of_tumours(drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """What lies around the core is oedema, but where the core reaches the brain's surface or a ventricle."""
    for image, label in drawn:
        core, whole, _ = (r.sum() for r in regions_from_labels(label, CODINGS["decathlon"]))
        brain = (image[..., 0] > 0).sum()
        assert 0.003 < whole / brain < 0.25 and 0 < core < whole
        around_core = [np.roll(label >= 2, step, axis) & (label < 2) for axis in range(3) for step in (-1, 1)]
        outside = np.concatenate([label[shell] for shell in around_core])
        assert (outside == 1).mean() > 0.5


def test_one_case_in_ten_does_not_enhance(drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    assert [bool((label == 3).any()) for _, label in drawn] == [True] * 9 + [False]


def test_contrasts_are_those_of_the_modalities(drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Oedema is bright on FLAIR and T2 and dark on T1; the rim is bright on T1c alone; the rest of the core is dark."""
    t1_of_oedema, t1c_of_core = [], []
    for image, label in drawn:
        healthy = (image[..., 0] > 0) & (label == 0)
        # (modality, tissue) relative to the healthy brain
        flair, t1, t1c, t2 = (
            [np.median(image[..., c][label == k]) / np.median(image[..., c][healthy]) for k in np.unique(label)]
            for c in range(4)
        )
        assert min(flair[1], t2[1]) > 1.15
        if (label == 3).any():
            assert t1c[3] > 1.2 and t1[3] < 1.1
        t1_of_oedema.append(t1[1])
        t1c_of_core.append(t1c[2])  # a small core is blurred with its rim
    assert max(t1_of_oedema) < 1 and np.mean(t1_of_oedema) < 0.95
    assert np.mean(t1c_of_core) < 0.9


def best_dice(score: np.ndarray, truth: np.ndarray) -> float:
    """The best Dice that a threshold on score can reach, chosen with the truth in hand."""
    thresholds = np.quantile(score[score > 0], np.linspace(0.5, 0.995, 60))
    return max(2 * np.sum((score > t) & truth) / (np.sum(score > t) + truth.sum()) for t in thresholds)


def test_no_threshold_on_one_modality_solves_them(drawn: list[tuple[np.ndarray, np.ndarray]]) -> None:
    whole = [best_dice(image[..., 0], label > 0) for image, label in drawn]
    enhancing = [best_dice(image[..., 2], label == 3) for image, label in drawn if (label == 3).any()]
    assert np.mean(whole) < 0.88 and np.mean(enhancing) < 0.75


def test_a_mark_without_files_is_not_a_finished_set(tmp_path: Path) -> None:
    make_phantoms(tmp_path / "a", cases=2, size=(16, 16, 16))
    for part in ("imagesTr", "labelsTr"):
        for path in (tmp_path / "a" / part).iterdir():
            path.unlink()
    assert (tmp_path / "a" / phantom._MARKER).is_file()
    make_phantoms(tmp_path / "a", cases=2, size=(16, 16, 16))
    assert len(find_cases(tmp_path / "a").cases) == 2
