"""Standard output and error, and log files: a failed write never ends the work, and names can't control a terminal.

When a reader goes away (`| head`), a terminal is closed or the disk behind `>` is full, printed text is lost; the work
goes on, for its results are files. File names and headers may hold control characters, which could make a terminal show
what is not there, or bytes that are not text: they are shown as escapes, `\\x1b` and `\\udcff`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
from pathlib import Path

from pipelines.basics.atomic import open_to_append
from pipelines.basics.text import escape_controls

_STYLE = re.compile("\x1b\\[[0-9;]*m|\x1b\\[[0-9]*A|\x1b\\[2K|\x1b\\[\\?25[hl]|\r")
"""Colours, and how a progress bar moves the cursor."""


class Terminal(io.TextIOWrapper):
    """A standard stream that accepts any text and raises no OSError.

    On a terminal it lets colours and cursor movements through, for progress bars and tables.

    Args:
        stream: the one that this replaces.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(
            stream.buffer, stream.encoding, "backslashreplace", line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )  # fmt: skip
        self._is_styled = self.isatty()
        self.lost: OSError | None = None  # the first error by which text was lost

    def write(self, text: str) -> int:
        """Write text; returns its length."""
        styles = _STYLE.findall(text) if self._is_styled else []
        texts = _STYLE.split(text) if self._is_styled else [text]
        try:
            super().write(
                "".join(escape_controls(part) + style for part, style in zip(texts, [*styles, ""], strict=True))
            )
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        try:
            super().flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        self.lost = self.lost or error
        if not isinstance(error, BlockingIOError):  # libraries and child processes write to it too
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


class PlainFormatter(logging.Formatter):
    """Log records without control characters, and without the line end of a warning's text."""

    def format(self, record: logging.LogRecord) -> str:
        """A record as text."""
        return escape_controls(super().format(record).rstrip("\n"))


class LogFile(logging.StreamHandler):
    """A log file, appended to; if it can't be written, it says so once, and the work goes on.

    Raises:
        ValueError, OSError: as `open_to_append`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(open_to_append(path))
        self.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(message)s"))
        self._path, self._has_failed = path, False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # the name is logging's
        """Called where a record could not be written."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._has_failed:
            self._has_failed = True
            print(f"{self._path} can't be written ({error.strerror}) and will lack lines", file=sys.stderr)


def set_up_terminal() -> None:
    """Make standard output and error of this process `Terminal`s, where they are Python's own."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process
            setattr(sys, name, Path(os.devnull).open("w", errors="replace"))  # noqa: SIM115  # stays open
        elif type(stream) is io.TextIOWrapper:  # neither one of ours nor what a test or a notebook put there
            with contextlib.suppress(OSError):
                stream.flush()
            terminal = Terminal(stream)
            setattr(sys, name, terminal)
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    handler.setStream(terminal)
                    handler.setFormatter(PlainFormatter(handler.formatter._fmt if handler.formatter else None))
