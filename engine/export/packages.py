"""Weights of a trained network to and from the reference packages: MONAI and self-attention-cv.

What can be converted is in `models.NETWORKS`. No code from a file is run on the way in.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.config import Config, to_dict
from engine.network import make_model, widths_of
from engine.trained import TrainedNetwork, mismatch
from engine.weights_file import Unreadable, WeightsFile, read_archive
from models import NETWORKS, from_reference, to_reference
from models.references import Reference, StateDict
from pipelines.layouts.labels import REGIONS, Coding


def find_reference(name: str, package: str) -> Reference:
    """What a package has for one of our networks. Raises ValueError if that is nothing."""
    reference = NETWORKS[name].reference
    if reference is None or reference.package != package:
        others = [other for other, network in NETWORKS.items()
                  if network.reference and network.reference.package == package]  # fmt: skip
        raise ValueError(
            f"{package} does not have our {name}{f', {reference.package} does' if reference else ''}; {package} goes "
            f"with --model.name {' or '.join(others)}"
        )
    return reference


def reference_class(trained: TrainedNetwork, reference: Reference) -> tuple[str, dict[str, Any]]:
    """The package's class for a network, and the arguments that make one of the same widths."""
    size, widths = trained.config.data.crop_size_voxels, widths_of(trained.config.model)
    return reference.class_name, reference.arguments(len(trained.modalities), len(REGIONS), size, widths)


def reference_weights(trained: TrainedNetwork) -> StateDict:
    """The state dict of the reference package's network that computes the same. Raises ValueError if none does."""
    model = trained.config.model
    weights = to_reference(model.name, trained.network.state_dict(), widths_of(model).get("num_heads", 0))
    return {key: value.contiguous() for key, value in weights.items()}


def read_state_dict(path: Path) -> StateDict:
    """Read a state dict from a `.safetensors` file, or one of `torch.save`, without running code from it.

    Raises:
        ValueError: no such file, one that can't be read, or one that holds no state dict.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give the file of a state dict")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else read_archive(path)
    except (SafetensorError, Unreadable) as error:
        raise ValueError(
            f"{path} can't be read: {error}; save the state dict alone: torch.save(model.state_dict(), ...)"
        ) from error
    for name in ("state_dict", "model"):  # where training programs put it in their checkpoints
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (tensors by name): save model.state_dict()")
    return dict(content)


def import_weights(
    state_dict: StateDict, package: str, config: Config, modalities: tuple[str, ...], coding: Coding
) -> WeightsFile:
    """A weights file from another package's weights.

    Args:
        state_dict: of the package's model.
        package: "monai" or "self_attention_cv".
        config: model, spacing and crop; the rest goes into the file unchanged, but a precision of `auto` as float32.
        modalities, coding: what the channels are, and what label values to write.

    Raises:
        ValueError: a network that the package does not have, or weights that are not those of `config`.
    """
    name, widths = config.model.name, widths_of(config.model)
    find_reference(name, package)
    network = make_model(config.model, config.data.crop_size_voxels, len(modalities))
    weights = from_reference(name, state_dict, widths.get("num_heads", 0))
    if fault := mismatch(network, weights):
        raise ValueError(
            f"the weights are not those of a {name} with {len(modalities)} modalities, {widths} and crops of "
            f"{tuple(config.data.crop_size_voxels)}: set --model, --data.modalities and --data.crop_size_voxels as the "
            f"network was built ({fault})"
        )
    train = replace(config.train, precision="float32") if config.train.precision == "auto" else config.train
    return WeightsFile(weights, to_dict(replace(config, train=train)), 0, {}, modalities, coding, {})
