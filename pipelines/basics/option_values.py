"""Values of options: the bounds that a field of a dataclass declares, and how text becomes a value.

An option's type is that of its field, one of

    bool   int   float   str   Path   Literal[...]   list[X]   tuple[X, X, X]   each also as `X | None`

A switch that may be left to the program is a `Literal["auto", True, False]`. Bounds are next to the default,
`lr: float = number(1e-4, least=0, most=1000)`. Command lines, YAML files and dataclasses made in Python all pass
through `convert`, so that every number is finite and within its bounds.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import re
import reprlib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from pipelines.basics.text import printable, shortened

_TRUTHS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
MANY = 1_000_000
"""An upper bound for counts: more is a slip of the finger."""
MOST_SEED = 2**63 - 1
_SHOWN = 80  # characters of a value in a message


@dataclass(frozen=True)
class Bounds:
    """The bounds of a number, or of each of several; None: no bound."""

    least: float | None = None
    most: float | None = None
    above: float | None = None  # itself excluded
    below: float | None = None  # itself excluded
    rising: bool = False  # of several numbers, none may be smaller than the one before it
    example: Any = None  # several allowed ones, for messages

    def broken_by(self, value: float) -> str:
        """The bound that a number breaks, in words; empty if it breaks none."""
        if isinstance(value, float) and not math.isfinite(value):
            return "finite"
        broken = (f"{words} {bound:.10g}" for words, bound in self._given() if not _HOLDS[words](value, bound))
        return next(broken, "")

    def __str__(self) -> str:
        """All bounds: `at least 0 and below 1`."""
        return " and ".join(f"{words} {bound:.10g}" for words, bound in self._given())

    def _given(self) -> list[tuple[str, float]]:
        bounds = zip(_HOLDS, (self.least, self.above, self.most, self.below), strict=True)
        return [(words, bound) for words, bound in bounds if bound is not None]


NO_BOUNDS = Bounds()


class Misfit(ValueError):
    """A value that an option can't have; the message says what it must be, and follows the words `must be`."""


def number(default: Any, **bounds: Any) -> Any:
    """A dataclass field for a number, or several, within `Bounds`."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(example=default, **bounds)})


def describe(kind: Any, bounds: Bounds) -> str:
    """What a value of this type must be: `a whole number, at least 1`."""
    kind, origin, inner = _unwrapped(kind)
    if origin is Literal:
        return f"one of {', '.join(map(as_typed, inner))}"
    if origin in (list, tuple):
        names = {int: "whole numbers", float: "numbers", Path: "paths"}
        several = names.get(inner[0], "names")
        count = f"{len(inner)} " if origin is tuple else ""
        limits = f", each {bounds}" if str(bounds) else ""
        order = ", none smaller than the one before" if bounds.rising else ""
        example = ",".join(f"{each:g}" for each in bounds.example or ()) or ("a,b" if inner[0] is str else "")
        return f"{count}{several}{limits}{order}{f', written as {example}' if example else ''}"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}[kind]
    return f"{words}, {bounds}" if str(bounds) else words


def convert(raw: Any, kind: Any, bounds: Bounds = NO_BOUNDS) -> Any:
    """The value of an option.

    Args:
        raw: text, a list of words from a command line, or a value from YAML, JSON or Python.
        kind: the option's type.
        bounds: of its numbers.

    Raises:
        Misfit: it is not such a value.
    """
    given, (kind, origin, inner) = kind, _unwrapped(kind)
    rule = describe(kind, bounds)
    is_null = raw is None or (raw == "null" and kind is not str and Path not in (kind, *inner))
    if is_null and kind is not given:
        return None
    if raw is None:
        raise Misfit(rule)
    if origin in (list, tuple):
        return origin(_several(raw, kind, bounds, rule))
    if origin is Literal:
        truth = _truth(raw)
        if truth is not None and any(choice is truth for choice in inner):  # 0 and 1 are no truths
            return truth
        choices = {as_typed(choice): choice for choice in inner}
        if str(raw) in choices and not isinstance(raw, bool):
            return choices[str(raw)]
        meant = nearest(str(raw), list(choices))
        raise Misfit(f"{rule}{f'; did you mean {meant}?' if meant else ''}")
    text = raw if isinstance(raw, str) and raw else None
    one: Any = text if kind is str else {bool: _truth, int: _whole, float: _real, Path: _path}[kind](raw)
    broken = rule if one is None else bounds.broken_by(one) if kind in (int, float) else ""
    if broken:
        raise Misfit(broken)
    return one


def check_fields(config: Any, prefix: str = "") -> None:
    """Refuse a dataclass with wrong values in its fields or in those of the dataclasses in it.

    Args:
        config: the dataclass.
        prefix: of the options' names, such as `--data.`, for the message.

    Raises:
        ValueError: as `raise_faults`.
    """
    raise_faults(list(_field_faults(config, prefix)))


def _field_faults(config: Any, prefix: str) -> Iterator[str]:
    kinds = get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name}"
        if dataclasses.is_dataclass(value):
            yield from _field_faults(value, f"{name}.")
            continue
        try:
            converted = convert(value, kinds[item.name], bounds_of(item))
            if isinstance(value, str) is not isinstance(converted, str):
                raise Misfit(f"{describe(kinds[item.name], bounds_of(item))}, not text")
        except Misfit as error:
            yield f"{name} {as_typed(value)} must be {error}"


def raise_faults(faults: Sequence[str]) -> None:
    """Raise ValueError for the faults of a command line or a configuration, if any: one is a line, several a list."""
    distinct = list(dict.fromkeys(faults))
    if len(distinct) == 1:
        raise ValueError(distinct[0])
    if distinct:
        raise ValueError("\n  ".join([f"{len(distinct)} options can't be used:", *distinct]))


def bounds_of(field: dataclasses.Field) -> Bounds:
    """The bounds that `number` gave to a field."""
    return field.metadata.get("bounds", NO_BOUNDS)


def as_typed(raw: Any) -> str:
    """A value for a message: as typed, on one line, not too long."""
    if isinstance(raw, list) and all(isinstance(word, str) for word in raw):
        raw = " ".join(raw)
    if isinstance(raw, int) and abs(raw) >= 10**_SHOWN:
        return f"(of more than {_SHOWN} digits)"
    if isinstance(raw, dict | list | tuple):
        raw = reprlib.repr(raw)  # shared parts can make the whole text enormous
    text = "null" if raw is None else str(raw).lower() if isinstance(raw, bool) else str(raw)
    return shortened(printable(text[: _SHOWN + 1]), _SHOWN) or "'' (nothing)"


def nearest(name: str, names: Sequence[str]) -> str:
    """The name that was probably meant, empty if none is close enough."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), "")


