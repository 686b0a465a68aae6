"""CSV files that the commands write, and read back.

A spreadsheet runs a cell that begins with =, +, - or @ as a formula, and a table may hold the names of somebody else's
files. Such a cell gets an apostrophe in front, as spreadsheets themselves mark text; numbers stay numbers. A name that
is not UTF-8 is written with escapes (see `pipelines.basics.text`). Reading undoes both and returns what was written.

Tables are also written in Markdown and on the terminal, with Dice in percent.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.basics.atomic import open_to_append, write_text
from pipelines.basics.errors import DataError
from pipelines.basics.lazy import Lazy
from pipelines.basics.text import encodable, shortened

rich_console, rich_markup, rich_table = Lazy("rich.console"), Lazy("rich.markup"), Lazy("rich.table")
PIPE_WIDTH = 160  # columns; a file or a pipe has no terminal to fit
_FORMULA = re.compile(r"'*[=+\-@\t\r＝＋－＠]")  # noqa: RUF001  # some spreadsheets take the wide signs, too
_ESCAPED = re.compile(r"\\u(005c|d[89a-f][0-9a-f]{2})")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table as `table_text` makes it. Raises OSError too: it can't be written."""
    write_text(path, table_text(columns, rows))


def table_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a table with `columns` as its first line; a missing value, or None, is an empty cell.

    Raises:
        ValueError: a row has a value without a column.
    """
    return _lines([dict(zip(columns, columns, strict=True)), *rows], columns)


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row to a table of `write_table` in one call, so that several processes may. No link is followed.

    Raises:
        OSError: it can't be written; `filename` is `path`.
        ValueError: the row has a value without a column, or the table is a link.
    """
    try:
        with open_to_append(path) as file:
            file.write(_lines([row], columns))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The rows that `write_table` wrote, or a spreadsheet saved with commas: text by column, without empty lines.

    Args:
        path: the file.
        columns: what its first line must hold, in this order; None: anything.

    Raises:
        OSError: it can't be read.
        ValueError: it is not such a table, or damaged; the message has path and line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 table: {error}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line}: it holds NUL bytes: the file is probably incomplete")
    lines = csv_rows(path, text)
    _, names = next(lines, (0, None))
    if names is None:
        raise ValueError(f"{path} is empty, and must begin with the names of its columns")
    head = list(map(from_cell, names))
    listing = shortened(", ".join(head), 200)
    if columns is not None and head != list(columns):
        raise ValueError(f"{path} has the columns {listing}, must have {', '.join(columns)}")
    if len(set(head)) < len(head):
        raise ValueError(f"{path} names a column twice: {listing}")
    rows = []
    for line, cells in lines:
        if len(cells) != len(head):
            raise ValueError(f"{path}, line {line}: {len(cells)} cells, must be {len(head)}")
        rows.append(dict(zip(head, map(from_cell, cells), strict=True)))
    return rows


def csv_rows(path: Path, text: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The rows of CSV text that are not empty, each with the number of its first line.

    Raises:
        DataError: a quote that is not closed, or doubled, or a field that is too long; it names path and line.
    """
    reader, line = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), 1
    try:
        for row in reader:
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}, line {line}: {error}: put a field that holds quotes or separators in quotes, double its own "
            'quotes (""), and keep it to 131072 characters'
        ) from error


def to_cell(value: Any) -> Any:
    """A value as it is written; `from_cell` gives back its text."""
    if not isinstance(value, str):
        return value
    text = encodable(_ESCAPED.sub(lambda found: r"\u005c" + found[0][1:], value))
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(text: str) -> str:
    """The text that `to_cell` was given."""
    text = text[1:] if text.startswith("'") and _FORMULA.match(text) else text
    return _ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)


def _lines(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    file = io.StringIO()
    table = csv.DictWriter(file, columns)
    for row in rows:
        table.writerow({name: to_cell(value) for name, value in row.items()})
    return file.getvalue()


def percent(dice: float | None) -> str:
    """A Dice between 0 and 1 in percent; "n/a" for None and NaN."""
    return "n/a" if dice is None or math.isnan(dice) else f"{100 * dice:.1f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and whose others are numbers; cells are Markdown already."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, is_text: bool = False
) -> None:
    """Print a table whose first column is text and whose others are numbers, or, if it `is_text`, long texts too."""
    table = rich_table.Table(title=title, show_lines=is_text)
    for index, column in enumerate(head):
        table.add_column(column, justify="right" if index and not is_text else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(rich_markup.escape, row))
    rich_console.Console(width=None if rich_console.Console().is_terminal else PIPE_WIDTH).print(table)
