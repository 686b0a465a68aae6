"""`launch/predict.py` as a user calls it, in this process."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from commands import free_port
from test_trained import content_of

from engine import evaluation, inference, metrics
from engine.config import Config, to_dict
from engine.data import DataConfig
from engine.inference import Predictor, Prepared
from engine.network import ModelConfig, make_model
from engine.ranks.distributed import Ranks
from engine.sliding_window import sliding_window_logits
from engine.weights_file import write_content
from launch import evaluate, predict, score_cases, segment_cases
from pipelines.basics.errors import DataError
from pipelines.basics.tables import read_table
from pipelines.layouts.cases import Case, find_cases
from pipelines.layouts.labels import CODINGS, Coding, regions_from_labels
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.loaders import ValLoader
from pipelines.phantom import make_phantoms
from pipelines.preparing.store import prepare
from pipelines.scans.nifti import RawCase, read_nifti

ROOT = Path(__file__).resolve().parent.parent
CROP = (16, 16, 16)
SPACING = (8.0, 8.0, 8.0)
ORDER = ("flair", "t1", "t1c", "t2")  # of the 4D files


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Decathlon task of three synthetic scans."""
    return make_phantoms(tmp_path_factory.mktemp("scans") / "task", 3, (40, 48, 32), workers=1)


