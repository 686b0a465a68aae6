"""The bar over cases: in a pipe it is one line, and it never keeps results or errors to itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from pipelines.basics.progress_bar import show_progress


def test_without_a_terminal_one_line_says_what_begins(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert list(show_progress(iter("abc"), "Scoring", 3)) == ["a", "b", "c"]
    assert list(show_progress(["a"], "Making", 1, "synthetic case")) == ["a"]
    assert list(show_progress(["a"], "Scoring", 1, is_shown=False)) == ["a"]
    assert caplog.messages == ["scoring 3 cases", "making 1 synthetic case"]


def test_on_a_terminal_cases_are_counted(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which Rich takes for a terminal
    assert list(show_progress(range(3), "Scoring", 3)) == [0, 1, 2]
    said = capsys.readouterr().err
    assert "Scoring 3 cases" in said and "3/3" in said


def test_what_fails_between_two_cases_ends_the_loop() -> None:
    def results() -> Iterator[str]:
        yield "a"
        raise OSError("the disk is full")

    found = []
    with pytest.raises(OSError, match="disk is full"):
        for result in show_progress(results(), "Scoring", 2):
            found.append(result)
    assert found == ["a"]
