"""UNETR: a vision transformer as encoder, convolutions that double the resolution four times as decoder.

    volume 128^3 ------ stem --------> f channels at 128^3  ------------> decoder0 -> head -> logits
      |                                                                      ^
      | vit layer 3  (8^3) -> skip1 -> 2 f at 64^3  ------------> decoder1 --+
      |                                                              ^
      | vit layer 6  (8^3) -> skip2 -> 4 f at 32^3  ----> decoder2 --+
      |                                                      ^
      | vit layer 9  (8^3) -> skip3 -> 8 f at 16^3 -> decoder3
      |                                                  ^
      | vit layer 12 (8^3) ------------------------------+

Level l is the resolution after l halvings. A decoder level doubles what comes from below, concatenates the skip, and
passes both through a residual block. Doubling is a transposed convolution of kernel and stride 2, f the
`feature_size`. A residual block is conv - norm - leaky ReLU - conv - norm, plus its input (through a 1 x 1 x 1 conv
and a norm where the channels change), then leaky ReLU; each norm + activation (+ residual) is one call of
`kernels.instance_norm`.

The two published versions differ in what `Variant` lists and in nothing else. One difference is easily missed: MONAI
indexes its list of layer outputs with 3, 6 and 9 from zero, and so takes layers 4, 7 and 10, where self-attention-cv
(and the paper) take 3, 6 and 9.

Positions are learned for one grid of patches, so a model takes volumes of exactly the size it was built for.

Source: Hatamizadeh et al., UNETR: Transformers for 3D Medical Image Segmentation, https://arxiv.org/abs/2103.10504.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from kernels.instance_norm import instance_norm, instance_norm_into
from models.concatenation import join, room_for
from models.convolutions import Doubling, NormedConv3d, ProjectionConv3d, SameConv3d
from models.vit import VisionTransformer

NEGATIVE_SLOPE = 0.01


@dataclass(frozen=True)
class Variant:
    """What distinguishes one published UNETR from the other.

    Fields:
        hidden_size, mlp_dim, num_heads: widths of the transformer where none are given.
        layers: transformer layers, counted from 1, whose tokens feed skip1, skip2, skip3 and decoder3.
        vit_bias, final_norm, position_std: see models/vit.py.
        conv_bias: biases in the convolutions of the residual blocks.
        skip_blocks: a residual block after each but the first transposed convolution of a skip.
    """

    hidden_size: int
    mlp_dim: int
    num_heads: int
    layers: tuple[int, int, int, int]
    vit_bias: bool
    final_norm: bool
    position_std: float
    conv_bias: bool
    skip_blocks: bool


SELF_ATTENTION_CV = Variant(
    hidden_size=512,
    mlp_dim=2048,
    num_heads=10,
    layers=(3, 6, 9, 12),
    vit_bias=False,
    final_norm=False,
    position_std=1.0,
    conv_bias=True,
    skip_blocks=False,
)
# MONAI truncates its initial positions at 100 standard deviations, which is to say not at all.
MONAI = Variant(
    hidden_size=768,
    mlp_dim=3072,
    num_heads=12,
    layers=(4, 7, 10, 12),
    vit_bias=True,
    final_norm=True,
    position_std=0.02,
    conv_bias=False,
    skip_blocks=True,
)


class ResidualBlock(nn.Module):
    """Two 3 x 3 x 3 convolutions with instance norms around a skip, (B, in, X, Y, Z) -> (B, out, X, Y, Z).

    `out`: a half of a `models.concatenation.Room`, which the result is written into if it can be.
    """

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = NormedConv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=bias)
        self.conv2 = NormedConv3d(out_channels, out_channels, kernel_size=3, padding=1, bias=bias)
        self.projected = in_channels != out_channels
        if self.projected:
            self.conv3 = ProjectionConv3d(in_channels, out_channels, bias)

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        residual, x = self.conv3(x) if self.projected else (x, x)
        y = self.conv2(instance_norm(self.conv1(x), negative_slope=NEGATIVE_SLOPE))
        # The cast acts only under autocast, on a float32 volume with as many channels as the block.
        residual = residual.to(y.dtype)
        return instance_norm_into(
            out, y, negative_slope=NEGATIVE_SLOPE, residual=residual, residual_norm=self.projected
        )


class Skip(nn.Module):
    """Transposed convolutions from the patch grid to the resolution of one decoder level; `out` as `ResidualBlock`."""

    def __init__(self, in_channels: int, out_channels: int, doublings: int, blocks: bool, bias: bool) -> None:
        super().__init__()
        self.ups = nn.ModuleList([Doubling(in_channels, out_channels)])
        self.ups.extend(Doubling(out_channels, out_channels) for _ in range(doublings - 1))
        self.blocks = nn.ModuleList(
            ResidualBlock(out_channels, out_channels, bias) for _ in range(doublings - 1) if blocks
        )

    def forward(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        last = len(self.ups) - 1
        for i, up in enumerate(self.ups):
            room = out if i == last else None
            has_block = i > 0 and self.blocks
            x = up(x, None if has_block else room)
            if has_block:
                x = self.blocks[i - 1](x, room)
        return x


class DecoderLevel(nn.Module):
    """Double the resolution, concatenate the skip, residual block."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool) -> None:
        super().__init__()
        self.up = Doubling(in_channels, out_channels)
        self.block = ResidualBlock(2 * out_channels, out_channels, bias)

    def forward(self, x: Tensor, skip: nn.Module, source: Tensor) -> Tensor:
        """`skip` takes `source` and gives the other half of the block's input."""
        room = room_for(x, self.up.out_channels)
        return self.block(join(self.up(x, room and room.left), skip(source, room and room.right), room))


