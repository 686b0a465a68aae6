"""Score a trained network, or the average of several, on scans with labels.

python launch/evaluate.py --runs runs/RUN                           its own validation cases
python launch/evaluate.py --runs runs/A runs/B --root SCANS         all cases of a data set, an ensemble
deepspeed launch/evaluate.py --runs runs/RUN --root SCANS           on all GPUs

Dice and HD95 of TC, WT and ET, on the scans' own grid: probabilities are resampled to it, and scored against the label
as its file has it. `--on prepared` scores on the grid that the network sees, `--on center_crop` on the published
tutorial's centre crop of it. What is scored is what `launch/predict.py` writes: the regions of the label map, in which
ET is within TC and TC within WT. `--score masks` scores the network's three masks, which may overlap in any way.
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  # before any other import

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from engine.parser import Parser
from launch.network_options import GRIDS, add_network_options, run_with_networks
from pipelines.layouts.labels import CODINGS

if TYPE_CHECKING:
    from jsonargparse import Namespace


def main(args: list[str] | None = None) -> int:
    """Parse the command line and evaluate.

    Returns:
        exit status: 0, 1 where a case can't be read, 2 for a user's mistake, 75 or 130 when stopped.
    """

    def work(options: Namespace) -> int:
        from launch.score_cases import evaluate  # imports PyTorch, which takes a second

        return evaluate(options)

    return run_with_networks(lambda: make_parser().parse_args(args), work, "no scores were kept: start again")


def make_parser() -> Parser:
    """The options of this command."""
    parser = Parser("Score a trained network, or the average of several, on scans with labels.")
    add_network_options(parser)
    parser.add_argument("--root", type=Path, help="A data set, all of its cases; default: the run's validation cases.")
    parser.add_argument("--release", choices=sorted(CODINGS), help="Label coding of --root, if names leave it open.")
    parser.add_argument("--cases", type=str, nargs="+", help="Only these cases.")
    grids = "; ".join(f"{name}: {grid}" for name, grid in GRIDS.items())
    parser.add_argument("--on", choices=list(GRIDS), default="source", help=grids)
    scored = "label_map: what is written, ET within TC within WT; masks: the network's masks, as they overlap"
    parser.add_argument("--score", choices=("label_map", "masks"), default="label_map", help=scored)
    folder = "Folder for the tables; default: evaluation-GRID[-ROOT][-flips][-masks] in the run's folder."
    parser.add_argument("--output", type=Path, help=folder)
    return parser


if __name__ == "__main__":
    sys.exit(main())
