"""Scans to segmentations: MONAI's transforms, sliding window and their inverse are the oracle."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers.utils import sliding_window_inference
from monai.transforms import Compose, Orientation, Spacing
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from test_trained import CONFIG, content_of

from engine import inference
from engine.config import to_dict
from engine.inference import Predictor, Segmentation, compose_labels, describe
from engine.network import ModelConfig, make_model
from engine.precision import tf32
from engine.sliding_window import sliding_window_logits, zscore_nonzero
from engine.weights_file import write_content
from kernels import dispatch
from pipelines.layouts.labels import CODINGS, regions_from_labels, tutorial_coding
from pipelines.preparing.domain_shift import ranges, scan_statistics
from pipelines.scans.nifti import read_description, read_nifti

TOLERANCES = {"MONAI": 1e-4, "ensemble": 1e-6, "flips": 1e-5}  # of probabilities

SHAPE = (30, 44, 21)
AFFINE = np.array([[-1.25, 0, 0, 20.0], [0, -1.0, 0, 31.0], [0, 0, 2.0, -4.0], [0, 0, 0, 1]])


def write_run(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A run's weights whose logits are far enough from one another to be worth comparing."""
    torch.manual_seed(seed)
    network = make_model(CONFIG.model, CONFIG.data.crop_size_voxels, 2)
    with torch.no_grad():
        network.get_parameter("head.weight").mul_(20)
    write_content(folder / "checkpoints" / "best.pt", content_of(weights=network.state_dict()) | changes)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def scan() -> np.ndarray:
    """int16 (2, X, Y, Z), zero around a head."""
    image = np.random.default_rng(0).integers(100, 900, (2, *SHAPE)).astype(np.int16)
    image[:, :4], image[:, :, 40:] = 0, 0
    return image


def write_scan(folder: Path, scan: np.ndarray) -> list[Path]:
    """A file for each channel, with units and codes of their own."""
    paths = []
    for name, channel in zip(("t1c", "flair"), scan):
        image = nib.Nifti1Image(channel, AFFINE)
        image.set_sform(AFFINE, code=4)
        image.set_qform(AFFINE, code=1)
        image.header.set_xyzt_units("mm", "sec")
        paths.append(folder / f"{name}.nii.gz")
        nib.save(image, paths[-1])
    return paths


