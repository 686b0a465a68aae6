"""The work of `launch/predict.py`: every case of data sets, folders and files becomes a segmentation in one folder.

It also gets a row of a table there, `predictions.csv`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jsonargparse import Namespace

from engine.case_batch import BatchStopped, fault_message, run_batch
from engine.inference import Predictor, Prepared, describe
from engine.ranks.distributed import Ranks, gather, init_ranks
from launch.network_options import with_own_options
from pipelines.basics.atomic import cannot_write, make_writable
from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.tables import append_row, read_table, write_table
from pipelines.basics.text import counted, first_few, printable
from pipelines.layouts.cases import Case, CaseSet, survey_cases
from pipelines.layouts.labels import CODINGS, Coding
from pipelines.layouts.names import canonical_modalities, case_name_of, in_order
from pipelines.scans.nifti import read_case, read_description, read_grid, read_nifti

log = logging.getLogger(__name__)

TABLE = "predictions.csv"
OR_ELSE = "choose another folder; its files are complete, and the same command continues"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class PredictionRow:
    """A row of `predictions.csv`."""

    case: str
    seconds: float | None = None
    warnings: str = ""
    error: str = ""


COLUMNS = tuple(PredictionRow.__dataclass_fields__)
Fault = tuple[Path, Exception]
"""A file or folder, and what is wrong with it."""


@dataclass(frozen=True)
class Output:
    """What to write: the coding is of the label maps, `made_by` is the predictor's."""

    folder: Path
    coding: Coding
    probabilities: bool
    made_by: str

    def files(self, case: Case) -> dict[Path, str]:
        """The files of a case, the label map first, and what the header of each says."""
        name = re.sub(r"[^\w.-]", "_", case.name)
        files = {self.folder / f"{name}.nii.gz": describe(self.coding, self.made_by)}
        if self.probabilities:
            files[self.folder / f"{name}-probabilities.nii.gz"] = describe(None, self.made_by)
        return files


def segment_cases(options: Namespace) -> int:
    """Segment the cases of `--input`; 1 where one failed."""
    ranks = init_ranks(options.device)
    if not ranks.is_first:
        logging.getLogger().setLevel(logging.ERROR)
    predictor = Predictor(options.runs, ranks.device, options.flips, options.kernels)
    log.info("%s; %s", ", ".join(str(member.path) for member in predictor.members), predictor.kernels_taken)
    found, faults = find_scans(options.input, predictor, options.modalities)
    unreadable = [PredictionRow(str(path), error=with_own_options(fault_message(error))) for path, error in faults]
    coding = CODINGS[options.release] if options.release else found.coding
    output = Output(options.output, coding, options.probabilities, predictor.made_by)
    check_outputs(found.cases, output)
    try:
        make_writable(output.folder)
    except OSError as error:
        raise cannot_write(f"--output {output.folder}", error, OR_ELSE) from error
    waiting = left_to_do(found.cases, output, options.overwrite, ranks)
    kept = len(found.cases) - len(waiting)
    if kept:
        log.info("%d of %d cases are segmented already and kept (--overwrite replaces them)", kept, len(found.cases))
    log.info("label coding %s: %s", coding.release, ", ".join(f"{v} {t}" for v, t in coding.tissues.items()))
    rows = predict_cases(predictor, waiting, output, ranks)
    if not ranks.is_first:
        return 0
    for row in (row for part in rows[1:] for row in part if row.warnings):
        log.warning("%s: %s", row.case, row.warnings)
    done = [*unreadable, *(row for part in rows for row in part)]
    failed = [row for row in done if row.error]
    print(f"{counted(len(done) - len(failed))} segmented, {kept} kept: {printable(str(output.folder))}")
    for row in failed:
        print(f"failed: {row.error}", file=sys.stderr)
    write_rows(output.folder / TABLE, done)
    return 1 if failed else 0


def check_outputs(cases: Sequence[Case], output: Output) -> None:
    """Refuse segmentations that would overwrite a scan, a label or each other; ValueError names the file."""
    given = {path.resolve() for case in cases for path in (*case.images, case.label) if path}
    case_of: dict[Path, str] = {}
    for case in cases:
        for path in output.files(case):
            if path.resolve() in given:
                raise ValueError(
                    f"--output {output.folder}: {path} is a file of the data and would be lost; choose another folder"
                )
            if path in case_of:
                raise ValueError(
                    f"cases {case_of[path]} and {case.name} of --input would both be written to {path}: predict them "
                    "separately, or rename one"
                )
            case_of[path] = case.name


