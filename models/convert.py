"""Weights of the reference packages to ours and back, exactly.

    "unetr"        self-attention-cv 1.2.3   self_attention_cv.UnetTr.UNETR
    "unetr_monai"  MONAI 1.6.1               monai.networks.nets.UNETR
    "unet"         MONAI 1.6.1               monai.networks.nets.UNet with strides (2, 2, 2, 2) and num_res_units=2

Each table below pairs our module's name with the reference's; a state dict's keys are those names plus weight or
bias. A key that is missing, or that no table foresees, is an error. One module depends on the widths: the UNETRs' first
residual block has a projection (`stem.conv3`) only where feature_size differs from in_channels, which the shape of its
first convolution tells. Values pass through unchanged, but for:

- the fused projection of self-attention-cv: its rows are ordered (feature, q|k|v, head), ours (q|k|v, head, feature),
  so rows are permuted. The number of heads cannot be read from the weights (510 rows a projection are 10 x 51 and
  also 15 x 34): give it where it is not 10.
- `norm_cross_attn` of MONAI's transformer blocks: created and never used (18,432 parameters at hidden size 768). They
  are dropped coming in; going back they are LayerNorm's initial ones and zeros, so that MONAI loads with strict=True.
- a perceptron patch embedding of MONAI (`proj_type="perceptron"`): a linear layer over a patch is a convolution of
  the patch's size, so coming in its weight is reordered, and the model computes the same. Going back always gives the
  convolution (`proj_type="conv"`)."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from models import MODELS
from models.vit import NUM_LAYERS, PATCH_SIZE

StateDict = dict[str, Tensor]
Pairs = list[tuple[str, str]]

PACKAGES = {"unetr": "self_attention_cv", "unetr_monai": "monai", "unet": "monai"}
"""Which package has the reference of a model."""

PERCEPTRON = "vit.patch_embedding.patch_embeddings.1."
PATCHES = "vit.patch_embedding.patch_embeddings."
STEM = "stem.conv1.weight"  # (feature_size, in_channels, 3, 3, 3)
UNUSED = re.compile(r"vit\.blocks\.\d+\.norm_cross_attn\.(weight|bias)")


def _block_pairs(ours: str, theirs: str, names: dict[str, str]) -> Pairs:
    return [(f"{ours}.{our_name}", f"{theirs}.{their_name}") for our_name, their_name in names.items()]


def _unetr_modules() -> tuple[Pairs, Pairs]:
    """(module pairs without a bias, module pairs with one) of self-attention-cv's UNETR."""
    bare: Pairs = [("vit.patch_embedding", "embed.patch_embeddings")]
    biased: Pairs = [("head", "out_conv.1")]
    for i in range(NUM_LAYERS):
        ours, theirs = f"vit.blocks.{i}", f"transformer.block_list.{i}"
        bare += _block_pairs(ours, theirs, {"attention.qkv": "mhsa.to_qvk", "attention.out": "mhsa.W_0"})
        biased += _block_pairs(
            ours, theirs, {"norm1": "norm_1", "norm2": "norm_2", "mlp.0": "linear.0", "mlp.3": "linear.3"}
        )
    for level, layer in ((1, 3), (2, 6), (3, 9)):
        bare += [(f"skip{level}.ups.{j}", f"z{layer}_blue_conv.blocks.{j}.block") for j in range(4 - level)]
    bare += [
        ("decoder3.up", "z12_deconv.block"),
        ("decoder2.up", "z9_deconv.block"),
        ("decoder1.up", "z6_deconv.block"),
        ("decoder0.up", "z3_deconv.block"),
    ]
    convs = {"conv1": "conv_block.0", "conv2": "conv_block.3", "conv3": "conv_down.0"}
    for ours, theirs in (
        ("stem", "init_conv"),
        ("decoder3.block", "z9_conv"),
        ("decoder2.block", "z6_conv"),
        ("decoder1.block", "z3_conv"),
        ("decoder0.block", "out_conv.0"),
    ):
        biased += _block_pairs(ours, theirs, convs)
    return bare, biased


