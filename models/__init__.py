"""The three models by name, each equal to its reference weight for weight.

    unetr         UNETR of self-attention-cv 1.2.3, the seed's: 49,667,123 parameters at 4 x 128 x 128 x 64
    unetr_monai   UNETR of MONAI 1.6.1 with a convolution as patch embedding: 102,253,107 (MONAI counts 18,432 more
                  that it never uses: see models/convert.py)
    unet          residual UNet of MONAI: 4,810,074

Every model takes (B, in_channels, X, Y, Z) and gives logits (B, out_channels, X, Y, Z). They know nothing of devices,
precision or distribution; initial weights follow the references' own distributions.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kernels.attention import MAX_HEAD_DIM
from models.unet import UNet
from models.unetr import MONAI, SELF_ATTENTION_CV, UNETR

MODELS = ("unetr", "unetr_monai", "unet")
SIZE_DIVISOR = 16
FEATURE_SIZE = 16


def check_img_size(img_size: Sequence[int], divisor: int = SIZE_DIVISOR) -> None:
    """Refuse a volume size that the models cannot take.

    Args:
        img_size: voxels on X, Y and Z.
        divisor: what each must be a multiple of: 16 for all three models (patches of 16^3; four halvings).

    Raises:
        ValueError: naming the nearest valid size (the larger of two equally near).
    """
    sizes = tuple(img_size)
    if len(sizes) != 3:
        raise ValueError(f"img_size {sizes} must have three axes, X, Y and Z; for example (128, 128, 64)")
    if any(size < divisor or size % divisor for size in sizes):
        nearest = tuple(max(divisor, (size + divisor // 2) // divisor * divisor) for size in sizes)
        raise ValueError(f"img_size {sizes} must be divisible by {divisor} on every axis; try {nearest}")


def parameter_count(model: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _check_positive(**sizes: int | None) -> None:
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} {size} must be at least 1")


def _check_heads(name: str, hidden_size: int, num_heads: int) -> None:
    if num_heads > hidden_size:
        raise ValueError(f"num_heads {num_heads} must be at most hidden_size {hidden_size}: each head needs a feature")
    if hidden_size // num_heads > MAX_HEAD_DIM:
        raise ValueError(
            f"hidden_size {hidden_size} over {num_heads} heads is {hidden_size // num_heads} features "
            f"each; the limit is {MAX_HEAD_DIM}: use num_heads {-(-hidden_size // MAX_HEAD_DIM)} or more"
        )
    if name == "unetr_monai" and hidden_size % num_heads:
        raise ValueError(
            f"hidden_size {hidden_size} must be divisible by num_heads {num_heads} for unetr_monai; "
            f"try hidden_size {-(-hidden_size // num_heads) * num_heads}"
        )


def build_model(
    name: str,
    in_channels: int,
    out_channels: int = 3,
    img_size: Sequence[int] = (128, 128, 64),
    feature_size: int | None = None,
    hidden_size: int | None = None,
    mlp_dim: int | None = None,
    num_heads: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """Build a model with fresh weights.

    Args:
        name: "unetr", "unetr_monai" or "unet".
        in_channels, out_channels: modalities; regions.
        img_size: voxels of the training crops on X, Y, Z, multiples of 16. The UNETRs take this size only.
        feature_size: channels at the top convolution level. None = 16.
        hidden_size, mlp_dim, num_heads: widths of the transformer, UNETRs only. None = the reference's own: 512,
            2048, 10 for "unetr", 768, 3072, 12 for "unetr_monai".
        dropout: probability, in the transformers only.

    Returns:
        the model, float32, on the CPU (or torch's default device), in training mode.

    Raises:
        ValueError: an unknown name, a size below 1, an img_size that is not a multiple of 16, heads that do not fit
            hidden_size, a transformer option or dropout for the UNet.
    """
    if name not in MODELS:
        raise ValueError(f"model {name!r} must be one of {', '.join(MODELS)}")
    check_img_size(img_size)
    _check_positive(
        in_channels=in_channels,
        out_channels=out_channels,
        feature_size=feature_size,
        hidden_size=hidden_size,
        mlp_dim=mlp_dim,
        num_heads=num_heads,
    )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} must be a probability from 0 up to, but not including, 1")
    feature_size = feature_size or FEATURE_SIZE
    if name == "unet":
        given = {"hidden_size": hidden_size, "mlp_dim": mlp_dim, "num_heads": num_heads, "dropout": dropout or None}
        wrong = [f"{option} {value}" for option, value in given.items() if value is not None]
        if wrong:
            raise ValueError(
                f"{', '.join(wrong)}: the unet has no transformer; set feature_size alone, or choose a unetr"
            )
        return UNet(in_channels, out_channels, feature_size)
    variant = SELF_ATTENTION_CV if name == "unetr" else MONAI
    hidden_size = hidden_size or variant.hidden_size
    mlp_dim = mlp_dim or variant.mlp_dim
    num_heads = num_heads or variant.num_heads
    _check_heads(name, hidden_size, num_heads)
    return UNETR(variant, in_channels, out_channels, img_size, feature_size, hidden_size, mlp_dim, num_heads, dropout)
