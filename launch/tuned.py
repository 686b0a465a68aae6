"""Show what was measured on this machine's GPUs, and what was chosen by it; or forget it.

python launch/tuned.py              tables: kernels and operations, and ways to run a training step
python launch/tuned.py --clear      measure again in the next run

Kernels are measured in the first step of a training and by `python -m benchmarks.tune`. The files are in the folder
`measured` of the cache (`GLIOFORGE_CACHE`).
"""

from __future__ import annotations

if __name__ == "__main__":
    import launch.start  # noqa: F401  # before any other import

import json
import sys
from typing import Any

from engine.parser import Parser
from engine.ranks.command import run_command
from kernels.measured_cache import MeasuredCache
from pipelines.basics.tables import print_table
from pipelines.basics.text import counted, printable

CACHES = ("kernels", "steps")
HEAD = ("measured", "chosen", "default, us", "chosen, us", "gain", "on")


def main(args: list[str] | None = None) -> int:
    """Parse the command line and show, or clear, the measurements.

    Returns:
        exit status: 0, 2 for a user's mistake.
    """

    def work() -> None:
        options = make_parser().parse_args(args)
        for name in CACHES:
            cache = MeasuredCache(name)
            if options.clear:
                print(f"{name}: {counted(cache.clear(), 'measurement')} removed")
            else:
                show(cache)

    return run_command(work, lambda: "start again", alone=True)


def make_parser() -> Parser:
    """The options of this command."""
    parser = Parser("Show what was measured on this machine's GPUs, or forget it.")
    parser.add_argument("--clear", action="store_true", help="Remove all measurements.")
    return parser


def show(cache: MeasuredCache) -> None:
    """Print the measurements of one file as a table."""
    entries = cache.entries()
    print(printable(f"{cache.name}: {counted(len(entries), 'measurement')} in {cache.path}"))
    choices = {name: entry for name, entry in entries.items() if _is_choice(entry)}
    if choices:
        print_table(HEAD, [_cells(name, choices[name]) for name in sorted(choices)], is_text=True)
    others = [(name, json.dumps(entries[name])) for name in sorted(entries.keys() - choices.keys())]
    if others:
        print_table(("measured", "values"), others, is_text=True)


def _is_choice(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("times"), dict) and isinstance(entry.get("best"), str)


def _cells(name: str, entry: dict[str, Any]) -> list[str]:
    """A choice of `kernels.self_tuning`, whose name is: GPU | PyTorch | Triton | what | version of the source."""
    machine, what = name.split(" | ")[:-2], name.split(" | ")[-2:][0]
    default, best = (entry["times"].get(entry.get(which)) for which in ("default", "best"))
    cells = [f"{1e3 * time:.1f}" if isinstance(time, float) else str(time or "") for time in (default, best)]
    gain = f"{default / best:.2f} x" if isinstance(default, float) and isinstance(best, float) and best else ""
    return [what, entry["best"], *cells, gain, ", ".join(machine)]


if __name__ == "__main__":
    sys.exit(main())