def to_builtins(value: Any) -> Any:
    """Values in the types that JSON, YAML and `torch.load(weights_only=True)` take; `convert` reverses it."""
    if isinstance(value, dict):
        return {key: to_builtins(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_builtins(item) for item in value]
    return path_text(value) if isinstance(value, Path) else value


def is_several(kind: Any) -> bool:
    """Whether an option of this type has several values."""
    return _unwrapped(kind)[1] in (list, tuple)


def path_text(path: Path) -> str:
    """A path as text that `convert` reads as the same path: a leading `~` is not taken for the home folder."""
    return f"./{path}" if str(path).startswith("~") else str(path)


def _unwrapped(kind: Any) -> tuple[Any, Any, tuple[Any, ...]]:
    """A type without `| None`, its origin (list, tuple, Literal), and the types or choices in it."""
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    return kind, get_origin(kind), get_args(kind)


def _several(raw: Any, kind: Any, bounds: Bounds, rule: str) -> list[Any]:
    _, origin, (inner, *others) = _unwrapped(kind)
    items = [raw] if isinstance(raw, str) else raw
    if isinstance(items, list | tuple) and all(isinstance(word, str) for word in items):
        items = list(items) if inner is Path else _words(items, rule)
    if not isinstance(items, list | tuple) or "" in items or (origin is tuple and len(items) != 1 + len(others)):
        raise Misfit(rule)
    try:
        found = [convert(item, inner, bounds) for item in items]
    except Misfit as error:
        raise Misfit(rule) from error
    if bounds.rising and sorted(found) != found:
        raise Misfit(rule)
    return found


def _words(words: Sequence[str], rule: str) -> list[Any]:
    """The items of a list, given as `[a, b]` or separated by blanks or commas."""
    line = " ".join(words).strip()
    if not (line.startswith("[") and line.endswith("]")):
        return [part.strip() for word in words for part in word.strip().removesuffix(",").split(",")]
    try:
        return yaml.load(line, yaml.BaseLoader)  # every scalar as text: 00001 is a name, not a number
    except yaml.YAMLError as error:
        raise Misfit(f"{rule}; quote an item that holds one of []{{}},:#") from error


def _truth(raw: Any) -> bool | None:
    return raw if isinstance(raw, bool) else _TRUTHS.get(str(raw).lower())


def _whole(raw: Any) -> int | None:
    if isinstance(raw, str) and re.fullmatch(r"[+-]?[0-9](_?[0-9]){,39}", raw):
        return int(raw)
    return raw if isinstance(raw, int) and not isinstance(raw, bool) else None


def _real(raw: Any) -> float | None:
    if isinstance(raw, bool) or not isinstance(raw, str | int | float):
        return None
    try:
        return float(re.sub(r"^([+-]?)\.(inf|nan)$", r"\1\2", raw.lower()) if isinstance(raw, str) else raw)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def _path(raw: Any) -> Path | None:
    """Text as it is, except a leading `~/`, which a shell does not expand within a word (`--root=~/scans`)."""
    if isinstance(raw, Path):
        return raw
    if not isinstance(raw, str) or not raw or "\0" in raw:
        return None
    if raw == "~" or raw.startswith("~/"):
        home = os.path.expanduser("~")
        if home == "~":
            raise Misfit("a path without ~: no home folder is known here")
        return Path(home + raw[1:])
    return Path(raw)
