"""Scans to segmentations: one trained network, or the average of several.

    from engine.inference import Predictor

    predictor = Predictor("runs/my-run")
    segmentation = predictor.segment(["case_flair.nii.gz", "case_t1.nii.gz", "case_t1ce.nii.gz", "case_t2.nii.gz"])
    segmentation.save("case_segmentation.nii.gz")

A scan is resampled and oriented as those that the network was trained on, predicted by sliding window (windows are
z-scored one by one, as training crops are), and the probabilities of the three regions are resampled to the scan's own
grid, linearly, where those above one half make the masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from engine.sliding_window import sliding_window_logits
from engine.step import prepare_network, set_tf32
from engine.trained import Trained, load_trained
from kernels import dispatch
from pipelines.cases import Case, DataError
from pipelines.geometry import BackToFile, Grid, resample_image, target_grid
from pipelines.labels import CYST, ENHANCING, NECROSIS, NON_ENHANCING, OEDEMA, REGIONS, TUTORIAL, Coding
from pipelines.likeness import looks_of, unlike
from pipelines.nifti import RawCase, affine_fault, read_case, read_grid, write_nifti

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")


@dataclass(frozen=True)
class Prepared:
    """A scan as a network takes it.

    Attributes:
        image_1CXYZ: float32 on the prepared grid, not normalised, on the CPU.
        grid: that grid.
        shape, affine: of the scan's file.
        warnings: what about it is not as in training.
    """

    image_1CXYZ: torch.Tensor
    grid: Grid
    shape: tuple[int, ...]
    affine: np.ndarray
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segmentation:
    """What was found in a scan, on the scan's own grid.

    Attributes:
        masks_RXYZ: bool (3, X, Y, Z): TC, WT, ET.
        affine: (4, 4), voxel index to mm (RAS+).
        coding: of the label map.
        probabilities_RXYZ: float32 (3, X, Y, Z), where they were asked for.
        warnings: what about the scan is not as in training.
        like: the scan's file, whose header a saved one takes.
    """

    masks_RXYZ: np.ndarray
    affine: np.ndarray
    coding: Coding
    probabilities_RXYZ: np.ndarray | None = None
    warnings: tuple[str, ...] = ()
    like: Path | None = field(default=None, repr=False)

    def masks_as(self, coding: Coding) -> np.ndarray:
        """The masks as a coding means them, bool (3, X, Y, Z); what the tutorial calls enhancing is not, elsewhere."""
        if self.coding.release == TUTORIAL != coding.release:
            core, whole, non_enhancing = self.masks_RXYZ
            return np.stack([core | non_enhancing, whole, core & ~non_enhancing])
        return self.masks_RXYZ

    def labels(self, coding: Coding | None = None) -> np.ndarray:
        """uint8 (X, Y, Z), in a release's coding; None: that of the network's training data. See `compose_labels`."""
        coding = coding or self.coding
        return compose_labels(self.masks_as(coding), coding)

    def save(self, path: Path | str, coding: Coding | None = None) -> None:
        """Write the label map as NIfTI, with the scan's grid, units and codes.

        Raises:
            OSError: it can't be written.
        """
        write_nifti(Path(path), self.labels(coding), self.affine, self.like)

    def save_probabilities(self, path: Path | str) -> None:
        """Write float32 (X, Y, Z, 3): TC, WT, ET.

        Raises:
            ValueError: they were not kept.
            OSError: it can't be written.
        """
        if self.probabilities_RXYZ is None:
            raise ValueError("the probabilities were not kept: ask for them when segmenting (probabilities=True)")
        write_nifti(Path(path), np.moveaxis(self.probabilities_RXYZ, 0, -1), self.affine, self.like)


class Predictor:
    """One trained network, or several whose probabilities are averaged.

    Args:
        runs: a run's folder or a weights file, or several; of an ensemble all must have the same modalities, spacing
            and label coding, while networks and crops may differ.
        device: "auto" takes a GPU where there is one; or torch's name of a device.
        flips: average over all eight mirror images too, for eight times the time.
        kernels: "auto", "triton" or "reference", as in training.

    Raises:
        ValueError: as `load_trained`; runs that do not go together.
    """

    def __init__(
        self,
        runs: Path | str | Sequence[Path | str],
        device: torch.device | str = "auto",
        flips: bool = False,
        kernels: dispatch.Kernels = "auto",
    ) -> None:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(name)
        self.kernels_taken = dispatch.use(kernels, self.device)
        paths = [runs] if isinstance(runs, str | Path) else list(runs)
        if not paths:
            raise ValueError("no run is given: name a run's folder or a weights file")
        self.members = tuple(load_trained(path, self.device) for path in paths)
        first = self.members[0]
        _check_alike(self.members)
        self.modalities, self.coding = first.modalities, first.coding
        self.spacing = first.config.data.spacing
        # Halves are faster on a GPU alone; on a CPU they would be slower and less exact.
        self._networks = [
            prepare_network(member.network, member.config.train.precision if self.device.type == "cuda" else "float32")
            for member in self.members
        ]
        if self.device.type == "cuda":
            in_tf32 = all(member.config.train.precision == "tf32" for member in self.members)
            set_tf32(in_tf32)
        axes = (2, 3, 4)
        subsets = chain.from_iterable(combinations(axes, count) for count in range(4)) if flips else [()]
        self._mirrored = list(subsets)

    def segment(
        self,
        images: Sequence[Path | str] | Mapping[str, Path | str] | Path | str | np.ndarray,
        affine: np.ndarray | None = None,
        probabilities: bool = False,
    ) -> Segmentation:
        """Segment a scan.

        Args:
            images: NIfTI files, one for each of `modalities`, in that order, or by name; one 4D file with them on its
                last axis; or an array (C, X, Y, Z).
            affine: of an array, (4, 4), voxel index to mm (RAS+).
            probabilities: keep them.

        Raises:
            ValueError: a file that can't be read, or not the images that the network needs.
        """
        if isinstance(images, np.ndarray):
            if affine is None or images.ndim != 4 or len(images) != len(self.modalities):
                raise ValueError(
                    f"an array is {images.shape}{'' if affine is not None else ' without an affine'}; it must be "
                    f"(C, X, Y, Z) with the C = {len(self.modalities)} modalities {', '.join(self.modalities)}, and "
                    "its affine (4, 4) given"
                )
            return self.finish(*self._predicted(_raw(images, affine)), probabilities)
        case = self.case_of(images)
        return self.finish(*self._predicted(self.read(case)), probabilities, case.images[0])

    def _predicted(self, raw: RawCase) -> tuple[Prepared, torch.Tensor]:
        scan = self.prepare(raw)
        return scan, self.probabilities(scan)

    def case_of(self, images: Sequence[Path | str] | Mapping[str, Path | str] | Path | str, name: str = "scan") -> Case:
        """The case that files make up; see `segment`.

        Raises:
            ValueError: more or fewer files, or images in one file, than modalities, or not these.
        """
        if isinstance(images, Mapping):
            missing = [modality for modality in self.modalities if modality not in images]
            if missing:
                raise ValueError(
                    f"no {', '.join(missing)} among {', '.join(images)}: the network needs {', '.join(self.modalities)}"
                )
            images = [images[modality] for modality in self.modalities]
        files = tuple(Path(image) for image in ([images] if isinstance(images, str | Path) else images))
        count = len(self.modalities)
        if len(files) == 1 and count > 1:
            shape = read_grid(files[0])[0]
            if len(shape) > 3 and shape[3] != count:
                raise ValueError(
                    f"{files[0]} has {shape[3]} images on its last axis: the network needs {count}, "
                    f"{', '.join(self.modalities)}, and can't tell which they are; give a file of these alone"
                )
            return Case(name, files, tuple(range(count)), None)
        if len(files) != count:
            raise ValueError(
                f"{len(files)} files for a network of {count} modalities: give {', '.join(self.modalities)}, in this "
                "order, or one 4D file"
            )
        return Case(name, files, None, None)

    def read(self, case: Case) -> RawCase:
        """The files of a case, checked; its label too, where it has one.

        Raises:
            CaseError: a fault, with its path.
        """
        return read_case(case, self.coding)

    def prepare(self, raw: RawCase) -> Prepared:
        """Resampled and oriented as in training; on the CPU, in any thread."""
        shape = raw.image.shape[:3]
        grid = target_grid(shape, raw.affine, self.spacing)
        image_XYZC = resample_image(raw.image, raw.affine, grid)
        look = looks_of(image_XYZC, raw.affine)
        warnings = unlike(look, self.members[0].scans, self.modalities)
        image = torch.from_numpy(image_XYZC).permute(3, 0, 1, 2)[None].contiguous()
        return Prepared(image, grid, shape, raw.affine, tuple(warnings))

    @torch.no_grad()
    def probabilities(self, scan: Prepared) -> torch.Tensor:
        """Of the three regions on the prepared grid: float32 (3, X', Y', Z'), on the device."""
        image = scan.image_1CXYZ.to(self.device)
        total: torch.Tensor | None = None
        for member, network in zip(self.members, self._networks, strict=True):
            for axes in self._mirrored:
                window = member.config.data.crop_size_voxels
                logits = sliding_window_logits(network, image.flip(axes) if axes else image, window)
                part = (logits.flip(axes) if axes else logits).sigmoid_()[0]
                total = part if total is None else total.add_(part)
        assert total is not None
        return total.div_(len(self.members) * len(self._mirrored))

    def finish(
        self, scan: Prepared, probabilities_RXYZ: torch.Tensor, keep: bool = False, like: Path | None = None
    ) -> Segmentation:
        """From the prepared grid to the scan's own; in any thread.

        Args:
            scan: what was predicted. probabilities_RXYZ: what `probabilities` gave for it.
            keep: the probabilities too. like: file whose header a saved segmentation takes.
        """
        back = BackToFile(scan.grid, scan.shape, scan.affine, probabilities_RXYZ.device)
        masks = np.empty((len(REGIONS), *scan.shape), bool)
        kept = np.empty(masks.shape, np.float32) if keep else None
        for i, region in enumerate(probabilities_RXYZ):  # one at a time, for the memory
            values = back(region)
            masks[i] = (values > 0.5).cpu().numpy()
            if kept is not None:
                kept[i] = values.cpu().numpy()
        return Segmentation(masks, scan.affine, self.coding, kept, scan.warnings, like)


def _raw(image_CXYZ: np.ndarray, affine: np.ndarray) -> RawCase:
    """An array as a scan that was read.

    Raises:
        ValueError: no voxels, voxels that are no finite real numbers, or an affine that maps no volume.
    """
    affine = np.asarray(affine, np.float64)
    if not image_CXYZ.size or image_CXYZ.dtype.kind not in "buif" or not np.isfinite(image_CXYZ).all():
        raise ValueError(
            f"an array of {image_CXYZ.shape}, {image_CXYZ.dtype}: voxels must be finite real numbers (0 is the usual "
            "background), and at least one"
        )
    fault = affine_fault(affine) if affine.shape == (4, 4) else f"its affine is {affine.shape} and must be (4, 4)"
    if fault:
        raise ValueError(f"an array of {image_CXYZ.shape}: {fault}")
    return RawCase(np.moveaxis(image_CXYZ, 0, -1), None, affine, None)


def compose_labels(masks_RXYZ: np.ndarray, coding: Coding) -> np.ndarray:
    """A label map from overlapping regions.

    Enhancing tumour goes before core, and core before the rest of the whole tumour, so a voxel of an inner region is in
    the outer ones too. Core that does not enhance is the coding's non-enhancing tumour, or necrosis where it has no
    such value: the regions do not tell the two apart. `engine.metrics.written_regions` gives the result's regions.

    Args:
        masks_RXYZ: bool (3, X, Y, Z): TC, WT, ET. coding: of the result.

    Returns:
        uint8 (X, Y, Z).
    """
    value = {tissue: label for label, tissue in coding.tissues.items()}
    core, whole, enhancing = masks_RXYZ
    labels = np.zeros(whole.shape, np.uint8)
    labels[whole] = value[OEDEMA]
    labels[core] = next(value[tissue] for tissue in (NON_ENHANCING, NECROSIS, CYST, ENHANCING) if tissue in value)
    labels[enhancing] = value[ENHANCING]
    return labels


def in_stages(
    items: Sequence[A],
    read: Callable[[A], B],
    compute: Callable[[A, B], C],
    finish: Callable[[A, B, C], D],
) -> Iterator[tuple[A, D | DataError]]:
    """Work on items one after the other, the next being read and the last being finished meanwhile, in threads.

    Args:
        items: what to work on.
        read: runs in a thread, one item ahead. compute: runs here. finish: runs in another thread, one item behind.

    Yields:
        (item, what `finish` returned, or the DataError that one of the three raised), in order. Other errors are
        raised here. At most three items are in memory.
    """
    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "finish") as finisher:
        ahead = reader.submit(read, items[0]) if items else None
        behind: tuple[A, Future[D]] | None = None
        for i, item in enumerate(items):
            assert ahead is not None
            reading, ahead = ahead, reader.submit(read, items[i + 1]) if i + 1 < len(items) else None
            finishing: Future[D] = Future()
            try:
                content = reading.result()
                finishing = finisher.submit(finish, item, content, compute(item, content))
            except DataError as error:
                finishing.set_exception(error)
            if behind:
                yield behind[0], _outcome(behind[1])
            behind = item, finishing
        if behind:
            yield behind[0], _outcome(behind[1])


def _outcome(done: Future) -> Any:
    try:
        return done.result()
    except DataError as error:
        return error


def _check_alike(members: Sequence[Trained]) -> None:
    def traits(member: Trained) -> dict[str, object]:
        return {
            "modalities": member.modalities,
            "spacing": member.config.data.spacing,
            "label coding": (member.coding.release, member.coding.regions),
        }

    first = traits(members[0])
    for member in members[1:]:
        for name, value in traits(member).items():
            if value != first[name]:
                raise ValueError(
                    f"{member.path} has {name} {value}, {members[0].path} has {first[name]}: an ensemble's runs must "
                    "share it"
                )
