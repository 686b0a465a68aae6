"""A progress bar over cases: on a terminal; elsewhere a line in the log when the work begins."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import TypeVar

from pipelines.basics.lazy import Lazy
from pipelines.basics.text import counted

rich_console, progress = Lazy("rich.console"), Lazy("rich.progress")
log = logging.getLogger(__name__)
T = TypeVar("T")


def show_progress(
    results: Iterable[T], verb: str, total: int, noun: str = "case", is_shown: bool = True
) -> Iterator[T]:
    """Pass on the results of cases and count them.

    Args:
        results: one for each case. verb: as "Segmenting". total: number of cases. noun: for one of them.
        is_shown: False on all ranks but one.
    """
    title = f"{verb} {counted(total, noun)}"
    console = rich_console.Console(stderr=True)
    if is_shown and not console.is_terminal:
        log.info(title.lower())
    columns = (progress.TextColumn(title), progress.BarColumn(), progress.MofNCompleteColumn(),
               progress.TimeRemainingColumn())  # fmt: skip
    with progress.Progress(*columns, console=console, disable=not (is_shown and console.is_terminal and total)) as bar:
        task = bar.add_task(title, total=total)
        for result in results:
            bar.advance(task)
            yield result
