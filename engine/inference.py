"""Scans to segmentations: one trained network, or the average of several.

    from engine.inference import Predictor

    predictor = Predictor("runs/my-run")
    segmentation = predictor.segment(["case_flair.nii.gz", "case_t1.nii.gz", "case_t1ce.nii.gz", "case_t2.nii.gz"])
    segmentation.save("case_segmentation.nii.gz")

A scan is resampled and oriented like those that the network was trained on, and predicted by sliding window (windows
are z-scored one by one, as training crops are). The probabilities of the three regions are resampled linearly to the
scan's own grid, where those above one half make the masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import file_digest, sha256
from itertools import combinations
from pathlib import Path
from threading import Condition

import numpy as np
import torch

from engine.precision import LOW_PRECISION, prepare_network, tf32
from engine.sliding_window import OVERLAP, sliding_window_logits
from engine.trained import TrainedNetwork, load_trained
from engine.windows_at_once import WindowsAtOnce
from kernels import dispatch
from pipelines.basics.errors import DataError
from pipelines.layouts.cases import Case
from pipelines.layouts.labels import (
    CODINGS,
    CYST,
    ENHANCING,
    NECROSIS,
    NON_ENHANCING,
    OEDEMA,
    REGIONS,
    TUTORIAL,
    Coding,
    coding_for_release,
)
from pipelines.layouts.names import in_order
from pipelines.preparing.domain_shift import duplicate_channels, scan_statistics, shift_warnings
from pipelines.scans.geometry import Grid, target_grid
from pipelines.scans.nifti import RawCase, read_case, read_grid, write_nifti
from pipelines.scans.nifti_header import affine_fault
from pipelines.scans.resample import BackToFile, resample_image


@dataclass(frozen=True)
class Prepared:
    """A scan as the network takes it.

    Attributes:
        image_1CXYZ: float32 on the prepared grid, not normalised, on the CPU; page-locked for a predictor on a GPU.
        grid: that grid.
        shape, affine: of the scan's file.
        warnings: how it differs from the training data.
    """

    image_1CXYZ: torch.Tensor
    grid: Grid
    shape: tuple[int, ...]
    affine: np.ndarray
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segmentation:
    """The regions found in a scan, on the scan's own grid.

    Attributes:
        masks_RXYZ: bool (3, X, Y, Z): TC, WT, ET, each where its probability is above one half. They need not be
            nested; the regions of `labels`, which are written and scored, are.
        affine: (4, 4), voxel index to mm (RAS+).
        coding: of the label map.
        probabilities_RXYZ: float32 (3, X, Y, Z), if asked for.
        warnings: how the scan differs from the training data.
        like: the scan's file, whose header a saved segmentation gets.
        made_by: see `Predictor.made_by`; it goes into that header.
    """

    masks_RXYZ: np.ndarray
    affine: np.ndarray
    coding: Coding
    probabilities_RXYZ: np.ndarray | None = None
    warnings: tuple[str, ...] = ()
    like: Path | None = field(default=None, repr=False)
    made_by: str = ""

    def masks_as(self, coding: Coding) -> np.ndarray:
        """The masks as a coding defines them, bool (3, X, Y, Z): only the tutorial counts its label 2 as enhancing."""
        if self.coding.release == TUTORIAL != coding.release:
            core, whole, non_enhancing = self.masks_RXYZ
            return np.stack([core | non_enhancing, whole, core & ~non_enhancing])
        return self.masks_RXYZ

    def labels(self, coding: Coding | str | None = None) -> np.ndarray:
        """uint8 (X, Y, Z). See `compose_labels`.

        Args:
            coding: of the result, or a release that has it; None: the coding of the network's training data.

        Raises:
            ValueError: an unknown release.
        """
        coding = self._as_coding(coding)
        return compose_labels(self.masks_as(coding), coding)

    def save(self, path: Path | str, coding: Coding | str | None = None) -> None:
        """Write the label map as NIfTI, with the scan's grid, units and codes, and how it was made in its header.

        Args:
            path: a name that ends in `.nii.gz`, or in `.nii` for a file that is not compressed. coding: as in `labels`.

        Raises:
            ValueError: another ending, or an unknown release.
            OSError: it can't be written.
        """
        coding = self._as_coding(coding)
        write_nifti(Path(path), self.labels(coding), self.affine, self.like, describe(coding, self.made_by))

    def save_probabilities(self, path: Path | str) -> None:
        """Write float32 (X, Y, Z, 3): TC, WT, ET, to a path as in `save`.

        Raises:
            ValueError: they were not kept, or the path has another ending.
            OSError: it can't be written.
        """
        if self.probabilities_RXYZ is None:
            raise ValueError("the probabilities were not kept: ask for them when segmenting (probabilities=True)")
        volume_XYZR = np.moveaxis(self.probabilities_RXYZ, 0, -1)
        write_nifti(Path(path), volume_XYZR, self.affine, self.like, describe(None, self.made_by))

    def _as_coding(self, coding: Coding | str | None) -> Coding:
        return coding_for_release(coding) if isinstance(coding, str) else coding or self.coding


def describe(coding: Coding | None, made_by: str) -> str:
    """How a saved file was made, in at most 79 characters, for its header.

    Args:
        coding: of a label map; None for probabilities. made_by: from `Predictor.made_by`.
    """
    kind = f"{coding.release} labels" if coding else "probabilities"
    if coding and coding.tissues != CODINGS.get(coding.release, coding).tissues:  # a dataset.json with other values
        kind += f" {sha256(repr(sorted(coding.tissues.items())).encode()).hexdigest()[:6]}"
    return f"glioforge: {kind}{', ' if made_by else ''}{made_by}"


class Predictor:
    """One trained network, or several whose probabilities are averaged.

    Kernels, TF32 and cuDNN's search for algorithms are set only while a predictor works; then the process has its own
    setting back. Threads may share a predictor. Predictors of different settings wait for each other.

    Args:
        runs: a run's folder or a weights file, or several. Members of an ensemble must have the same modalities,
            spacing and label coding; networks and crops may differ.
        device: "auto" takes a GPU if there is one; or torch's name of a device.
        flips: average over all eight mirror images too, which takes eight times as long.
        kernels: "auto", "triton" or "reference", as in training.

    Attributes:
        kernels_taken: a line for the log: what `kernels` means on this device and why.
        made_by: the weights and the way of predicting, which together determine a segmentation.

    Raises:
        ValueError: as `load_trained`; runs that don't go together; kernels that the device can't run.
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
        with dispatch.using(kernels, self.device) as self.kernels_taken:
            pass
        paths = [runs] if isinstance(runs, str | Path) else list(runs)
        if not paths:
            raise ValueError("no run is given: name a run's folder or a weights file")
        self.members = tuple(load_trained(path, self.device) for path in paths)
        _check_alike(self.members)
        first = self.members[0]
        self.modalities, self.coding, self.spacing = first.modalities, first.coding, first.config.data.spacing
        hashes = sorted(_file_hash(member.path) for member in self.members)
        self.made_by = f"weights {sha256(''.join(hashes).encode()).hexdigest()[:12]}{', flips' if flips else ''}"
        # On a CPU half precision would be slower and less exact.
        in_training = [member.config.train.precision for member in self.members]
        precisions = in_training if self.device.type == "cuda" else ["float32"] * len(self.members)
        self._networks = [prepare_network(member.network, each) for member, each in zip(self.members, precisions)]
        self._windows = [
            WindowsAtOnce(network, member.config.data.crop_size_voxels, len(self.modalities))
            for member, network in zip(self.members, self._networks)
        ]
        self._settings = partial(_SETTINGS.holding, kernels, self.device, set(precisions) == {"tf32"})
        self._mirrored = [axes for count in range(4 if flips else 1) for axes in combinations((2, 3, 4), count)]

    def segment(
        self,
        images: Sequence[Path | str] | Mapping[str, Path | str] | Path | str | np.ndarray,
        affine: np.ndarray | None = None,
        probabilities: bool = False,
    ) -> Segmentation:
        """Segment a scan.

        Args:
            images: NIfTI files, one for each of `modalities`, in any order if every name contains its modality
                (`case_t1ce.nii.gz`), else in the order of `modalities`; or a mapping from modality to file; one 4D
                file with them on its last axis; or an array (C, X, Y, Z).
            affine: of an array, (4, 4), voxel index to mm (RAS+).
            probabilities: keep them.

        Raises:
            ValueError: a file that can't be read; not the images that the network needs; one image given twice; weights
                that give NaN or infinite numbers for it.
        """
        if isinstance(images, np.ndarray):
            raw, like = _raw_of_array(images, affine, self.modalities), None
        else:
            case = self._case_of(images)
            raw, like = read_case(case, self.coding), case.images[0]
        scan = self.prepare(raw)
        return self.finish(scan, self.probabilities(scan), probabilities, like)

    def _case_of(self, images: Sequence[Path | str] | Mapping[str, Path | str] | Path | str) -> Case:
        given = list(images) if isinstance(images, Mapping) else None
        if isinstance(images, Mapping):
            images = list(images.values())
        files = tuple(map(Path, [images] if isinstance(images, str | Path) else images))
        count = len(self.modalities)
        if len(files) != 1 or count == 1 or given:
            return Case("scan", in_order(files, self.modalities, given), None, None)
        shape = read_grid(files[0])[0]
        if len(shape) > 3 and shape[3] != count:
            raise ValueError(
                f"{files[0]} has {shape[3]} images on its last axis: the network needs {count}, "
                f"{', '.join(self.modalities)}, and can't tell which they are; give a file of these alone"
            )
        return Case("scan", files, tuple(range(count)), None)

    def prepare(self, raw: RawCase) -> Prepared:
        """Resample and orient a scan as in training; on the CPU, in any thread.

        Raises:
            DataError: one image is given as two modalities.
        """
        shape, known = raw.image.shape[:3], self.members[0].scans
        grid = target_grid(shape, raw.affine, self.spacing)
        image_XYZC = resample_image(raw.image, raw.affine, grid)
        if fault := duplicate_channels(image_XYZC, known, self.modalities):
            raise DataError(fault)
        warnings = shift_warnings(scan_statistics(image_XYZC, raw.affine), known, self.modalities)
        image = torch.from_numpy(image_XYZC).permute(3, 0, 1, 2)[None].contiguous()
        if self.device.type == "cuda":
            image = image.pin_memory()  # here, where the GPU does not wait for it
        return Prepared(image, grid, shape, raw.affine, tuple(warnings))

    @torch.no_grad()
    def probabilities(self, scan: Prepared) -> torch.Tensor:
        """Probabilities of the three regions on the prepared grid: float32 (3, X', Y', Z'), on the device.

        Raises:
            DataError: logits that are NaN or infinite; their sigmoid would pass for a segmentation.
        """
        image = scan.image_1CXYZ.to(self.device, non_blocking=True)
        total: torch.Tensor | None = None
        extremes: list[torch.Tensor] = []
        with self._settings():
            for member, network, windows in zip(self.members, self._networks, self._windows, strict=True):
                size = member.config.data.crop_size_voxels
                for axes in self._mirrored:
                    mirrored = image.flip(axes) if axes else image
                    logits = windows.run(partial(sliding_window_logits, network, mirrored, size, OVERLAP))
                    extremes += torch.aminmax(logits)  # NaN where any is
                    part = (logits.flip(axes) if axes else logits).sigmoid_()[0]
                    total = part if total is None else total.add_(part)
        assert total is not None
        if not torch.stack(extremes).isfinite().all():  # waits for the device, once a case
            raise DataError(self._overflow())
        return total.div_(len(self.members) * len(self._mirrored))

    def _overflow(self) -> str:
        paths = ", ".join(str(member.path) for member in self.members)
        low = sorted({member.config.train.precision for member in self.members} & LOW_PRECISION.keys())
        in_float32 = f", or predict in float32 (a GPU computes in {', '.join(low)} here) by --device cpu"
        return (
            f"the logits of this scan are NaN or infinite, so there is no segmentation of it: {paths} overflows on it; "
            f"take weights of an earlier epoch{in_float32 if low and self.device.type == 'cuda' else ''}"
        )

    def finish(
        self, scan: Prepared, probabilities_RXYZ: torch.Tensor, keep: bool = False, like: Path | None = None
    ) -> Segmentation:
        """Resample probabilities to the scan's own grid and make the masks; in any thread.

        Args:
            scan: what was predicted. probabilities_RXYZ: from `probabilities`.
            keep: the probabilities too. like: file whose header a saved segmentation gets.
        """
        masks = np.empty((len(REGIONS), *scan.shape), bool)
        kept = np.empty(masks.shape, np.float32) if keep else None
        with self._settings():
            back = BackToFile(scan.grid, scan.shape, scan.affine, probabilities_RXYZ.device)
            for i, region in enumerate(probabilities_RXYZ):  # one at a time, for the memory
                if kept is None:
                    masks[i] = back.above(region, 0.5).cpu().numpy()
                else:
                    kept[i] = back(region).cpu().numpy()
                    masks[i] = kept[i] > 0.5
        return Segmentation(masks, scan.affine, self.coding, kept, scan.warnings, like, self.made_by)


