"""What happens before a command's own code: interrupts and warnings."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import TRAIN, train, write_small

COMMANDS = ("train", "prepare", "evaluate", "predict", "convert", "compare")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_during_the_imports_ends_without_a_traceback(name: str, tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, str(TRAIN.with_name(f"{name}.py"))]
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in maps.read_text():
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("", "", -signal.SIGINT)


def test_warnings_are_single_lines_without_their_source(tmp_path: Path) -> None:
    small = ("--config", str(write_small(tmp_path)), "--data.regions", "tutorial", "--train.epochs", "1")
    done = train(tmp_path, *small, "--run_dir", "run")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "label 2 is scored" in line]
    assert len(told) == 1 and told[0].startswith("regions 'tutorial': ")
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
