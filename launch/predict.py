"""Segment scans with a trained network, or with the average of several.

python launch/predict.py --runs runs/RUN --input SCANS --output SEGMENTATIONS
deepspeed launch/predict.py --runs runs/A runs/B --input SCANS --output SEGMENTATIONS --flips    all GPUs, an ensemble

SCANS is a data set as for training (a Decathlon task, BraTS folders, a list), folders of cases, a case's files (one
for each modality), or 4D files; for a network of one modality, 3D files. Each case becomes `<case>.nii.gz` on the
scan's own grid. What is there already is kept, so a run that was stopped goes on by the same command.
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  before the imports below, which take seconds

import csv
import logging
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jsonargparse import Namespace

from engine.command import make_writable, run_command
from engine.distributed import Ranks, gather, init_ranks
from engine.inference import Predictor, Prepared, in_stages
from engine.parser import Parser
from engine.progress import CaseBar
from launch.options import add_network_options
from pipelines.atomic import replacing
from pipelines.cases import Case, CaseSet, survey_cases
from pipelines.labels import CODINGS, Coding
from pipelines.layouts import CaseError, DataError, canonical_modalities
from pipelines.nifti import read_grid

log = logging.getLogger("launch.predict")

TABLE = "predictions.csv"


@dataclass(frozen=True)
class Row:
    """A line of `predictions.csv`."""

    case: str
    seconds: float | None = None
    warnings: str = ""
    error: str = ""


def main(args: list[str] | None = None) -> int:
    """Parse the command line and predict.

    Returns:
        exit status: 0, 1 where a case failed, 2 for a user's mistake, 75 or 130 when stopped.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run_command(
        lambda: predict(make_parser().parse_args(args)), lambda: "the same command goes on with the cases that are left"
    )


