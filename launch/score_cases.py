"""The work of `launch/evaluate.py`: Dice and HD95 of every case, and tables of them."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jsonargparse import Namespace

from engine import evaluation
from engine.case_batch import run_batch
from engine.data import existing_root, list_cases, split_names
from engine.evaluation import CaseScores
from engine.inference import Predictor, Prepared, Segmentation
from engine.metrics import Score, scored_regions
from engine.ranks.distributed import Ranks, first_on_node, init_ranks
from launch.network_options import GRIDS, with_own_options
from pipelines.basics.atomic import cannot_write, make_subfolder, make_writable
from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.tables import percent, print_table
from pipelines.basics.text import counted, first_few, printable
from pipelines.layouts.cases import Case, CaseSet, survey_cases
from pipelines.layouts.labels import regions_from_labels
from pipelines.scans.geometry import label_grid
from pipelines.scans.nifti import RawCase, read_case
from pipelines.scans.resample import resample_label


def evaluate(options: Namespace) -> int:
    """Score the cases and write the tables; 1 where one could not be read."""
    ranks = init_ranks(options.device)
    if not ranks.is_first:
        logging.getLogger().setLevel(logging.ERROR)
    predictor = Predictor(options.runs, ranks.device, options.flips, options.kernels)
    cases, unusable = first_on_node(lambda: find(options, predictor), ranks)
    folder = make_folder(options, predictor) if ranks.is_first else Path()
    outcomes = score_cases(predictor, cases, options.on, options.score, ranks)
    if not ranks.is_first:
        return 0
    scores = sorted((each for each in outcomes if isinstance(each, CaseScores)), key=lambda case: case.name)
    faults = [*unusable, *(outcome for outcome in outcomes if isinstance(outcome, DataError))]
    for line in warnings_of(scores):
        print(printable(line), file=sys.stderr)
    for fault in faults:
        print(printable(with_own_options(f"skipped: {fault}")), file=sys.stderr)
    if not scores:
        raise DataError("no case could be read: nothing to score")
    runs = [str(member.path) for member in predictor.members]
    data, grid = str(options.root or "the run's validation cases"), GRIDS[options.on]
    found = {"runs": runs, "data": data, "grid": grid, "flips": options.flips}
    found |= evaluation.summary(scores, options.score)
    title = f"{', '.join(runs)} on {data}, {grid}{', with mirror images' if options.flips else ''}"
    evaluation.write(folder, scores, found, title)
    print_table(evaluation.HEAD, evaluation.table_rows(found), f"{counted(len(scores))}, {grid}")
    worst = ", ".join(f"{printable(each['case'])} {percent(each['dice'])}" for each in found["worst"])
    print(f"worst cases by mean Dice: {worst or 'no truth has any region'}\n{found['definition']}.")
    print(f"tables: {printable(str(folder))}")
    return 1 if faults else 0


def warnings_of(cases: Iterable[CaseScores]) -> list[str]:
    """A line for each warning, with the cases that have it."""
    names: dict[str, list[str]] = {}
    for case in cases:
        for warning in case.warnings:
            names.setdefault(warning, []).append(case.name)
    return [f"{first_few(of, 3)}: {warning}" for warning, of in names.items()]


def make_folder(options: Namespace, predictor: Predictor) -> Path:
    """Make the folder of the tables; by default in the run's, with a name for grid, data set and way of predicting.

    Raises:
        ValueError: it can't be written to, or a link leads out of the run's folder.
    """
    parts = ["evaluation", options.on, *([options.root.resolve().name] if options.root else [])]
    parts += [name for name, is_on in (("flips", options.flips), ("masks", options.score == "masks")) if is_on]
    weights = predictor.members[0].path  # in a run's folder, or on their own
    run_dir = weights.parent.parent if weights.parent.name == "checkpoints" else weights.parent
    folder = options.output or run_dir / "-".join(parts)
    try:
        if not options.output:
            make_subfolder(run_dir, folder.name)
        make_writable(folder)
    except OSError as error:
        raise cannot_write(f"the folder of the tables, {folder},", error, "choose another with --output") from error
    return folder


def find(options: Namespace, predictor: Predictor) -> tuple[CaseSet, tuple[CaseError, ...]]:
    """The cases to score, and the faults of those of `--root` that can't be scored.

    Raises:
        ValueError: no case without a fault, or an unknown name; of the run's own cases, any fault, for the split
            depends on all of them.
    """
    own = predictor.members[0].config.data
    faults: tuple[CaseError, ...] = ()
    try:
        if options.root:
            survey = survey_cases(options.root, options.release, predictor.modalities, own.regions)
            cases, faults = survey.usable, survey.faults
            names = options.cases or cases.names
        else:
            settings = replace(own, modalities=list(predictor.modalities))
            cases = list_cases(settings, existing_root(settings))
            names = options.cases or split_names(own, cases)[1]
    except DataError as error:
        needed = f"the network takes {', '.join(predictor.modalities)}"
        raise DataError(f"{error}\n({needed}; --root gives a data set, --release its label coding)") from error
    if not names and not faults:
        raise DataError("the run has no validation cases: give --root")
    return cases.select(names), faults


def score_cases(
    predictor: Predictor, cases: CaseSet, grid: str, scored: Score, ranks: Ranks
) -> list[CaseScores | DataError]:
    """Read, predict and score the cases; the outcomes of all ranks."""
    size = predictor.members[0].config.data.crop_size_voxels

    def read(case: Case) -> tuple[RawCase, Prepared]:
        raw = read_case(case, cases.coding)
        scan = predictor.prepare(raw)
        raw.image = np.empty(0)  # only the label is needed from here on
        if grid == "center_crop":
            x, y, z = centre(scan.image_1CXYZ.shape[2:], size)
            scan = replace(scan, image_1CXYZ=scan.image_1CXYZ[..., x, y, z].contiguous())
        return raw, scan

    def score(case: Case, content: tuple[RawCase, Prepared], found: torch.Tensor) -> CaseScores:
        raw, scan = content
        assert raw.label is not None and raw.label_affine is not None
        if grid == "source":
            segmentation, label = predictor.finish(scan, found), raw.label
        else:
            segmentation = Segmentation((found > 0.5).cpu().numpy(), scan.grid.affine, predictor.coding)
            on = label_grid(scan.grid, raw.label.shape, raw.label_affine, predictor.spacing)
            label = resample_label(raw.label, raw.label_affine, on)
            if grid == "center_crop":
                label = label[centre(label.shape, size)]
        masks = scored_regions(torch.from_numpy(segmentation.masks_as(cases.coding)), cases.coding, scored)
        spacing_mm = np.linalg.norm(segmentation.affine[:3, :3], axis=0).tolist()
        truth = regions_from_labels(label, cases.coding)
        return replace(evaluation.score(case.name, masks.numpy(), truth, spacing_mm), warnings=scan.warnings)

    parts = run_batch("Scoring", cases.cases, ranks, read, lambda content: predictor.probabilities(content[1]), score)
    outcomes = [outcome for part in parts for outcome in part]
    return [DataError(f"{name}: {found}") if isinstance(found, DataError) else found for name, found in outcomes]


def centre(shape: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """The centre crop of MONAI's `CenterSpatialCrop`; an axis that is smaller stays as it is."""
    starts = [max(n // 2 - wanted // 2, 0) for n, wanted in zip(shape, size, strict=True)]
    return tuple(slice(start, min(start + wanted, n)) for start, wanted, n in zip(starts, size, shape, strict=True))
