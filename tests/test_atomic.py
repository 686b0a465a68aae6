"""Files are written whole or not at all, and nothing of the user's is touched on the way."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from pipelines.atomic import remove_left_over, replacing, temporary_name, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(table) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert table.read_text() == "old" and os.listdir(tmp_path) == ["table.csv"]


def test_a_symbolic_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "precious", tmp_path / "table.csv"
    target.write_text("mine")
    link.symlink_to(target)
    write_text(link, "new")
    assert target.read_text() == "mine" and link.read_text() == "new" and not link.is_symlink()


def test_a_file_has_the_permissions_that_others_get(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "x", "")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a full disk is tried on Linux's /dev/full")
def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.atomic.os.open", lambda *_: OPEN("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError) as raised:
        write_text(tmp_path / "table.csv", "x")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "table.csv")
    assert os.listdir(tmp_path) == []


OPEN = os.open


def test_a_missing_folder_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        write_text(tmp_path / "none" / "x", "")
    assert raised.value.filename == str(tmp_path / "none" / "x")


@pytest.mark.parametrize("name", ["x" * 250, "\N{BRAIN}" * 60, os.fsdecode(b"M\xfcller")])
def test_any_name_that_a_file_can_have_can_be_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "content")
    assert (tmp_path / name).read_text() == "content" and len(os.listdir(tmp_path)) == 1


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    mine, dead, users = temporary_name(tmp_path / "a"), tmp_path / "b", tmp_path / ".notes.tmp-old"
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", "-4194305-"))  # above the kernel's largest number
    for path in (mine, dead, users):
        path.touch()
    remove_left_over(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine, users])
