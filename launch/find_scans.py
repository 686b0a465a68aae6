"""The scans that `launch/predict.py` segments: data sets, folders of cases, and files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.inference import Predictor
from pipelines.basics.errors import CaseError, DataError
from pipelines.cases import Case, CaseSet, survey_cases
from pipelines.layouts.names import canonical_modalities, case_name_of
from pipelines.layouts.order import in_order
from pipelines.scans.nifti import read_grid

Fault = tuple[Path, Exception]
"""A file or folder, and what is wrong with it."""


def find_scans(
    inputs: Sequence[Path], predictor: Predictor, modalities: Sequence[str] | None
) -> tuple[CaseSet, list[Fault]]:
    """The cases to segment, and the faults of those that can't be segmented.

    Their coding is the one that the names of all data sets and folders show, else the network's.

    Raises:
        ValueError: no cases there, or files that do not make up a case.
        OSError: the only folder can't be read.
    """
    files = [path for path in inputs if path.name.lower().endswith((".nii", ".nii.gz")) and not path.is_dir()]
    cases, faults = cases_from_files(files, predictor, modalities)
    codings = [predictor.coding] if files else []
    if modalities and not files:
        raise ValueError("--modalities is for --input files and their 4D axis; a data set has its own: leave it out")
    taken = set(files)
    for root in (path for path in inputs if path not in taken):
        try:
            survey = survey_cases(root, None, predictor.modalities, labelled=False, unlabelled_as=predictor.coding)
        except (DataError, OSError) as error:
            if len(inputs) == 1:
                raise
            faults.append((root, error))
            continue
        cases += survey.usable.cases
        faults += [(fault.path, fault) for fault in survey.faults]
        codings.append(survey.usable.coding)
    coding = codings[0] if codings and all(each == codings[0] for each in codings) else predictor.coding
    return CaseSet(tuple(cases), predictor.modalities, coding), faults


def cases_from_files(
    files: Sequence[Path], predictor: Predictor, modalities: Sequence[str] | None
) -> tuple[list[Case], list[Fault]]:
    """4D files, each a case (3D for a network of one modality), and their faults; or the 3D files of one case."""
    if not files:
        return [], []
    order = canonical_modalities(modalities) if modalities else predictor.modalities
    missing = [name for name in predictor.modalities if name not in order]
    if missing:
        raise ValueError(
            f"--modalities {' '.join(order)} lacks {', '.join(missing)}: the network needs "
            f"{' '.join(predictor.modalities)}"
        )
    shapes: dict[Path, tuple[int, ...]] = {}
    faults: list[Fault] = []
    for path in files:
        try:
            shapes[path] = read_grid(path)[0]
        except CaseError as error:
            faults.append((path, error))
    dimensions = {path: len([n for n in shape[3:] if n > 1]) + 3 for path, shape in shapes.items()}
    alone = len(order) == 1  # the network has one modality
    if alone and set(dimensions.values()) == {3}:
        return [Case(case_name_of([path]), in_order([path], order, modalities), None, None) for path in shapes], faults
    if not alone and set(dimensions.values()) == {4}:
        return [_stacked(path, shape, order, predictor.modalities) for path, shape in shapes.items()], faults
    if faults:
        raise faults[0][1]
    if alone or set(dimensions.values()) != {3}:
        given = ", ".join(f"{path.name} ({count}D)" for path, count in dimensions.items())
        wanted = "3D files, each a case" if alone else f"4D files with {', '.join(order)}, or the 3D files of one case"
        raise ValueError(f"--input {given}: give {wanted}")
    return [Case(case_name_of(files), in_order(files, predictor.modalities, modalities), None, None)], []


def _stacked(path: Path, shape: Sequence[int], order: Sequence[str], needed: Sequence[str]) -> Case:
    if shape[3] != len(order):
        raise ValueError(
            f"--input {path.name} has {shape[3]} images on its last axis, and {len(order)} are expected "
            f"({' '.join(order)}): name what is on it, in order, with --modalities"
        )
    return Case(case_name_of([path]), (path,), tuple(order.index(name) for name in needed), None)
