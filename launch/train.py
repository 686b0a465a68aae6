"""Train a network on brain-tumour scans.

python launch/train.py                                        synthetic scans, a small UNETR, minutes on a laptop
deepspeed launch/train.py --config launch/configs/seed.yaml --data.root Task01_BrainTumour
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  # before any other import

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.ranks.command import run_command

if TYPE_CHECKING:
    from engine.config import Config


def main(args: list[str] | None = None) -> int:
    """Parse the command line and train; returns the exit status, see `run_command`."""
    config: Config | None = None
    advice: Callable[[Config | None], str] | None = None

    def work() -> None:
        nonlocal config, advice
        from engine.config import make_parser, parse_config

        parser = make_parser(
            "Train UNETR or UNet on BraTS or Decathlon scans, or, with no arguments, on synthetic ones."
        )
        config, _ = parse_config(parser, args)
        from launch import run as training

        advice = training.how_to_resume
        training.run(config)

    def how_to_continue() -> str:
        return advice(config) if advice else "training had not begun: start again"

    return run_command(work, how_to_continue)


if __name__ == "__main__":
    sys.exit(main())