def _unetr_monai_modules() -> tuple[Pairs, Pairs]:
    """(module pairs without a bias, module pairs with one) of MONAI's UNETR."""
    bare: Pairs = []
    biased: Pairs = [("vit.patch_embedding", PATCHES.rstrip(".")), ("vit.norm", "vit.norm"), ("head", "out.conv.conv")]
    for i in range(NUM_LAYERS):
        ours = theirs = f"vit.blocks.{i}"
        bare += _block_pairs(ours, theirs, {"attention.qkv": "attn.qkv"})
        biased += _block_pairs(
            ours,
            theirs,
            {
                "attention.out": "attn.out_proj",
                "norm1": "norm1",
                "norm2": "norm2",
                "mlp.0": "mlp.linear1",
                "mlp.3": "mlp.linear2",
            },
        )
    convs = {"conv1": "conv1.conv", "conv2": "conv2.conv"}
    projected = {**convs, "conv3": "conv3.conv"}
    for level in (1, 2, 3):
        encoder = f"encoder{level + 1}"
        bare.append((f"skip{level}.ups.0", f"{encoder}.transp_conv_init.conv"))
        for j in range(3 - level):
            bare.append((f"skip{level}.ups.{j + 1}", f"{encoder}.blocks.{j}.0.conv"))
            bare += _block_pairs(f"skip{level}.blocks.{j}", f"{encoder}.blocks.{j}.1", convs)
    bare += _block_pairs("stem", "encoder1.layer", projected)
    for level in range(4):
        ours, theirs = f"decoder{level}", f"decoder{level + 2}"
        bare.append((f"{ours}.up", f"{theirs}.transp_conv.conv"))
        bare += _block_pairs(f"{ours}.block", f"{theirs}.conv_block", projected)
    return bare, biased


def _unet_keys() -> dict[str, str]:
    """Our key -> MONAI UNet's, whose levels nest: model, model.1.submodule, model.1.submodule.1.submodule, ..."""
    biased: Pairs = []
    slopes: Pairs = []

    def add(ours: str, theirs: str) -> None:
        biased.append((f"{ours}.conv", f"{theirs}.conv"))
        slopes.append((f"{ours}.slope", f"{theirs}.adn.A.weight"))

    units = [(f"downs.{level}", f"model{'.1.submodule' * level}.0") for level in range(4)]
    for ours, theirs in [*units, ("bottom", f"model{'.1.submodule' * 4}")]:
        add(f"{ours}.unit0", f"{theirs}.conv.unit0")
        add(f"{ours}.unit1", f"{theirs}.conv.unit1")
        biased.append((f"{ours}.residual", f"{theirs}.residual"))
    for level in range(4):
        theirs = f"model{'.1.submodule' * level}.2"
        add(f"ups.{level}.up", f"{theirs}.0")
        if level == 0:
            biased.append(("ups.0.unit", f"{theirs}.1.conv.unit0.conv"))
        else:
            add(f"ups.{level}.unit", f"{theirs}.1.conv.unit0")
    return _keys([], biased) | dict(slopes)


def _keys(bare: Pairs, biased: Pairs) -> dict[str, str]:
    weights = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in [*bare, *biased]}
    return weights | {f"{ours}.bias": f"{theirs}.bias" for ours, theirs in biased}


def _key_table(name: str, state_dict: StateDict) -> dict[str, str]:
    """Our key -> the reference's; `state_dict`, of either, tells whether there is a projection in the stem."""
    if name == "unet":
        return _unet_keys()
    if name == "unetr":
        table = _keys(*_unetr_modules()) | {"vit.position_embedding": "embed.position_embeddings.abs_pos_enc"}
    elif name == "unetr_monai":
        table = _keys(*_unetr_monai_modules()) | {"vit.position_embedding": "vit.patch_embedding.position_embeddings"}
    else:
        raise ValueError(f"model {name!r} must be one of {', '.join(MODELS)}")
    stem = state_dict.get(STEM, state_dict.get(table[STEM]))
    if stem is not None and stem.shape[0] == stem.shape[1]:
        table = {ours: theirs for ours, theirs in table.items() if not ours.startswith("stem.conv3.")}
    return table


