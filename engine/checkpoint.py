"""Checkpoints: the states that a run resumes from, and the thread that writes them and the run's weights files.

    checkpoints/step-00001200/state.pt     everything that training needs to continue
    checkpoints/step-00001200/about.json   its size and hash, the configuration, and how many ranks wrote it
    checkpoints/step-00001200-validated/   the same after the epoch's validation; it replaces the other
    checkpoints/last.pt, best.pt           see `engine.weights_file`

A state is one file for any number of ranks and any ZeRO stage. (These networks have 5 to 100 million parameters; with
two moments each that is 60 MB to 1.2 GB.) It holds plain values and tensors and loads with
`torch.load(weights_only=True)`: see `engine.weights_file`. A folder is written under a temporary name, with its hash,
synced, and renamed once complete: a crash leaves earlier ones as they were. Training goes on meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from engine.ranks.memory_limits import is_out_of_memory
from engine.weights_file import Unreadable, WeightsFile, read_archive, write_archive
from pipelines.basics.atomic import remove_left_over, replacing, temporary_name
from pipelines.basics.text import one_line
from pipelines.layouts.labels import REGIONS

log = logging.getLogger(__name__)

STATE_FORMAT = 2
HASH = "blake2b"
VALIDATED = "-validated"
STATES = "step-*/about.json"
"""Pattern below `checkpoints` that matches each state that a run can resume from."""
_STATE = re.compile(rf"step-\d{{8,}}({VALIDATED})?")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _are_numbers(values: Any) -> bool:
    """Whether these are numbers by name, or groups of them; None is a missing number."""
    return isinstance(values, dict) and all(
        isinstance(name, str) and (value is None or isinstance(value, int | float) or _are_numbers(value))
        for name, value in values.items()
    )


def _are(kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, list) and all(map(kind, values))


def _is_case(value: Any) -> bool:
    match value:
        case {"name": str(), "intersection": [*a], "predicted": [*b], "truth": [*c], **others} if not others:
            return len(a) == len(b) == len(c) == len(REGIONS) and all(map(_is_count, [*a, *b, *c]))
    return False


_STATE_PARTS: dict[str, Callable[[Any], bool]] = {
    "weights": lambda value: isinstance(value, dict),
    "moments": lambda value: isinstance(value, dict),
    "epoch": _is_count,
    "taken": _is_count,
    "history": _are(lambda row: _are_numbers(row) and _is_count(row.get("epoch"))),
    "best": lambda value: _are_numbers(value) and {"epoch", "mean"} <= value.keys(),
    "cases": _are(_is_case),
    "ranks": lambda value: _are(lambda rank: isinstance(rank, dict))(value) and len(value) > 0,
}
"""Parts of a state that are first used long after it is read, and their checks."""


class CheckpointWriter:
    """Writes checkpoints in the background, one after the other.

    Args:
        folder: `checkpoints` of a run. keep: how many states to keep, each of another step.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None

    def write(
        self, name: str, state: dict[str, Any], about: dict[str, Any], weights: Mapping[str, WeightsFile]
    ) -> None:
        """Start writing.

        Args:
            name: of the folder, from `state_name`.
            state: content of `state.pt`; its tensors are on the CPU and must not change any more.
            about: more for `about.json`.
            weights: weights files by name.

        Raises:
            OSError: the previous one could not be written.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, name, state, about, weights)

    def wait(self) -> None:
        """Wait until everything is on disk. Raises OSError if it can't be written."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def _write(self, name: str, state: dict, about: dict, weights: Mapping[str, WeightsFile]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / name
        partial = temporary_name(final)
        try:
            for file, content in weights.items():
                content.write(self.folder / file)
            remove_left_over(self.folder)
            partial.mkdir()
            write_archive({"format": STATE_FORMAT, **state}, partial / "state.pt")
            size, digest = (partial / "state.pt").stat().st_size, _digest(partial / "state.pt")
            with replacing(partial / "about.json", sync=True) as about_json:
                json.dump({**about, "bytes": size, HASH: digest}, about_json)
            shutil.rmtree(final, ignore_errors=True)  # damaged: the run resumed from an earlier one
            partial.rename(final)
        except OSError as error:
            advice = "no checkpoint could be written; make room, then --resume continues from the previous one"
            raise OSError(error.errno, f"{error.strerror}: {advice}", error.filename) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        _sync(self.folder)
        # Later ones are damaged, or the run would have resumed from them.
        whole = [path for path in states(self.folder) if path.name <= name]
        validated = {path.name.removesuffix(VALIDATED) for path in whole if path.name.endswith(VALIDATED)}
        kept = [path for path in whole if path.name not in validated][: self.keep]
        for folder in self.folder.glob("step-*"):
            is_ours = _STATE.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
            if is_ours and folder not in kept:  # old, later, or half removed by a run that was killed
                shutil.rmtree(folder)


def state_name(steps: int, is_validated: bool) -> str:
    """The name of a state's folder, after so many optimizer steps of the run; names sort in the order of writing."""
    return f"step-{steps:08d}{VALIDATED if is_validated else ''}"


def states(folder: Path) -> list[Path]:
    """Folders of complete states, newest first."""
    return sorted((path.parent for path in folder.glob(STATES)), reverse=True)


def find_state(folder: Path) -> Path:
    """The newest intact state; the log names damaged ones. Raises ValueError if there is none."""
    found = states(folder)
    for path in found:
        if not (fault := _fault(path)):
            return path
        log.warning("checkpoint %s is damaged (%s): going back to the previous one", path, fault)
    damaged = f"; all {len(found)} in it are damaged" if found else "; the run ended before it wrote one"
    raise ValueError(f"--resume: no checkpoint in {folder}{damaged}")


def recorded_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the run that wrote the newest state; None if no state holds one."""
    for path in states(folder):
        with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            about = json.loads((path / "about.json").read_text())
            if isinstance(about["config"], dict):
                return about["config"]
    return None


def load_state(path: Path) -> dict[str, Any]:
    """Load a state onto the CPU, without running code from the file.

    Raises:
        ValueError: it has another format, or other content.
    """
    try:
        state = read_archive(path / "state.pt")
    except Unreadable as error:
        raise ValueError(f"--resume: {path}: {error}") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != STATE_FORMAT:
        shown = found if isinstance(found, int) else "none"
        raise ValueError(f"--resume: {path} has format {shown}, this program reads {STATE_FORMAT}")
    odd = [name for name, is_right in _STATE_PARTS.items() if not is_right(state.get(name))]
    if odd:
        raise ValueError(f"--resume: {path} was written by another version of this program: its {odd[0]} can't be used")
    return state


@contextlib.contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Turn an error while a state is restored into a ValueError of one line that names the run."""
    try:
        yield
    except (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"--resume: the checkpoint in {folder} does not fit this run, or another version of this program wrote it: "
            f"{one_line(f'{type(error).__name__}: {error}', 300)}"
        ) from error


def _fault(path: Path) -> str:
    """What is wrong with a state; empty if nothing is."""
    record, state = path / "about.json", path / "state.pt"
    try:
        if not (record.is_file() and state.is_file()):
            return "about.json or state.pt is missing, or not a file"
        about, size = json.loads(record.read_text()), state.stat().st_size
        if size != about["bytes"]:
            return f"state.pt has {size} bytes, not as many as were written"
        return "" if _digest(state) == about[HASH] else "the content of state.pt is not what was written"
    except (KeyError, TypeError):
        return "about.json was not written by this program"
    except (OSError, ValueError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, HASH).hexdigest()


def _sync(folder: Path) -> None:
    """Flush the folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
