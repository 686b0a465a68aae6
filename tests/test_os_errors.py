"""Errors of the operating system in words for the user."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest

from pipelines.basics import errors
from pipelines.basics.errors import REMEDIES, explain


@pytest.mark.parametrize("number", list(REMEDIES))
def test_an_error_of_the_system_names_file_cause_and_remedy(number: int) -> None:
    line = explain(OSError(number, os.strerror(number), "runs/a/log.csv"))
    assert line.startswith(f"runs/a/log.csv: {os.strerror(number)}; ") and "\n" not in line and "{" not in line


def test_a_limit_of_the_shell_is_given_with_its_value() -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert f"`ulimit -n` ({files})" in explain(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "scan.nii"))


def test_a_full_disk_without_a_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "a folder that the system does not name" in explain(error)
    monkeypatch.setattr(errors, "_FULL_BELOW", float("inf"))
    assert f"No space left on device in {tmp_path} and " in explain(error)


def test_an_error_that_has_a_remedy_keeps_it() -> None:
    error = OSError(errno.ENOSPC, "No space left on device: no checkpoint could be written; make room", "state.pt")
    assert explain(error) == "state.pt: No space left on device: no checkpoint could be written; make room"
    assert explain(OSError("no such server")) == "no such server"


def test_both_names_of_a_move_are_given() -> None:
    error = OSError(errno.EXDEV, os.strerror(errno.EXDEV), b"a", None, "b")
    assert explain(error) == f"a -> b: {os.strerror(errno.EXDEV)}"