class UNETR(nn.Module):
    """UNETR, (B, in_channels, X, Y, Z) -> logits (B, out_channels, X, Y, Z).

    Args:
        variant: `SELF_ATTENTION_CV` or `MONAI`.
        in_channels, out_channels: modalities; regions.
        img_size: voxels on each axis, multiples of 16; the only size that the model takes.
        feature_size: channels at full resolution; doubled at each of the three levels below.
        hidden_size, mlp_dim, num_heads: widths of the transformer.
        dropout: in the transformer. MONAI also drops attention weights, which exact fused attention has no place for.

    Raises:
        ValueError: on a forward with volumes of another size than `img_size`.
    """

    def __init__(
        self,
        variant: Variant,
        in_channels: int,
        out_channels: int,
        img_size: Sequence[int],
        feature_size: int,
        hidden_size: int,
        mlp_dim: int,
        num_heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size = tuple(img_size)
        self.vit = VisionTransformer(
            in_channels,
            img_size,
            hidden_size,
            num_heads,
            mlp_dim,
            layers=variant.layers,
            bias=variant.vit_bias,
            final_norm=variant.final_norm,
            position_std=variant.position_std,
            dropout=dropout,
        )
        bias, blocks = variant.conv_bias, variant.skip_blocks
        self.stem = ResidualBlock(in_channels, feature_size, bias)
        self.skip1 = Skip(hidden_size, feature_size * 2, 3, blocks, bias)
        self.skip2 = Skip(hidden_size, feature_size * 4, 2, blocks, bias)
        self.skip3 = Skip(hidden_size, feature_size * 8, 1, blocks, bias)
        self.decoder3 = DecoderLevel(hidden_size, feature_size * 8, bias)
        self.decoder2 = DecoderLevel(feature_size * 8, feature_size * 4, bias)
        self.decoder1 = DecoderLevel(feature_size * 4, feature_size * 2, bias)
        self.decoder0 = DecoderLevel(feature_size * 2, feature_size, bias)
        self.head = SameConv3d(feature_size, out_channels, kernel_size=1)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        if tuple(x_BCXYZ.shape[2:]) != self.img_size:
            raise ValueError(
                f"volumes of {tuple(x_BCXYZ.shape[2:])} voxels for a UNETR built for img_size {self.img_size}: its "
                "position embeddings fit one size; build it with the size of the crops, and predict larger volumes "
                "with a sliding window of that size"
            )
        z1, z2, z3, z4 = self.vit(x_BCXYZ)
        y = self.decoder3(z4, self.skip3, z3)
        y = self.decoder2(y, self.skip2, z2)
        y = self.decoder1(y, self.skip1, z1)
        y = self.decoder0(y, self.stem, x_BCXYZ)
        return self.head(y)
