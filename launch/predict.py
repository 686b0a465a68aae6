"""Segment scans with a trained network, or with the average of several.

python launch/predict.py --runs runs/RUN --input SCANS --output SEGMENTATIONS
deepspeed launch/predict.py --runs runs/A runs/B --input SCANS --output SEGMENTATIONS --flips    all GPUs, an ensemble

SCANS is a data set as for training (a Decathlon task, BraTS folders, a list), folders of cases, a case's files (one
for each modality), or 4D files; for a network of one modality, 3D files. Each case becomes `<case>.nii.gz` on the
scan's own grid. Existing segmentations are kept, so a run that was stopped continues with the same command. A
segmentation's header holds its label coding and the weights that made it; if they differ from what was requested, the
command stops before any work, because file names do not show which coding a segmentation has.
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  # before any other import

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine.parser import Parser
from launch.network_options import add_network_options, run_with_networks
from pipelines.layouts.labels import CODINGS

if TYPE_CHECKING:
    from jsonargparse import Namespace


def main(args: list[str] | None = None) -> int:
    """Parse the command line and predict.

    Returns:
        exit status: 0, 1 where a case failed, 2 for a user's mistake, 75 or 130 when stopped.
    """

    def work(options: Namespace) -> int:
        from launch.segment_cases import segment_cases  # imports PyTorch, which takes a second

        return segment_cases(options)

    return run_with_networks(
        lambda: make_parser().parse_args(args), work, "the same command continues with the remaining cases"
    )


def make_parser() -> Parser:
    """The options of this command."""
    parser = Parser("Segment scans with a trained network, or the average of several.")
    add_network_options(parser)
    scans = "A data set, case folders, a case's files (one for each modality), or 4D files."
    parser.add_argument("--input", type=Path, nargs="+", required=True, help=scans)
    parser.add_argument("--output", type=Path, required=True, help="Folder for <case>.nii.gz.")
    modalities = (
        "Modalities of the --input files, in their order, or on a 4D file's last axis; needed if the files' names do "
        "not contain them and the order is not the network's."
    )
    parser.add_argument("--modalities", type=str, nargs="+", help=modalities)
    coding = (
        "Label coding to write. By default the one that the names of all data sets and case folders show; otherwise, "
        "and for files, the one of the network's training data."
    )
    parser.add_argument("--release", choices=sorted(CODINGS), help=coding)
    written = "Write <case>-probabilities.nii.gz (TC, WT, ET) too."
    parser.add_argument("--probabilities", action="store_true", help=written)
    parser.add_argument("--overwrite", action="store_true", help="Replace existing segmentations.")
    return parser


if __name__ == "__main__":
    sys.exit(main())