@pytest.fixture(scope="module")
def run(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that validated on one of them, whose logits are wide enough to give masks of some size."""
    return make_run(scans, tmp_path_factory.mktemp("run"), ORDER)


def make_run(scans: Path, folder: Path, modalities: tuple[str, ...], seed: int = 3, scans_known: Any = None) -> Path:
    data = DataConfig(root=scans, crop_size_voxels=CROP, spacing_mm=SPACING, val_cases=["BRATS_002"], pad=True)
    config = Config(data=data, model=ModelConfig(name="unet", feature_size=2))
    torch.manual_seed(seed)
    weights = make_model(config.model, config.data.crop_size_voxels, len(modalities)).state_dict()
    content = content_of(CODINGS["decathlon"], weights=weights, config=to_dict(config), modalities=list(modalities))
    content["scans"] = scans_known or {}
    write_content(folder / "checkpoints" / "best.pt", content)
    return folder


@pytest.fixture(autouse=True)
def one_rank(ranks: Ranks) -> None:
    """The commands take the process group that is there."""


def run_predict(*args: object) -> int:
    return segment_cases.segment_cases(predict.make_parser().parse_args([*map(str, args), "--device", "cpu"]))


def run_evaluate(*args: object) -> int:
    return score_cases.evaluate(evaluate.make_parser().parse_args([*map(str, args), "--device", "cpu"]))


def labels_of(path: Path) -> np.ndarray:
    return np.asarray(read_nifti(path)[0])


def rows_of(output: Path) -> dict[str, dict[str, str]]:
    with (output / "predictions.csv").open() as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def test_each_case_of_a_data_set_is_segmented_on_its_scans_grid(run: Path, scans: Path, tmp_path: Path) -> None:
    assert run_predict("--runs", run, "--input", scans, "--output", tmp_path, "--probabilities") == 0
    predictor = Predictor(run, "cpu")
    for case in find_cases(scans).cases:
        labels, affine = read_nifti(tmp_path / f"{case.name}.nii.gz")
        np.testing.assert_array_equal(labels, predictor.segment(case.images[0]).labels())
        source, expected = read_nifti(case.images[0])
        assert labels.shape == source.shape[:3] and labels.any()
        np.testing.assert_array_equal(affine, expected)
        assert labels_of(tmp_path / f"{case.name}-probabilities.nii.gz").shape == (*labels.shape, 3)
    assert set(rows_of(tmp_path)) == {"BRATS_001", "BRATS_002", "BRATS_003"}


def test_existing_segmentations_are_kept_unless_asked(run: Path, scans: Path, tmp_path: Path) -> None:
    command = ("--runs", run, "--input", scans, "--output", tmp_path)
    Predictor(run, "cpu").segment(scans / "imagesTr" / "BRATS_001.nii.gz").save(tmp_path / "BRATS_001.nii.gz")
    before = (tmp_path / "BRATS_001.nii.gz").stat().st_ino
    assert run_predict(*command) == 0
    assert (tmp_path / "BRATS_001.nii.gz").stat().st_ino == before and "BRATS_001" not in rows_of(tmp_path)
    assert run_predict(*command, "--overwrite") == 0
    assert (tmp_path / "BRATS_001.nii.gz").stat().st_ino != before and "BRATS_001" in rows_of(tmp_path)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("--release", "brats2023"), "BRATS_001.nii.gz says .glioforge: decathlon labels, .* not .*brats2023 labels"),
        (("--flips",), "says .*, not .*, flips'"),
        (("--runs", "other"), "BRATS_001.nii.gz says .*weights .*, not .*weights "),
    ],
)
def test_a_folder_of_other_segmentations_is_refused_before_any_work(
    changed: tuple[str, ...], says: str, run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(scans, tmp_path / "other", ORDER, seed=4)
    images, out = sorted((scans / "imagesTr").glob("*.nii.gz")), tmp_path / "out"
    assert run_predict("--runs", run, "--input", images[0], "--output", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    command = ("--runs", run, "--input", *images, "--output", out, *changed)
    with pytest.raises(ValueError, match=f"holds 1 files that differ from what was requested: .*{says}.*--overwrite"):
        run_predict(*command)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert run_predict(*command, "--overwrite") == 0
    assert len(list(out.glob("*.nii.gz"))) == 3


def test_a_file_of_unknown_origin_or_another_grid_is_refused_as_output(run: Path, scans: Path, tmp_path: Path) -> None:
    image, out = scans / "imagesTr" / "BRATS_001.nii.gz", tmp_path / "out"
    command = ("--runs", run, "--input", image, "--output", out)
    assert run_predict(*command, "--probabilities") == 0
    written = (out / "BRATS_001.nii.gz").read_bytes()
    whole = nib.Nifti1Image.from_bytes(gzip.decompress(written))
    moved = whole.affine + np.diag([0, 0, 0.1, 0])
    probabilities = (out / "BRATS_001-probabilities.nii.gz").read_bytes()
    for array, affine, header, says in (
        (np.asarray(whole.dataobj), whole.affine, None, "does not say how it was made"),
        (np.asarray(whole.dataobj)[1:], whole.affine, whole.header, "is on another grid than .*BRATS_001"),
        (np.asarray(whole.dataobj), moved, whole.header, "is on another grid than .*BRATS_001"),
    ):
        nib.save(nib.Nifti1Image(array, affine, header), out / "BRATS_001.nii.gz")
        with pytest.raises(ValueError, match=says):
            run_predict(*command)
    (out / "BRATS_001.nii.gz").write_bytes(b"notes")
    with pytest.raises(ValueError, match="BRATS_001.nii.gz can't be read .not a NIfTI file"):
        run_predict(*command)
    (out / "BRATS_001.nii.gz").write_bytes(written[: len(written) // 2])
    with pytest.raises(ValueError, match="BRATS_001.nii.gz can't be read .truncated"):
        run_predict(*command)
    (out / "BRATS_001.nii.gz").unlink()
    with pytest.raises(ValueError, match="1 files .*BRATS_001-probabilities.nii.gz says"):
        run_predict(*command, "--probabilities", "--flips")
    assert (out / "BRATS_001-probabilities.nii.gz").read_bytes() == probabilities
    assert run_predict(*command, "--probabilities") == 0 and (out / "BRATS_001.nii.gz").is_file()


@pytest.mark.parametrize(
    ("number", "status", "says"),
    [(signal.SIGINT, 130, "interrupted; the same"), (signal.SIGTERM, 75, "stopped by SIGTERM; the same")],
)
def test_a_stopped_command_leaves_complete_files_and_continues_with_the_rest(
    number: signal.Signals,
    status: int,
    says: str,
    run: Path,
    scans: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The signal comes when the second case is predicted, the first one being written and the third one read."""
    at_work = threading.Barrier(3, timeout=20)
    read, save, probabilities = segment_cases.read_case, inference.write_nifti, Predictor.probabilities
    seen: list[Prepared] = []

    def reading(case: Case, coding: Coding) -> RawCase:
        if case.name == "BRATS_003":
            at_work.wait()
            time.sleep(0.2)
        return read(case, coding)

    def saving(path: Path, *rest: Any) -> None:
        if path.name == "BRATS_001.nii.gz":
            at_work.wait()
            time.sleep(0.2)
        save(path, *rest)

    def predicting(predictor: Predictor, scan: Prepared) -> torch.Tensor:
        seen.append(scan)
        if len(seen) == 2:
            at_work.wait()
            os.kill(os.getpid(), number)
            time.sleep(20)
        return probabilities(predictor, scan)

    command = ["--runs", str(run), "--input", str(scans), "--output", str(tmp_path), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(segment_cases, "read_case", reading)
        patch.setattr(inference, "write_nifti", saving)
        patch.setattr(Predictor, "probabilities", predicting)
        started = time.monotonic()
        assert predict.main(command) == status
    assert time.monotonic() - started < 10 and says in capsys.readouterr().err
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(("read", "finish"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["BRATS_001.nii.gz", "predictions.csv"]
    assert list(rows_of(tmp_path)) == ["BRATS_001"]
    assert labels_of(tmp_path / "BRATS_001.nii.gz").any()
    assert predict.main(command) == 0
    assert f"2 cases segmented, 1 kept: {tmp_path}" in capsys.readouterr().out
    assert list(rows_of(tmp_path)) == ["BRATS_001", "BRATS_002", "BRATS_003"]
    assert (tmp_path / "predictions.csv").read_text().count("\n") == 4


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"id,dice\n1,0.9\n", "has the columns id, dice"),
        (b"\xff\xfe\x00", "is not a UTF-8 table"),
        (b"", "is empty"),
        (b"case,seconds,warnings,error\na,1,,\n\0\0\0\0\n", "predictions.csv, line 3: it holds NUL bytes"),
        (b"case,seconds,warnings,error\na,1,,,,,\n", "predictions.csv, line 2: 7 cells, must be 4"),
        (b"case,seconds,warnings,error\na,1," + b"w" * 131_073 + b",\n", "line 2: field larger than field limit"),
    ],
)
def test_a_table_of_something_else_is_never_replaced(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, fault: str
) -> None:
    (tmp_path / "predictions.csv").write_bytes(content)
    command = ["--runs", str(run), "--input", str(scans), "--output", str(tmp_path), "--device", "cpu"]
    assert predict.main(command) == 2
    told = capsys.readouterr().err
    assert fault in told and "It is not a table of this command (case,seconds,warnings,error)" in told
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [content]


@pytest.mark.parametrize("rest", ["BRATS_002", 'BRATS_002,1.5,"of', "BRATS_002,1.5,,"])
def test_a_row_that_was_cut_off_does_not_stop_the_command(rest: str, run: Path, scans: Path, tmp_path: Path) -> None:
    command = ("--runs", run, "--input", scans, "--output", tmp_path)
    (tmp_path / "predictions.csv").write_text(f"case,seconds,warnings,error\nother,1.5,,\n{rest}", newline="")
    assert run_predict(*command) == 0
    assert sorted(rows_of(tmp_path)) == ["BRATS_001", "BRATS_002", "BRATS_003", "other"]


def test_modalities_may_come_in_another_order(run: Path, scans: Path, tmp_path: Path) -> None:
    source = nib.load(scans / "imagesTr" / "BRATS_001.nii.gz")
    image = np.asarray(source.dataobj)
    expected = Predictor(run, "cpu").segment(scans / "imagesTr" / "BRATS_001.nii.gz").labels()
    turned = tmp_path / "turned.nii.gz"
    nib.save(nib.Nifti1Image(image[..., [3, 2, 1, 0]], source.affine), turned)
    files = [tmp_path / f"case_{name}.nii.gz" for name in ("t2", "t1c", "t1", "flair")]
    for file, channel in zip(files, (3, 2, 1, 0)):
        nib.save(nib.Nifti1Image(image[..., channel], source.affine), file)
    out, order = tmp_path / "out", ("--modalities", "t2", "t1ce", "t1", "flair")
    assert run_predict("--runs", run, "--input", turned, "--output", out, *order) == 0
    assert run_predict("--runs", run, "--input", *files, "--output", out, *order) == 0
    for name in ("turned", "case"):
        np.testing.assert_array_equal(labels_of(out / f"{name}.nii.gz"), expected)
    with pytest.raises(ValueError, match="lacks t1c"):
        run_predict("--runs", run, "--input", turned, "--output", out, "--modalities", "t2", "t1", "flair")


def brats_folder(root: Path, name: str, scans: Path, end: str = "{}") -> Path:
    """A case as a folder of 3D files, without a label."""
    source = nib.load(scans / "imagesTr" / "BRATS_001.nii.gz")
    for channel, modality in enumerate(("t2f", "t1n", "t1c", "t2w")):
        path = root / name / f"{name}-{modality}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(np.asarray(source.dataobj)[..., channel], source.affine), path)
    return root / name


def test_failed_cases_are_named_at_the_end_and_the_others_are_segmented(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / "root"
    for name in ("BraTS-GLI-1", "BraTS-GLI-2", "BraTS-GLI-3"):
        brats_folder(root, name, scans)
    (root / "BraTS-GLI-1" / "BraTS-GLI-1-t1c.nii.gz").unlink()
    (root / "BraTS-GLI-2" / "BraTS-GLI-2-t2w.nii.gz").write_bytes(b"\x1f\x8b damaged")
    assert run_predict("--runs", run, "--input", root, "--output", tmp_path / "out") == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed:")]
    assert len(told) == 2 and "modality t1c is missing" in told[0] and "BraTS-GLI-2-t2w.nii.gz: damaged gzip" in told[1]
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["BraTS-GLI-3.nii.gz"]
    assert "damaged gzip" in rows_of(tmp_path / "out")["BraTS-GLI-2"]["error"]


def test_output_never_overwrites_inputs(run: Path, scans: Path, tmp_path: Path) -> None:
    task = shutil.copytree(scans, tmp_path / "task")
    before = {path: path.read_bytes() for path in task.rglob("*.nii.gz")}
    image = task / "imagesTr" / "BRATS_001.nii.gz"
    for given, folder in ((image, image.parent), (task, task / "labelsTr")):
        with pytest.raises(ValueError, match=r"BRATS_00\d.nii.gz is a file of the data and would be lost"):
            run_predict("--runs", run, "--input", given, "--output", folder, "--overwrite")
    assert {path: path.read_bytes() for path in task.rglob("*.nii.gz")} == before


def listed(folder: Path, image: Path, *names: str) -> Path:
    """A list in which several cases have one image."""
    cases = [{"name": name, "image": str(image)} for name in names]
    (folder / "list.json").write_text(json.dumps({"modalities": ORDER, "cases": cases}))
    return folder / "list.json"


def test_each_case_has_a_segmentation_of_its_own_whatever_its_name(run: Path, scans: Path, tmp_path: Path) -> None:
    image, out = scans / "imagesTr" / "BRATS_001.nii.gz", tmp_path / "out"
    cases = listed(tmp_path, image, "Müller", "Möller", "张")
    assert run_predict("--runs", run, "--input", cases, "--output", out) == 0
    assert {path.name for path in out.glob("*.nii.gz")} == {"Müller.nii.gz", "Möller.nii.gz", "张.nii.gz"}
    with pytest.raises(ValueError, match="cases a b and a_b of --input would both be written to .*a_b.nii.gz"):
        run_predict("--runs", run, "--input", listed(tmp_path, image, "a b", "a_b"), "--output", out)


def test_the_table_has_every_fault_until_it_is_mended(run: Path, scans: Path, tmp_path: Path) -> None:
    """Cases of one list have its path in common, and a fault that is mended leaves no row behind."""
    image = np.asarray(nib.load(scans / "imagesTr" / "BRATS_001.nii.gz").dataobj)
    columns = [f"{modality}.nii" for modality in ORDER]
    for channel, file in enumerate(columns):
        nib.save(nib.Nifti1Image(image[..., channel], np.eye(4)), tmp_path / file)

    def predicted(**cases: list[str]) -> list[tuple[str, bool]]:
        rows = [",".join((name, *files)) for name, files in cases.items()]
        (tmp_path / "list.csv").write_text("\n".join([",".join(("name", *ORDER)), *rows]))
        run_predict("--runs", run, "--input", tmp_path / "list.csv", "--output", tmp_path / "out")
        with (tmp_path / "out" / "predictions.csv").open() as file:
            return [(row["case"], bool(row["error"])) for row in csv.DictReader(file)]

    lacking, listed = [*columns[:3], ""], str(tmp_path / "list.csv")
    assert predicted(a=columns, b=lacking, c=lacking) == [(listed, True), (listed, True), ("a", False)]
    assert predicted(a=columns, b=columns, c=columns) == [("a", False), ("b", False), ("c", False)]


def test_a_4d_file_that_cannot_be_read_leaves_the_others_alone(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(b"\x1f\x8b damaged")
    good = scans / "imagesTr" / "BRATS_001.nii.gz"
    assert run_predict("--runs", run, "--input", damaged, good, "--output", tmp_path / "out") == 1
    assert "failed: " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["BRATS_001.nii.gz"]
    with pytest.raises(ValueError, match="damaged gzip"):
        run_predict("--runs", run, "--input", damaged, "--output", tmp_path / "out")


def test_labels_are_of_the_scans_release_or_of_the_one_asked_for(run: Path, scans: Path, tmp_path: Path) -> None:
    """The network knows Decathlon's values, names of 2023 stand for 1, 2 and 3 in another order."""
    case = brats_folder(tmp_path, "BraTS-GLI-9", scans)
    masks = regions_from_labels(Predictor(run, "cpu").segment(sorted_files(case)).labels(), CODINGS["decathlon"])
    for name, options in (("brats2023", ()), ("brats2018", ("--release", "brats2018"))):
        assert run_predict("--runs", run, "--input", case, "--output", tmp_path / name, *options) == 0
        found = labels_of(tmp_path / name / "BraTS-GLI-9.nii.gz")
        np.testing.assert_array_equal(regions_from_labels(found, CODINGS[name]), masks)
    open_release = tmp_path / "2021" / "case1"
    open_release.mkdir(parents=True)
    for path, end in zip(sorted_files(case), ("flair", "t1", "t1ce", "t2")):
        shutil.copy(path, open_release / f"case1_{end}.nii.gz")
    assert run_predict("--runs", run, "--input", open_release.parent, "--output", tmp_path / "open") == 0
    np.testing.assert_array_equal(
        regions_from_labels(labels_of(tmp_path / "open" / "case1.nii.gz"), CODINGS["decathlon"]), masks
    )


def sorted_files(case: Path) -> list[Path]:
    return [case / f"{case.name}-{modality}.nii.gz" for modality in ("t2f", "t1n", "t1c", "t2w")]


def test_files_that_do_not_make_up_a_case_are_refused(run: Path, scans: Path, tmp_path: Path) -> None:
    case = brats_folder(tmp_path, "BraTS-GLI-1", scans)
    stacked = scans / "imagesTr" / "BRATS_001.nii.gz"
    command = ("--runs", run, "--output", tmp_path / "out", "--input")
    for files in (sorted_files(case)[:1], sorted_files(case)[:3]):
        with pytest.raises(ValueError, match=r"no .*t2 among .*: the network needs flair, t1, t1c, t2"):
            run_predict(*command, *files)
    with pytest.raises(ValueError, match=r"\(3D\): give 4D files with flair, t1, t1c, t2, or the 3D files of one case"):
        run_predict(*command, stacked, *sorted_files(case)[:3])
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 5), np.float32), np.eye(4)), tmp_path / "five.nii")
    with pytest.raises(ValueError, match="five.nii has 5 images on its last axis, and 4 are expected"):
        run_predict(*command, tmp_path / "five.nii")
    with pytest.raises(ValueError, match="cases BraTS-GLI-1 and BraTS-GLI-1 of --input would both be written to"):
        run_predict(*command, case, case)
    with pytest.raises(ValueError, match="a data set has its own"):
        run_predict(*command, case, "--modalities", "t2", "t1", "t1c", "flair")
    (tmp_path / "a_file").write_text("")
    with pytest.raises(ValueError, match="a_file can't be written"):
        run_predict("--runs", run, "--input", case, "--output", tmp_path / "a_file")