def _rename(state_dict: StateDict, table: dict[str, str], what: str) -> StateDict:
    missing = sorted(set(table) - set(state_dict))
    unexpected = sorted(set(state_dict) - set(table))
    if missing or unexpected:
        raise ValueError(
            f"these are not the weights of {what}: {len(missing)} keys missing{_first(missing)}, "
            f"{len(unexpected)} unexpected{_first(unexpected)}; give the state_dict "
            "of that model alone, without any prefix"
        )
    return {new: state_dict[old] for old, new in table.items()}


def _first(keys: list[str]) -> str:
    shown = ", ".join(keys[:3])
    return f" ({shown}{', ...' if len(keys) > 3 else ''})" if keys else ""


def _head_dim(weight: Tensor, num_heads: int) -> int:
    if num_heads < 1 or weight.shape[0] % (3 * num_heads):
        raise ValueError(
            f"num_heads {num_heads} does not fit a projection of {weight.shape[0]} rows, which must be "
            "a multiple of 3 x num_heads; give the num_heads that the model was built with"
        )
    return weight.shape[0] // (3 * num_heads)


def _perceptron_to_conv(state_dict: StateDict) -> StateDict:
    """MONAI's linear patch embedding, columns ordered (x, y, z, channel), as the convolution that computes the same."""
    result = dict(state_dict)
    weight = result.pop(f"{PERCEPTRON}weight")
    patches = weight.reshape(weight.shape[0], PATCH_SIZE, PATCH_SIZE, PATCH_SIZE, -1)
    result[f"{PATCHES}weight"] = patches.permute(0, 4, 1, 2, 3).contiguous()
    if f"{PERCEPTRON}bias" in result:
        result[f"{PATCHES}bias"] = result.pop(f"{PERCEPTRON}bias")
    return result


def from_reference(name: str, state_dict: StateDict, num_heads: int = 10) -> StateDict:
    """Weights of a reference model as weights of ours.

    Args:
        name: "unetr" (self-attention-cv), "unetr_monai" or "unet" (MONAI).
        state_dict: of the reference model, any widths.
        num_heads: heads of the reference model; used for "unetr" only.

    Returns:
        state dict that `build_model(name, ...)` of the same widths loads with strict=True.

    Raises:
        ValueError: an unknown name; keys missing or unexpected, which names them; heads that do not fit.
    """
    table = {theirs: ours for ours, theirs in _key_table(name, state_dict).items()}
    if name == "unetr_monai":
        state_dict = {key: value for key, value in state_dict.items() if not UNUSED.fullmatch(key)}
        if f"{PERCEPTRON}weight" in state_dict:
            state_dict = _perceptron_to_conv(state_dict)
    result = _rename(state_dict, table, f"the reference of {name!r}")
    if name == "unetr":
        for key in [key for key in result if key.endswith("attention.qkv.weight")]:
            weight = result[key]
            rows = weight.reshape(_head_dim(weight, num_heads), 3, num_heads, -1)
            result[key] = rows.permute(1, 2, 0, 3).reshape(weight.shape)
    return result


def to_reference(name: str, state_dict: StateDict, num_heads: int = 10) -> StateDict:
    """Weights of ours as weights of the reference model: the inverse of `from_reference`, same arguments and errors."""
    result = _rename(state_dict, _key_table(name, state_dict), f"our {name!r}")
    if name == "unetr":
        for key in [key for key in result if key.endswith("mhsa.to_qvk.weight")]:
            weight = result[key]
            rows = weight.reshape(3, num_heads, _head_dim(weight, num_heads), -1)
            result[key] = rows.permute(2, 0, 1, 3).reshape(weight.shape)
    if name == "unetr_monai":
        for i in range(NUM_LAYERS):
            norm = result[f"vit.blocks.{i}.norm1.weight"]
            result[f"vit.blocks.{i}.norm_cross_attn.weight"] = torch.ones_like(norm)
            result[f"vit.blocks.{i}.norm_cross_attn.bias"] = torch.zeros_like(norm)
    return result
