"""Which folders are read as finished runs, and what is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from finished_runs import settings, write_run

from engine.metrics import CaseDice
from engine.reports.comparison import FinishedRun
from engine.run_tables import write_validation


def test_an_unfinished_run_is_refused_with_the_command_that_continues_it(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", settings("demo"))
    (run_dir / "report.html").unlink()
    with pytest.raises(ValueError, match="it lacks report.html: .*--resume .*run"):
        FinishedRun.read(run_dir)


def test_cases_keep_the_names_they_were_validated_under(tmp_path: Path) -> None:
    run_dir, names = write_run(tmp_path / "run", settings("demo")), ("=1", "caf\udce9", "a\nb")
    write_validation(run_dir, [CaseDice(name, (1, 1, 1), (1, 1, 1), (1, 1, 1)) for name in names], {})
    assert json.loads((run_dir / "metrics.json").read_text()) == {}
    shutil.copy(write_run(tmp_path / "other", settings("demo")) / "metrics.json", run_dir)
    assert FinishedRun.read(run_dir).cases == names


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.json", '{"definition": "Di', "Unterminated string"),
        ("metrics.json", "{}", "it lacks 'epochs'"),
        ("metrics.json", "[" * 100_000, "recursion"),
        ("metrics.json", "[]", "metrics.json is [], and must be"),
        ("metrics.json", '{"epochs": "many", "best": {"epoch": 1}, "definition": ""}', "epochs 'many' must be a whole"),
        ("metrics.json", '{"epochs": 1, "best": {"epoch": -1}, "definition": ""}', "best epoch -1 must be a whole"),
        ("metrics.json", '{"epochs": 1, "best": {"epoch": 1, "TC": "x"}, "definition": ""}', "best TC 'x' must be"),
        ("metrics.json", '{"epochs": 1, "best": {"epoch": 1, "TC": NaN}, "definition": ""}', "best TC nan must be"),
        ("metrics.json", '{"scored": "everything"}', "metrics.json scored 'everything'"),
        ("checkpoints/step-00000001-validated/about.json", '{"world_size": "8"}', "world_size '8' must be a whole"),
        ("config.yaml", "", "the file is null and must be a group"),
        ("config.yaml", "data: [", "expected the node content"),
        ("config.yaml", "[" * 100_000, "nested too deeply"),
        ("log.csv", "epoch,loss\n1,half", "could not convert string to float: 'half'"),
        ("log.csv", "epoch,loss\n1,2,3", "log.csv, line 2: 3 cells, must be 2"),
        ("log.csv", "epoch,loss\n", "log.csv has no rows with epoch and loss"),
        ("validation.csv", "case,TC\n" + "x" * 140_000 + ",1", "validation.csv, line 2: field larger than"),
        ("validation.csv", "case,TC\n\0\0", "validation.csv, line 2: it holds NUL bytes"),
        ("validation.csv", "case,TC\na,1", "it lacks 'WT'"),
    ],
)
def test_a_run_with_a_damaged_file_is_named(name: str, content: str, says: str, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", settings("demo"))
    (run_dir / name).write_text(content)
    with pytest.raises(ValueError, match=r"run can't be read, a file in it is damaged .*; copy it again") as raised:
        FinishedRun.read(run_dir)
    assert says in str(raised.value) and "\n" not in str(raised.value)
