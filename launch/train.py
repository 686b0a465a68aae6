"""Train a network on brain-tumour scans.

python launch/train.py                                        synthetic scans, a small UNETR, minutes on a laptop
deepspeed launch/train.py --config launch/configs/seed.yaml --data.root Task01_BrainTumour
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  before the imports below, which take seconds

import sys

from engine.config import make_parser, parse_config
from engine.run import start_run


def main() -> int:
    """Parse the command line and train; a user's mistake ends in one line on standard error and status 2."""
    parser = make_parser("Train UNETR or UNet on BraTS or Decathlon scans, or, with no arguments, on synthetic ones.")
    return start_run(lambda: parse_config(parser)[0])


if __name__ == "__main__":
    sys.exit(main())
