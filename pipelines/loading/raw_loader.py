"""Training crops of cases that are not prepared: files decoded in threads, resampled by the pipeline of raw.py.

Every sample decodes its case again, which costs more than all the rest: to train for more than a few epochs, prepare
the cases instead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.layouts.cases import CaseSet
from pipelines.loading.batch_thread import side_stream
from pipelines.loading.dali import Batch, Stream, buffers_for
from pipelines.loading.loader_options import DEFAULT_OPTIONS, CropOptions, LoaderOptions
from pipelines.loading.loaders import CropLoader
from pipelines.loading.raw import ImageOnGrid, ResampleInputs, raw_pipeline
from pipelines.loading.sampling import CropDraw, copy_crop
from pipelines.preparing.prepared_case import foreground_voxels, prepared_label
from pipelines.scans.geometry import DEFAULT_SPACING, Spacing, as_spacing, target_grid
from pipelines.scans.nifti import read_case, read_grid


class DecodedCase(NamedTuple):
    """A case in memory: its raw image, and its label as prepared, uint8 (X, Y, Z, 1)."""

    image: ImageOnGrid
    label: NDArray[np.uint8]


class ReadAhead:
    """Decodes cases in threads before they are needed, and holds at most `capacity`, unfinished ones included.

    `decode` goes from the index of a case to the case, in any of `threads`.
    """

    def __init__(self, decode: Callable[[int], DecodedCase], capacity: int, threads: int) -> None:
        self.decode, self.capacity = decode, capacity
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._cases: dict[int, Future[DecodedCase]] = {}

    def get(self, wanted: Sequence[int]) -> DecodedCase:
        """The first of the cases; the next ones are started, in order, as far as there is room, and all others dropped.

        Raises:
            CaseError: the first case is faulty. It is read again the next time.
        """
        ahead = list(dict.fromkeys(wanted))[: self.capacity]
        for case in self._cases.keys() - set(ahead):
            if not self._cases[case].cancel():
                wait([self._cases[case]])  # a running one can't be stopped, and takes memory until it ends
            del self._cases[case]
        for case in ahead:
            if case not in self._cases:
                self._cases[case] = self._pool.submit(self.decode, case)
        try:
            return self._cases[ahead[0]].result()
        except Exception:
            del self._cases[ahead[0]]
            raise


class ScanSource:
    """Cases as a loader asks for them, straight from the scans: shapes from headers, the rest decoded on demand."""

    def __init__(self, case_set: CaseSet, spacing: Spacing | Sequence[float]) -> None:
        self.cases, self.names, self.modalities = case_set.cases, case_set.names, case_set.modalities
        self.coding, self.spacing = case_set.coding, as_spacing(spacing)
        grids = (read_grid(case.images[0]) for case in case_set.cases)
        self._shapes = [target_grid(shape[:3], affine, self.spacing).shape for shape, affine in grids]
        self._foreground: dict[int, NDArray[np.int32]] = {}  # at most 48 KB a case

    def index(self, name: str) -> int:
        return self.names.index(name)

    def shape(self, i: int) -> tuple[int, int, int]:  # (X, Y, Z) of the prepared grid
        return self._shapes[i]

    def has_label(self, i: int) -> bool:
        return self.cases[i].label is not None

    def foreground(self, i: int) -> NDArray[np.int32]:
        """As `Store.foreground`; the first call decodes the case."""
        if i not in self._foreground:
            self.decode(i)
        return self._foreground[i]

    def decode(self, i: int) -> DecodedCase:
        """Read a case, and resample its label. Raises CaseError as `read_case`."""
        raw = read_case(self.cases[i], self.coding)
        grid = target_grid(raw.image.shape[:3], raw.affine, self.spacing)
        label = prepared_label(raw, grid, self.spacing)
        if i not in self._foreground:
            self._foreground[i] = foreground_voxels(label)
        return DecodedCase(ImageOnGrid.of(raw.image, raw.affine, grid), label[..., None])


class RawLoader(CropLoader):
    """The crops of `TrainLoader`, of cases that are not prepared: resampled and oriented on the way.

    Args:
        case_set: the cases; only their headers are read before the first batch.
        names, crops: as in `CropLoader`.
        options: as in `CropLoader`; as many threads decode as DALI has. At most `batch_size` + 2 decoded cases are in
            memory (143 MB each for BraTS), and `buffers_for` batches of boxes (80 MB a sample of 128 x 128 x 64 at
            1.5 x 1.5 x 2.0 mm from 1 mm).
        spacing: voxel size after resampling, as in `store.prepare`.

    Raises:
        CaseError: a header can't be read; while it runs: any fault of `read_case`.
        DataError, ValueError: as `CropLoader`.
    """

    def __init__(
        self,
        case_set: CaseSet,
        names: Sequence[str],
        crops: CropOptions,
        options: LoaderOptions = DEFAULT_OPTIONS,
        spacing: Spacing | Sequence[float] = DEFAULT_SPACING,
    ) -> None:
        source = ScanSource(case_set.select(names), spacing)
        super().__init__(source, names, crops, options)
        self._ahead = ReadAhead(source.decode, crops.batch_size + 2, options.threads)
        self._boxes = deque([np.empty(0, np.float32)] * crops.batch_size for _ in range(buffers_for(options.device)))
        side, batch_size = side_stream(options.device), crops.batch_size
        self._stream = Stream(raw_pipeline, self._read, len(self), batch_size, options, side, extras=crops.extras)

    def _read(self, epoch: int, step: int) -> Batch:
        self._boxes.rotate()
        cases = self._cases_from(epoch, step)
        batch = enumerate(self._batch(epoch, step))
        samples = [self._sample(b, epoch, position, cases[b:]) for b, (_, position) in batch]
        inputs, labels, draws = zip(*samples, strict=True)
        return (*map(list, zip(*inputs, strict=True)), np.stack(labels)), self._numbers(draws, epoch, step)

    def _cases_from(self, epoch: int, step: int) -> list[int]:
        """Cases of the samples of a batch, and of as many after it as may be started while its last one is read."""
        first, steps = epoch * len(self) + step, -(-self._ahead.capacity // self.crops.batch_size)
        tags = [divmod(n, len(self)) for n in range(first, first + 1 + steps)]
        return [self.indices[case] for tag in tags for case, _ in self._batch(*tag)]

    def _sample(
        self, b: int, epoch: int, position: int, cases: Sequence[int]
    ) -> tuple[ResampleInputs, NDArray[np.uint8], CropDraw]:
        decoded = self._ahead.get(cases)
        draw = self._draw(epoch, position, cases[0])
        label = np.empty((*self.crops.crop_size, 1), np.uint8)
        copy_crop(decoded.label, draw.start, label[::-1] if draw.flip else label)
        inputs = decoded.image.crop(draw.start, self.crops.crop_size, draw.flip)
        if self._boxes[0][b].size < inputs.box.size:
            self._boxes[0][b] = np.empty(inputs.box.size, np.float32)
        box = self._boxes[0][b][: inputs.box.size].reshape(inputs.box.shape)
        np.copyto(box, inputs.box)
        return inputs._replace(box=box), label, draw
