"""Networks as a configuration describes them, and trained ones as a run left them.

A weights file (`checkpoints/best.pt`, `last.pt`) says with its weights what they are for: the configuration, the
modalities and their order, the spacing, and what the label values of its training data mean. So nothing has to be
repeated, or can be mistaken, where a network is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import load_weights
from engine.config import Config, ModelConfig, config_from_dict
from models import build_model, check_img_size
from pipelines.labels import REGIONS, Coding


@dataclass(frozen=True)
class Trained:
    """A trained network and all that belongs to it.

    Attributes:
        path: the weights file.
        network: in evaluation mode; float32 (N, C, X, Y, Z) of `config.data.crop_size_voxels` to logits (N, 3, ...).
        config: of the run.
        modalities: of the C channels, in order.
        coding: of the labels that it was trained on.
        epoch: after which the weights were taken.
        validation: Dice then, as in `metrics.json`.
        scans: what its training scans look like, see `pipelines.likeness`.
    """

    path: Path
    network: torch.nn.Module
    config: Config
    modalities: tuple[str, ...]
    coding: Coding
    epoch: int
    validation: dict[str, Any]
    scans: dict[str, Any]


def make_model(config: Config, channels: int) -> torch.nn.Module:
    """The network that `config` describes, for images of so many channels.

    Raises:
        ValueError: naming the option that does not fit.
    """
    chosen = config.model
    transformer = ModelConfig() if chosen.name == "unet" else chosen
    size = config.data.crop_size_voxels
    try:
        check_img_size(size)
    except ValueError as error:
        raise ValueError(f"--data.crop_size_voxels: {error}") from error
    try:
        return build_model(
            chosen.name,
            in_channels=channels,
            out_channels=len(REGIONS),
            img_size=size,
            feature_size=chosen.feature_size,
            hidden_size=transformer.hidden_size,
            mlp_dim=transformer.mlp_dim,
            num_heads=transformer.num_heads,
        )
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error


def weights_path(run: Path) -> Path:
    """The weights that a run is known by: `checkpoints/best.pt`, else `last.pt`; a file is taken as it is.

    Raises:
        ValueError: there is neither.
    """
    if run.is_file():
        return run
    for path in (run / "checkpoints" / name for name in ("best.pt", "last.pt")):
        if path.is_file():
            return path
    raise ValueError(f"{run} is no run with weights (checkpoints/best.pt, last.pt), nor a weights file")


def load_trained(run: Path | str, device: torch.device | str = "cpu") -> Trained:
    """A trained network, on a device, ready to be used. No code from the file is run.

    Args:
        run: a run's folder, of which the best weights are taken, or a weights file.
        device: where the network goes.

    Raises:
        ValueError: no weights there, a damaged file, another program's, or one of a version that knew other options;
            weights of another network, or that are no numbers.
    """
    path = weights_path(Path(run))
    content = load_weights(path)
    try:
        config = config_from_dict(content["config"])
        tissues = {int(value): str(tissue) for value, tissue in content["tissues"].items()}
        regions = tuple(tuple(values) for values in content["regions"])
        if len(regions) != len(REGIONS):
            raise ValueError(f"it has {len(regions)} regions, must have {', '.join(REGIONS)}")
        coding = Coding(content["release"], tissues, regions)
        modalities = tuple(content["modalities"])
        network = make_model(config, len(modalities))
        epoch, validation, scans = (content[name] for name in ("epoch", "validation", "scans"))
        fault = misfit(network, content["weights"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise ValueError(
            f"{path} was written by another version of this program: {reason}; update this one, or use that one"
        ) from error
    if fault:
        raise ValueError(
            f"{path} holds the weights of another network than its configuration, {config.model.name}: {fault}; take a "
            "file as a run wrote it"
        )
    network.load_state_dict(content["weights"])
    broken = [name for name, value in network.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} of its tensors hold NaN or Inf ({_some(broken)}), and so would whatever it finds: "
            "take weights of an earlier epoch, or train again"
        )
    network.to(device).eval()
    return Trained(path, network, config, modalities, coding, epoch, validation, scans)


def misfit(network: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> str:
    """What keeps a state dict from being that of a network, in words; empty where nothing does."""
    expected = network.state_dict()
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    shapes = [
        f"{name} {tuple(weights[name].shape)}, must be {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(f"{len(names)} tensors are {what} ({_some(names)})" for what, names in found if names)


def _some(names: Sequence[str]) -> str:
    return f"{names[0]}{', ...' if len(names) > 1 else ''}"
