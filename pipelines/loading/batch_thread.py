"""Batches for a GPU: made in a thread, one ahead, with their copies on a CUDA stream of their own.

The thread that launches a step's kernels would otherwise cut crops between two steps, and their copies to the GPU would
stand in line with the kernels.

No event is needed for the order: volumes are loaded, buffers filled and DALI's copies of them made on the one stream
(`on_stream`), in the order in which they are asked for, so none is overwritten or read too early. DALI itself makes its
operators wait for its copies, and the stream of the step for its results.

A batch depends on its epoch and step alone, so those made ahead are those that would have been made later.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Tag = tuple[int, int]
"""Epoch, and step within it."""


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A CUDA stream for making batches; None on a CPU, whose cores are busy with the step."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def on_stream(stream: torch.cuda.Stream | None) -> AbstractContextManager:
    """Within it, this thread's CUDA work goes to the stream, if there is one."""
    return nullcontext() if stream is None else torch.cuda.stream(stream)


class BatchThread(Generic[T]):
    """Makes batches in a thread, one ahead of the one last taken.

    The thread ends with the program, or with this object, once the batch in progress is made.

    Args:
        make: from an epoch and a step to their batch; it is called in the thread only.
        after: the tag that follows another.
        stream: of the CUDA work in `make`.
    """

    def __init__(
        self, make: Callable[[int, int], T], after: Callable[[Tag], Tag], stream: torch.cuda.Stream | None
    ) -> None:
        self._make, self._after, self._stream = make, after, stream
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[Tag, Future[T]] | None = None

    def take(self, tag: Tag) -> T:
        """A batch; the one after it is begun. One that was made ahead and is not this one is dropped.

        Raises:
            Exception: as `make` raised it for this batch, which may then be asked for again.
        """
        ahead, self._ahead = self._ahead, None
        made = ahead[1] if ahead and ahead[0] == tag else self._begin(tag)
        batch = made.result()
        following = self._after(tag)
        self._ahead = following, self._begin(following)
        return batch

    def _begin(self, tag: Tag) -> Future[T]:
        return self._pool.submit(_made_on, self._stream, self._make, tag)


def _made_on(stream: torch.cuda.Stream | None, make: Callable[[int, int], T], tag: Tag) -> T:
    with on_stream(stream):
        return make(*tag)
