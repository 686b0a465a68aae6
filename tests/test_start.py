"""What happens before a command's own code: interrupts and warnings."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import TRAIN, train, write_small

ASKED = {
    "train": ["--data.root", "nowhere"], "prepare": [], "evaluate": ["--runs", "a"],
    "predict": ["--runs", "a", "--input", "b", "--output", "c"], "compare": [],
    "convert": ["a", "--to", "onnx", "--output", "b.onnx"],
}  # fmt: skip


def started(name: str, folder: Path, before: str = "true") -> subprocess.Popen:
    """A command with options that it accepts, after a command of the shell."""
    line = f'{before}; exec "$0" "$@"'
    command = ["bash", "-c", line, sys.executable, str(TRAIN.with_name(f"{name}.py")), *ASKED[name]]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("name", ASKED)
def test_an_interrupt_during_the_imports_ends_in_one_line(name: str, tmp_path: Path) -> None:
    with started(name, tmp_path) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in maps.read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert output == "" and "Traceback" not in errors
    assert process.returncode == 130 and errors.startswith("\ninterrupted; ") and errors.endswith("\n")


@pytest.mark.parametrize("name", ASKED)
def test_memory_that_is_too_small_for_the_imports_is_one_line(name: str, tmp_path: Path) -> None:
    with started(name, tmp_path, before="ulimit -v 200000") as process:
        output, errors = process.communicate(timeout=60)
    assert (output, process.returncode) == ("", 2)
    assert errors.startswith("error: out of memory (") and errors.count("\n") == 1 and "`ulimit -v`" in errors


def test_warnings_are_single_lines_without_their_source(tmp_path: Path) -> None:
    small = ("--config", str(write_small(tmp_path)), "--data.regions", "tutorial", "--train.epochs", "1")
    done = train(tmp_path, *small, "--run_dir", "run")
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stdout.splitlines() if "label 2 is scored" in line]
    assert len(warned) == 1 and warned[0].startswith("regions 'tutorial': ")
    said = done.stdout + done.stderr + (tmp_path / "run" / "run.log").read_text()
    assert "UserWarning" not in said and "warnings.warn" not in said
    assert "\n\n" not in (tmp_path / "run" / "run.log").read_text()


def test_a_warning_before_there_is_a_log_is_a_line_too() -> None:
    root = TRAIN.parent.parent
    places = [root / "pipelines" / "labels.py", root / ".venv" / "lib" / "other.py", Path("/other/package.py")]
    code = (
        "import sys, warnings; sys.path.insert(0, sys.argv.pop(1)); import launch.start\n"
        "for place in sys.argv[1:]: warnings.warn_explicit('two\\nlines', FutureWarning, place, 7)"
    )
    command = [sys.executable, "-c", code, *map(str, [root, *places])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines() == ["two lines", *(f"{path}:7: FutureWarning: two lines" for path in places[1:])]
