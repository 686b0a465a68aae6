"""Score a trained network, or the average of several, on scans with labels.

python launch/evaluate.py --runs runs/RUN                           its own validation cases
python launch/evaluate.py --runs runs/A runs/B --root SCANS         all cases of a data set, an ensemble
deepspeed launch/evaluate.py --runs runs/RUN --root SCANS           on all GPUs

Dice and HD95 of TC, WT and ET, on the scans' own grid: probabilities are resampled to it, and scored against the label
as its file has it. `--on prepared` scores on the grid that the network sees, `--on center_crop` the published
tutorial's centre crop of it. What is scored is what `launch/predict.py` writes: the regions of the label map, in which
ET is within TC and TC within WT. `--score masks` scores the network's three masks, which overlap as they like.
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  before the imports below, which take seconds

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jsonargparse import Namespace

from engine import evaluation
from engine.data import existing_root, list_cases, split_names
from engine.evaluation import CaseScores
from engine.inference import Predictor, Prepared, Segmentation
from engine.metrics import SCORED, Score, scored_regions
from engine.parser import Parser
from engine.ranks.command import run_command
from engine.ranks.distributed import Ranks, first_on_node, gather, init_ranks
from engine.reports.formats import percent, print_table
from engine.stages import in_stages
from launch.options import add_network_options, in_own_options, naming_own_options
from pipelines.basics.atomic import cannot_write, make_writable, own_folder
from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.progress_bar import show_progress
from pipelines.basics.text import first_few, printable
from pipelines.cases import Case, CaseSet, survey_cases
from pipelines.geometry import label_grid
from pipelines.labels import CODINGS, regions_from_labels
from pipelines.resample import resample_label
from pipelines.scans.nifti import RawCase, read_case

NAMED = 3  # cases of a warning that has more
GRIDS = {
    "source": "the scans' own grid",
    "prepared": "the prepared grid",
    "center_crop": "the centre crop of the prepared grid",
}


def main(args: list[str] | None = None) -> int:
    """Parse the command line and evaluate.

    Returns:
        exit status: 0, 1 where a case can't be read, 2 for a user's mistake, 75 or 130 when stopped.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> int:
        options = make_parser().parse_args(args)
        return naming_own_options(lambda: evaluate(options))

    return run_command(work, lambda: "nothing is kept of it: start again")


def make_parser() -> Parser:
    """The options of this command."""
    parser = Parser("Score a trained network, or the average of several, on scans with labels.")
    add_network_options(parser)
    parser.add_argument("--root", type=Path, help="A data set, all cases of it; without, the run's validation cases.")
    parser.add_argument("--release", choices=sorted(CODINGS), help="Label coding of --root, where names leave it open.")
    parser.add_argument("--cases", type=str, nargs="+", help="These cases alone.")
    parser.add_argument(
        "--on", choices=list(GRIDS), default="source", help="; ".join(f"{k}: {v}" for k, v in GRIDS.items())
    )
    scored = "label_map: what is written, ET within TC within WT; masks: the network's masks, as they overlap"
    parser.add_argument("--score", choices=list(SCORED), default="label_map", help=scored)
    parser.add_argument(
        "--output",
        type=Path,
        help="Folder of the tables; by default evaluation-GRID[-ROOT][-flips][-masks] in the run's.",
    )
    return parser