def test_probabilities_are_those_of_monais_chain(run: Path, scan: np.ndarray) -> None:
    predictor = Predictor(run, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        chain = Compose([Spacing(CONFIG.data.spacing_mm, mode="bilinear"), Orientation("RAS")])
        prepared = chain(MetaTensor(torch.from_numpy(scan).float(), affine=torch.from_numpy(AFFINE)))
        network = predictor.members[0].network
        logits = sliding_window_inference(
            prepared.as_tensor()[None], (16, 16, 16), 1, lambda window: network(zscore_nonzero(window)),
            overlap=0.5, mode="gaussian",
        )  # fmt: skip
        result = MetaTensor(logits[0].detach().sigmoid(), affine=prepared.affine)
        result.applied_operations = prepared.applied_operations
        expected = chain.inverse(result).as_tensor().numpy()
    found = predictor.segment(scan, AFFINE, probabilities=True)
    assert found.probabilities_RXYZ is not None and np.ptp(found.probabilities_RXYZ) > 0.3
    np.testing.assert_allclose(found.probabilities_RXYZ, expected, atol=TOLERANCES["MONAI"])
    np.testing.assert_array_equal(found.masks_RXYZ, found.probabilities_RXYZ > 0.5)
    assert found.masks_RXYZ.shape == (3, *SHAPE)


def test_files_names_arrays_and_a_4d_file_give_the_same(run: Path, scan: np.ndarray, tmp_path: Path) -> None:
    predictor = Predictor(run, "cpu")
    t1c, flair = write_scan(tmp_path, scan)
    stacked = tmp_path / "stacked.nii"
    nib.save(nib.Nifti1Image(np.moveaxis(scan, 0, -1), AFFINE), stacked)
    expected = predictor.segment(scan, AFFINE).labels()
    for images in ([t1c, flair], [flair, t1c], {"t2f": flair, "T1ce": t1c}, stacked, [str(stacked)]):
        np.testing.assert_array_equal(predictor.segment(images).labels(), expected)
    unnamed = [shutil.copy(path, tmp_path / f"{i}.nii.gz") for i, path in enumerate((flair, t1c))]
    assert (predictor.segment(unnamed).labels() != expected).any()
    np.testing.assert_array_equal(predictor.segment({"flair": unnamed[0], "t1c": unnamed[1]}).labels(), expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            ["a.nii", "b.nii", "c.nii"],
            r"3 files \(a.nii, .*\) for 2 modalities: give the files of t1c, flair",
        ),
        ({"flair": "a.nii"}, r"no t1c among a.nii \(flair\)"),
        ({"flair": "a_t1c.nii", "t1c": "a_flair.nii"}, "a_t1c.nii is given as flair, but its name says t1c"),
        (np.zeros((3, 8, 8, 8)), r"an array is \(3, 8, 8, 8\) without an affine"),
        (["absent.nii", "also.nii"], "absent.nii: there is no such file"),
    ],
)
def test_images_that_the_network_does_not_take_are_refused(images: Any, message: str, run: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(run, "cpu").segment(images)


def test_a_4d_file_of_more_images_than_modalities_is_refused(run: Path, scan: np.ndarray, tmp_path: Path) -> None:
    """Its first channels need not be the network's, and nothing in the file says what they are."""
    nib.save(nib.Nifti1Image(np.stack([*scan, scan[0]], axis=-1), AFFINE), tmp_path / "three.nii")
    with pytest.raises(ValueError, match="three.nii has 3 images on its last axis: the network needs 2, t1c, flair"):
        Predictor(run, "cpu").segment(tmp_path / "three.nii")


@pytest.mark.parametrize(
    ("image", "affine", "message"),
    [
        (np.full((2, 8, 8, 8), np.nan), AFFINE, r"\(2, 8, 8, 8\), float64: voxels must be finite real numbers"),
        (np.zeros((2, 8, 8, 8), np.complex64), AFFINE, "complex64: voxels must be finite"),
        (np.zeros((2, 8, 0, 8)), AFFINE, r"\(2, 8, 0, 8\), .* at least one"),
        (np.zeros((2, 8, 8, 8)), np.eye(3), r"its affine is \(3, 3\) and must be \(4, 4\)"),
        (np.zeros((2, 8, 8, 8)), np.diag([1, 1, 0, 1]), "can't be inverted"),
        (np.zeros((2, 8, 8, 8)), np.full((4, 4), np.nan), "can't be inverted"),
    ],
)
def test_arrays_that_are_not_scans_are_refused(image: np.ndarray, affine: np.ndarray, message: str, run: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Predictor(run, "cpu").segment(image, affine)


def process_state() -> tuple[object, ...]:
    """What a library must leave as it is."""
    backends = torch.backends
    return (
        dispatch._mode, torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32, backends.cudnn.benchmark,
        backends.cuda.matmul.fp32_precision, torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
        torch.is_grad_enabled(), torch.get_default_dtype(), dict(os.environ), list(warnings.filters),
        [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], logging.getLogger().handlers[:],
        logging.getLogger().level, np.geterr(),
    )  # fmt: skip


def tf32_predictor(run: Path) -> Predictor:
    """As one on a GPU, of a network that was trained in TF32."""
    predictor = Predictor(run, "cpu")
    predictor._settings = partial(inference._SETTINGS.holding, "auto", predictor.device, True)
    return predictor


@pytest.mark.parametrize("matmul", ["highest", "medium"])
def test_a_predictor_leaves_its_users_process_as_it_was(
    matmul: str, run: Path, scan: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels and TF32 are set only while it works, in turn with a predictor that sets others, and after an error."""
    seen: list[tuple[str, bool, str]] = []

    def looking(network: Any, *rest: Any) -> torch.Tensor:
        precision = torch.get_float32_matmul_precision()
        seen.append((dispatch._mode, torch.backends.cudnn.allow_tf32, precision))
        return sliding_window_logits(network, *rest)

    monkeypatch.setattr(inference, "sliding_window_logits", looking)
    with dispatch.using("auto", "cpu"), tf32(False):
        torch.set_float32_matmul_precision(matmul)
        before = process_state()
        plain = Predictor(run, "cpu", kernels="reference")
        assert process_state() == before
        fast = tf32_predictor(run)
        for predictor in (plain, fast, plain):
            assert process_state() == before
            predictor.segment(scan, AFFINE)
        assert process_state() == before
        assert seen == [("reference", False, "highest"), ("auto", True, "high"), ("reference", False, "highest")]
        monkeypatch.setattr(inference, "sliding_window_logits", mock.Mock(side_effect=RuntimeError("lost")))
        with pytest.raises(RuntimeError, match="lost"):
            fast.segment(scan, AFFINE)
        assert process_state() == before


@pytest.mark.parametrize(
    ("device", "deterministic", "searches"), [("cuda", False, True), ("cuda", True, False), ("cpu", False, False)]
)
def test_cudnn_searches_for_algorithms_while_a_gpu_predicts_unless_bits_must_repeat(
    device: str, deterministic: bool, searches: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", deterministic)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    with inference._SETTINGS.holding("reference", torch.device(device), False):
        assert torch.backends.cudnn.benchmark is searches
    assert torch.backends.cudnn.benchmark is False


def test_a_scan_for_a_gpu_is_page_locked_in_the_thread_that_reads_it(
    run: Path, scan: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[torch.Size] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda image: pinned.append(image.shape) or image)  # type: ignore
    predictor = Predictor(run, "cpu")
    raw = inference._raw_of_array(scan, AFFINE, predictor.modalities)
    here = predictor.prepare(raw).image_1CXYZ
    assert pinned == []
    predictor.device = torch.device("cuda")
    there = predictor.prepare(raw).image_1CXYZ
    assert pinned == [here.shape] and torch.equal(here, there)


def test_predictors_of_other_settings_wait_for_each_other(run: Path, scan: np.ndarray) -> None:
    """And those of the same settings work at once: the next scan is finished while this one is predicted."""
    plain, fast = Predictor(run, "cpu"), tf32_predictor(run)
    waiting = threading.Thread(target=lambda: fast.segment(scan, AFFINE))
    with plain._settings():
        plain.segment(scan, AFFINE)
        with ThreadPoolExecutor(1) as other:
            other.submit(plain.segment, scan, AFFINE).result(timeout=60)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive() and not torch.backends.cudnn.allow_tf32
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_saved_segmentation_lies_on_the_scans_grid(run: Path, scan: np.ndarray, tmp_path: Path) -> None:
    paths = write_scan(tmp_path, scan)
    found = Predictor(run, "cpu").segment(paths, probabilities=True)
    found.save(tmp_path / "out.nii.gz")
    found.save(tmp_path / "other.nii", CODINGS["decathlon"])
    found.save_probabilities(tmp_path / "probabilities.nii.gz")
    source, saved = nib.load(paths[0]), nib.load(tmp_path / "out.nii.gz")
    np.testing.assert_array_equal(np.asarray(saved.dataobj), found.labels())
    np.testing.assert_array_equal(saved.affine, source.affine)
    assert saved.get_data_dtype() == np.uint8 and saved.header.get_xyzt_units() == ("mm", "sec")
    assert [int(saved.header[code]) for code in ("sform_code", "qform_code")] == [4, 1]
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "other.nii").dataobj) == 3, found.labels() == 4)
    assert nib.load(tmp_path / "probabilities.nii.gz").shape == (*SHAPE, 3)
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(ValueError, match="not kept"):
        Predictor(run, "cpu").segment(paths).save_probabilities(tmp_path / "none.nii.gz")


@pytest.mark.parametrize("codes", ["RAS", "PIR", "RSA"])
def test_a_scan_is_segmented_alike_however_its_axes_are_stored(codes: str, run: Path, scan: np.ndarray) -> None:
    """At 2 x 2 x 3 mm on a scan whose grid reaches its last voxel, from whichever side it is begun."""
    image, affine = scan[:, :25, :43, :19], np.diag([-1.25, -1.0, 1.5, 1.0])
    expected = Predictor(run, "cpu").segment(image, affine, probabilities=True).probabilities_RXYZ
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    stored = np.stack([apply_orientation(channel, turn) for channel in image])
    affine = affine @ inv_ornt_aff(turn, image.shape[1:])
    found = Predictor(run, "cpu").segment(stored, affine, probabilities=True)
    assert (
        found.probabilities_RXYZ is not None and expected is not None and found.masks_RXYZ.shape[1:] == stored.shape[1:]
    )
    back = np.stack([apply_orientation(region, ornt_transform(io_orientation(affine), axcodes2ornt("LPS")))
                     for region in found.probabilities_RXYZ])  # fmt: skip
    np.testing.assert_allclose(back, expected, atol=TOLERANCES["MONAI"])


def test_a_scan_looks_alike_however_its_axes_are_stored(scan: np.ndarray) -> None:
    turn = ornt_transform(io_orientation(AFFINE), axcodes2ornt("PIR"))
    turned = AFFINE @ inv_ornt_aff(turn, scan.shape[1:])
    prepared = np.moveaxis(scan, 0, -1)
    assert scan_statistics(prepared, turned) == scan_statistics(prepared, AFFINE)
    assert scan_statistics(prepared, AFFINE)["spacing_mm"][2] == 2


def test_an_ensemble_is_the_mean_of_its_members(run: Path, scan: np.ndarray, tmp_path: Path) -> None:
    other = write_run(tmp_path, seed=1)
    parts = [Predictor(path, "cpu").segment(scan, AFFINE, True).probabilities_RXYZ for path in (run, other)]
    found = Predictor([run, other], "cpu").segment(scan, AFFINE, True).probabilities_RXYZ
    assert found is not None and parts[0] is not None and parts[1] is not None
    assert np.abs(parts[0] - parts[1]).max() > 0.1
    np.testing.assert_allclose(found, (parts[0] + parts[1]) / 2, atol=TOLERANCES["ensemble"])


@pytest.mark.parametrize(
    "changes",
    [
        {"modalities": ["flair", "t1c"]},
        {"config": to_dict(CONFIG) | {"data": to_dict(CONFIG)["data"] | {"spacing_mm": [2.0, 2.0, 2.0]}}},
        {"config": to_dict(CONFIG) | {"data": to_dict(CONFIG)["data"] | {"spacing_axes": "file"}}},
        {"release": "brats2023"},
    ],
)
def test_an_ensemble_of_runs_that_do_not_match_is_refused(changes: dict[str, Any], run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="an ensemble's runs must share it"):
        Predictor([run, write_run(tmp_path, **changes)], "cpu")


def test_flips_are_the_mean_over_eight_mirror_images(run: Path) -> None:
    plain, flipping = Predictor(run, "cpu"), Predictor(run, "cpu", flips=True)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])  # the prepared grid itself, which may be mirrored
    image = np.random.default_rng(1).random((2, 20, 16, 16), np.float32)
    total = np.zeros((3, 20, 16, 16))
    for axes in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)):
        found = plain.segment(np.flip(image, axes).copy(), affine, True).probabilities_RXYZ
        assert found is not None
        total += np.flip(found, axes) / 8
    found = flipping.segment(image, affine, True).probabilities_RXYZ
    np.testing.assert_allclose(found, total, atol=TOLERANCES["flips"])  # type: ignore[arg-type]


@pytest.mark.parametrize("release", CODINGS)
def test_labels_of_nested_regions_give_the_regions_back(release: str) -> None:
    coding = CODINGS[release]
    masks = np.zeros((3, 4, 1, 1), bool)  # voxels: background, oedema, core, enhancing
    masks[1, 1:], masks[0, 2:], masks[2, 3:] = True, True, True
    labels = compose_labels(masks, coding)
    np.testing.assert_array_equal(regions_from_labels(labels, coding), masks)
    assert labels.dtype == np.uint8 and set(labels.ravel()) <= set(coding.values)
    only_inner = masks & np.array([False, False, True])[:, None, None, None]
    np.testing.assert_array_equal(compose_labels(only_inner, coding)[3], labels[3])


@pytest.mark.parametrize(("release", "values"), [("decathlon", (1, 2, 3)), ("brats2023", (2, 1, 3))])
def test_what_the_tutorial_calls_enhancing_is_written_as_non_enhancing(release: str, values: tuple[int, ...]) -> None:
    """Label 2 of `dataset.json`, which its networks find as ET, is non-enhancing tumour, and 3 is enhancing."""
    with pytest.warns(UserWarning, match="label 2 is scored as enhancing"):
        coding = tutorial_coding(CODINGS["decathlon"])
    truth = np.array([0, 1, 2, 3], np.uint8).reshape(4, 1, 1)
    found = Segmentation(regions_from_labels(truth, coding), np.eye(4), coding)
    np.testing.assert_array_equal(found.labels(), truth)
    np.testing.assert_array_equal(found.labels(CODINGS[release]).ravel(), (0, *values))


def test_a_segmentation_carries_the_warnings(scan: np.ndarray, tmp_path: Path) -> None:
    known = ranges([scan_statistics(np.moveaxis(scan, 0, -1).astype(np.float32), np.diag([0.5, 0.5, 0.5, 1.0]))])
    found = Predictor(write_run(tmp_path, scans=known), "cpu").segment(scan, AFFINE)
    assert found.warnings[0].startswith("voxels are up to 2 mm long, in training they were up to 0.5 mm")


def test_one_image_given_as_two_modalities_is_refused(run: Path, scan: np.ndarray, tmp_path: Path) -> None:
    """A file given twice is, by another name too, and so is a copy of it, or an array."""
    predictor = Predictor(run, "cpu")
    t1c, _ = write_scan(tmp_path, scan)
    (tmp_path / "again.nii.gz").symlink_to(t1c)
    shutil.copy(t1c, tmp_path / "copied.nii.gz")
    with pytest.raises(ValueError, match="again.nii.gz is the same file as"):
        predictor.segment([t1c, tmp_path / "again.nii.gz"])
    for images, affine in (([t1c, tmp_path / "copied.nii.gz"], None), (np.stack([scan[0], scan[0]]), AFFINE)):
        with pytest.raises(ValueError, match="t1c and flair are the same image"):
            predictor.segment(images, affine)


@pytest.mark.parametrize("name", ["unet", "unetr"])
@pytest.mark.parametrize("scale", [1e20, 1e38])
def test_weights_that_overflow_are_an_error_not_a_segmentation(
    name: Literal["unet", "unetr"], scale: float, scan: np.ndarray, tmp_path: Path
) -> None:
    """Every voxel was background, for NaN is not above one half."""
    model = ModelConfig(name=name, feature_size=2, hidden_size=8, mlp_dim=8, num_heads=2)
    config = dataclasses.replace(CONFIG, model=model)
    weights = {
        key: value * scale
        for key, value in make_model(config.model, config.data.crop_size_voxels, 2).state_dict().items()
    }
    weights = {key: value.clamp(-3e38, 3e38) for key, value in weights.items()}
    predictor = Predictor(write_run(tmp_path, weights=weights, config=to_dict(config)), "cpu")
    with pytest.raises(ValueError, match="logits of this scan are NaN or infinite, .*best.pt overflows on it"):
        predictor.segment(scan, AFFINE)


def test_an_infinite_logit_is_not_a_probability_of_one(
    run: Path, scan: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(run, "cpu", flips=True)
    for value in (np.inf, -np.inf, np.nan):
        seen: list[tuple[int, ...]] = []

        def logits(
            network: Any, image: torch.Tensor, window: Any, *_: Any, value: float = value, seen: list = seen
        ) -> Any:
            seen.append(tuple(image.shape))
            found = torch.zeros(1, 3, *image.shape[2:])
            if len(seen) == 3:  # in one mirror image of eight, in one voxel
                found[0, 1, 2, 3, 4] = value
            return found

        with monkeypatch.context() as patch:
            patch.setattr(inference, "sliding_window_logits", logits)
            with pytest.raises(ValueError, match="NaN or infinite"):
                predictor.segment(scan, AFFINE)
        assert len(seen) == 8


def test_a_saved_segmentation_says_how_it_was_made(run: Path, scan: np.ndarray, tmp_path: Path) -> None:
    """Of weights, flips and coding each shows; the folder that the weights lie in does not."""
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)

    def saved(run: Path, release: str | None = None, flips: bool = False) -> str:
        Predictor(run, "cpu", flips).segment(scan, AFFINE).save(tmp_path / "out.nii", release)
        return read_description(tmp_path / "out.nii")

    first = saved(run)
    assert first.startswith("glioforge: brats2018 labels, weights ") and saved(copied) == first
    others = {saved(run, "brats2023"), saved(run, flips=True), saved(write_run(tmp_path / "other", seed=1))}
    assert len(others | {first}) == 4 and max(map(len, others)) < 80
    own = dataclasses.replace(CODINGS["decathlon"], tissues={7: "oedema", 8: "enhancing"})
    assert describe(own, "") != describe(CODINGS["decathlon"], "")


def test_a_name_of_another_kind_of_file_or_an_unknown_release_is_refused(
    run: Path, scan: np.ndarray, tmp_path: Path
) -> None:
    found = Predictor(run, "cpu").segment(scan, AFFINE, probabilities=True)
    for name in ("x.nrrd", "x", "x.gz", "nii"):
        for save in (found.save, found.save_probabilities):
            with pytest.raises(ValueError, match=f"{name} must end in .nii.gz, or in .nii"):
                save(tmp_path / name)
    with pytest.raises(ValueError, match="unknown release 'brats2099': choose one of decathlon"):
        found.save(tmp_path / "x.nii", "brats2099")
    assert not list(tmp_path.iterdir())
    found.save(tmp_path / "x.NII.GZ", "brats2023")
    assert (tmp_path / "x.NII.GZ").read_bytes()[:2] == b"\x1f\x8b"
    np.testing.assert_array_equal(read_nifti(tmp_path / "x.NII.GZ")[0], found.labels(CODINGS["brats2023"]))
