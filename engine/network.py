"""The network that `--model.*` describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from models import build_model, check_img_size
from pipelines.basics.option_values import number
from pipelines.labels import REGIONS


@dataclass
class ModelConfig:
    """The network; a width of None is that of the reference, and the UNet has no transformer to set widths of."""

    name: Literal["unetr", "unetr_monai", "unet"] = "unetr"
    """UNETR as in self-attention-cv, UNETR as in MONAI, or MONAI's residual UNet."""
    feature_size: int | None = number(None, least=1, most=1024)
    """Channels at full resolution (16)."""
    hidden_size: int | None = number(None, least=1, most=65_536)
    """Width of the transformer (512; MONAI 768)."""
    mlp_dim: int | None = number(None, least=1, most=262_144)
    """Hidden width of the transformer's MLP (2048; MONAI 3072)."""
    num_heads: int | None = number(None, least=1, most=1024)
    """Attention heads (10; MONAI 12)."""


def make_model(config: ModelConfig, crop_size: Sequence[int], channels: int) -> nn.Module:
    """A network with fresh weights.

    Args:
        crop_size: voxels on X, Y and Z. channels: of its images.

    Raises:
        ValueError: naming the option that does not fit.
    """
    transformer = ModelConfig() if config.name == "unet" else config
    try:
        check_img_size(crop_size)
    except ValueError as error:
        raise ValueError(f"--data.crop_size_voxels: {error}") from error
    try:
        return build_model(
            config.name,
            in_channels=channels,
            out_channels=len(REGIONS),
            img_size=crop_size,
            feature_size=config.feature_size,
            hidden_size=transformer.hidden_size,
            mlp_dim=transformer.mlp_dim,
            num_heads=transformer.num_heads,
        )
    except ValueError as error:
        raise ValueError(f"--model: {error}") from error
