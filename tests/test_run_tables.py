"""The tables of a run, on disks that are full."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from unittest import mock

import pytest

from engine.ranks import command
from engine.run_tables import EpochLog
from launch import run

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("method", ["add_scalar", "flush", "close"])
def test_a_full_disk_stops_tensorboard_and_not_the_run(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = EpochLog(tmp_path, 0)
    with mock.patch.object(records.writer, method, side_effect=FULL):
        records.write([{"epoch": 1, "step": 4, "loss": 1.5}])
        records.write([{"epoch": 1, "step": 4, "loss": 1.5}, {"epoch": 2, "step": 8, "loss": 1.25}])
        records.close()
    assert (tmp_path / "log.csv").read_text().splitlines()[-1] == "2,8,1.25"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        f"{tmp_path}/tensorboard can't be written (No space left on device): the run continues without it; log.csv has "
        "the same numbers"
    ]


def test_an_error_of_the_system_in_a_thread_prints_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", command._log_thread_error)

    def end(error: Exception) -> str:
        def work() -> None:
            raise error

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return capsys.readouterr().err

    assert end(FULL) == ""
    assert "KeyError: 'a mistake'" in end(KeyError("a mistake"))


@pytest.mark.parametrize("missing", ["write_log", "write_validation", "pictures.draw_curves"])
def test_without_its_tables_and_pictures_a_run_gets_no_page(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = ("report.data_facts", "report.timing_facts", "report.environment_facts")
    for name in ("write_log", "write_validation", "pictures.draw_curves", *facts, "report.RunResults"):
        monkeypatch.setattr(f"launch.run.{name}", mock.Mock(side_effect=FULL if name == missing else None))
    page = mock.Mock()
    monkeypatch.setattr("launch.run.report.write_html", page)
    with pytest.raises(OSError, match="No space left"):
        run.finish(mock.MagicMock(), tmp_path, "")
    page.assert_not_called()
