"""The page about performance shows what was counted, and says that nothing on it was measured on a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import performance_page

BEFORE, NOW = (json.loads(path.read_text()) for path in (performance_page.BEFORE, performance_page.NOW))


def test_the_page_shows_what_was_counted() -> None:
    assert performance_page.main(["--check"]) == 0


def test_a_page_out_of_date_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "performance.md"
    shutil.copy(performance_page.PAGE, page)
    monkeypatch.setattr(performance_page, "PAGE", page)
    assert performance_page.main(["--check"]) == 0
    page.write_text(page.read_text().replace(" launches |", " starts |"))
    assert performance_page.main(["--check"]) == 1
    assert "run python -m benchmarks.performance_page" in capsys.readouterr().out


def test_every_case_and_kind_is_in_the_tables() -> None:
    page = performance_page.fill_in(performance_page.PAGE.read_text(), BEFORE, NOW)
    case = f"{performance_page.CASES[0][0]}, batch {performance_page.CASES[0][1]}"
    assert list(NOW) == list(BEFORE) == [f"{model}, batch {batch}" for model, batch in performance_page.CASES]
    for name in (*NOW, *NOW[case]["kinds"], *BEFORE[case]["kinds"]):
        assert f"| {name} |" in page


def test_the_sums_by_kind_are_the_totals() -> None:
    for counts in (BEFORE, NOW):
        for found in counts.values():
            for name in ("bytes", "launches"):
                assert sum(kind[name] for kind in found["kinds"].values()) == found["total"][name]


def test_the_picture_is_the_same_each_time(tmp_path: Path) -> None:
    pictures = [tmp_path / name for name in ("a.svg", "b.svg")]
    for path in pictures:
        performance_page.draw(BEFORE, NOW, path)
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert "not measured" in pictures[0].read_text()
