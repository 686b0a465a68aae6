"""The transformer half of both UNETRs: patches to tokens, twelve pre-norm blocks, four feature maps out.

    image (B, C, X, Y, Z) -> 16^3 patches -> tokens (B, N, D) + learned positions, N = X Y Z / 16^3
    block:  t = t + out(attention(norm1(t)));  t = t + mlp(norm2(t))
    after four of the layers: tokens back on the patch grid, (B, D, X/16, Y/16, Z/16)

Facts that decide the code:
- Query, key and value come from one projection whose rows are ordered (q|k|v, head, feature), so each of the three is
  a strided view (B, H, N, D / H) of its result with adjacent features. self-attention-cv orders them (feature, q|k|v,
  head); models/references.py permutes the rows of its weights.
- A head has dim // heads features: 51 for 512 / 10, so the projection is then 3 x 510 wide, not 3 x 512.
- self-attention-cv and MONAI differ in four ways only: which layers they take (`layers`), biases of the patch
  embedding and of the attention's output projection (`bias`), a last LayerNorm on the deepest tokens (`final_norm`),
  and the spread of the initial positions (`position_std`). All other initial values are those of torch's own layers,
  in both.

Source: Dosovitskiy et al., An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.attention import flash_attention

PATCH_SIZE = 16
NUM_LAYERS = 12


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, out_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * num_heads * self.head_dim, bias=False)
        self.out = nn.Linear(num_heads * self.head_dim, dim, bias=out_bias)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        batch, count, _ = tokens_BND.shape
        qkv = self.qkv(tokens_BND).view(batch, count, 3, self.num_heads, self.head_dim)
        q_BHND, k_BHND, v_BHND = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended_BHND = flash_attention(q_BHND, k_BHND, v_BHND)
        return self.out(attended_BHND.transpose(1, 2).reshape(batch, count, self.num_heads * self.head_dim))


class TransformerBlock(nn.Module):
    """Pre-norm transformer block of tokens (B, N, D): attention, then an MLP with exact GELU."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, out_bias: bool, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, num_heads, out_bias)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)
        )

    def forward(self, tokens_BND: Tensor) -> Tensor:
        tokens_BND = tokens_BND + self.dropout(self.attention(self.norm1(tokens_BND)))
        return tokens_BND + self.mlp(self.norm2(tokens_BND))


class VisionTransformer(nn.Module):
    """Twelve transformer blocks over 16^3 patches.

    Args:
        in_channels: modalities.
        img_size: voxels of the input on each axis, multiples of 16.
        dim, num_heads, mlp_dim: features of a token, heads, hidden features of the MLP.
        layers: layers, counted from 1 and rising to 12, whose tokens are returned.
        bias: bias in the patch embedding and in the attention's output projection.
        final_norm: LayerNorm on the tokens of the last layer.
        position_std: standard deviation of the initial position embeddings.
        dropout: on the embedded tokens, the attention's output and inside the MLP.
    """

    def __init__(
        self,
        in_channels: int,
        img_size: Sequence[int],
        dim: int,
        num_heads: int,
        mlp_dim: int,
        *,
        layers: Sequence[int],
        bias: bool,
        final_norm: bool,
        position_std: float,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.grid = tuple(size // PATCH_SIZE for size in img_size)
        self.patch_embedding = nn.Conv3d(in_channels, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE, bias=bias)
        self.position_embedding = nn.Parameter(torch.randn(1, math.prod(self.grid), dim) * position_std)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, mlp_dim, bias, dropout) for _ in range(NUM_LAYERS))
        self.norm = nn.LayerNorm(dim) if final_norm else nn.Identity()

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """Feature maps (B, dim, X/16, Y/16, Z/16) after each of `layers`, from a volume (B, C, X, Y, Z)."""
        tokens_BND = self.patch_embedding(x_BCXYZ).flatten(2).transpose(1, 2)
        tokens_BND = self.dropout(tokens_BND + self.position_embedding)
        extracted = []
        for layer, block in enumerate(self.blocks, start=1):
            tokens_BND = block(tokens_BND)
            if layer in self.layers:
                extracted.append(tokens_BND)
        extracted[-1] = self.norm(extracted[-1])
        return [tokens.transpose(1, 2).unflatten(2, self.grid) for tokens in extracted]
