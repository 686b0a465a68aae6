"""The network that `--model.*` describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from models import NetworkName, build_model, check_img_size, find_network
from pipelines.basics.option_values import number
from pipelines.layouts.labels import REGIONS


@dataclass
class ModelConfig:
    """The network. A width of None is the published one; widths that the network does not have are ignored."""

    name: NetworkName = "unetr"
    """UNETR as in self-attention-cv (unetr) or as in MONAI (unetr_monai), or another network of MONAI."""
    feature_size: int | None = number(None, least=1, most=1024)
    """Channels at full resolution (16)."""
    hidden_size: int | None = number(None, least=1, most=65_536)
    """Width of the transformer (512; MONAI 768)."""
    mlp_dim: int | None = number(None, least=1, most=262_144)
    """Hidden width of the transformer's MLP (2048; MONAI 3072)."""
    num_heads: int | None = number(None, least=1, most=1024)
    """Attention heads (10; MONAI 12)."""


def widths_of(config: ModelConfig) -> dict[str, int]:
    """The widths of a network by their options: those given, and the published ones for the rest."""
    published = find_network(config.name).widths
    return {name: width if getattr(config, name) is None else getattr(config, name)
            for name, width in published.items()}  # fmt: skip


def make_model(config: ModelConfig, crop_size: Sequence[int], channels: int) -> nn.Module:
    """A network with fresh weights.

    Args:
        crop_size: voxels on X, Y and Z. channels: of its images.

    Raises:
        ValueError: naming the option that does not fit.
    """
    try:
        check_img_size(crop_size, find_network(config.name).size_divisor)
    except ValueError as error:
        raise ValueError(f"--data.crop_size_voxels: {error}") from error
    try:
        return build_model(config.name, channels, len(REGIONS), crop_size, **widths_of(config))
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error
