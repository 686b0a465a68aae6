"""Prepare scans for training, or check them.

python launch/prepare.py --config launch/configs/brats.yaml --data.root BraTS2023     prepare: resample, orient, store
python launch/prepare.py --data.root BraTS2023 --check                                report every faulty case

It takes the options of `launch/train.py`, so that the same YAML file serves both, and uses those of `--data`. Training
prepares what is missing by itself. `--check` writes nothing and ends with status 1 if a case is faulty. Its table has
every fault of names and lists, and for each case whose files are all there the first fault inside them. Cases without a
label are checked as prediction reads them.
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  # before any other import

import logging
import sys
import time
from collections import Counter
from typing import TYPE_CHECKING

from engine.ranks.command import run_command
from pipelines.basics.tables import print_table
from pipelines.basics.text import counted

if TYPE_CHECKING:
    from engine.data import DataConfig


def main(args: list[str] | None = None) -> int:
    """Parse the command line, then prepare or check.

    Returns:
        exit status: 0, 1 where `--check` finds a fault, 2 for a user's mistake, 75 or 130 when stopped.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work() -> int:
        from engine.config import make_parser, parse_config

        parser = make_parser("Prepare scans for training (resample, orient, store), or check them.")
        parser.add_argument("--check", action="store_true", help="Report every faulty case and write nothing.")
        config, options = parse_config(parser, args)
        return check(config.data) if options.check else prepare(config.data)

    return run_command(work, lambda: "run the same command to continue", alone=True)


def check(config: DataConfig) -> int:
    """Print a table of all faulty cases; 1 if there are any."""
    if config.root is None or config.download:
        raise ValueError("--check writes nothing and needs scans to read: give --data.root, and no --data.download")
    from pipelines.layouts.cases import survey_cases
    from pipelines.preparing.store import check_cases

    survey = survey_cases(config.root, config.release, config.modalities, config.regions, labelled=False)
    usable, faults = survey.usable, [*survey.faults]
    labelled = [case.name for case in usable.cases if case.label]
    unlabelled = [case.name for case in usable.cases if not case.label]
    crop_size = None if config.pad else config.crop_size_voxels
    for names, least in ((labelled, crop_size), (unlabelled, None)):
        if names:
            faults += check_cases(usable.select(names), config.workers, config.spacing, least)
    faulty = survey.total - len(usable.cases) + len(faults) - len(survey.faults)
    if faulty:
        rows = []
        for fault in faults:
            path = fault.path.relative_to(config.root) if config.root in fault.path.parents else fault.path
            rows.append((f"{path.parent}/\n{path.name}", fault.problem, fault.remedy))
        print_table(("file", "fault", "remedy"), rows, is_text=True)
    coding = f"; {usable.coding.release}" if labelled else ""
    print(f"{faulty} of {survey.total} cases are faulty ({', '.join(usable.modalities)}{coding})")
    if unlabelled:
        count = len(usable.cases)
        have = f"{len(labelled)} of {count} cases have" if labelled else f"none of {count} cases has"
        print(f"{have} a label: without one a case can be segmented, but not trained on or scored")
    return 1 if faulty else 0


def prepare(config: DataConfig) -> int:
    """Prepare all cases; print their number, shapes, bytes, folder and the time taken."""
    from engine.data import list_cases, obtain_root, prepared

    cases = list_cases(config, obtain_root(config))
    started = time.perf_counter()
    store = prepared(config, cases)
    seconds = time.perf_counter() - started
    shapes = Counter(store.shape(i) for i in range(len(store)))
    shape, count = shapes.most_common(1)[0]
    others = f" ({len(shapes) - 1} other shapes in {len(store) - count} cases)" if len(shapes) > 1 else ""
    print(
        f"{counted(len(store))} of {', '.join(store.modalities)}: {' x '.join(map(str, shape))} voxels{others} at "
        f"{' x '.join(f'{s:g}' for s in store.spacing_mm)} mm, {store.nbytes() / 1e9:.2f} GB in {store.folder}\n"
        f"{seconds:.1f} s, {seconds / len(store):.2f} s per case"
    )
    empty = sum(not store.has_tumour(i) for i in range(len(store)))
    if empty:
        print(f"{empty} of {len(store)} cases have no tumour in their label")
    return 0


if __name__ == "__main__":
    sys.exit(main())
