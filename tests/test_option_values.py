"""What text, YAML and Python mean for an option's type."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest

from pipelines.basics.option_values import Bounds, Misfit, as_typed, convert


@pytest.mark.parametrize(
    ("raw", "kind", "value"),
    [
        ("3", int, 3),
        ("+1_000", int, 1000),
        ("010", int, 10),
        ("1e-4", float, 1e-4),
        (3, float, 3.0),
        ("Yes", bool, True),
        ("off", bool, False),
        ("2", Literal[0, 1, 2], 2),
        ("on", Literal["auto", True, False], True),
        (False, Literal["auto", True, False], False),
        ("auto", Literal["auto", True, False], "auto"),
        ("null", int | None, None),
        ("null", Literal["a"] | None, None),
        ("null", list[str] | None, None),
        ("null", str | None, "null"),
        ("null", Path | None, Path("null")),
        ("null", list[Path], [Path("null")]),
        ("null", list[Path] | None, [Path("null")]),
        (["a,b", "[c]"], list[Path], [Path("a,b"), Path("[c]")]),
        ([], list[str], []),
        ("[]", list[str], []),
        ("[null, 1]", list[str], ["null", "1"]),
        ([1, 2.0], tuple[float, float], (1.0, 2.0)),
    ],
)
def test_a_value_is_what_its_type_says(raw: Any, kind: Any, value: Any) -> None:
    found = convert(raw, kind)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("raw", "kind", "rule"),
    [
        (None, int, "a whole number"),
        ("3.0", int, "a whole number"),
        (3.0, int, "a whole number"),
        (True, int, "a whole number"),
        (True, float, "a number"),
        ("x", float, "a number"),
        (math.nan, float, "finite"),
        (10**400, float, "finite"),
        ("1", bool, "true or false"),
        (1, bool, "true or false"),
        (True, Literal[0, 1], "one of 0, 1"),
        ("true", Literal[0, 1], "one of 0, 1"),
        (1, Literal["auto", True, False], "one of auto, true, false"),
        ("True?", Literal["auto", True, False], "one of auto, true, false; did you mean true?"),
        ("on", Literal["one", "two"], "one of one, two; did you mean one?"),
        ("", Path, "a path"),
        ("a\0b", Path, "a path"),
        (3, Path, "a path"),
        ("", str, "text"),
        ({"a": 1}, list[str], "names, written as a,b"),
        ([1], list[str], "names, written as a,b"),
        ([None], list[str], "names, written as a,b"),
        ("1,2", tuple[int, int, int], "3 whole numbers"),
        (["1", "2", None], tuple[int, int, int], "3 whole numbers"),
    ],
)
def test_what_its_type_does_not_take_is_refused_with_the_rule(raw: Any, kind: Any, rule: str) -> None:
    with pytest.raises(Misfit) as caught:
        convert(raw, kind)
    assert str(caught.value) == rule


@pytest.mark.parametrize(
    ("bounds", "right", "wrong"),
    [
        (Bounds(least=1), [1, 2], {0: "at least 1", -1: "at least 1"}),
        (Bounds(most=1), [1, 0], {2: "at most 1"}),
        (Bounds(above=0, below=1), [0.5], {0: "above 0", 1: "below 1"}),
    ],
)
def test_numbers_keep_to_their_bounds(bounds: Bounds, right: list[float], wrong: dict[float, str]) -> None:
    assert [convert(number, float, bounds) for number in right] == right
    for number, rule in wrong.items():
        with pytest.raises(Misfit, match=f"^{rule}$"):
            convert(number, float, bounds)
        with pytest.raises(Misfit, match=f"^2 numbers, each {bounds}$"):
            convert([number, number], tuple[float, float], bounds)


def test_a_value_is_shown_on_a_line_that_ends() -> None:
    assert [as_typed(raw) for raw in (None, True, "", "a\n\x1b[31m", ["64", "32"])] == [
        "null", "true", "'' (nothing)", "a\\n\\x1b[31m", "64 32",
    ]  # fmt: skip
    bomb: list[Any] = ["x"]
    for _ in range(50):
        bomb = [bomb] * 9  # as YAML's anchors make it
    assert (
        max(len(as_typed(raw)) for raw in ("x" * 10**6, 10**5000, -(10**5000), ["x"] * 10**5, bomb, {"a": bomb})) <= 83
    )
