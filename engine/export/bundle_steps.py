"""Steps of a MONAI bundle that MONAI lacks; goes into the bundle as `scripts/steps.py`, see `engine.export.bundle`.

Besides this program's sliding window it needs only PyTorch and MONAI with nibabel, not ignite or MONAI's other extras.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.transforms import InvertibleTransform, MapTransform, Orientation, Transform
from monai.utils import TraceKeys
from nibabel.orientations import io_orientation

from engine.sliding_window import zscore_nonzero

ENDINGS = (".nii", ".nii.gz")
AXES = (("L", "R"), ("P", "A"), ("I", "S"))  # from where to where each axis runs


def find_scans(folder: str, names: Mapping[str, Sequence[str]], channels: Sequence[int]) -> list[dict[str, Any]]:
    """Find the scans of a folder: its 4D files, and its folders with a file for each modality.

    Args:
        names: by modality, in the network's order, the words that its file may end with (before .nii or .nii.gz, after
            "_" or "-" or as the whole name, in any letter case).
        channels: where the modalities are on the last axis of a 4D file.

    Returns:
        for each scan "image", a file or one for each modality, and "channels", those of a 4D file or None.

    Raises:
        ValueError: no scan, or a folder with no file or several for a modality.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"no folder {folder}: give the folder of the scans as --dataset_dir")
    scans: list[dict[str, Any]] = []
    for path in sorted(Path(folder).iterdir()):
        if _is_image(path):
            scans.append({"image": str(path), "channels": list(channels)})
        elif path.is_dir():
            files = [file for file in sorted(path.iterdir()) if _is_image(file)]
            if files:
                images = [_one_of(files, path, modality, words) for modality, words in names.items()]
                scans.append({"image": images, "channels": None})
    if not scans:
        raise ValueError(f"no scan in {folder}: it must hold 4D NIfTI files, or a folder for each scan")
    return scans


def _is_image(path: Path) -> bool:
    """Whether it is a NIfTI file, but none of those that macOS adds to archives, whose names begin with a dot."""
    return path.name.lower().endswith(ENDINGS) and not path.name.startswith(".")


def _one_of(files: Sequence[Path], folder: Path, modality: str, words: Sequence[str]) -> str:
    ends = tuple(f"{mark}{word.lower()}{ending}" for mark in "_-" for word in words for ending in ENDINGS)
    found = [file for file in files if f"_{file.name.lower()}".endswith(ends)]
    if len(found) != 1:
        raise ValueError(
            f"{folder} has {len(found)} files of {modality}, must have one, whose name ends in _{' or _'.join(words)}: "
            "rename it, or add its ending to file_names in configs/inference.json"
        )
    return str(found[0])


class SelectChannelsd(Transform):
    """Keep the channels of "image" that "channels" lists, in that order; all where it is None.

    Raises:
        ValueError: a scan without them, or with voxels that are NaN or Inf.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        image, channels = out["image"], out["channels"]
        name = image.meta["filename_or_obj"]
        if channels is not None:
            if max(channels) >= len(image):
                raise ValueError(
                    f"{name} has {len(image)} channel(s), but {list(channels)} are needed, counted from 0: give a 4D "
                    "file with all modalities on its last axis, or use --channels to say where each is"
                )
            out["image"] = image = image[list(channels)]
        if not torch.isfinite(image).all():
            raise ValueError(f"{name} has voxels that are NaN or Inf: repair it (0 is the usual background)")
        return out


class AxesInOrderd(MapTransform, InvertibleTransform):
    """Turn "image" to LPS if its axes don't run along R or L, A or P, S or I in this order: Spacing takes the voxel
    sizes in the order of the file's axes, and they are given in the patient's."""

    def __init__(self) -> None:
        super().__init__("image")
        self.turn = Orientation("LPS", labels=AXES)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        if io_orientation(out["image"].affine.numpy())[:, 0].tolist() != [0, 1, 2]:
            out["image"] = self.turn(out["image"])
        return out

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        done = out["image"].applied_operations
        if done and done[-1][TraceKeys.ID] == id(self.turn):
            out["image"] = self.turn.inverse(out["image"])
        return out


class RegionsToLabelsd(Transform):
    """From probabilities (3, X, Y, Z) of TC, WT and ET under "pred" to a label map (1, X, Y, Z).

    Enhancing tumour overrides core, and core overrides the rest of the whole tumour.

    Args:
        values: labels of core, oedema and enhancing tumour.
    """

    def __init__(self, values: Sequence[int]) -> None:
        self.values = tuple(values)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        core, whole, enhancing = out["pred"] > 0.5
        labels = torch.zeros_like(out["pred"][:1])
        for mask, value in ((whole, self.values[1]), (core, self.values[0]), (enhancing, self.values[2])):
            labels[0][mask] = value
        # Otherwise MONAI's writer takes X for the channel axis, and fails if Y and Z are not R and A.
        labels.meta["original_channel_dim"] = "no_channel"  # type: ignore[attr-defined]  # MONAI's MetaTensor
        out["pred"] = labels
        return out


class ZScoredWindows(torch.nn.Module):
    """A network that first z-scores the non-zero voxels of each channel of each window, as in training."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, windows_BCXYZ: torch.Tensor) -> torch.Tensor:
        return self.network(zscore_nonzero(torch.as_tensor(windows_BCXYZ).contiguous()))


class Evaluator:
    """Segments scans one after the other.

    Args:
        dataset: of dictionaries with "image" (C, X, Y, Z). network: for windows. inferer: of MONAI, for volumes.
        postprocessing: from logits under "pred" to a saved file. device: where the network is.
    """

    def __init__(
        self,
        dataset: Iterable[dict[Hashable, Any]],
        network: torch.nn.Module,
        inferer: Callable[..., torch.Tensor],
        postprocessing: Callable[[dict[Hashable, Any]], Any],
        device: torch.device,
    ) -> None:
        self.dataset, self.network, self.inferer = dataset, network.eval(), inferer
        self.postprocessing, self.device = postprocessing, device

    @torch.no_grad()
    def run(self) -> None:
        for scan in self.dataset:
            logits = self.inferer(scan["image"][None].to(self.device), self.network)
            self.postprocessing({**scan, "pred": logits[0].cpu()})