def test_a_network_of_one_modality_takes_3d_files_each_a_case(scans: Path, tmp_path: Path) -> None:
    run, output = make_run(scans, tmp_path / "run", ("t1c",)), tmp_path / "out"
    cases = [brats_folder(tmp_path, name, scans) for name in ("BraTS-GLI-1", "BraTS-GLI-2")]
    files = [sorted_files(case)[2] for case in cases]
    damaged = tmp_path / "damaged.nii.gz"
    damaged.write_bytes(files[0].read_bytes()[:1000])
    assert run_predict("--runs", run, "--output", output, "--input", *files, damaged) == 1
    for file in files:
        expected = Predictor(run, "cpu").segment(file).labels()
        np.testing.assert_array_equal(labels_of(output / file.name), expected)
    assert "truncated" in rows_of(output)["damaged"]["error"]
    with pytest.raises(ValueError, match="BRATS_001.nii.gz .4D.: give 3D files, each a case"):
        run_predict("--runs", run, "--output", output, "--input", scans / "imagesTr" / "BRATS_001.nii.gz")


def test_evaluation_on_the_prepared_grid_is_a_validation(run: Path, scans: Path, tmp_path: Path) -> None:
    """Volumes from the store through the validation loader, full and centre crop, give the same counts."""
    cases = find_cases(scans)
    store = prepare(cases, tmp_path / "store", SPACING, workers=1)
    network = Predictor(run, "cpu").members[0].network
    for grid, size in (("prepared", None), ("center_crop", CROP)):
        assert run_evaluate("--runs", run, "--root", scans, "--on", grid, "--output", tmp_path / grid) == 0
        with (tmp_path / grid / "cases.csv").open() as file:
            found = {row["case"]: row for row in csv.DictReader(file)}
        loader = ValLoader(store, store.names, size, LoaderOptions(pad=True), normalise=False)
        for name, image, labels in loader:
            with torch.no_grad():
                masks = metrics.written_regions((sliding_window_logits(network, image, CROP) > 0)[0], cases.coding)
            truth = regions_from_labels(labels[0].numpy(), cases.coding)
            pad = [(mine - theirs) for mine, theirs in zip(truth.shape[1:], store.shape(store.index(name)))]
            counts = metrics.case_dice(name, masks, torch.from_numpy(truth))
            assert [int(found[name][f"voxels_truth_{region}"]) for region in ("TC", "WT", "ET")] == [*counts.truth]
            if max(pad) <= 0:
                predicted = [int(found[name][f"voxels_predicted_{region}"]) for region in ("TC", "WT", "ET")]
                assert predicted == [*counts.predicted]


