"""Segment scans with a trained network, or with the average of several.

python launch/predict.py --runs runs/RUN --input SCANS --output SEGMENTATIONS
deepspeed launch/predict.py --runs runs/A runs/B --input SCANS --output SEGMENTATIONS --flips    all GPUs, an ensemble

SCANS is a data set as for training (a Decathlon task, BraTS folders, a list), folders of cases, a case's files (one
for each modality), or 4D files; for a network of one modality, 3D files. Each case becomes `<case>.nii.gz` on the
scan's own grid. What is there already is kept, so a run that was stopped goes on by the same command. A segmentation
says in its header which label coding it has and which weights found it; where that is not what is asked for now, the
command stops before it begins, for a folder of several codings can't be told apart by its files' names.
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  before the imports below, which take seconds

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

from engine.inference import Predictor, Prepared, describe
from engine.parser import Parser
from engine.ranks.command import run_command
from engine.ranks.distributed import Ranks, gather, init_ranks
from engine.stages import BatchEnds, in_stages, in_words
from launch.inputs import find
from launch.options import add_network_options, in_own_options, naming_own_options
from pipelines.basics.atomic import cannot_write, make_writable
from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.progress_bar import show_progress
from pipelines.basics.tables import append_row, read_table, write_table
from pipelines.basics.text import first_few, printable
from pipelines.cases import Case
from pipelines.labels import CODINGS, Coding
from pipelines.scans.nifti import read_description, read_grid, read_nifti

log = logging.getLogger("launch.predict")

TABLE = "predictions.csv"
OR_ELSE = "choose another folder; what is there is whole, and the same command goes on"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Row:
    """A line of `predictions.csv`."""

    case: str
    seconds: float | None = None
    warnings: str = ""
    error: str = ""


COLUMNS = tuple(Row.__dataclass_fields__)


@dataclass(frozen=True)
class Output:
    """What is to be written.

    Attributes:
        folder: of all files. coding: of the label maps. probabilities: whether they are written too.
        made_by: what the segmentations are found by, see `Predictor.made_by`.
    """

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


def main(args: list[str] | None = None) -> int:
    """Parse the command line and predict.

    Returns:
        exit status: 0, 1 where a case failed, 2 for a user's mistake, 75 or 130 when stopped.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> int:
        options = make_parser().parse_args(args)
        return naming_own_options(lambda: predict(options))

    return run_command(work, lambda: "the same command goes on with the cases that are left")


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
        help="What the files of --input are, in their order, or what is on a 4D file's last axis; needed where the "
        "files' names do not tell and that is not the network's own order.",
    )
    parser.add_argument(
        "--release",
        choices=sorted(CODINGS),
        help="Label coding to write; by default that of the release that names of data sets and case folders tell, all "
        "the same; else, and for files, that of the network's training data.",
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
    found, faults = find(options.input, predictor, options.modalities)
    failed = [Row(str(path), error=in_own_options(in_words(error))) for path, error in faults]
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
    own = predict_cases(predictor, waiting, output, ranks)
    rows = gather(own, ranks, is_patient=True)
    if not ranks.is_first:
        return 0
    for row in (row for part in rows[1:] for row in part if row.warnings):
        log.warning("%s: %s", row.case, row.warnings)
    done = [row for part in rows for row in part]
    segmented = len(done) - sum(bool(row.error) for row in done)
    print(f"{segmented} cases segmented, {kept} kept: {printable(str(output.folder))}")
    for row in (*failed, *(row for row in done if row.error)):
        print(f"failed: {row.error}", file=sys.stderr)
    write_rows(output.folder / TABLE, [*failed, *done])
    return 1 if failed or segmented < len(done) else 0


def check_outputs(cases: Sequence[Case], output: Output) -> None:
    """Refuse segmentations that would take the place of a scan, of a label or of each other.

    Raises:
        ValueError: naming the file.
    """
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
    """The cases without a segmentation, as the first rank finds them: by the time another one looks, some are done.

    The first rank also begins the table.

    Raises:
        ValueError: a segmentation that exists is not what is asked for.
    """
    if not ranks.is_first:
        return gather([], ranks)[0]
    waiting: list[Case] = []
    others: list[str] = []
    for case in cases:
        files = output.files(case)
        there = [] if overwrite else [path for path in files if os.path.lexists(path)]
        others += [f"{path.name} {unlike}" for path in there if (unlike := not_as_asked(path, case, files[path]))]
        if len(there) < len(files):
            waiting.append(case)
    if others:
        raise ValueError(
            f"--output {output.folder} holds {len(others)} files that are not what is asked for now: "
            f"{first_few(others, 3)}. Choose another --output, ask for what is there (--runs, --release, --flips), or "
            "replace them with --overwrite"
        )
    write_rows(output.folder / TABLE, [])  # for all ranks to add to, which wait for it here
    return gather(waiting, ranks)[0]


def not_as_asked(path: Path, case: Case, asked: str) -> str:
    """How a file that exists differs from what is asked for, in words; empty where it does not.

    Args:
        path: of the segmentation. case: the case it should be of. asked: what its header should say.
    """
    try:
        said, (array, affine) = read_description(path), read_nifti(path)  # whole: a copy may have been cut off
    except CaseError as error:
        return f"can't be read ({error.problem})"
    try:
        scan_shape, scan_affine = read_grid(case.images[0])
    except CaseError:
        scan_shape, scan_affine = array.shape, affine  # the scan has become unreadable since: nothing to compare with
    if array.shape[:3] != scan_shape[:3] or not np.allclose(affine, scan_affine, atol=1e-3):
        return f"lies on another grid than {case.images[0]}"
    if not said.startswith("glioforge: "):
        return "does not say how it was made"
    return "" if said == asked else f"says {said!r}, not {asked!r}"


def predict_cases(predictor: Predictor, waiting: Sequence[Case], output: Output, ranks: Ranks) -> list[Row]:
    """This rank's share of the cases, read, predicted and written side by side."""
    started: dict[str, float] = {}

    def read(case: Case) -> Prepared:
        started[case.name] = time.perf_counter()
        return predictor.prepare(predictor.read(replace(case, label=None)))

    def write(case: Case, scan: Prepared, found: torch.Tensor) -> Row:
        segmentation = predictor.finish(scan, found, output.probabilities, case.images[0])
        for warning in segmentation.warnings:
            log.warning("%s: %s", case.name, warning)
        labels, *extra = output.files(case)
        try:
            if extra:
                segmentation.save_probabilities(extra[0])
            segmentation.save(labels, output.coding)
            row = Row(case.name, round(time.perf_counter() - started[case.name], 2), "; ".join(segmentation.warnings))
            append_row(output.folder / TABLE, COLUMNS, asdict(row))  # at once, in case the command is stopped
        except OSError as error:
            if is_lost(output.folder, error):
                raise BatchEnds(str(cannot_write(f"--output {output.folder}", error, OR_ELSE))) from error
            raise
        return row

    mine = waiting[ranks.rank :: ranks.world_size]
    rows: list[Row] = []
    found = in_stages(mine, read, lambda _, scan: predictor.probabilities(scan), write)
    for case, outcome in show_progress(found, "Segmenting", len(mine), is_shown=ranks.is_first):
        if isinstance(outcome, DataError):
            outcome = Row(case.name, error=in_own_options(f"{case.name}: {outcome}"))
        rows.append(outcome)
    return rows


def is_lost(folder: Path, error: OSError) -> bool:
    """Whether no other case can be written either: a full disk, a folder that is gone or locked."""
    return error.errno in NO_ROOM or not os.access(folder, os.W_OK | os.X_OK)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Bring the table up to date; rows of other segmentations stay, and faults of earlier commands go.

    Raises:
        ValueError: a file of that name is another table, none, or damaged.
    """
    known: dict[str, dict] = {}
    if os.path.lexists(path):
        try:
            drop_cut_off_row(path)
            known = {row["case"]: row for row in read_table(path, COLUMNS) if not row["error"]}
        except ValueError as error:
            raise ValueError(
                f"{error}. It is not a table of this command ({','.join(COLUMNS)}) and would be lost: move it, or "
                "choose another --output"
            ) from error
    for row in rows:
        known.pop(row.case, None)
    write_table(path, COLUMNS, sorted([*known.values(), *map(asdict, rows)], key=lambda row: row["case"]))


def drop_cut_off_row(path: Path) -> None:
    """Remove the incomplete last row that a full disk or a kill left in the table."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if content.startswith(",".join(COLUMNS).encode()) and 0 < end < len(content):
        os.truncate(path, end)


if __name__ == "__main__":
    sys.exit(main())
