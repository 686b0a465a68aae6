"""Parity of store and DALI pipelines with the tutorial's MONAI chain: transform by transform, then the whole chain.

For the whole chain MONAI draws: its random chain runs, its draws are read out of its transforms and fed to the loader.
Images must agree within 1e-3 of their range, regions on every voxel. Three cases: a phantom (4D file, always there), a
BraTS 2023 case of four modalities and a BraTS 2013 case of two, already z-scored (real scans, skipped where absent).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from nvidia.dali import fn, pipeline_def

from benchmarks.monai_chain import (
    LabelsToRegionsd,
    case_to_dict,
    prepare_steps,
    seed_transforms,
    train_steps,
    val_steps,
)
from pipelines.layouts.cases import CaseSet, find_cases
from pipelines.layouts.labels import CODINGS, regions_from_labels, tutorial_coding
from pipelines.loading import dali, loaders
from pipelines.loading.loader_options import CropOptions
from pipelines.loading.loaders import TrainLoader, ValLoader
from pipelines.loading.sampling import CropDraw, copy_crop
from pipelines.loading.volumes import MappedVolumes, label_of
from pipelines.phantom import make_phantoms
from pipelines.preparing.store import Store, prepare

TOLERANCES = {"image": 1e-3, "shift": 1e-6, "affine": 1e-6}  # of the image's range, of a value, in mm
DRAWS = 4


@dataclass
class Prepared:
    """One case, prepared twice: by the store, and by MONAI into image (C, X, Y, Z) and regions (3, X, Y, Z)."""

    store: Store
    case_set: CaseSet
    monai: dict[str, Any]
    crop: tuple[int, int, int]

    def fresh(self) -> dict[str, Any]:
        """MONAI's dictionary to work on: NormalizeIntensity writes into the volume that its crop is a view of."""
        return {key: value.clone() if isinstance(value, MetaTensor) else value for key, value in self.monai.items()}

    def regions(self, label: torch.Tensor | np.ndarray) -> np.ndarray:
        return regions_from_labels(np.asarray(label), self.case_set.coding)