def test_evaluation_on_the_scans_grid_scores_what_is_predicted(
    run: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of the run's own validation case: against the label's file, by the regions of the file that a user would get."""
    output = tmp_path / "out"
    assert run_evaluate("--runs", run, "--output", output) == 0
    found = json.loads((output / "summary.json").read_text())
    labels = labels_of(scans / "labelsTr" / "BRATS_002.nii.gz").astype(np.uint8)
    written = Predictor(run, "cpu").segment(scans / "imagesTr" / "BRATS_002.nii.gz").labels()
    masks = regions_from_labels(written, CODINGS["decathlon"])
    spacing = np.linalg.norm(read_nifti(scans / "imagesTr" / "BRATS_002.nii.gz")[1][:3, :3], axis=0)
    expected = evaluation.score("BRATS_002", masks, regions_from_labels(labels, CODINGS["decathlon"]), spacing)
    summary = evaluation.summary([expected])
    assert {key: found[key] for key in summary} == summary
    assert found["worst"] == [{"case": "BRATS_002", "dice": expected.dice.mean()}]
    told = capsys.readouterr().out
    assert "HD95" in told and f"tables: {output}" in told


def test_evaluation_names_cases_that_cannot_be_read(run: Path, scans: Path, tmp_path: Path) -> None:
    root = tmp_path / "task"
    shutil.copytree(scans, root)
    (root / "imagesTr" / "BRATS_001.nii.gz").write_bytes(b"")
    assert run_evaluate("--runs", run, "--root", root, "--output", tmp_path / "out") == 1
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["cases"] == 2
    assert run_evaluate("--runs", run, "--root", root, "--cases", "BRATS_003", "--output", tmp_path / "one") == 0


def test_all_ranks_share_what_the_first_finds_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is late finds segmentations that another has just written; its share would be of fewer cases."""
    cases = [Case(name, (tmp_path / f"{name}.nii.gz",), (0,), None) for name in "abc"]
    late = Ranks(1, 2, 1, torch.device("cpu"), 2)
    (tmp_path / "a.nii.gz").touch()

    def left_to_do(ranks: Ranks, overwrite: bool = False) -> Sequence[Case]:
        return segment_cases.left_to_do(
            cases, segment_cases.Output(tmp_path, CODINGS["decathlon"], False, ""), overwrite, ranks
        )

    monkeypatch.setattr(segment_cases, "difference", lambda *_: "")
    monkeypatch.setattr(segment_cases, "gather", lambda value, ranks: [cases, value])
    assert left_to_do(late) == cases and not (tmp_path / "predictions.csv").exists()
    monkeypatch.setattr(segment_cases, "gather", lambda value, ranks: [value])
    first = replace(late, rank=0)
    assert left_to_do(first) == cases[1:] and (tmp_path / "predictions.csv").exists()
    assert left_to_do(first, overwrite=True) == cases


def test_two_ranks_share_the_cases(run: Path, scans: Path, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port())
    command = [*torchrun, str(ROOT / "launch" / "predict.py"), "--runs", str(run), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--input", str(scans), "--output", "out"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "3 cases segmented, 0 kept" in done.stdout and len(list((tmp_path / "out").glob("*.nii.gz"))) == 3


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "failed: BRATS_002: out of memory (MemoryError)"),
        (RuntimeError("could not create a primitive"), "failed: BRATS_002: out of memory (could not create"),
        (ValueError("some strides are negative"), "failed: BRATS_002: some strides are negative"),
        (IndexError("one slice"), "failed: BRATS_002: IndexError: one slice (test_segment_cases.py, line"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "failed: BRATS_002: x: Permission denied"),
    ],
)
@pytest.mark.parametrize("stage", ["prepare", "probabilities", "finish"])
def test_a_failing_case_does_not_stop_the_others(
    error: Exception, says: str, stage: str, run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    calls, work = [], getattr(Predictor, stage)

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise error
        return work(*args)

    monkeypatch.setattr(Predictor, stage, failing)
    command = ["--runs", str(run), "--input", str(scans), "--output", str(tmp_path), "--device", "cpu"]
    assert predict.main(command) == 1
    told = capsys.readouterr()
    assert says in told.err and "2 cases segmented, 0 kept" in told.out and "Traceback" not in told.err
    assert [path.name for path in sorted(tmp_path.glob("*.nii.gz"))] == ["BRATS_001.nii.gz", "BRATS_003.nii.gz"]
    assert rows_of(tmp_path)["BRATS_002"]["error"] and not rows_of(tmp_path)["BRATS_003"]["error"]
    monkeypatch.undo()
    assert predict.main(command) == 0
    assert "1 case segmented, 2 kept" in capsys.readouterr().out and not rows_of(tmp_path)["BRATS_002"]["error"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOENT])
