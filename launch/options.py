"""Options that the commands share which use trained networks."""

from __future__ import annotations

from pathlib import Path

from engine.parser import Parser


def add_network_options(parser: Parser) -> None:
    """`--runs`, `--flips`, `--device`, `--kernels`."""
    choose, kernels = ["auto", "cpu", "cuda"], ["auto", "triton", "reference"]
    parser.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="A run's folder or a weights file; several are averaged."
    )
    parser.add_argument("--flips", action="store_true", help="Average over all mirror images, in eight times the time.")
    parser.add_argument("--device", choices=choose, default="auto", help="auto: a GPU where there is one.")
    parser.add_argument("--kernels", choices=kernels, default="auto", help="As in training.")
