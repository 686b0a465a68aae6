"""Text of users as it is shown: on one line, in characters that every file and terminal takes."""

from __future__ import annotations

import pytest

from pipelines.basics.text import counted, encodable, escape_controls, first_few, markdown, one_line, printable


def test_unprintable_characters_become_escapes() -> None:
    assert encodable("caf\udce9\n") == "caf\\udce9\n"
    assert escape_controls("caf\udce9\n\t\x1b[31m") == "caf\\udce9\n\t\\x1b[31m"
    assert printable("caf\udce9\n\x1b[31m\u202e \u5bb6\xe9") == "caf\\udce9\\n\\x1b[31m\\u202e \u5bb6\xe9"


def test_markdown_shows_a_name_as_it_is() -> None:
    assert markdown("BraTS_GLI-0001_t1") == "BraTS_GLI-0001_t1"
    assert markdown("a|b\n<img src=x>*_em_*") == r"a\|b\\n\<img src=x>\*\_em\_\*"


@pytest.mark.parametrize(
    ("message", "line"),
    [(ValueError("a\n   b\tc "), "a b c"), ("caf\udce9\x1b", "caf\\udce9\\x1b"), (KeyError("x"), "'x'")],
)
def test_a_message_becomes_one_line(message: object, line: str) -> None:
    assert one_line(message) == line and one_line(message, 2) == line[:2]


def test_the_first_few_of_many_names_are_given_and_the_rest_counted() -> None:
    assert first_few([]) == "" and first_few(list("abcde")) == "a, b, c, d, e"
    assert first_few(list("abcdefg")) == "a, b, c, d, e and 2 more" and first_few(list("abc"), 1) == "a and 2 more"


def test_one_thing_is_not_several() -> None:
    assert [counted(n) for n in (0, 1, 2)] == ["0 cases", "1 case", "2 cases"]
    assert counted(1, "training case") == "1 training case"
