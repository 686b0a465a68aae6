"""Text that comes from users (names of cases, files and folders) as it is shown.

A file's name on Linux is bytes. Python holds those that are not UTF-8 as lone surrogates, which no file in UTF-8 and no
font takes, so they are shown as their escapes, `\\udce9` for byte 0xE9, wherever a name is written or printed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MARKDOWN = re.compile(r"[\\`*\[<|&~$]|(?<![^\W_])_|_(?![^\W_])")


def encodable(text: str) -> str:
    """The text with lone surrogates as escapes, and all else as it is; UTF-8 can hold it."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def as_text(text: str) -> str:
    """The text with escapes for characters that steer a terminal or can't be encoded; tabs and line ends stay."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def printable(text: str) -> str:
    """The text on one line: lone surrogates, line breaks and other characters that are not printed as escapes."""
    return "".join(part if part.isprintable() else part.encode("unicode_escape").decode() for part in text)


def shortened(text: str, limit: int = 80) -> str:
    """The text, cut after `limit` characters."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def brief(value: Any, limit: int = 80) -> str:
    """A value as Python writes it, cut where it is long."""
    return shortened(repr(value), limit)


def markdown(text: str) -> str:
    """The text as Markdown and HTML show it, in a cell of a table too. An underscore within a word needs no escape."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def one_line(message: object, limit: int | None = None) -> str:
    """A message, as that of an error, on one line, of at most `limit` characters."""
    return printable(" ".join(str(message).split()))[:limit]


def first_few(names: Sequence[str], limit: int = 5) -> str:
    """The first few of many names: `a, b and 7 more`."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
