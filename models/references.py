"""The reference packages' classes, and their weights as ours and back, exactly; `models.from_reference` takes a name.

    "unetr"        self-attention-cv 1.2.3   self_attention_cv.UnetTr.UNETR
    "unetr_monai"  MONAI 1.6.1               monai.networks.nets.UNETR
    "unet"         MONAI 1.6.1               monai.networks.nets.UNet with strides (2, 2, 2, 2) and num_res_units=2

The key tables pair our module's name with the reference's; a state dict's keys are those names plus weight or bias. A
key that is missing, or that no table foresees, is an error. One module depends on the widths: the UNETRs' first
residual block has a projection (`stem.conv3`) only where feature_size differs from in_channels, as the shape of its
first convolution shows. Values pass through unchanged, except:

- the fused projection of self-attention-cv: its rows are ordered (feature, q|k|v, head), ours (q|k|v, head, feature),
  so rows are permuted. The number of heads cannot be read from the weights (510 rows a projection are 10 x 51 and
  also 15 x 34): give it where it is not 10.
- `norm_cross_attn` of MONAI's transformer blocks: created and never used (18,432 parameters at hidden size 768). They
  are dropped coming in; going back they are LayerNorm's initial ones and zeros, so that MONAI loads with strict=True.
- a perceptron patch embedding of MONAI (`proj_type="perceptron"`): a linear layer over a patch is a convolution of
  the patch's size, so coming in its weight is reordered, and the model computes the same. Going back always gives the
  convolution (`proj_type="conv"`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from models.vit import NUM_LAYERS, PATCH_SIZE

StateDict = dict[str, Tensor]
Pairs = list[tuple[str, str]]

STEM = "stem.conv1.weight"  # (feature_size, in_channels, 3, 3, 3)
PERCEPTRON = "vit.patch_embedding.patch_embeddings.1."
PATCHES = "vit.patch_embedding.patch_embeddings."
UNUSED = re.compile(r"vit\.blocks\.\d+\.norm_cross_attn\.(weight|bias)")


@dataclass(frozen=True)
class Reference:
    """A class of another package that computes what one of our networks does.

    Fields:
        package: as `launch/convert.py --to` and `--from` name it.
        class_name: with its module.
        arguments: of the class, from (in_channels, out_channels, img_size, widths).
        keys: our key -> the package's.
        incoming, outgoing: further changes to a state dict with the package's keys, on the way to ours and back; the
            second argument is the number of heads.
    """

    package: str
    class_name: str
    arguments: Callable[[int, int, Sequence[int], Mapping[str, int]], dict[str, Any]]
    keys: Mapping[str, str]
    incoming: Callable[[StateDict, int], StateDict] = lambda state_dict, num_heads: state_dict
    outgoing: Callable[[StateDict, int], StateDict] = lambda state_dict, num_heads: state_dict

    def to_ours(self, name: str, state_dict: StateDict, num_heads: int) -> StateDict:
        """`models.from_reference` of the network with this name."""
        table = {theirs: ours for ours, theirs in self._key_table(state_dict).items()}
        return _rename(self.incoming(state_dict, num_heads), table, f"the reference of {name!r}")

    def from_ours(self, name: str, state_dict: StateDict, num_heads: int) -> StateDict:
        """`models.to_reference` of the network with this name."""
        renamed = _rename(state_dict, self._key_table(state_dict), f"our {name!r}")
        return self.outgoing(renamed, num_heads)

    def _key_table(self, state_dict: StateDict) -> Mapping[str, str]:
        """Our key -> the package's, without the stem's projection if a state dict, ours or theirs, has none."""
        stem = state_dict.get(STEM, state_dict.get(self.keys.get(STEM, "")))
        if stem is None or stem.shape[0] != stem.shape[1]:
            return self.keys
        return {ours: theirs for ours, theirs in self.keys.items() if not ours.startswith("stem.conv3.")}


def _rename(state_dict: StateDict, table: Mapping[str, str], what: str) -> StateDict:
    missing, unexpected = sorted(table.keys() - state_dict.keys()), sorted(state_dict.keys() - table.keys())
    if missing or unexpected:
        found = f"{len(missing)} keys missing{_first(missing)}, {len(unexpected)} unexpected{_first(unexpected)}"
        remedy = "give the state_dict of that model alone, without any prefix"
        raise ValueError(f"these are not the weights of {what}: {found}; {remedy}")
    return {new: state_dict[old] for old, new in table.items()}


def _first(keys: list[str]) -> str:
    return f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""


def _block_pairs(ours: str, theirs: str, names: dict[str, str]) -> Pairs:
    return [(f"{ours}.{our_name}", f"{theirs}.{their_name}") for our_name, their_name in names.items()]


def _keys(bare: Pairs, biased: Pairs) -> dict[str, str]:
    weights = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in [*bare, *biased]}
    return weights | {f"{ours}.bias": f"{theirs}.bias" for ours, theirs in biased}


# UNETR of self-attention-cv


def _unetr_keys() -> dict[str, str]:
    bare: Pairs = [("vit.patch_embedding", "embed.patch_embeddings")]
    biased: Pairs = [("head", "out_conv.1")]
    for i in range(NUM_LAYERS):
        ours, theirs = f"vit.blocks.{i}", f"transformer.block_list.{i}"
        bare += _block_pairs(ours, theirs, {"attention.qkv": "mhsa.to_qvk", "attention.out": "mhsa.W_0"})
        names = {"norm1": "norm_1", "norm2": "norm_2", "mlp.0": "linear.0", "mlp.3": "linear.3"}
        biased += _block_pairs(ours, theirs, names)
    for level, layer in ((1, 3), (2, 6), (3, 9)):
        bare += [(f"skip{level}.ups.{j}", f"z{layer}_blue_conv.blocks.{j}.block") for j in range(4 - level)]
    convs = {"conv1": "conv_block.0", "conv2": "conv_block.3", "conv3": "conv_down.0"}
    biased += _block_pairs("stem", "init_conv", convs)
    blocks = ((3, "z12_deconv", "z9_conv"), (2, "z9_deconv", "z6_conv"), (1, "z6_deconv", "z3_conv"),
              (0, "z3_deconv", "out_conv.0"))  # fmt: skip
    for level, up, block in blocks:
        bare.append((f"decoder{level}.up", f"{up}.block"))
        biased += _block_pairs(f"decoder{level}.block", block, convs)
    return _keys(bare, biased) | {"vit.position_embedding": "embed.position_embeddings.abs_pos_enc"}


def _reorder_rows(state_dict: StateDict, num_heads: int, to_ours: bool) -> StateDict:
    """Rows of the fused projections from (feature, q|k|v, head) to (q|k|v, head, feature), or back."""
    result = dict(state_dict)
    for key, weight in state_dict.items():
        if not key.endswith("mhsa.to_qvk.weight"):
            continue
        if num_heads < 1 or len(weight) % (3 * num_heads):
            raise ValueError(
                f"num_heads {num_heads} does not fit a projection of {len(weight)} rows, which must be "
                "a multiple of 3 x num_heads; give the num_heads that the model was built with"
            )
        if to_ours:
            rows = weight.reshape(-1, 3, num_heads, weight.shape[1]).permute(1, 2, 0, 3)
        else:
            rows = weight.reshape(3, num_heads, -1, weight.shape[1]).permute(2, 0, 1, 3)
        result[key] = rows.reshape(weight.shape)
    return result


SELF_ATTENTION_CV_UNETR = Reference(
    package="self_attention_cv",
    class_name="self_attention_cv.UnetTr.UNETR",
    arguments=lambda in_channels, out_channels, img_size, widths: {
        "img_shape": tuple(img_size),
        "input_dim": in_channels,
        "output_dim": out_channels,
        "embed_dim": widths["hidden_size"],
        "num_heads": widths["num_heads"],
        "dim_linear_block": widths["mlp_dim"],
        "base_filters": widths["feature_size"],
    },
    keys=_unetr_keys(),
    incoming=partial(_reorder_rows, to_ours=True),
    outgoing=partial(_reorder_rows, to_ours=False),
)


# UNETR of MONAI


def _unetr_monai_keys() -> dict[str, str]:
    bare: Pairs = []
    biased: Pairs = [("vit.patch_embedding", PATCHES.rstrip(".")), ("vit.norm", "vit.norm"), ("head", "out.conv.conv")]
    for i in range(NUM_LAYERS):
        ours = theirs = f"vit.blocks.{i}"
        bare += _block_pairs(ours, theirs, {"attention.qkv": "attn.qkv"})
        names = {"attention.out": "attn.out_proj", "norm1": "norm1", "norm2": "norm2"}
        biased += _block_pairs(ours, theirs, {**names, "mlp.0": "mlp.linear1", "mlp.3": "mlp.linear2"})
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
    return _keys(bare, biased) | {"vit.position_embedding": "vit.patch_embedding.position_embeddings"}


def _without_unused(state_dict: StateDict, num_heads: int) -> StateDict:
    """Drop the unused norms, and make a perceptron patch embedding a convolution."""
    result = {key: value for key, value in state_dict.items() if not UNUSED.fullmatch(key)}
    weight = result.pop(f"{PERCEPTRON}weight", None)
    if weight is not None:  # columns ordered (x, y, z, channel)
        patches = weight.reshape(weight.shape[0], PATCH_SIZE, PATCH_SIZE, PATCH_SIZE, -1)
        result[f"{PATCHES}weight"] = patches.permute(0, 4, 1, 2, 3).contiguous()
        if f"{PERCEPTRON}bias" in result:
            result[f"{PATCHES}bias"] = result.pop(f"{PERCEPTRON}bias")
    return result


def _with_unused(state_dict: StateDict, num_heads: int) -> StateDict:
    for i in range(NUM_LAYERS):
        norm = state_dict[f"vit.blocks.{i}.norm1.weight"]
        state_dict[f"vit.blocks.{i}.norm_cross_attn.weight"] = torch.ones_like(norm)
        state_dict[f"vit.blocks.{i}.norm_cross_attn.bias"] = torch.zeros_like(norm)
    return state_dict


MONAI_UNETR = Reference(
    package="monai",
    class_name="monai.networks.nets.UNETR",
    arguments=lambda in_channels, out_channels, img_size, widths: {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "img_size": list(img_size),
        **widths,
        "proj_type": "conv",
    },
    keys=_unetr_monai_keys(),
    incoming=_without_unused,
    outgoing=_with_unused,
)


# UNet of MONAI


def _unet_keys() -> dict[str, str]:
    """MONAI's levels nest: model, model.1.submodule, model.1.submodule.1.submodule, ..."""
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


MONAI_UNET = Reference(
    package="monai",
    class_name="monai.networks.nets.UNet",
    arguments=lambda in_channels, out_channels, img_size, widths: {
        "spatial_dims": 3,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "channels": [widths["feature_size"] * 2**level for level in range(5)],
        "strides": [2, 2, 2, 2],
        "num_res_units": 2,
    },
    keys=_unet_keys(),
)
