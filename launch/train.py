"""Train a network on brain-tumour scans.

python launch/train.py                                        synthetic scans, a small UNETR, minutes on a laptop
deepspeed launch/train.py --config launch/configs/seed.yaml --data.root Task01_BrainTumour
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  # before any other import

import sys
from collections.abc import Callable
from functools import partial

from engine.ranks.command import run_command


def main(args: list[str] | None = None) -> int:
    """Parse the command line and train; returns the exit status, see `run_command`."""
    advice: Callable[[], str] | None = None

    def work() -> None:
        nonlocal advice
        from engine.config import make_parser, parse_config

        parser = make_parser(
            "Train UNETR or UNet on BraTS or Decathlon scans, or, with no arguments, on synthetic ones."
        )
        config, _ = parse_config(parser, args)
        from launch import run as training

        advice = partial(training.how_to_resume, config)
        training.run(config)

    return run_command(work, lambda: advice() if advice else "training had not begun: start again")


if __name__ == "__main__":
    sys.exit(main())
