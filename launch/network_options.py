"""What the commands that use trained networks share: options, and messages that name them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from engine.parser import Parser
from engine.ranks.command import run_command

if TYPE_CHECKING:
    from jsonargparse import Namespace

OWN = {"data.release": "--release", "train.device": "--device"}
"""What these commands call options of training."""

GRIDS = {
    "source": "the scans' own grid",
    "prepared": "the prepared grid",
    "center_crop": "the centre crop of the prepared grid",
}


def add_network_options(parser: Parser) -> None:
    """`--runs`, `--flips`, `--device`, `--kernels`."""
    runs = "A run's folder or a weights file; several are averaged."
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help=runs)
    flips = "Average over all mirror images; takes eight times as long."
    parser.add_argument("--flips", action="store_true", help=flips)
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one."
    )
    parser.add_argument("--kernels", choices=["auto", "triton", "reference"], default="auto", help="As in training.")


def run_with_networks(parse: Callable[[], Namespace], work: Callable[[Namespace], int], how_to_continue: str) -> int:
    """`run_command`; messages of `work` name the options of these commands, those of `parse` what was typed."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    def work_or_explain() -> int:
        options = parse()
        try:
            return work(options)
        except ValueError as error:
            if (message := with_own_options(str(error))) == str(error):
                raise
            raise ValueError(message) from error

    return run_command(work_or_explain, lambda: how_to_continue)


def with_own_options(text: str) -> str:
    """A message of the code that training shares: with these commands' options, others as settings of the run."""
    options = r"--((?:data|train|model|optim|loss)\.\w+)"
    return re.sub(options, lambda match: OWN.get(match[1], f"{match[1]} of the run"), text)