class _ProcessSettings:
    """Kernels, TF32 and cuDNN's search, of the process. Threads that need the same ones share them; others wait."""

    def __init__(self) -> None:
        self.is_free, self.users = Condition(), 0
        self.held: object = None
        self.restore = ExitStack()

    @contextmanager
    def holding(self, kernels: dispatch.Kernels, device: torch.device, in_tf32: bool) -> Iterator[None]:
        wanted = (kernels, device, in_tf32)
        with self.is_free:
            self.is_free.wait_for(lambda: self.users == 0 or self.held == wanted)
            if self.users == 0:
                self.restore.enter_context(dispatch.using(kernels, device))
                self.restore.enter_context(tf32(in_tf32))
                self.restore.enter_context(_cudnn_search(device))
            self.held, self.users = wanted, self.users + 1
        try:
            yield
        finally:
            with self.is_free:
                self.users -= 1
                if self.users == 0:
                    self.restore.close()
                    self.is_free.notify_all()


@contextmanager
def _cudnn_search(device: torch.device) -> Iterator[None]:
    """Within it, cuDNN looks for the fastest algorithms on a GPU: windows have one size. Not if bits must repeat."""
    before, cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn
    if device.type == "cuda" and not (cudnn.deterministic or torch.are_deterministic_algorithms_enabled()):
        cudnn.benchmark = True
    try:
        yield
    finally:
        cudnn.benchmark = before


