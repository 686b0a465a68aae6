"""How scores and tables are written: Dice in percent, tables in Markdown and on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pipelines.basics.lazy import Lazy
from pipelines.labels import REGIONS

rich_console, rich_table = Lazy("rich.console"), Lazy("rich.table")
PIPE_WIDTH = 160  # columns; a file or a pipe has no terminal to fit


def percent(dice: float | None) -> str:
    """A Dice between 0 and 1 in percent; "n/a" for None and NaN."""
    return "n/a" if dice is None or math.isnan(dice) else f"{100 * dice:.1f}"


def dice_text(dice: Iterable[float | None]) -> str:
    """The Dice of the three regions on one line."""
    return "  ".join(f"{region} {percent(value)}" for region, value in zip(REGIONS, dice, strict=True))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers; cells are Markdown already."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table whose first column is text and whose others are numbers."""
    table = rich_table.Table(title=title)
    for index, column in enumerate(head):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    rich_console.Console(width=None if rich_console.Console().is_terminal else PIPE_WIDTH).print(table)
