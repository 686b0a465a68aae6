"""Errors reach the user whole, from a worker process too; those of the operating system with a remedy."""

from __future__ import annotations

import errno
import os
import pickle
import resource
from pathlib import Path

import pytest

from pipelines.basics import errors
from pipelines.basics.errors import REMEDIES, CaseError, CaseFailure, DataError, StoreError, explain


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("bad \x1b[31m"), "bad \\x1b[31m"),
        (CaseError(Path("a\udce9.nii"), "empty", "Copy it again"), "a\\udce9.nii: empty. Copy it again."),
        (CaseFailure(Path("a.nii"), "killed", "Try again"), "a.nii: killed. Try again."),
        (StoreError(Path("s"), "no space left", 2_500_000), "store s: no space left. It needs about 2.5 MB more. Free"),
    ],
)
def test_an_error_survives_the_way_from_a_worker(error: DataError, message: str) -> None:
    brought = pickle.loads(pickle.dumps(error))
    assert type(brought) is type(error) and str(brought) == str(error) and str(error).startswith(message)
    assert vars(brought) == vars(error)


@pytest.mark.parametrize("number", list(REMEDIES))
def test_an_error_of_the_system_names_file_cause_and_remedy(number: int) -> None:
    line = explain(OSError(number, os.strerror(number), "runs/a/log.csv"))
    assert line.startswith(f"runs/a/log.csv: {os.strerror(number)}; ") and "\n" not in line and "{" not in line


def test_a_limit_of_the_shell_is_given_with_its_value() -> None:
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert f"`ulimit -n` ({files})" in explain(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "scan.nii"))


def test_the_full_disk_is_found_where_an_error_names_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
