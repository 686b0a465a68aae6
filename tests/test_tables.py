"""Tables that are written and read back: no formula, no name that stops a writer, no damage without a name."""

from __future__ import annotations

import csv
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from engine.progress import dice_text
from pipelines.basics.tables import (
    append_row,
    from_cell,
    markdown_table,
    percent,
    print_table,
    read_table,
    to_cell,
    write_table,
)

COLUMNS = ("case", "dice", "warnings")
NAMES = ["=HYPERLINK(1)", "+1", "-case", "@case", "\t=1", "\r=1", "'=quoted", "''+", "'plain'", "caf\udce9", "\ud800",
         r"literal \udce9", r"literal \u005cudce9", "a,b;\"c\"\r\nd", "\u5bb6", "", " ", "=\udcff"]  # fmt: skip
ALPHABET = ["'", "=", "-", "\\", "u", "d", "8", "0", "5", "c", "e", "\udce9", "\ud8ff", "a"]


def table_of(path: Path, names: list[str]) -> Path:
    write_table(path, COLUMNS, [{"case": name, "dice": -0.5} for name in names])
    return path


def test_names_come_back_as_they_were(tmp_path: Path) -> None:
    rows = read_table(table_of(tmp_path / "table.csv", NAMES), COLUMNS)
    assert [row["case"] for row in rows] == NAMES
    assert rows[0]["dice"] == "-0.5" and rows[0]["warnings"] == ""


def test_any_text_comes_back_from_its_cell() -> None:
    draw = random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choices(ALPHABET, k=8))
        assert from_cell(to_cell(text)) == text


def test_no_cell_is_a_formula_and_numbers_stay_numbers(tmp_path: Path) -> None:
    with table_of(tmp_path / "table.csv", NAMES).open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    assert not [row[0] for row in rows if row[0][:1] in tuple("=+-@\t\r")]
    assert {row[1] for row in rows} == {"-0.5"}


def test_a_row_is_added_whole_and_through_no_link(tmp_path: Path) -> None:
    path = table_of(tmp_path / "table.csv", ["a"])
    append_row(path, COLUMNS, {"case": "=b"})
    assert [row["case"] for row in read_table(path)] == ["a", "=b"]
    (tmp_path / "link.csv").symlink_to(path)
    with pytest.raises(ValueError, match="link.csv is a link to .*table.csv, which would be written to: remove it"):
        append_row(tmp_path / "link.csv", COLUMNS, {"case": "c"})
    assert len(read_table(path)) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_names_the_table() -> None:
    with pytest.raises(OSError, match="No space left.*'/dev/full'"):
        append_row(Path("/dev/full"), COLUMNS, {"case": "a"})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"case,dice,warnings\r\n" + b"x" * 131_073 + b",1,\r\n", "line 2: field larger than field limit"),
        (b"case,dice,warnings\r\na,1,,,\r\n", "line 2: 5 cells, must be 3"),
        (b"case,dice,warnings\r\na,1\r\n", "line 2: 2 cells, must be 3"),
        (b"case,dice,warnings\r\n\r\na,1,\0\0\r\n", "line 3: it holds NUL bytes"),
        (b'case,dice,warnings\r\n"a,1,\r\n', "line 2: unexpected end of data"),
        (b'case,dice,warnings\r\n"a"b,1,\r\n', "line 2: ',' expected after '\"'"),
        (b"case,dice,warnings\r\ncaf\xe9,1,\r\n", "is not a UTF-8 table"),
        (b"name,value\r\n", "has the columns name, value, must have case, dice, warnings"),
        (b"x," * 10_000, r"has the columns x, x, .{190,}\.\.\., must have"),
        (b"\r\n", "is empty"),
        (b"", "is empty"),
    ],
)
def test_a_damaged_table_is_refused_by_name_and_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{path}.*{says}"):
        read_table(path, COLUMNS)


def test_a_table_of_any_bytes_is_read_or_refused_by_name(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "table.csv"
    whole = table_of(path, NAMES).read_bytes()
    parts, refused = [b"\0", b"\xff", b'"', b",", b"\r", b"\n", b"'", b"=", b"\\ud800", b"x" * 140_000], 0
    for _ in range(500):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            i = draw.randrange(len(content) + 1)
            content[i : i + draw.choice((0, 1, 9, 10_000))] = draw.choice(parts)
        path.write_bytes(content)
        try:
            rows = read_table(path, COLUMNS)
        except ValueError as error:
            assert str(error).startswith(str(path))
            refused += 1
        else:
            write_table(path, COLUMNS, rows)
            assert read_table(path, COLUMNS) == rows
    assert 50 < refused < 450


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("case,case\n")
    with pytest.raises(ValueError, match="names a column twice: case, case"):
        read_table(tmp_path / "table.csv")


def test_a_table_that_a_spreadsheet_saved_is_read(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("\ufeffcase,dice,warnings\n\na,1,\n", encoding="utf-8")
    assert read_table(tmp_path / "table.csv", COLUMNS) == [{"case": "a", "dice": "1", "warnings": ""}]


def test_a_name_that_is_not_utf_8_stops_no_command_that_prints_it() -> None:
    """Whatever standard output takes: here ASCII."""
    code = (
        "from engine.ranks.command import run_command; run_command(lambda: print('caf\\udce9 \u00b1'), str, alone=True)"
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "caf\\udce9 \\xb1\n"), done.stderr


def test_dice_are_percents_and_unknown_ones_are_not_numbers() -> None:
    assert [percent(dice) for dice in (0.0, 0.7654, 1.0, None, math.nan)] == ["0.0", "76.5", "100.0", "n/a", "n/a"]
    assert dice_text([0.5, math.nan, 0.25]) == "TC 50.0  WT n/a  ET 25.0"


def test_markdown_has_text_on_the_left_and_numbers_on_the_right() -> None:
    table = markdown_table(("case", "mean"), [("a", "50.0"), ("b", "n/a")])
    assert table == "| case | mean |\n| --- | ---: |\n| a | 50.0 |\n| b | n/a |"


def test_a_table_in_a_pipe_is_not_cut_to_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    print_table(("", *(f"column {i}" for i in range(8))), [("row", *("100.0",) * 8)], "a title")
    said = capsys.readouterr().out
    assert "a title" in said and "column 7" in said and said.count("100.0") == 8


def test_a_table_shows_brackets_and_whole_texts(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("file", "fault"), [("[b]x[/b].nii", "z" * 300)], is_text=True)
    said = capsys.readouterr().out
    assert "[b]x[/b].nii" in said and said.count("z") == 300
