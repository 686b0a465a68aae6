"""How text from users (names of cases, files and folders) is shown.

A file's name on Linux is bytes. Python holds bytes that are not UTF-8 as lone surrogates, which no UTF-8 file and no
font can hold, so they appear as escapes, `\\udce9` for byte 0xE9, wherever a name is written or printed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*\[<|&~$]|(?<![^\W_])_|_(?![^\W_])")


def encodable(text: str) -> str:
    """The text with lone surrogates as escapes, so that UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def escape_controls(text: str) -> str:
    """The text with escapes for characters that control a terminal or can't be encoded; tabs and line ends stay."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def printable(text: str) -> str:
    """The text on one line: line breaks, lone surrogates and other unprintable characters as escapes."""
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)


def shortened(text: str, limit: int = 80) -> str:
    """The text, cut after `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def brief(value: Any, limit: int = 80) -> str:
    """A value as Python writes it, cut if long."""
    return shortened(repr(value), limit)


def markdown(text: str) -> str:
    """The text escaped for Markdown and HTML, for table cells too. An underscore within a word needs no escape."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def one_line(message: object, limit: int | None = None) -> str:
    """A message, such as an error, on one line of at most `limit` characters."""
    return printable(" ".join(str(message).split()))[:limit]


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """The first few of many names: `a, b and 7 more`."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def counted(count: int, noun: str = "case") -> str:
    """A number of things: "1 case", "3 cases"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
