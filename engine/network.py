"""The network that `--model.*` describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from models import NETWORKS, NetworkName, build_model, check_img_size, find_network
from pipelines.basics.option_values import number
from pipelines.labels import REGIONS


@dataclass
class ModelConfig:
    """The network; a width of None is the published one, and one that the network does not have is ignored."""

    name: NetworkName = "unetr"
    """UNETR as in self-attention-cv, UNETR as in MONAI, or MONAI's residual UNet."""
    feature_size: int | None = number(None, least=1, most=1024)
    """Channels at full resolution (16)."""
    hidden_size: int | None = number(None, least=1, most=65_536)
    """Width of the transformer (512; MONAI 768)."""
    mlp_dim: int | None = number(None, least=1, most=262_144)
    """Hidden width of the transformer's MLP (2048; MONAI 3072)."""
    num_heads: int | None = number(None, least=1, most=1024)
    """Attention heads (10; MONAI 12)."""


def widths_of(model: ModelConfig) -> dict[str, int]:
    """The widths of a network, by the names of its options: those given, and the published ones for the rest."""
    given = {name: getattr(model, name) for name in NETWORKS[model.name].widths}
    return {**NETWORKS[model.name].widths, **{name: width for name, width in given.items() if width is not None}}


def make_model(config: ModelConfig, crop_size: Sequence[int], channels: int) -> nn.Module:
    """A network with fresh weights.

    Args:
        crop_size: voxels on X, Y and Z. channels: of its images.

    Raises:
        ValueError: naming the option that does not fit.
    """
    try:
        network = find_network(config.name)
        check_img_size(crop_size, network.size_divisor)
    except ValueError as error:
        raise ValueError(f"--data.crop_size_voxels: {error}") from error
    try:
        return build_model(
            config.name,
            in_channels=channels,
            out_channels=len(REGIONS),
            img_size=crop_size,
            **{option: getattr(config, option) for option in network.widths},
        )
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error