def test_an_error_that_every_case_would_meet_ends_the_batch_and_says_so(
    number: int, run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A full disk, a folder that can't be written to, and (ENOENT) one that is gone."""
    save, output, tried = inference.write_nifti, tmp_path / "out", []

    def saving(path: Path, *rest: Any) -> None:
        tried.append(path.name)
        if len(tried) == 2:
            if number == errno.ENOENT:
                shutil.rmtree(output)
            raise OSError(number, os.strerror(number), str(path))
        save(path, *rest)

    monkeypatch.setattr(inference, "write_nifti", saving)
    cases = listed(tmp_path, scans / "imagesTr" / "BRATS_001.nii.gz", *"abcdef")
    command = ["--runs", str(run), "--input", str(cases), "--output", str(output), "--device", "cpu"]
    assert predict.main(command) == 2
    told = capsys.readouterr().err
    assert f"error: --output {output} can't be written ({os.strerror(number)})" in told and "Traceback" not in told
    assert len(tried) < 4  # the third may be under way
    monkeypatch.undo()
    assert predict.main(command) == 0 and len(list(output.glob("*.nii.gz"))) == 6


def test_a_file_that_is_too_large_is_the_fault_of_one_case(
    run: Path, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = inference.write_nifti

    def saving(path: Path, *rest: Any) -> None:
        if path.name == "BRATS_001.nii.gz":
            raise OSError(errno.EFBIG, "File too large", str(path))
        save(path, *rest)

    monkeypatch.setattr(inference, "write_nifti", saving)
    assert run_predict("--runs", run, "--input", scans, "--output", tmp_path) == 1
    assert len(list(tmp_path.glob("*.nii.gz"))) == 2
    assert "BRATS_001.nii.gz: File too large" in rows_of(tmp_path)["BRATS_001"]["error"]


def test_weights_that_overflow_leave_no_segmentation_and_name_every_case(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(scans, tmp_path / "run", ORDER)
    content = torch.load(run / "checkpoints" / "best.pt", weights_only=True)
    weights = {name: torch.full_like(value, 1e38) for name, value in content["weights"].items()}
    (run / "checkpoints" / "best.pt").unlink()
    write_content(run / "checkpoints" / "best.pt", content | {"weights": weights})
    assert run_predict("--runs", run, "--input", scans, "--output", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert told.count("the logits of this scan are NaN or infinite") == 3
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    with pytest.raises(DataError, match="no case could be read"):
        run_evaluate("--runs", run, "--root", scans, "--output", tmp_path / "scores")
    assert capsys.readouterr().err.count("NaN or infinite") == 3


def test_names_are_written_as_they_are_or_refused_as_too_long(run: Path, scans: Path, tmp_path: Path) -> None:
    """Of 255 bytes that a file's name may have, `.nii.gz` takes 7 and `-probabilities` 14."""
    image, out = scans / "imagesTr" / "BRATS_001.nii.gz", tmp_path / "out"
    files = [tmp_path / os.fsdecode(name) for name in (b"caf\xe9.nii.gz", b"=1+1.nii.gz", b"n" * 241 + b".nii.gz")]
    for file in files:
        shutil.copy(image, file)
    good = tmp_path / "good.nii.gz"
    shutil.copy(image, good)
    command = ("--runs", run, "--input", *files, good, "--output", out, "--probabilities")
    assert run_predict(*command) == 1
    rows = read_table(out / "predictions.csv")
    by_case = {row["case"]: row["error"] for row in rows}
    assert by_case[os.fsdecode(b"caf\xe9")] == by_case["=1+1"] == by_case["good"] == ""
    assert "File name too long; most file systems take names of 255 bytes" in by_case["n" * 241]
    assert {path.name for path in out.glob("*[!s].nii.gz")} == {"caf_.nii.gz", "_1_1.nii.gz", "good.nii.gz"}
    assert b"'=1+1," in (out / "predictions.csv").read_bytes()
    assert run_predict(*command[:-1]) == 0 and (out / f"{'n' * 241}.nii.gz").is_file()
