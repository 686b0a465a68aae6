"""Training crops of cases that are not prepared: files decoded in threads, resampled by the graph of `loading.raw`.

Every sample decodes its case again, which costs more than all the rest: what is trained on for more than a few epochs
is better prepared.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.cases import CaseSet
from pipelines.geometry import label_grid, target_grid
from pipelines.loading.dali import BUFFERS
from pipelines.loading.loaders import CropLoader
from pipelines.loading.raw import INPUTS, RawImage, Window, raw_graph
from pipelines.loading.sampling import Draw, Size, copy_crop
from pipelines.preparing.prepared_case import foreground_voxels
from pipelines.resample import resample_label
from pipelines.scans.nifti import read_case, read_grid
from pipelines.spacing import DEFAULT_SPACING, Spacing, patient_spacing


@dataclass(frozen=True)
class Decoded:
    """A case in memory: its raw image, and its label as prepared, uint8 (X, Y, Z, 1)."""

    image: RawImage
    label: NDArray[np.uint8]


class CaseReader:
    """Decodes cases in threads, ahead of their use, and keeps at most `capacity`, those in the making included.

    Args:
        decode: from the index of a case to the case; runs in any thread.
        capacity: at least 1.
        threads: that decode at the same time.
    """

    def __init__(self, decode: Callable[[int], Decoded], capacity: int, threads: int) -> None:
        self.decode, self.capacity = decode, capacity
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._cases: dict[int, Future[Decoded]] = {}

    def get(self, wanted: Sequence[int]) -> Decoded:
        """The first of the cases; the others are begun, in this order, as far as there is room, the rest dropped.

        Raises:
            CaseError: the first case has a fault. It is read anew the next time.
        """
        ahead = list(dict.fromkeys(wanted))[: self.capacity]
        for case in self._cases.keys() - set(ahead):
            if not self._cases[case].cancel():
                wait([self._cases[case]])  # it can't be stopped, and takes memory until it ends
            del self._cases[case]
        for case in ahead:
            if case not in self._cases:
                self._cases[case] = self._pool.submit(self.decode, case)
        try:
            return self._cases[ahead[0]].result()
        except Exception:
            del self._cases[ahead[0]]
            raise


class RawCases:
    """Cases that are in no store, as a loader asks for them: from headers, or decoded on demand."""

    def __init__(self, case_set: CaseSet, spacing: Spacing | Sequence[float]) -> None:
        self.cases, self.names, self.modalities = case_set.cases, case_set.names, case_set.modalities
        self.coding, self.spacing = case_set.coding, patient_spacing(spacing)
        grids = [read_grid(case.images[0]) for case in case_set.cases]
        self._shapes = [target_grid(shape[:3], affine, self.spacing).shape for shape, affine in grids]
        self._foreground: dict[int, NDArray[np.int32]] = {}  # at most 48 KB a case

    def index(self, name: str) -> int:
        """Position of a case."""
        return self.names.index(name)

    def shape(self, i: int) -> tuple[int, int, int]:
        """(X, Y, Z) of the prepared grid."""
        return self._shapes[i]

    def has_label(self, i: int) -> bool:
        """Whether the case has a label."""
        return self.cases[i].label is not None

    def foreground(self, i: int) -> NDArray[np.int32]:
        """As `Store.foreground`; the first time the case is decoded for it."""
        if i not in self._foreground:
            self.decode(i)
        return self._foreground[i]

    def decode(self, i: int) -> Decoded:
        """Read a case, and resample its label. Raises CaseError as `read_case`."""
        raw = read_case(self.cases[i], self.coding)
        assert raw.label is not None and raw.label_affine is not None, "check_loader refuses cases without a label"
        shape = raw.label.shape
        grid = target_grid(shape, raw.affine, self.spacing)
        own = label_grid(grid, shape, raw.label_affine, self.spacing)
        label = resample_label(raw.label, raw.label_affine, own)
        if i not in self._foreground:
            self._foreground[i] = foreground_voxels(label)
        return Decoded(RawImage.of(raw.image, raw.affine, grid), label[..., None])


class RawLoader(CropLoader):
    """The crops of `TrainLoader`, of cases that are not prepared: resampled and oriented on the way.

    Args:
        case_set: the cases; only their headers are read before the first batch.
        names: cases to train on.
        crop_size: (X, Y, Z) in voxels of the prepared grid.
        batch_size, seed, options: as in `CropLoader`; as many threads decode as DALI has. At most `batch_size` + 2
            decoded cases are in memory (143 MB each for BraTS), and `BUFFERS` batches of boxes (80 MB a sample of
            128 x 128 x 64 at 1.5 x 1.5 x 2.0 mm from 1 mm).
        spacing: voxel size after resampling, as in `store.prepare`.

    Raises:
        CaseError: a header can't be read; while it runs: any fault of `read_case`.
        DataError, ValueError: as `CropLoader`.
    """

    def __init__(
        self,
        case_set: CaseSet,
        names: Sequence[str],
        crop_size: Size,
        batch_size: int,
        seed: int = 0,
        spacing: Spacing | Sequence[float] = DEFAULT_SPACING,
        **options: Any,
    ) -> None:
        cases = RawCases(case_set.select(names), spacing)
        super().__init__(cases, names, crop_size, batch_size, seed, **options)
        self._reader = CaseReader(cases.decode, batch_size + 2, options.get("threads", 2))
        self._boxes = deque([np.empty(0, np.float32)] * batch_size for _ in range(BUFFERS))
        self._in_use: deque[tuple] = deque(maxlen=BUFFERS)  # DALI reads them in place
        self._stream = self._start(partial(raw_graph, extras=self.extras))

    def _read(self, epoch: int, step: int, tags: NDArray[np.int64]) -> tuple[tuple, tuple]:
        self._boxes.rotate()
        ahead = self._ahead(epoch, step)
        samples = [
            self._sample(b, epoch, position, ahead[b:]) for b, (_, position) in enumerate(self._batch(epoch, step))
        ]
        windows, labels, draws = zip(*samples, strict=True)
        inputs = tuple([getattr(window, name) for window in windows] for name in INPUTS)
        self._in_use.append((inputs, (np.stack(labels), *self._numbers(draws, epoch, step, tags))))
        return self._in_use[-1]

    def _ahead(self, epoch: int, step: int) -> list[int]:
        """Cases of the samples of a batch, and of as many after it as the reader may have begun by its last one."""
        first, steps = epoch * len(self) + step, -(-self._reader.capacity // self.batch_size)
        tags = [divmod(n, len(self)) for n in range(first, first + 1 + steps)]
        return [self.indices[case] for tag in tags for case, _ in self._batch(*tag)]

    def _sample(
        self, b: int, epoch: int, position: int, ahead: Sequence[int]
    ) -> tuple[Window, NDArray[np.uint8], Draw]:
        decoded = self._reader.get(ahead)
        draw = self._draw(epoch, position, ahead[0])
        label = np.empty((*self.crop_size, 1), np.uint8)
        copy_crop(decoded.label, draw.start, label[::-1] if draw.flip else label)
        window = decoded.image.window(draw.start, self.crop_size, draw.flip)
        if self._boxes[0][b].size < window.box.size:
            self._boxes[0][b] = np.empty(window.box.size, np.float32)
        box = self._boxes[0][b][: window.box.size].reshape(window.box.shape)
        np.copyto(box, window.box)
        return replace(window, box=box), label, draw
