"""The networks by name, each equal to its reference weight for weight.

    unetr         UNETR of self-attention-cv 1.2.3, the tutorial's: 49,667,123 parameters at 4 x 128 x 128 x 64
    unetr_monai   UNETR of MONAI 1.6.1 with a convolution as patch embedding: 102,253,107 (MONAI counts 18,432 more
                  that it never uses: see models/references.py)
    unet          residual UNet of MONAI: 4,810,074

Every network takes (B, in_channels, X, Y, Z) and gives logits (B, out_channels, X, Y, Z). They know nothing of devices,
precision or distribution; initial weights follow the references' own distributions.

To add one: its file here, its entry in `NETWORKS`, and a test. All else reads the entry, and refuses what its empty
fields rule out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import nn

from kernels.attention import MAX_HEAD_DIM
from models.references import MONAI_UNET, MONAI_UNETR, SELF_ATTENTION_CV_UNETR, Reference, StateDict
from models.unet import UNet
from models.unetr import MONAI, SELF_ATTENTION_CV, UNETR, Variant


class Published(NamedTuple):
    """Published figures: epochs of training, and the best mean Dice, as a fraction."""

    epochs: int
    dice: float


@dataclass(frozen=True)
class Network:
    """An entry of `NETWORKS`.

    Fields:
        build: from (in_channels, out_channels, img_size) and, by keyword, `widths` (and `dropout`) to the module.
        title, colour: in tables and pictures.
        widths: the options of `--model` that it has, with their published values.
        size_divisor: each axis of a volume must be a multiple of it.
        has_dropout: whether `build` takes `dropout`.
        reference: the class of another package that it equals; None: its weights can't be converted.
        published: None: there are no figures to compare with.
        bundled_as: how a MONAI bundle makes it from its file here: "_target_", the class in that file, and constants of
            the file by argument. Empty where MONAI has the network, or it can't be bundled.
    """

    build: Callable[..., nn.Module]
    title: str
    colour: str
    widths: Mapping[str, int]
    size_divisor: int = 16
    has_dropout: bool = False
    reference: Reference | None = None
    published: Published | None = None
    bundled_as: Mapping[str, str] = field(default_factory=dict)


def _build_unetr(
    variant: Variant, in_channels: int, out_channels: int, img_size: Sequence[int], **widths: Any
) -> nn.Module:
    hidden_size, num_heads = widths["hidden_size"], widths["num_heads"]
    if num_heads > hidden_size:
        raise ValueError(f"num_heads {num_heads} must be at most hidden_size {hidden_size}: each head needs a feature")
    if hidden_size // num_heads > MAX_HEAD_DIM:
        fault = f"hidden_size {hidden_size} over {num_heads} heads is {hidden_size // num_heads} features each"
        enough = -(-hidden_size // MAX_HEAD_DIM)
        raise ValueError(f"{fault}; the limit is {MAX_HEAD_DIM}: use num_heads {enough} or more")
    if variant is MONAI and hidden_size % num_heads:
        fault = f"hidden_size {hidden_size} must be divisible by num_heads {num_heads} for MONAI's UNETR"
        raise ValueError(f"{fault}; try hidden_size {-(-hidden_size // num_heads) * num_heads}")
    return UNETR(variant, in_channels, out_channels, img_size, **widths)


def _widths(variant: Variant) -> dict[str, int]:
    return {"feature_size": 16} | {name: getattr(variant, name) for name in ("hidden_size", "mlp_dim", "num_heads")}


NETWORKS: dict[str, Network] = {
    "unetr": Network(
        partial(_build_unetr, SELF_ATTENTION_CV),
        title="UNETR of self-attention-cv",
        colour="#d55e00",
        widths=_widths(SELF_ATTENTION_CV),
        has_dropout=True,
        reference=SELF_ATTENTION_CV_UNETR,
        published=Published(180, 0.769),
        bundled_as={"_target_": "models.unetr.UNETR", "variant": "SELF_ATTENTION_CV"},
    ),
    "unetr_monai": Network(
        partial(_build_unetr, MONAI),
        title="UNETR of MONAI",
        colour="#009e73",
        widths=_widths(MONAI),
        has_dropout=True,
        reference=MONAI_UNETR,
        published=Published(180, 0.761),
    ),
    "unet": Network(
        lambda in_channels, out_channels, _, feature_size: UNet(in_channels, out_channels, feature_size),
        title="UNet",
        colour="#0072b2",
        widths={"feature_size": 16},
        reference=MONAI_UNET,
        published=Published(170, 0.766),
    ),
}
if TYPE_CHECKING:
    NetworkName = str
else:
    NetworkName = Literal[tuple(NETWORKS)]


def find_network(name: str) -> Network:
    """The entry of a network.

    Raises:
        ValueError: there is no such network.
    """
    if name not in NETWORKS:
        raise ValueError(f"model {name!r} must be one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def check_img_size(img_size: Sequence[int], divisor: int) -> None:
    """Refuse voxels on X, Y and Z that are not all multiples of `divisor`.

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
    """Number of parameters, with the frozen biases of models/convolutions.py."""
    return sum(parameter.numel() for parameter in model.parameters())