@pytest.fixture(scope="module", params=["phantom", "BraTS-GLI-00000-000", "brats_2013_pat0003_1"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("parity")
    crop = (128, 128, 64)
    if request.param == "phantom":
        # Half the modalities and not in the file's order; 1 mm voxels, so that labels meet the ties of 1 to 1.5 mm.
        task = make_phantoms(folder / "Task", cases=1, size=(150, 146, 111), spacing_mm=(1.0, 1.0, 1.0), workers=1)
        case_set = find_cases(task, modalities=("t1c", "flair"))
        crop = (64, 64, 32)
    else:
        root = request.getfixturevalue("real_data")
        release = "brats2013" if "2013" in request.param else "brats2023"
        case_set = find_cases(root, release=release).select([request.param])
    monai = mt.Compose(prepare_steps(case_set.coding))(case_to_dict(case_set.cases[0]))
    return Prepared(prepare(case_set, folder / "store", workers=1), case_set, monai, crop)


def assert_close(image: Any, expected: Any) -> None:
    image, expected = np.asarray(image, np.float64), np.asarray(expected, np.float64)
    assert image.shape == expected.shape
    assert np.abs(image - expected).max() <= TOLERANCES["image"] * np.ptp(expected)


def assert_same_regions(regions: np.ndarray, expected: Any) -> None:
    np.testing.assert_array_equal(regions, np.asarray(expected) != 0)


def run_step(step: Callable[..., Any], volume_CXYZ: Any, *scalars: np.generic) -> np.ndarray:
    """Run one step of the DALI pipeline on one channel-first volume."""
    volume = np.ascontiguousarray(np.asarray(volume_CXYZ).transpose(1, 2, 3, 0))[None]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def pipeline():
        arguments = [fn.external_source([np.array([value])], cycle=True) for value in scalars]
        return step(fn.external_source(lambda: volume, layout="DHWC"), *arguments)

    return np.array(pipeline().run()[0].as_array())[0].transpose(3, 0, 1, 2)


def monai_draw(chain: mt.Compose) -> CropDraw:
    """What MONAI's chain of `train_steps` drew last."""
    crop, flip, _, scale, shift = chain.transforms
    x, y, z = (s.start for s in crop.cropper._slices)
    return CropDraw(
        start=(x, y, z),
        flip=flip._do_transform,
        scale=scale.scaler.factor if scale._do_transform else 0.0,
        shift=shift.shifter._offset if shift._do_transform else 0.0,
    )


# ---------- transform by transform


def test_resample_and_orient_match_monai(case: Prepared) -> None:
    image = case.store.image(0).transpose(3, 0, 1, 2)
    assert_close(image, case.monai["image"])
    # Rounding leaves 1e-11 in some voxels beside the head, and the z-score takes every voxel that is not exactly 0.
    np.testing.assert_array_equal(image != 0, np.asarray(case.monai["image"]) != 0)
    assert_same_regions(case.regions(case.store.label(0)), case.monai["label"])  # type: ignore[arg-type]
    assert case.monai["label"].any()
    np.testing.assert_allclose(case.store.affine(0), case.monai["image"].affine, atol=TOLERANCES["affine"])


def test_random_crop_matches_monai(case: Prepared) -> None:
    crop = mt.RandSpatialCropd(["image", "label"], case.crop, random_size=False).set_random_state(5)
    for _ in range(DRAWS):
        expected = crop(case.monai)
        start = [s.start for s in crop.cropper._slices]
        image = np.empty((*case.crop, case.store.image(0).shape[3]), np.float32)
        label = np.empty((*case.crop, 1), np.uint8)
        copy_crop(case.store.image(0), start, image)
        copy_crop(label_of(case.store, 0), start, label)
        assert_close(image.transpose(3, 0, 1, 2), expected["image"])
        assert_same_regions(case.regions(label[..., 0]), expected["label"])


def test_flip_matches_monai(case: Prepared) -> None:
    flip = mt.Flip(spatial_axis=0)
    volumes, shape = MappedVolumes(case.store), case.store.shape(0)
    image, label = volumes.new_buffers(1, shape)
    volumes.crop(0, (0, 0, 0), image[0], label[0], flip=True)
    expected = flip(torch.tensor(case.store.image(0)).permute(3, 0, 1, 2))
    np.testing.assert_array_equal(image[0].transpose(3, 0, 1, 2), expected)
    np.testing.assert_array_equal(label[0, ..., 0], flip(torch.tensor(label_of(case.store, 0))[..., 0][None])[0])


def test_z_score_matches_monai(case: Prepared) -> None:
    normalise = mt.NormalizeIntensity(nonzero=True, channel_wise=True)
    image = case.fresh()["image"]
    for volume in (image, image[:, 20:84, 10:74, 5:47]):
        out = run_step(dali.z_score, volume)
        assert_close(out, normalise(volume.clone()))
        assert not out[np.asarray(volume) == 0].any()


def test_scale_matches_monai(case: Prepared) -> None:
    scale = mt.RandScaleIntensity(0.1, prob=1.0).set_random_state(1)
    expected = scale(case.fresh()["image"])
    assert_close(run_step(dali.jitter, case.monai["image"], np.float32(scale.factor), np.float32(0)), expected)


def test_shift_matches_monai(case: Prepared) -> None:
    shift = mt.RandShiftIntensity(0.1, prob=1.0).set_random_state(1)
    expected = shift(case.fresh()["image"])
    out = run_step(dali.jitter, case.monai["image"], np.float32(0), np.float32(shift._offset))
    assert_close(out, expected)
    tolerance = TOLERANCES["shift"]  # a shift of 0.1 is lost in a range of thousands
    np.testing.assert_allclose(out, expected, rtol=tolerance, atol=tolerance)


# ---------- the whole chain


def test_train_chain_matches_monai_with_monais_own_draws(case: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = mt.Compose(train_steps(case.crop)).set_random_state(2)
    expected, draws = [], []
    for _ in range(DRAWS):
        expected.append(chain(case.fresh()))
        draws.append(monai_draw(chain))
    assert len({d.flip for d in draws}) == 2
    assert any(d.scale for d in draws)
    assert any(d.shift for d in draws)
    monkeypatch.setattr(loaders, "draw_sample", lambda seed, epoch, position, *_: draws[position])
    loader = TrainLoader(case.store, case.store.names, CropOptions(case.crop, crops_per_case=DRAWS))
    images, labels = (torch.cat(batches) for batches in zip(*loader.epoch(0)))
    for image, label, wanted in zip(images, labels, expected, strict=True):
        assert_close(image, wanted["image"])
        assert_same_regions(case.regions(label), wanted["label"])


def test_val_chain_matches_monai(case: Prepared) -> None:
    expected = mt.Compose(val_steps(case.crop))(case.fresh())
    ((name, image, label),) = ValLoader(case.store, case.store.names, case.crop)
    assert name == case.case_set.names[0]
    assert_close(image[0], expected["image"])
    assert_same_regions(case.regions(label[0]), expected["label"])


def test_full_volume_matches_monai(case: Prepared) -> None:
    expected = mt.NormalizeIntensity(nonzero=True, channel_wise=True)(case.fresh()["image"])
    ((_, image, label),) = ValLoader(case.store, case.store.names, None)
    assert_close(image[0], expected)
    assert_same_regions(case.regions(label[0]), case.monai["label"])


# ---------- the reference itself


@pytest.mark.parametrize("train", [True, False])
def test_seed_transforms_run_from_files_to_crops(tmp_path: Path, train: bool) -> None:
    case_set = find_cases(make_phantoms(tmp_path / "Task", cases=1, size=(60, 60, 40), workers=1))
    chain = seed_transforms(case_set.coding, (16, 16, 12), spacing_mm=(6.0, 6.0, 6.0), train=train)
    out = chain.set_random_state(0)(case_to_dict(case_set.cases[0]))
    assert out["image"].shape == (4, 16, 16, 12)
    assert out["label"].shape == (3, 16, 16, 12)
    assert out["label"].dtype == torch.float32


def test_case_to_dict_of_three_d_files_lists_them_in_order_of_the_modalities(real_data: Path) -> None:
    case_set = find_cases(real_data, release="brats2023", modalities=("t2", "flair"))
    entry = case_to_dict(case_set.cases[0])
    assert [Path(p).name for p in entry["image"]] == [
        "BraTS-GLI-00000-000-t2W.nii.gz",
        "BraTS-GLI-00000-000-t2f.nii.gz",
    ]
    assert entry["channels"] is None


@pytest.mark.parametrize("coding", [*CODINGS.values(), "tutorial"], ids=lambda c: getattr(c, "release", c))
def test_regions_of_the_reference_are_those_of_the_label_map(coding: Any) -> None:
    if coding == "tutorial":
        with pytest.warns(UserWarning, match="tutorial"):
            coding = tutorial_coding(CODINGS["decathlon"])
    label = np.random.default_rng(0).choice(coding.values, (6, 7, 8)).astype(np.uint8)
    scaled = MetaTensor(label[None].astype(np.float32) * np.float32(0.99999997))
    regions = LabelsToRegionsd(["label"], coding)({"label": scaled})["label"]
    assert_same_regions(regions_from_labels(label, coding), regions)


@pytest.mark.parametrize(("release", "et_label"), [("brats2018", 4), ("brats2023", 3)])
def test_regions_are_monais_where_monai_knows_the_coding(release: str, et_label: int) -> None:
    """BraTS 2018 and 2023 code alike but for ET; MONAI takes 1 for core, 2 for oedema and `et_label`."""
    coding = CODINGS[release]
    label = np.random.default_rng(0).choice(coding.values, (6, 7, 8)).astype(np.uint8)
    monai = mt.ConvertToMultiChannelBasedOnBratsClasses(et_label=et_label)
    assert_same_regions(regions_from_labels(label, coding), monai(label))


def test_monais_own_region_class_finds_no_enhancing_tumour_in_decathlon() -> None:
    label = np.array([0, 1, 2, 3], np.uint8).reshape(4, 1, 1)
    coding = CODINGS["decathlon"]
    assert regions_from_labels(label, coding)[2].sum() == 1
    assert not mt.ConvertToMultiChannelBasedOnBratsClasses()(label)[2].any()
