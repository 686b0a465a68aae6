"""What a command does before the imports that take seconds; each script of this folder imports it first."""

from __future__ import annotations

import signal
import warnings
from pathlib import Path

from pipelines.basics.machine import give_home
from pipelines.basics.text import one_line

_OURS = ("engine", "kernels", "launch", "models", "pipelines")


def as_line(message: Warning | str, category: type[Warning], filename: str, lineno: int, line: object = None) -> str:
    """A warning as a line: ours like any other message, another package's with its place."""
    text = one_line(message)
    path, root = Path(filename), Path(__file__).resolve().parent.parent
    is_ours = path.is_relative_to(root) and path.relative_to(root).parts[0] in _OURS
    return f"{text}\n" if is_ours else f"{filename}:{lineno}: {category.__name__}: {text}\n"


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback; `run_command` takes over
warnings.formatwarning = as_line
give_home()
