"""States to resume from: complete or not there, checked, and what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import (
    CheckpointWriter,
    find_state,
    load_state,
    restoring,
    state_name,
    states,
)


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("run",))


CASE = {"name": "a", "intersection": (1, 1, 1), "predicted": (1, 1, 1), "truth": [1, 1, 1]}
STATE: dict[str, Any] = {"weights": {}, "moments": {}, "epoch": 1, "taken": 9, "history": [{"epoch": 1, "loss": None}],
                         "best": {"epoch": None, "mean": 0.5, "empty_truths": {"ET": 1}}, "cases": [CASE],
                         "ranks": [{}]}  # fmt: skip


def write(folder: Path, step: int, keep: int = 2, is_validated: bool = False, **content: Any) -> None:
    writer = CheckpointWriter(folder, keep)
    state = {**STATE, "value": torch.full((100,), float(step)), **content}
    writer.write(state_name(step, is_validated), state, {"epoch": 1}, {})
    writer.wait()


def test_the_newest_states_are_kept(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        write(tmp_path, step)
    assert [path.name for path in states(tmp_path)] == ["step-00000100", "step-00000020"]
    assert load_state(find_state(tmp_path))["value"][0] == 100
    about = json.loads((tmp_path / "step-00000100" / "about.json").read_text())
    assert about["epoch"] == 1


def test_a_validated_state_sorts_after_the_one_of_its_last_step() -> None:
    names = [state_name(9, True), state_name(10, False), state_name(10, True), state_name(11, False)]
    assert names == sorted(names)


def test_a_validated_state_replaces_the_one_of_its_last_step(tmp_path: Path) -> None:
    for step in (5, 10):
        write(tmp_path, step)
        write(tmp_path, step, is_validated=True)
    assert [path.name for path in states(tmp_path)] == ["step-00000010-validated", "step-00000005-validated"]
    (tmp_path / "step-00000010-validated" / "state.pt").write_bytes(b"")
    write(tmp_path, 10)  # the run went back and comes by again
    assert [path.name for path in states(tmp_path)] == ["step-00000010", "step-00000005-validated"]


@pytest.mark.parametrize("keep", [1, 2])
def test_states_later_than_the_one_written_are_removed(keep: int, tmp_path: Path) -> None:
    for step in (5, 10):
        write(tmp_path, step, 2)
    (tmp_path / "step-00000010" / "state.pt").write_bytes(b"")
    write(tmp_path, 7, keep)
    assert [path.name for path in states(tmp_path)] == ["step-00000007", "step-00000005"][:keep]
    assert load_state(find_state(tmp_path))["value"][0] == 7


def test_after_a_crash_the_previous_state_remains_and_the_next_save_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    for function in ("_digest", "replacing", "_sync"):  # after the state, after its hash, after the move
        with monkeypatch.context() as patch:
            patch.setattr(f"engine.checkpoint.{function}", lambda *args, **options: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                write(tmp_path, 2)
        assert load_state(find_state(tmp_path))["value"][0] == (2 if function == "_sync" else 1)
    (tmp_path / "step-00000001" / "about.json").unlink()  # killed while it was removed
    write(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("record", ["null", "[1]", "3", '"x"', "{}", '{"bytes": "x", "blake2b": null}', "[" * 100_000])
def test_with_an_odd_record_the_previous_state_is_found(
    record: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    (tmp_path / "step-00000002" / "about.json").write_text(record)
    assert find_state(tmp_path).name == "step-00000001" and "step-00000002 is damaged" in caplog.text


def test_with_a_pipe_for_a_file_the_previous_state_is_found(tmp_path: Path) -> None:
    for step, name in ((1, ""), (2, "about.json"), (3, "state.pt")):
        write(tmp_path, step, keep=3)
        if name:
            (tmp_path / f"step-0000000{step}" / name).unlink()
            os.mkfifo(tmp_path / f"step-0000000{step}" / name)
    assert find_state(tmp_path).name == "step-00000001"


ODD: list[Any] = [None, "x", -1, 1.5, [], [1], {}, {"a": "b"}, [None], [{"a": "b"}], [{}]]
RIGHT: dict[str, list[Any]] = {"weights": [{}, {"a": "b"}], "moments": [{}, {"a": "b"}], "history": [[]],
                               "cases": [[]], "ranks": [[{}], [{"a": "b"}]]}  # fmt: skip


@pytest.mark.parametrize("part", [part for part in STATE])
def test_the_error_for_a_part_of_another_type_is_one_line(part: str, tmp_path: Path) -> None:
    for value in [each for each in ODD if each not in RIGHT.get(part, [])]:
        write(tmp_path, 1, **{part: value})
        with pytest.raises(ValueError, match=f"--resume: .*step-00000001 was written by another.*its {part}"):
            load_state(find_state(tmp_path))


@pytest.mark.parametrize("changes", [{"truth": [1, 1]}, {"truth": [1, 1, -1]}, {"truth": "abc"}, {"name": 1}, {"x": 1}])
def test_a_case_with_odd_counts_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, 1, cases=[CASE, CASE | changes])
    with pytest.raises(ValueError, match="its cases can't be used"):
        load_state(find_state(tmp_path))


def test_the_error_for_a_state_with_other_content_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, 1)
    state, record = (tmp_path / "step-00000001" / name for name in ("state.pt", "about.json"))
    for content in ([1], {"format": "\x1b[31m"}, Evil()):
        torch.save(content, state)
        digest = hashlib.blake2b(state.read_bytes()).hexdigest()
        record.write_text(json.dumps({"bytes": state.stat().st_size, "blake2b": digest}))
        with pytest.raises(ValueError, match="--resume: .*(has format none|no code from a file is run)"):
            load_state(find_state(tmp_path))


@pytest.mark.parametrize("error", [KeyError("exp_avg"), RuntimeError("size\nmismatch \x1b[31m"), TypeError("float")])
def test_the_error_for_a_state_that_does_not_fit_is_one_line(error: Exception, tmp_path: Path) -> None:
    message = f"--resume: the checkpoint in .*: {type(error).__name__}: "
    with pytest.raises(ValueError, match=message) as raised, restoring(tmp_path):
        raise error
    assert str(raised.value).isprintable()


def test_running_out_of_memory_while_restoring_is_not_a_mismatch(tmp_path: Path) -> None:
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
    with pytest.raises(RuntimeError, match="can't allocate"), restoring(tmp_path):
        raise error


def test_folders_of_the_user_among_checkpoints_are_kept(tmp_path: Path) -> None:
    users = [tmp_path / name for name in ("step-notes", "step-00000001-backup", "partial-step-00000001", "step-7")]
    for folder in users:
        folder.mkdir()
    (tmp_path / "step-00000000").symlink_to(users[0])
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert all(folder.is_dir() for folder in users) and (tmp_path / "step-00000000").is_symlink()
    assert [path.name for path in states(tmp_path)] == ["step-00000003", "step-00000002"]


@pytest.mark.parametrize("damage", ["content", "length", "state", "about"])
def test_a_damaged_state_is_named_and_the_previous_one_found(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    newest = tmp_path / "step-00000002"
    content = bytearray((newest / "state.pt").read_bytes())
    if damage == "content":
        content[len(content) // 2] ^= 1
        (newest / "state.pt").write_bytes(content)
    elif damage == "length":
        (newest / "state.pt").write_bytes(content[:-10])
    elif damage == "state":
        (newest / "state.pt").unlink()
    else:
        (newest / "about.json").write_text("{")
    assert find_state(tmp_path).name == "step-00000001"
    assert "step-00000002 is damaged" in caplog.text and "going back to the previous one" in caplog.text


def test_a_run_with_only_damaged_states_is_not_resumed(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001" / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="all 1 in it are damaged"):
        find_state(tmp_path)


def test_resuming_where_nothing_was_saved_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint in"):
        find_state(tmp_path)


def test_a_full_disk_is_reported_and_earlier_states_are_kept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: no checkpoint could be written; make room") as raised:
            write(tmp_path, 2, more=torch.zeros(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(str(raised.value.filename)).name == "state.pt"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]
    assert load_state(find_state(tmp_path))["value"][0] == 1


def test_a_failed_write_is_reported_at_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    writer = CheckpointWriter(tmp_path / "checkpoints", 2)
    writer.write("step-00000001", {}, {}, {})
    with pytest.raises(OSError):
        writer.wait()
    writer.wait()  # reported once


def test_a_state_of_another_format_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1, format=1)
    with pytest.raises(ValueError, match="format 1, this program reads 2"):
        load_state(find_state(tmp_path))
