"""Files are written whole or not at all, and nothing of the user's is touched on the way."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from pipelines.basics.atomic import (
    cannot_write,
    make_subfolder,
    make_writable,
    open_to_append,
    remove_left_over,
    replacing,
    temporary_name,
    write_text,
    write_texts,
)


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
def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.basics.atomic.os.open", lambda *_: OPEN("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError) as raised:
        write_text(tmp_path / "table.csv", "x")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == str(tmp_path / "table.csv")
    assert os.listdir(tmp_path) == []


OPEN = os.open


def test_a_missing_folder_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        write_text(tmp_path / "none" / "x", "")
    assert raised.value.filename == str(tmp_path / "none" / "x")


def test_an_error_without_a_number_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="cannot write mode F.*x.png"), replacing(tmp_path / "x.png", "wb"):
        raise OSError("cannot write mode F")  # as Pillow


@pytest.mark.parametrize("name", ["x" * 250, "\N{BRAIN}" * 60, os.fsdecode(b"M\xfcller")])
def test_any_name_that_a_file_can_have_can_be_written(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "content")
    assert (tmp_path / name).read_text() == "content" and len(os.listdir(tmp_path)) == 1


def test_a_temporary_name_is_utf_8_for_file_systems_that_take_nothing_else() -> None:
    assert temporary_name(Path("x" + "\N{BRAIN}" * 60)).name.encode()


def test_what_dead_processes_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    mine, dead, users = temporary_name(tmp_path / "a"), tmp_path / "b", tmp_path / ".notes.tmp-old"
    dead = mine.with_name(mine.name.replace(f"-{os.getpid()}-", "-4194305-"))  # above the kernel's largest number
    for path in (mine, dead, users):
        path.touch()
    remove_left_over(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([mine, users])


def test_files_that_belong_together_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    first, last = tmp_path / "first", tmp_path / "missing" / "last"
    first.write_text("old")
    with pytest.raises(FileNotFoundError):
        write_texts({first: "new", last: "new"})
    assert first.read_text() == "old" and os.listdir(tmp_path) == ["first"]
    last.parent.mkdir()
    write_texts({first: "new", last: "new"})
    assert first.read_text() == last.read_text() == "new"


def test_a_log_is_added_to_and_never_through_a_link(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("mine")
    (tmp_path / "link.log").symlink_to(target)
    with pytest.raises(ValueError, match=f"link.log is a link to {target}, which would be written to: remove it"):
        open_to_append(tmp_path / "link.log")
    assert target.read_text() == "mine"
    for line in ("caf\udce9\n", "b\n"):
        with open_to_append(tmp_path / "run.log") as file:
            file.write(line)
    assert (tmp_path / "run.log").read_text() == "caf\\udce9\nb\n"


def test_a_folder_that_leads_out_by_a_link_is_refused(tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    assert make_subfolder(run, "logs") == run / "logs" and (run / "logs").is_dir()
    (run / "checkpoints").symlink_to(outside)
    (run / "within").symlink_to(run / "logs")
    assert make_subfolder(run, "within").is_dir()
    for names in (("checkpoints",), ("checkpoints", "deeper")):
        with pytest.raises(ValueError, match=f"is a link to {outside}.*: remove the link"):
            make_subfolder(run, *names)
    assert not os.listdir(outside)
    (tmp_path / "link").symlink_to(run)  # a run's folder itself may be one: its user names it
    assert make_subfolder(tmp_path / "link", "logs").is_dir()


def test_a_folder_is_made_and_tried_before_any_work_is_done(tmp_path: Path) -> None:
    make_writable(tmp_path / "a" / "b")
    make_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not os.listdir(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as raised:
        make_writable(tmp_path / "file" / "c")
    assert str(cannot_write("--output c", raised.value, "choose another")) == (
        "--output c can't be written (Not a directory): free space or change its permissions, or choose another"
    )


def test_a_folder_that_takes_no_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(OSError, match="No space left"):
        make_writable(tmp_path)
