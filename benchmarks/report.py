"""The report of `pytest --benchmark`: a table on the terminal, a JSON file and a plot.

`python -m benchmarks.report FILE.json` prints a line for each case of a JSON file: ours beside the best of the others.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

from benchmarks.common import MARGIN, LeastWork, Roofline
from pipelines.basics.atomic import write_text

OURS = "glioforge"
COLOURS = {OURS: "#d55e00", "torch.compile": "#0072b2", "eager": "#999999", "MONAI": "#009e73"}
OTHER_COLOURS = ("#56b4e9", "#cc79a7", "#e69f00", "#000000")


@dataclass(frozen=True)
class Measurement:
    """One measurement.

    Fields:
        op, case, direction: operation, workload, "forward" or "forward + backward".
        variant: whose implementation; `path` is the path of ours.
        seconds: median of one call in a CUDA graph (on a CPU: of one call). eager_seconds: dispatched from Python.
        bytes, flops: the least that must be moved and computed. roofline_share: of the time at the measured ceilings.
        in_cache: whether all tensors of a call fit the cache, so that the share counts passes that memory never saw.
    """

    op: str
    case: str
    direction: str
    variant: str
    path: str
    seconds: float
    eager_seconds: float
    bytes: int
    flops: int
    roofline_share: float
    in_cache: bool

    @classmethod
    def of(
        cls, labels: dict[str, str], seconds: float, eager_seconds: float, work: LeastWork, roofline: Roofline
    ) -> Measurement:
        """From a time and the least work."""
        return cls(
            **labels,
            seconds=seconds,
            eager_seconds=eager_seconds,
            bytes=work.bytes,
            flops=work.flops,
            roofline_share=roofline.floor(work) / seconds,
            in_cache=work.tensors <= roofline.cache,
        )


def groups(rows: Sequence[Measurement]) -> Iterator[tuple[tuple[str, str, str], list[Measurement]]]:
    """Rows of the same computation, by (op, case, direction)."""
    for key, group in groupby(rows, key=lambda row: (row.op, row.case, row.direction)):
        yield key, list(group)


def ours_and_best(group: Sequence[Measurement]) -> tuple[Measurement, Measurement] | None:
    """Our row of a group and the fastest other one; None if either is missing."""
    ours = next((row for row in group if row.variant == OURS), None)
    others = [row for row in group if row.variant != OURS]
    return (ours, min(others, key=lambda row: row.seconds)) if ours is not None and others else None


def lost(rows: Sequence[Measurement]) -> list[str]:
    """A line for each group in which another variant beat ours by more than `MARGIN`."""
    lines = []
    for (op, case, direction), group in groups(rows):
        pair = ours_and_best(group)
        if pair is not None and pair[0].seconds > MARGIN * pair[1].seconds:
            ours, best = pair
            ratio = ours.seconds / best.seconds
            lines.append(f"{op} {case} {direction}: {best.variant} is {ratio:.2f} x as fast as ours ({ours.path} path)")
    return lines


def ceilings(roofline: Roofline) -> str:
    """The measured ceilings in words."""
    rates = ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in roofline.rates.items())
    return f"measured ceilings: copy {roofline.bandwidth / 1e9:.0f} GB/s; matrix products {rates} TFLOP/s"


def summary(rows: Sequence[Measurement], roofline: Roofline) -> list[str]:
    """Ceilings, a line for each case and direction, and the cases where another variant won."""
    lines = [ceilings(roofline), "us: ours (eager dispatch), share of the roofline, path; the best other, and x ours"]
    for (op, case, direction), group in groups(rows):
        pair = ours_and_best(group)
        if pair is not None:
            ours, best = pair
            times = f"{1e6 * ours.seconds:8.1f} ({1e6 * ours.eager_seconds:.0f})"
            share = f"{100 * ours.roofline_share:3.0f} %{'*' if ours.in_cache else ' '} {ours.path:9}"
            other = f"{1e6 * best.seconds:8.1f} {best.seconds / ours.seconds:5.2f} x {best.variant}"
            which = "f+b" if "backward" in direction else "f"
            lines.append(f"{op} {case} {which}".ljust(80) + f"{times:16} {share} {other}")
    return [*lines, *(f"lost: {line}" for line in lost(rows))]


def print_table(rows: Sequence[Measurement], roofline: Roofline, about: dict[str, Any], console: Console) -> None:
    """One line for each measurement, grouped by computation."""
    console.print(
        f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}\n"
        f"{ceilings(roofline)}",
        highlight=False,
    )
    table = Table()
    for column in ("", "µs", "eager µs", "GB/s", "TFLOP/s", "roofline", "x ours"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for (op, case, direction), group in groups(rows):
        ours = next((row.seconds for row in group if row.variant == OURS), None)
        table.add_row(f"[bold]{op}[/bold] {case}, {direction}")
        for index, row in enumerate(group):
            table.add_row(
                f"  {row.variant} ({row.path})" if row.path else f"  {row.variant}",
                f"{row.seconds * 1e6:.1f}",
                f"{row.eager_seconds * 1e6:.1f}",
                f"{row.bytes / row.seconds / 1e9:.0f}",
                f"{row.flops / row.seconds / 1e12:.3g}" if row.flops else "",
                f"{100 * row.roofline_share:.0f} %{'*' if row.in_cache else ''}",
                f"{row.seconds / ours:.2f}" if ours else "",
                end_section=index == len(group) - 1,
            )
    console.print(table)
    if any(row.in_cache for row in rows):
        console.print(f"* all tensors of a call fit the cache, {roofline.cache / 2**20:.0f} MiB", highlight=False)


def write_json(rows: Sequence[Measurement], roofline: Roofline, about: dict[str, Any], path: Path) -> None:
    """Machine, ceilings and rows."""
    content = {"machine": about, "roofline": asdict(roofline), "rows": [asdict(row) for row in rows]}
    write_text(path, json.dumps(content, indent=1) + "\n")


def draw(rows: Sequence[Measurement], about: dict[str, Any], path: Path) -> None:
    """Share of the roofline by case and variant, a panel for each operation."""
    ops = list(dict.fromkeys(row.op for row in rows))
    per_op = {op: [group for group in groups(rows) if group[0][0] == op] for op in ops}
    bars = {op: sum(len(group) + 1 for _, group in per_op[op]) for op in ops}
    figure = Figure(figsize=(11, 1.2 * len(ops) + 0.2 * sum(bars.values())), layout="constrained")
    axes = figure.subplots(len(ops), 1, squeeze=False, height_ratios=list(bars.values()))
    variants = list(dict.fromkeys(row.variant for row in rows))
    others = [variant for variant in variants if variant not in COLOURS]
    colours = COLOURS | dict(zip(others, OTHER_COLOURS * len(others), strict=False))
    for axis, op in zip(axes[:, 0], ops, strict=True):
        y, ticks = 0.0, []
        for (_, case, direction), group in per_op[op]:
            ticks.append((y + (len(group) - 1) / 2, f"{case}\n{direction}"))
            for row in group:
                axis.barh(y, 100 * row.roofline_share, color=colours[row.variant], height=0.9)
                label = f"{row.seconds * 1e6:.0f} µs"
                at = (100 * row.roofline_share, y)
                axis.annotate(label, at, (3, 0), textcoords="offset points", va="center", fontsize=6)
                y += 1
            y += 1
        axis.set_yticks(*zip(*ticks, strict=True), fontsize=7)
        axis.invert_yaxis()
        axis.margins(x=0.08, y=0.01)
        axis.set_title(op, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel(f"share of the measured roofline, % ({about['device']})")
    handles = [Rectangle((0, 0), 1, 1, color=colours[variant]) for variant in variants]
    figure.legend(handles, variants, loc="outside upper center", ncols=min(6, len(variants)), frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def main() -> int:
    content = json.loads(Path(sys.argv[1]).read_text())
    rows = [Measurement(**row) for row in content["rows"]]
    print(*summary(rows, Roofline(**content["roofline"])), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
