"""Dice in percent, and tables in Markdown and on the terminal."""

from __future__ import annotations

import math

import pytest

from engine.progress import dice_text
from pipelines.basics.tables import markdown_table, percent, print_table


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