def left_to_do(cases: Sequence[Case], output: Output, overwrite: bool, ranks: Ranks) -> Sequence[Case]:
    """The cases without a segmentation, as the first rank finds them: when another one looks, some may be done.

    The first rank also starts the table.

    Raises:
        ValueError: a segmentation that exists is not what was requested.
    """
    if not ranks.is_first:
        return gather([], ranks)[0]
    waiting, others = [], []
    for case in cases:
        files = output.files(case)
        there = [] if overwrite else [path for path in files if os.path.lexists(path)]
        others += [f"{path.name} {how}" for path in there if (how := difference(path, case, files[path]))]
        if len(there) < len(files):
            waiting.append(case)
    if others:
        raise ValueError(
            f"--output {output.folder} holds {len(others)} files that differ from what was requested: "
            f"{first_few(others, 3)}. Choose another --output, request what is there (--runs, --release, --flips), or "
            "replace them with --overwrite"
        )
    write_rows(output.folder / TABLE, [])  # for all ranks to add to, which wait for it here
    return gather(waiting, ranks)[0]


def difference(path: Path, case: Case, asked: str) -> str:
    """How an existing segmentation of a case differs from one whose header is as asked; empty if it does not."""
    try:
        said, (array, affine) = read_description(path), read_nifti(path)  # whole: a copy may have been cut off
    except CaseError as error:
        return f"can't be read ({error.problem})"
    try:
        scan_shape, scan_affine = read_grid(case.images[0])
    except CaseError:
        scan_shape, scan_affine = array.shape, affine  # nothing to compare with; reading the case will report it
    if array.shape[:3] != scan_shape[:3] or not np.allclose(affine, scan_affine, atol=1e-3):
        return f"is on another grid than {case.images[0]}"
    if not said.startswith("glioforge: "):
        return "does not say how it was made"
    return "" if said == asked else f"says {said!r}, not {asked!r}"


def predict_cases(
    predictor: Predictor, waiting: Sequence[Case], output: Output, ranks: Ranks
) -> list[list[PredictionRow]]:
    """Read, predict and write the cases; the rows of every rank."""
    started: dict[str, float] = {}

    def read(case: Case) -> Prepared:
        started[case.name] = time.perf_counter()
        return predictor.prepare(read_case(replace(case, label=None), predictor.coding))

    def write(case: Case, scan: Prepared, found: torch.Tensor) -> PredictionRow:
        segmentation = predictor.finish(scan, found, output.probabilities, case.images[0])
        for warning in segmentation.warnings:
            log.warning("%s: %s", case.name, warning)
        labels, *extra = output.files(case)
        try:
            if extra:
                segmentation.save_probabilities(extra[0])
            segmentation.save(labels, output.coding)
            seconds = round(time.perf_counter() - started[case.name], 2)
            row = PredictionRow(case.name, seconds, "; ".join(segmentation.warnings))
            append_row(output.folder / TABLE, COLUMNS, asdict(row))  # at once, in case the command is stopped
        except OSError as error:
            if error.errno in NO_ROOM or not os.access(output.folder, os.W_OK | os.X_OK):  # for other cases too
                raise BatchStopped(str(cannot_write(f"--output {output.folder}", error, OR_ELSE))) from error
            raise
        return row

    def row(name: str, found: PredictionRow | DataError) -> PredictionRow:
        return (
            found
            if isinstance(found, PredictionRow)
            else PredictionRow(name, error=with_own_options(f"{name}: {found}"))
        )

    parts = run_batch("Segmenting", waiting, ranks, read, predictor.probabilities, write)
    return [[row(*outcome) for outcome in part] for part in parts]


def write_rows(path: Path, rows: Sequence[PredictionRow]) -> None:
    """Update the table; rows of other segmentations stay, faults of earlier commands go.

    Raises:
        ValueError: a file of that name is another table, not a table, or damaged.
    """
    known: dict[str, dict] = {}
    if os.path.lexists(path):
        try:
            content = path.read_bytes()
            end = content.rfind(b"\n") + 1
            if content.startswith(",".join(COLUMNS).encode()) and 0 < end < len(content):
                os.truncate(path, end)  # a full disk or a kill cut off the last row
            known = {row["case"]: row for row in read_table(path, COLUMNS) if not row["error"]}
        except ValueError as error:
            raise ValueError(
                f"{error}. It is not a table of this command ({','.join(COLUMNS)}) and would be lost: move it, or "
                "choose another --output"
            ) from error
    for row in rows:
        known.pop(row.case, None)
    write_table(path, COLUMNS, sorted([*known.values(), *map(asdict, rows)], key=lambda row: row["case"]))


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
        raise ValueError("--modalities is for --input files and their 4D axis; a data set has its own: omit it")
    for root in (path for path in inputs if path not in files):
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
    found = set(dimensions.values())
    alone = len(order) == 1  # the network has one modality
    if alone and found == {3}:
        return [Case(case_name_of([path]), in_order([path], order, modalities), None, None) for path in shapes], faults
    if not alone and found == {4}:
        return [_stacked(path, shape, order, predictor.modalities) for path, shape in shapes.items()], faults
    if faults:
        raise faults[0][1]
    if alone or found != {3}:
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
