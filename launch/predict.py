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

from engine.command import make_writable, run_command
from engine.distributed import Ranks, gather, init_ranks
from engine.inference import Predictor, Prepared, describe
from engine.parser import Parser
from engine.progress import CaseBar
from engine.stages import BatchEnds, in_stages
from launch.inputs import find
from launch.options import add_network_options, in_own_options, naming_own_options
from pipelines.cases import Case
from pipelines.labels import CODINGS, Coding
from pipelines.layouts import CaseError, DataError
from pipelines.nifti import read_description, read_grid
from pipelines.tables import append_row, read_table, write_table
from pipelines.text import printable

log = logging.getLogger("launch.predict")

TABLE = "predictions.csv"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Row:
    """A line of `predictions.csv`."""

    case: str
    seconds: float | None = None
    warnings: str = ""
    error: str = ""


COLUMNS = tuple(Row.__dataclass_fields__)


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
    output: Path = options.output
    failed = [Row(str(path), error=in_own_options(str(error))) for path, error in faults]
    check_outputs(found.cases, output, options.probabilities)
    try:
        make_writable(output)
    except OSError as error:
        raise cannot_write(output, error) from error
    coding = CODINGS[options.release] if options.release else found.coding
    cases, too_long = those_with_names(found.cases, output, options.probabilities)
    failed += too_long
    waiting = left_to_do(cases, output, options.probabilities, options.overwrite, ranks, coding, predictor.made_by)
    kept = len(cases) - len(waiting)
    if kept:
        log.info("%d of %d cases are segmented already and kept (--overwrite replaces them)", kept, len(cases))
    log.info("label coding %s: %s", coding.release, ", ".join(f"{v} {t}" for v, t in coding.tissues.items()))
    own = predict_cases(predictor, waiting, output, coding, options.probabilities, ranks)
    rows = gather(own, ranks, is_patient=True)
    if not ranks.is_first:
        return 0
    for row in (row for part in rows[1:] for row in part if row.warnings):
        log.warning("%s: %s", row.case, row.warnings)
    done = [row for part in rows for row in part]
    segmented = len(done) - sum(bool(row.error) for row in done)
    print(f"{segmented} cases segmented, {kept} kept: {printable(str(output))}")
    for row in (*failed, *(row for row in done if row.error)):
        print(f"failed: {row.error}", file=sys.stderr)
    write_rows(output / TABLE, [*failed, *done])
    return 1 if failed or segmented < len(done) else 0


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


def those_with_names(cases: Sequence[Case], output: Path, probabilities: bool) -> tuple[list[Case], list[Row]]:
    """The cases whose files a folder can hold, and a row for each of the others."""
    most = os.pathconf(output, "PC_NAME_MAX")
    fitting, rows = [], []
    for case in cases:
        longest = max(len(os.fsencode(path.name)) for path in outputs(case, output, probabilities))
        if longest <= most:
            fitting.append(case)
        else:
            error = f"{case.name}: its file would have a name of {longest} bytes, {most} are allowed: rename the case"
            rows.append(Row(case.name, error=error))
    return fitting, rows


def left_to_do(
    cases: Sequence[Case],
    output: Path,
    probabilities: bool,
    overwrite: bool,
    ranks: Ranks,
    coding: Coding,
    made_by: str,
) -> Sequence[Case]:
    """The cases without a segmentation, as the first rank finds them: by the time that another looks, some are done.

    It begins the table, too.

    Raises:
        ValueError: a segmentation that is there is not what is asked for.
    """
    if not ranks.is_first:
        return gather([], ranks)[0]
    waiting: list[Case] = []
    others: list[str] = []
    for case in cases:
        paths = outputs(case, output, probabilities)
        there = [] if overwrite else [path for path in paths if os.path.lexists(path)]
        asked = {path: describe(coding if path is paths[0] else None, made_by) for path in paths}
        others += [f"{path.name} {unlike}" for path in there if (unlike := not_as_asked(path, case, asked[path]))]
        if len(there) < len(paths):
            waiting.append(case)
    if others:
        raise ValueError(
            f"--output {output} holds {len(others)} files that are not what is asked for now: {'; '.join(others[:3])}"
            f"{'; ...' if len(others) > 3 else ''}. Choose another --output, ask for what is there (--runs, --release, "
            "--flips), or replace them with --overwrite"
        )
    write_rows(output / TABLE, [])  # for all ranks to add to, which wait for it here
    return gather(waiting, ranks)[0]


def not_as_asked(path: Path, case: Case, asked: str) -> str:
    """What is other about a segmentation that is there than about that which is asked for; empty where nothing is.

    Args:
        path: of the segmentation. case: whose it should be. asked: what its header should say.
    """
    try:
        said, (shape, affine) = read_description(path), read_grid(path)
    except CaseError as error:
        return f"can't be read ({error.problem})"
    try:
        scan_shape, scan_affine = read_grid(case.images[0])
    except CaseError:
        scan_shape, scan_affine = shape, affine  # no way to compare: what is there was made before
    if shape[:3] != scan_shape[:3] or not np.allclose(affine, scan_affine, atol=1e-3):
        return f"lies on another grid than {case.images[0]}"
    if not said.startswith("glioforge: "):
        return "does not say how it was made"
    return "" if said == asked else f"says {said!r}, and asked for is {asked!r}"


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
        labels, *extra = outputs(case, output, probabilities)
        try:
            if extra:
                segmentation.save_probabilities(extra[0])
            segmentation.save(labels, coding)
            row = Row(case.name, round(time.perf_counter() - started[case.name], 2), "; ".join(segmentation.warnings))
            append_row(output / TABLE, COLUMNS, asdict(row))  # at once, in case that the command is stopped
        except OSError as error:
            if is_lost(output, error):
                raise BatchEnds(str(cannot_write(output, error))) from error
            raise
        return row

    mine = waiting[ranks.rank :: ranks.world_size]
    rows: list[Row] = []
    with CaseBar("Segmenting", len(mine), ranks.is_first) as bar:
        for case, outcome in in_stages(mine, read, lambda _, scan: predictor.probabilities(scan), write):
            error = in_own_options(f"{case.name}: {outcome}")
            rows.append(Row(case.name, error=error) if isinstance(outcome, DataError) else outcome)
            bar.advance()
    return rows


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


def is_lost(output: Path, error: OSError) -> bool:
    """Whether no other case can be written either: a full disk, a folder that is gone or locked."""
    return error.errno in NO_ROOM or not os.access(output, os.W_OK | os.X_OK)


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
    """Take the end of a row out of the table that a full disk or a kill left without its rest."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if content.startswith(",".join(COLUMNS).encode()) and 0 < end < len(content):
        os.truncate(path, end)


if __name__ == "__main__":
    sys.exit(main())