def build_model(
    name: str,
    in_channels: int,
    out_channels: int = 3,
    img_size: Sequence[int] = (128, 128, 64),
    dropout: float = 0.0,
    **widths: int | None,
) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: in `NETWORKS`.
        in_channels, out_channels: modalities; regions.
        img_size: voxels of the training crops on X, Y, Z, multiples of the network's `size_divisor`. The UNETRs take
            this size only.
        dropout: probability, in the transformers only.
        widths: any of the network's, in its entry; None = the published value. feature_size: channels at the top
            convolution level. hidden_size, mlp_dim, num_heads: widths of the transformer.

    Returns:
        the network, float32, on the CPU (or torch's default device), in training mode.

    Raises:
        ValueError: an unknown name, a size below 1 or an img_size that it cannot take, an option that it does not have,
            heads that do not fit hidden_size.
    """
    network = find_network(name)
    check_img_size(img_size, network.size_divisor)
    given: dict[str, Any] = {option: width for option, width in widths.items() if width is not None}
    for option, size in {"in_channels": in_channels, "out_channels": out_channels, **given}.items():
        if size < 1:
            raise ValueError(f"{option} {size} must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout} must be a probability from 0 up to, but not including, 1")
    usual = {**network.widths, **({"dropout": 0.0} if network.has_dropout else {})}
    given |= {"dropout": dropout} if dropout else {}
    unknown = [f"{option} {value}" for option, value in given.items() if option not in usual]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: {name} does not have this option; it takes {', '.join(usual)}")
    return network.build(in_channels, out_channels, img_size, **usual | given)


def from_reference(name: str, state_dict: StateDict, num_heads: int = 10) -> StateDict:
    """Weights of a reference model as weights of ours.

    Args:
        name: of our network, in `NETWORKS`.
        state_dict: of the reference model, any widths.
        num_heads: heads of the reference model; used for "unetr" only.

    Returns:
        state dict that `build_model(name, ...)` of the same widths loads with strict=True.

    Raises:
        ValueError: an unknown name, or one without a reference; keys missing or unexpected, which are named; heads that
            do not fit.
    """
    return _reference(name).to_ours(name, state_dict, num_heads)


def to_reference(name: str, state_dict: StateDict, num_heads: int = 10) -> StateDict:
    """Weights of ours as weights of the reference model: the inverse of `from_reference`, same arguments and errors."""
    return _reference(name).from_ours(name, state_dict, num_heads)


def _reference(name: str) -> Reference:
    reference = find_network(name).reference
    if reference is None:
        raise ValueError(f"no other package has our {name}: its weights can't be converted")
    return reference