def evaluate(options: Namespace) -> int:
    """Score, print and write; 1 where a case could not be read."""
    ranks = init_ranks(options.device)
    if not ranks.is_first:
        logging.getLogger().setLevel(logging.ERROR)
    predictor = Predictor(options.runs, ranks.device, options.flips, options.kernels)
    folder = options.output or default_folder(options, predictor)
    cases, unusable = first_on_node(lambda: find(options, predictor), ranks)
    if ranks.is_first:
        check_folder(folder, None if options.output else run_of(predictor.members[0].path))
    parts = gather(score_cases(predictor, cases, options.on, options.score, ranks), ranks, is_patient=True)
    if not ranks.is_first:
        return 0
    outcomes = [outcome for part in parts for outcome in part]
    scores = sorted((each for each in outcomes if isinstance(each, CaseScores)), key=lambda case: case.name)
    faults = [*unusable, *(outcome for outcome in outcomes if isinstance(outcome, DataError))]
    for line in warnings_of(scores):
        print(printable(line), file=sys.stderr)
    for fault in faults:
        print(printable(in_own_options(f"left out: {fault}")), file=sys.stderr)
    if not scores:
        raise DataError("no case could be read: nothing to score")
    runs = [str(member.path) for member in predictor.members]
    data, grid = str(options.root or "the run's validation cases"), GRIDS[options.on]
    summary = evaluation.summary(scores, options.score)
    found = {"runs": runs, "data": data, "grid": grid, "flips": options.flips, **summary}
    title = f"{', '.join(runs)} on {data}, {grid}{', with mirror images' if options.flips else ''}"
    evaluation.write(folder, scores, found, title)
    print_table(evaluation.HEAD, evaluation.table_rows(found), f"{len(scores)} cases, {grid}")
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
    return [f"{first_few(of, NAMED)}: {warning}" for warning, of in names.items()]


def default_folder(options: Namespace, predictor: Predictor) -> Path:
    """Where the tables go: another place for another grid, data set or way of prediction."""
    parts = ["evaluation", options.on, *([options.root.resolve().name] if options.root else [])]
    parts += [name for name, is_on in (("flips", options.flips), ("masks", options.score == "masks")) if is_on]
    return run_of(predictor.members[0].path) / "-".join(parts)


def check_folder(folder: Path, run_dir: Path | None) -> None:
    """See before any work is done that the folder can be written to.

    Args:
        folder: of the tables. run_dir: that of the run which it is made in, and must not lead out of.

    Raises:
        ValueError: it can't be.
    """
    try:
        if run_dir:
            own_folder(run_dir, folder.name)
        make_writable(folder)
    except OSError as error:
        raise cannot_write(f"the folder of the tables, {folder},", error, "choose another with --output") from error


def run_of(path: Path) -> Path:
    """The folder of a run, or that of a weights file which is in none."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def find(options: Namespace, predictor: Predictor) -> tuple[CaseSet, tuple[CaseError, ...]]:
    """The cases to score, and the faults of those of `--root` that can't be.

    Raises:
        ValueError: no case without a fault, or one that is not there; of the run's own cases, any fault, for the split
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
    """This rank's share of the cases, read, predicted and scored side by side."""
    size = predictor.members[0].config.data.crop_size_voxels

    def read(case: Case) -> tuple[RawCase, Prepared]:
        raw = read_case(case, cases.coding)
        scan = predictor.prepare(raw)
        raw.image = np.empty(0)  # only the label is needed from here on
        return raw, crop_centre(scan, size) if grid == "center_crop" else scan

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

    mine = cases.cases[ranks.rank :: ranks.world_size]
    outcomes: list[CaseScores | DataError] = []
    found = in_stages(mine, read, lambda _, content: predictor.probabilities(content[1]), score)
    for case, outcome in show_progress(found, "Scoring", len(mine), is_shown=ranks.is_first):
        outcomes.append(DataError(f"{case.name}: {outcome}") if isinstance(outcome, DataError) else outcome)
    return outcomes


def crop_centre(scan: Prepared, size: Sequence[int]) -> Prepared:
    """The scan with its image cropped; on an axis where it is smaller, as it is."""
    x, y, z = centre(scan.image_1CXYZ.shape[2:], size)
    return replace(scan, image_1CXYZ=scan.image_1CXYZ[..., x, y, z].contiguous())


def centre(shape: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    """The centre crop of MONAI's `CenterSpatialCrop`."""
    starts = [max(n // 2 - wanted // 2, 0) for n, wanted in zip(shape, size, strict=True)]
    return tuple(slice(start, min(start + wanted, n)) for start, wanted, n in zip(starts, size, shape, strict=True))


if __name__ == "__main__":
    sys.exit(main())
