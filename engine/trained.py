"""Trained networks, as a run left them.

A weights file also holds what its weights are for: the configuration, the modalities and their order, the spacing, and
the meaning of the label values. So whoever uses the network need not repeat it and can't get it wrong. A file may come
from anybody: only the options that describe the network and its scans are used, none that download, make or write
files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.config import Config, config_from_dict
from engine.data import DataConfig
from engine.network import make_model
from engine.step import TrainConfig
from engine.weights_file import WeightsFile, written_by_this_version
from pipelines.basics.option_values import as_typed
from pipelines.basics.text import first_few
from pipelines.decathlon import TASK
from pipelines.layouts.labels import REGIONS, Coding

NOT_DESCRIPTIVE = ("download", "store_dir", "store_dtype", "residence", "workers", "prepare_on", "unprepared",
                   "augment")  # fmt: skip
"""Options of `--data` that say how volumes are made and kept, not what the scans are."""
DESCRIPTIVE = ("precision", "validation")
"""Options of `--train` that say how the network is run."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network and all that belongs to it.

    Attributes:
        path: the weights file.
        network: in evaluation mode; float32 (N, C, X, Y, Z) of `config.data.crop_size_voxels` to logits (N, 3, ...).
        config: the run's options about network and scans; all others have their defaults.
        modalities, coding, epoch, validation, scans: see `engine.weights_file.WeightsFile`.
    """

    path: Path
    network: torch.nn.Module
    config: Config
    modalities: tuple[str, ...]
    coding: Coding
    epoch: int
    validation: dict[str, Any]
    scans: dict[str, Any]

    def description(self) -> dict[str, Any]:
        """Its input and output in plain values: all that a program that runs it needs to know."""
        data = self.config.data
        return {
            "model": self.config.model.name,
            "modalities": list(self.modalities),
            "spacing_mm": list(data.spacing_mm),
            "spacing_axes": "R, A, S" if data.spacing_axes == "patient" else "those of the file",
            "orientation": "RAS",
            "crop_size_voxels": list(data.crop_size_voxels),
            "input": (
                "image: float32 (batch, modality, X, Y, Z), a window of crop_size_voxels; from each channel of the "
                "window the mean of its non-zero voxels is subtracted and it is divided by their standard deviation, "
                "zeros stay 0"
            ),
            "output": f"logits: float32 (batch, region, X, Y, Z) of the regions {', '.join(REGIONS)}, which overlap",
            "regions": list(REGIONS),
            "threshold": 0.0,
            "release": self.coding.release,
            "tissues": {str(value): tissue for value, tissue in self.coding.tissues.items()},
        }

    def metadata(self) -> dict[str, str]:
        """The description as text by name, as ONNX and safetensors files hold it; JSON where it is not text."""
        return {name: value if isinstance(value, str) else json.dumps(value)
                for name, value in self.description().items()}  # fmt: skip


def load_trained(run: Path | str, device: torch.device | str = "cpu") -> TrainedNetwork:
    """Load a trained network, ready to use. No code from the file is run.

    Args:
        run: a weights file, or a run's folder, of which `checkpoints/best.pt` is taken, else `last.pt`.
        device: where the network goes.

    Raises:
        ValueError: no weights there, a damaged file, another program's, or one of a version with other options; weights
            of another network, or with NaN or Inf.
    """
    places = (Path(run, *names) for names in ((), ("checkpoints", "best.pt"), ("checkpoints", "last.pt")))
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ValueError(f"{run} is not a run with weights (checkpoints/best.pt, last.pt), nor a weights file")
    file = WeightsFile.read(path)
    with written_by_this_version(path):
        config = descriptive_config(config_from_dict(file.config))
        with torch.device("meta"):  # takes no memory, whatever sizes the file names
            network = make_model(config.model, config.data.crop_size_voxels, len(file.modalities))
        fault = mismatch(network, file.weights)
    if fault:
        raise ValueError(
            f"{path} holds the weights of another network than its configuration, {config.model.name}: {fault}; use a "
            "file as a run wrote it"
        )
    network.load_state_dict({name: value.float().contiguous() for name, value in file.weights.items()}, assign=True)
    broken = [name for name, value in network.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} of its tensors hold NaN or Inf ({first_few(broken, 1)}), and so would its "
            "segmentations: take weights of an earlier epoch, or train again"
        )
    network.to(device).eval()
    return TrainedNetwork(path, network, config, file.modalities, file.coding, file.epoch, file.validation, file.scans)


def descriptive_config(config: Config) -> Config:
    """A configuration's options about the network and its scans, with scans where they were downloaded to.

    All others have their defaults, so that nothing is downloaded, made or written.
    """
    given, usual = config.data, DataConfig()
    data = replace(given, **{name: getattr(usual, name) for name in NOT_DESCRIPTIVE})
    if given.download and given.root is not None and given.root.name != TASK:
        data.root = given.root / TASK
    train = TrainConfig(**{name: getattr(config.train, name) for name in DESCRIPTIVE})
    if train.precision == "auto":  # no run wrote this: those record what they took
        train.precision = "float32"
    return Config(data=data, model=config.model, train=train)


def mismatch(network: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> str:
    """Why a state dict is not that of a network, in words; empty if it is."""
    expected = network.state_dict()
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        return "they are not tensors by name"
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    shapes = [
        f"{name} {tuple(weights[name].shape)}, must be {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and (weights[name].shape != value.shape or not weights[name].is_floating_point())
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(
        f"{len(names)} tensors are {what} ({first_few(list(map(as_typed, names)), 1)})"
        for what, names in found
        if names
    )