_SETTINGS = _ProcessSettings()


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _raw_of_array(image_CXYZ: np.ndarray, affine: np.ndarray | None, modalities: Sequence[str]) -> RawCase:
    """An array as a scan that was read; refuses one that is not a scan of these modalities."""
    if affine is None or image_CXYZ.ndim != 4 or len(image_CXYZ) != len(modalities):
        raise ValueError(
            f"an array is {image_CXYZ.shape}{' without an affine' if affine is None else ''}; it must be (C, X, Y, Z) "
            f"with the C = {len(modalities)} modalities {', '.join(modalities)}, and its affine (4, 4) given"
        )
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

    Enhancing tumour overrides core, and core overrides the rest of the whole tumour, so a voxel of an inner region is
    in the outer ones too. The regions don't say how much of the core that does not enhance is necrosis: all of it gets
    the coding's value of non-enhancing tumour, or else of necrosis. `engine.metrics.written_regions` inverts this.

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


def _check_alike(members: Sequence[TrainedNetwork]) -> None:
    def traits(member: TrainedNetwork) -> dict[str, object]:
        coding = member.coding.release, member.coding.regions
        return {"modalities": member.modalities, "spacing": member.config.data.spacing, "label coding": coding}

    for member in members[1:]:
        for (name, value), first in zip(traits(member).items(), traits(members[0]).values(), strict=True):
            if value != first:
                raise ValueError(
                    f"{member.path} has {name} {value}, {members[0].path} has {first}: an ensemble's runs must share it"
                )
