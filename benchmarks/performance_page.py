"""Count a training step of each published network, and put the tables and the picture into `docs/performance.md`.

python -m benchmarks.performance_page           count, write benchmarks/results/roofline.json, fill in the page
python -m benchmarks.performance_page --check   write nothing; status 1 if the page does not show that file
python -m benchmarks.performance_page --json F  count, and only write F

The page compares two files of `benchmarks/results/`: `roofline_before.json`, counted before the step was made leaner,
and `roofline.json`. Counts are of `benchmarks/roofline.py`, which says what they assume; the seconds are predictions.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.roofline import GPUS, count, predicted_s, roofline_s, totals
from pipelines.basics.atomic import replacing, write_text

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
NOW, BEFORE = (ROOT / "benchmarks" / "results" / name for name in ("roofline.json", "roofline_before.json"))
CASES = [("unetr", 2), ("unetr", 32), ("unetr_monai", 2), ("unetr_monai", 32), ("unet", 2), ("unet", 32)]
PRECISION = "bf16"
GPU = "H100"
PLACE = re.compile(r"(?P<head><!-- (?P<name>totals|kinds|gpus) -->\n).*?(?=<!-- end -->)", re.DOTALL)

Counts = dict[str, dict[str, Any]]
"""From "unetr, batch 2" to its totals, its sums by kind, and its samples per second on each GPU."""


def count_cases() -> Counts:
    """Count one step of every case."""
    counts: Counts = {}
    for model, batch in CASES:
        rows = count(model, batch, PRECISION)
        kinds: dict[str, dict[str, float]] = defaultdict(lambda: {"bytes": 0, "launches": 0, "predicted_s": 0.0})
        for row in rows:
            kind = kinds[row.kind]
            kind["bytes"] += row.bytes
            kind["launches"] += row.launches
            kind["predicted_s"] += predicted_s(row, GPUS[GPU], PRECISION)
        samples = {
            name: {
                "roofline": batch / sum(roofline_s(row, sheet, PRECISION) for row in rows),
                "predicted": batch / sum(predicted_s(row, sheet, PRECISION) for row in rows),
            }
            for name, sheet in GPUS.items()
        }
        counts[f"{model}, batch {batch}"] = {"total": totals(rows), "kinds": kinds, "samples_per_second": samples}
    return counts


def totals_table(before: Counts, now: Counts) -> str:
    """Bytes, launches and predicted samples per second of every case."""
    lines = [
        f"| {PRECISION}, 4 x 128 x 128 x 64 | GB | launches | GFLOP | samples/s predicted on an {GPU} |",
        "|---|---|---|---|---|",
    ]
    for case, found in now.items():
        old, new = before[case]["total"], found["total"]
        speeds = (each["samples_per_second"][GPU]["predicted"] for each in (before[case], found))
        lines.append(
            f"| {case} | {old['bytes'] / 1e9:.2f} -> {new['bytes'] / 1e9:.2f} | {old['launches']} -> {new['launches']} "
            f"| {new['flops'] / 1e9:,.0f} | {' -> '.join(f'{speed:.0f}' for speed in speeds)} |"
        )
    return "\n".join(lines) + "\n"


def kinds_table(before: Counts, now: Counts) -> str:
    """Where the time of a step of the first case goes, by kind of operation."""
    case = next(iter(now))
    old, new = before[case]["kinds"], now[case]["kinds"]
    lines = [f"| {case} | GB | launches | predicted ms on an {GPU} |", "|---|---|---|---|"]
    nothing = {"bytes": 0, "launches": 0, "predicted_s": 0.0}
    for kind in sorted({*old, *new}, key=lambda kind: -new.get(kind, nothing)["predicted_s"]):
        was, became = old.get(kind, nothing), new.get(kind, nothing)
        lines.append(
            f"| {kind} | {was['bytes'] / 1e9:.2f} -> {became['bytes'] / 1e9:.2f} | {was['launches']:.0f} -> "
            f"{became['launches']:.0f} | {1e3 * was['predicted_s']:.2f} -> {1e3 * became['predicted_s']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def gpus_table(before: Counts, now: Counts) -> str:
    """Samples per second of every case on every GPU."""
    lines = [f"| samples/s: predicted (at the roofline) | {' | '.join(GPUS)} |", "|---" * (1 + len(GPUS)) + "|"]
    for case, found in now.items():
        speeds = [found["samples_per_second"][gpu] for gpu in GPUS]
        cells = " | ".join(f"{each['predicted']:.0f} ({each['roofline']:.0f})" for each in speeds)
        lines.append(f"| {case} | {cells} |")
    return "\n".join(lines) + "\n"


TABLES = {"totals": totals_table, "kinds": kinds_table, "gpus": gpus_table}


def fill_in(page: str, before: Counts, now: Counts) -> str:
    """The page with its tables."""
    return PLACE.sub(lambda place: place["head"] + TABLES[place["name"]](before, now), page)


def draw(before: Counts, now: Counts, path: Path) -> None:
    """Bars of the predicted time of a step of the first case by kind, before and now; the same bytes each time."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    case = next(iter(now))
    old, new = before[case]["kinds"], now[case]["kinds"]
    kinds = sorted({*old, *new}, key=lambda kind: new.get(kind, {}).get("predicted_s", 0.0))
    figure = Figure(figsize=(7, 0.42 * len(kinds) + 1.0), layout="constrained")
    axes = figure.subplots()
    for counts, offset, colour, label in ((old, 0.2, "#b0b7bf", "before"), (new, -0.2, "#0072b2", "now")):
        widths = [1e3 * counts.get(kind, {}).get("predicted_s", 0.0) for kind in kinds]
        axes.barh([place + offset for place in range(len(kinds))], widths, 0.4, color=colour, label=label)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel(f"ms of a step on an {GPU}: predicted, not measured ({case}, {PRECISION})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    with mpl.rc_context({"svg.hashsalt": "performance", "svg.fonttype": "none"}), replacing(path, "wb") as file:
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})


def main(args: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path, default=NOW)
    options = parser.parse_args(args)
    if not options.check:
        write_text(options.json, json.dumps(count_cases(), indent=1) + "\n")
        if options.json != NOW:
            return 0
    before, now = (json.loads(path.read_text()) for path in (BEFORE, NOW))
    page = fill_in(PAGE.read_text(), before, now)
    if options.check:
        is_current = PAGE.read_text() == page
        print(
            "" if is_current else "docs/performance.md is out of date: run python -m benchmarks.performance_page",
            end="",
        )
        return int(not is_current)
    write_text(PAGE, page)
    draw(before, now, PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