def make_parser() -> Parser:
    """The options of this command."""
    parser = Parser("Segment scans with a trained network, or the average of several.")
    add_network_options(parser)
    parser.add_argument(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        help="A data set, case folders, a case's files (one for each modality), or 4D files.",
    )
    parser.add_argument("--output", type=Path, required=True, help="Folder for <case>.nii.gz.")
    parser.add_argument(
        "--modalities",
        type=str,
        nargs="+",
        help="What the files of --input are, in their order, or what is on a 4D file's last axis; needed where that is "
        "not the network's own order.",
    )
    parser.add_argument(
        "--release",
        choices=sorted(CODINGS),
        help="Label coding to write; by default that of the release that names in one data set or case folder tell, "
        "else, and for files, that of the network's training data.",
    )
    parser.add_argument(
        "--probabilities", action="store_true", help="Write <case>-probabilities.nii.gz (TC, WT, ET) too."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace segmentations that are there already.")
    return parser


def predict(options: Namespace) -> int:
    """Segment what is asked for; 1 where a case failed."""
    ranks = init_ranks(options.device)
    if not ranks.is_first:
        logging.getLogger().setLevel(logging.ERROR)
    predictor = Predictor(options.runs, ranks.device, options.flips, options.kernels)
    log.info("%s; %s", ", ".join(str(member.path) for member in predictor.members), predictor.kernels_taken)
    cases, faults = find(options.input, predictor, options.modalities)
    output: Path = options.output
    check_outputs(cases.cases, output, options.probabilities)
    try:
        make_writable(output)
    except OSError as error:
        raise cannot_write(output, error) from error
    if ranks.is_first:
        write_rows(output / TABLE, [])  # for all ranks to add to
    waiting = left_to_do(cases.cases, output, options.probabilities, options.overwrite, ranks)
    kept = len(cases.cases) - len(waiting)
    if kept:
        log.info("%d of %d cases are segmented already and kept (--overwrite replaces them)", kept, len(cases.cases))
    coding = CODINGS[options.release] if options.release else cases.coding
    log.info("label coding %s: %s", coding.release, ", ".join(f"{v} {t}" for v, t in coding.tissues.items()))
    own = predict_cases(predictor, waiting, output, coding, options.probabilities, ranks)
    rows = gather(own, ranks, is_patient=True)
    if not ranks.is_first:
        return 0
    for row in (row for part in rows[1:] for row in part if row.warnings):
        log.warning("%s: %s", row.case, row.warnings)
    done = [row for part in rows for row in part]
    failed = [*(Row(str(fault.path), error=str(fault)) for fault in faults), *(row for row in done if row.error)]
    write_rows(output / TABLE, [*done, *(row for row in failed if row not in done)])
    print(f"{len(done) - sum(bool(row.error) for row in done)} cases segmented, {kept} kept: {output}")
    for row in failed:
        print(f"failed: {row.error}", file=sys.stderr)
    return 1 if failed else 0


def check_outputs(cases: Sequence[Case], output: Path, probabilities: bool) -> None:
    """Refuse segmentations that would take the place of a scan, of a label or of each other.

    Raises:
        ValueError: naming the file.
    """
    given = {path.resolve() for case in cases for path in (*case.images, case.label) if path}
    case_of: dict[Path, str] = {}
    for case in cases:
        for path in outputs(case, output, probabilities):
            if path.resolve() in given:
                raise ValueError(
                    f"--output {output}: {path} is a file of the data and would be lost; choose another folder"
                )
            if path in case_of:
                raise ValueError(
                    f"cases {case_of[path]} and {case.name} of --input would both be written to {path}: predict them "
                    "separately, or rename one"
                )
            case_of[path] = case.name


def left_to_do(
    cases: Sequence[Case], output: Path, probabilities: bool, overwrite: bool, ranks: Ranks
) -> Sequence[Case]:
    """The cases without a segmentation, as the first rank finds them: by the time that another looks, some are done."""
    waiting = [case for case in cases if overwrite or not all(map(Path.is_file, outputs(case, output, probabilities)))]
    return gather(waiting, ranks)[0]


def predict_cases(
    predictor: Predictor, waiting: Sequence[Case], output: Path, coding: Coding, probabilities: bool, ranks: Ranks
) -> list[Row]:
    """This rank's share of the cases, read, predicted and written side by side."""
    started: dict[str, float] = {}

    def read(case: Case) -> Prepared:
        started[case.name] = time.perf_counter()
        return predictor.prepare(predictor.read(replace(case, label=None)))

    def write(case: Case, scan: Prepared, found: torch.Tensor) -> Row:
        segmentation = predictor.finish(scan, found, probabilities, case.images[0])
        for warning in segmentation.warnings:
            log.warning("%s: %s", case.name, warning)
        try:
            labels, *extra = outputs(case, output, probabilities)
            if extra:
                segmentation.save_probabilities(extra[0])
            segmentation.save(labels, coding)
            row = Row(case.name, round(time.perf_counter() - started[case.name], 2), "; ".join(segmentation.warnings))
            with (output / TABLE).open("a", newline="") as file:  # at once, in case that the command is stopped
                csv.DictWriter(file, Row.__dataclass_fields__).writerow(asdict(row))
        except OSError as error:
            raise cannot_write(output, error) from error
        return row

    mine = waiting[ranks.rank :: ranks.world_size]
    rows: list[Row] = []
    with CaseBar("Segmenting", len(mine), ranks.is_first) as bar:
        for case, outcome in in_stages(mine, read, lambda _, scan: predictor.probabilities(scan), write):
            rows.append(Row(case.name, error=f"{case.name}: {outcome}") if isinstance(outcome, DataError) else outcome)
            bar.advance()
    return rows


def find(
    inputs: Sequence[Path], predictor: Predictor, modalities: Sequence[str] | None
) -> tuple[CaseSet, list[CaseError]]:
    """The cases to segment, and the faults of those that can't be.

    Raises:
        ValueError: nothing there, files that make up no case.
    """
    files = [path for path in inputs if path.name.lower().endswith((".nii", ".nii.gz"))]
    cases, faults = files_as_cases(files, predictor, modalities)
    coding = predictor.coding
    if modalities and not files:
        raise ValueError("--modalities names the files or the 4D axis of --input files; a data set says it by itself")
    for root in (path for path in inputs if path not in files):
        survey = survey_cases(root, None, predictor.modalities, labelled=False, unlabelled_as=predictor.coding)
        cases += survey.usable.cases
        faults += survey.faults
        coding = survey.usable.coding if len(inputs) == 1 else coding
    return CaseSet(tuple(cases), predictor.modalities, coding), faults


def files_as_cases(
    files: Sequence[Path], predictor: Predictor, modalities: Sequence[str] | None
) -> tuple[list[Case], list[CaseError]]:
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
    wanted = [order.index(name) for name in predictor.modalities]
    shapes: dict[Path, tuple[int, ...]] = {}
    faults: list[CaseError] = []
    for path in files:
        try:
            shapes[path] = read_grid(path)[0]
        except CaseError as error:
            faults.append(error)
    dimensions = {path: len([n for n in shape[3:] if n > 1]) + 3 for path, shape in shapes.items()}
    alone = len(order) == 1  # the network has one modality
    if set(dimensions.values()) == {3 if alone else 4}:
        for path, shape in shapes.items():
            if not alone and shape[3] != len(order):
                raise ValueError(
                    f"--input {path.name} has {shape[3]} images on its last axis, and {len(order)} are expected "
                    f"({' '.join(order)}): name what is on it, in order, with --modalities"
                )
        return [Case(stem(path), (path,), None if alone else tuple(wanted), None) for path in shapes], faults
    if faults:
        raise faults[0]
    if set(dimensions.values()) != {3} or len(files) != len(order):
        given = ", ".join(f"{path.name} ({count}D)" for path, count in dimensions.items())
        if alone:
            raise ValueError(f"--input {given}: give 3D files, each a case")
        raise ValueError(
            f"--input {given}: give 4D files with {len(order)} modalities ({', '.join(order)}), or the "
            f"{len(order)} 3D files of one case, in this order"
        )
    prefix = os.path.commonprefix([stem(path) for path in files])
    name = re.sub(r"(^|[-_. ]+)(t1?)?$", "", prefix, flags=re.IGNORECASE)
    return [Case(name or files[0].resolve().parent.name, tuple(files[i] for i in wanted), None, None)], []


def stem(path: Path) -> str:
    """A file's name without `.nii` or `.nii.gz`."""
    return path.name[: path.name.lower().rindex(".nii")]


def outputs(case: Case, output: Path, probabilities: bool) -> list[Path]:
    """The files of a case, the label map first."""
    name = re.sub(r"[^\w.-]", "_", case.name)
    return [output / f"{name}{end}.nii.gz" for end in ("", *(["-probabilities"] if probabilities else []))]


def cannot_write(output: Path, error: OSError) -> ValueError:
    """The user's words for it."""
    return ValueError(
        f"--output {output} can't be written ({error.strerror}): free space or change its permissions, or choose "
        "another folder; what is there is whole, and the same command goes on"
    )


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Bring the table up to date; rows of other segmentations stay, and faults of earlier commands go.

    Raises:
        ValueError: a file of that name is another table, or none.
    """
    columns = list(Row.__dataclass_fields__)
    known: dict[str, dict] = {}
    if path.is_file():
        with path.open(newline="", errors="replace") as file:
            table = csv.DictReader(file)
            if table.fieldnames != columns:
                raise ValueError(
                    f"{path} is not a table of this command ({','.join(columns)}) and would be lost: move it, or "
                    "choose another --output"
                )
            known = {row["case"]: row for row in table if not row["error"]}
    for row in rows:
        known.pop(row.case, None)
    with replacing(path) as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(sorted([*known.values(), *map(asdict, rows)], key=lambda row: row["case"]))


if __name__ == "__main__":
    sys.exit(main())
