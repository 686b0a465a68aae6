"""Options that the commands share which use trained networks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from engine.parser import Parser

OWN = {"data.release": "--release", "train.device": "--device"}
"""What these commands call options of training."""


def add_network_options(parser: Parser) -> None:
    """`--runs`, `--flips`, `--device`, `--kernels`."""
    choose, kernels = ["auto", "cpu", "cuda"], ["auto", "triton", "reference"]
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="A run's folder or a weights file; several are averaged."
    )
    parser.add_argument("--flips", action="store_true", help="Average over all mirror images, in eight times the time.")
    parser.add_argument("--device", choices=choose, default="auto", help="auto: a GPU where there is one.")
    parser.add_argument("--kernels", choices=kernels, default="auto", help="As in training.")


def in_own_options(text: str) -> str:
    """A message that training shares, with options that these commands have; others are told as the run's settings."""
    return re.sub(
        r"--((?:data|train|model|optim|loss)\.\w+)", lambda match: OWN.get(match[1], f"{match[1]} of the run"), text
    )


def naming_own_options(work: Callable[[], int]) -> int:
    """Do a command's work; what it raises for the user names the options of the command.

    Raises:
        ValueError: as `work`, in those words.
    """
    try:
        return work()
    except ValueError as error:
        message = in_own_options(str(error))
        if message == str(error):
            raise
        raise ValueError(message) from error
