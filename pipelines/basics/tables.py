"""CSV files that the commands write, and read back.

A spreadsheet runs a cell that begins with =, +, - or @ as a formula, and a table may hold the names of somebody else's
files. Such a cell gets an apostrophe in front, as spreadsheets themselves mark text; numbers stay numbers. A name that
is not UTF-8 is written with escapes (see `pipelines.basics.text`). Reading takes both away and gives what was written.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.basics.atomic import open_own, write_text
from pipelines.basics.text import encodable, shortened

_FORMULA = re.compile(r"'*[=+\-@\t\r＝＋－＠]")  # noqa: RUF001  # some spreadsheets take the wide signs, too
_ESCAPED = re.compile(r"\\u(005c|d[89a-f][0-9a-f]{2})")


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table whole, in UTF-8.

    Args:
        path: the file. columns: the first line. rows: values by column; one that is missing or None is left empty.

    Raises:
        OSError: it can't be written.
        ValueError: a row has a value of no column.
    """
    write_text(path, table_text(columns, rows))


def table_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """What `write_table` writes."""
    return _lines([dict(zip(columns, columns, strict=True)), *rows], columns)


def append_row(path: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row to a table that `write_table` began, by one call, so that several processes may. No link is followed.

    Raises:
        OSError: it can't be written; `filename` is `path`.
        ValueError: the row has a value of no column, or the table is a link.
    """
    try:
        with open_own(path) as file:
            file.write(_lines([row], columns))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_table(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """Read what `write_table` wrote, or a copy that a spreadsheet saved with commas.

    Args:
        path: the file. columns: what its first line must hold, in this order; None: anything.

    Returns:
        the rows, values by column; empty lines are passed over.

    Raises:
        OSError: it can't be read.
        ValueError: it is no such table, or damaged, with its path and line.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 table: {error}") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line}: it holds NUL bytes: the file was probably not written to its end")
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    head: list[str] | None = None
    rows = []
    try:
        for cells in filter(None, lines):
            if head is None:
                head = _head(path, cells, columns)
            elif len(cells) != len(head):
                raise ValueError(f"{path}, line {lines.line_num}: {len(cells)} cells, must be {len(head)}")
            else:
                rows.append(dict(zip(head, map(from_cell, cells), strict=True)))
    except csv.Error as error:
        raise ValueError(f"{path}, line {lines.line_num}: {error}") from error
    if head is None:
        raise ValueError(f"{path} is empty, and must begin with the names of its columns")
    return rows


def _head(path: Path, cells: list[str], columns: Sequence[str] | None) -> list[str]:
    head = list(map(from_cell, cells))
    listing = shortened(", ".join(head), 200)
    if columns is not None and head != list(columns):
        raise ValueError(f"{path} has the columns {listing}, must have {', '.join(columns)}")
    if len(set(head)) < len(head):
        raise ValueError(f"{path} names a column twice: {listing}")
    return head


def to_cell(value: Any) -> Any:
    """A value as it is written; `from_cell` gives the text of it again."""
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
