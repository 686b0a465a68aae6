"""MONAI's residual UNet: four halvings, four doublings, two-convolution residual units with PReLU.

    channels (f, 2f, 4f, 8f, 16f), f = 16 in the tutorial
    UNet(channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2)

    x -> down0 (f, 1/2) -> down1 (2f, 1/4) -> down2 (4f, 1/8) -> down3 (8f, 1/16) -> bottom (16f, 1/16)
           |                 |                  |                  | concatenate      |
           v                 v                  v                  v                  v
         up0 (regions, 1) <- up1 (f, 1/2) <---- up2 (2f, 1/4) <--- up3 (4f, 1/8) <----+

A residual unit is (conv - instance norm - PReLU) x 2 plus its input; the sum comes after the activation and outside
the fused operation, unlike UNETR's. Its input passes a strided 3 x 3 x 3 convolution where the unit halves, 1 x 1 x 1
where only the channels change. Each up is a transposed convolution (kernel 3, stride 2) - norm - PReLU, then a
residual unit of one convolution, which at the last level is bare. PReLU has one slope for all channels, 0.25 at
first. Norms have no affine parameters.

Every level must halve evenly for the concatenations to fit: sizes are multiples of 16, any multiple, at each call.

Source: Kerfoot et al., Left-Ventricle Quantification Using Residual U-Net,
https://doi.org/10.1007/978-3-030-12029-0_40.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels.instance_norm import instance_norm
from models.convolutions import NormedConv3d, NormedConvTranspose3d, SameConv3d


class ConvNormAct(nn.Module):
    """Convolution, then instance norm and PReLU in one operation."""

    def __init__(self, conv: NormedConv3d | NormedConvTranspose3d) -> None:
        super().__init__()
        self.conv = conv
        self.slope = nn.Parameter(torch.full((1,), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return instance_norm(self.conv(x), negative_slope=self.slope)


class ResidualUnit(nn.Module):
    """(conv - norm - PReLU) x 2 plus its input through a convolution; halves each axis where `stride` is 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.unit0 = ConvNormAct(NormedConv3d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1))
        self.unit1 = ConvNormAct(NormedConv3d(out_channels, out_channels, kernel_size=3, padding=1))
        self.residual: nn.Module = (
            SameConv3d(in_channels, out_channels, kernel_size=1)
            if stride == 1
            else nn.Conv3d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.unit1(self.unit0(x)) + self.residual(x)


class Up(nn.Module):
    """Transposed convolution - norm - PReLU doubling each axis, then one convolution plus its input."""

    def __init__(self, in_channels: int, out_channels: int, last: bool) -> None:
        super().__init__()
        self.up = ConvNormAct(
            NormedConvTranspose3d(in_channels, out_channels, kernel_size=3, stride=2, padding=1, output_padding=1)
        )
        if last:
            self.unit: nn.Module = SameConv3d(out_channels, out_channels, kernel_size=3)
        else:
            self.unit = ConvNormAct(NormedConv3d(out_channels, out_channels, kernel_size=3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        return self.unit(y) + y


class UNet(nn.Module):
    """Residual UNet, (B, in_channels, X, Y, Z) -> logits (B, out_channels, X, Y, Z); X, Y, Z multiples of 16.

    Args:
        in_channels, out_channels: modalities; regions.
        feature_size: channels of the first level, doubled at each of the four below.

    Raises:
        ValueError: on a forward with volumes that are not a multiple of 16 on every axis.
    """

    def __init__(self, in_channels: int, out_channels: int, feature_size: int) -> None:
        super().__init__()
        widths = [feature_size * 2**level for level in range(5)]
        ins = [in_channels, *widths[:3]]
        outs = [out_channels, *widths[:3]]
        self.downs = nn.ModuleList(ResidualUnit(ins[level], widths[level], stride=2) for level in range(4))
        self.bottom = ResidualUnit(widths[3], widths[4], stride=1)
        # What comes up from below is as wide as the skip, except from the bottom, which is twice as wide.
        joined = [2 * widths[0], 2 * widths[1], 2 * widths[2], widths[3] + widths[4]]
        self.ups = nn.ModuleList(Up(joined[level], outs[level], last=level == 0) for level in range(4))

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        if any(size % 16 for size in x_BCXYZ.shape[2:]):
            raise ValueError(
                f"volumes of {tuple(x_BCXYZ.shape[2:])} voxels for the UNet, which halves four times: pad "
                "or crop each axis to a multiple of 16"
            )
        skips = []
        y = x_BCXYZ
        for down in self.downs:
            y = down(y)
            skips.append(y)
        y = self.bottom(y)
        for up, skip in zip(reversed(self.ups), reversed(skips), strict=True):
            y = up(torch.cat([skip, y], dim=1))
        return y
