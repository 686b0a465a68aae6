"""The transformer half of both UNETRs: patches to tokens, twelve pre-norm blocks, four feature maps out.

    image (B, C, X, Y, Z) -> 16^3 patches -> tokens (B, N, D) + learned positions, N = X Y Z / 16^3
    block:  t = t + out(attention(norm1(t)));  t = t + mlp(norm2(t))
    after four of the layers: tokens back on the patch grid, (B, D, X/16, Y/16, Z/16)

Facts that decide the code:
- The tokens are a residual stream, float32 under autocast. Each norm adds the update of the layer before it, in one
  kernel; the tokens of a layer are therefore taken from the first norm of the next.
- So the position embeddings are the first tokens, and the patches the first update.
- The last product of an attention or MLP leaves its bias to the norm before it, which adds it to the stream at no cost
  and sums its gradient with its own. With dropout on that product the bias belongs inside; and a norm whose stream is
  taken as the tokens of a layer must not add to it.
- Query, key and value come from one projection whose rows are ordered (q|k|v, head, feature), which the attention reads
  as it is. self-attention-cv orders them (feature, q|k|v, head); models/references.py permutes the rows of its weights.
- A head has dim // heads features: 51 for 512 / 10, so the projection is then 3 x 510 wide, not 3 x 512, and its rows
  are no multiple of 16 bytes: see `AlignedLinear`.
- cuDNN is slow at a convolution that does not overlap, so the patch embedding is a product with the same weight.
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
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.attention import flash_attention_packed
from kernels.autocast import product_dtype
from kernels.layer_norm import residual_layer_norm

PATCH_SIZE = 16
NUM_LAYERS = 12


class PatchEmbedding(nn.Conv3d):
    """A 16^3 convolution of stride 16, as one copy of the patches and one product: (B, C, X, Y, Z) -> (B, N, D)."""

    def __init__(self, in_channels: int, dim: int, bias: bool) -> None:
        super().__init__(in_channels, dim, kernel_size=PATCH_SIZE, stride=PATCH_SIZE, bias=bias)

    def forward(self, x_BCXYZ: Tensor) -> Tensor:
        sizes = [size for axis in x_BCXYZ.shape[2:] for size in (axis // PATCH_SIZE, PATCH_SIZE)]
        # (B, C, X/16, 16, Y/16, 16, Z/16, 16), then a patch is read in the order in which the weight lies in memory
        patches = x_BCXYZ.view(*x_BCXYZ.shape[:2], *sizes)
        is_contiguous = self.weight.is_contiguous()
        weight = self.weight if is_contiguous else self.weight.permute(0, 2, 3, 4, 1)
        patches = patches.permute(0, 2, 4, 6, *((1, 3, 5, 7) if is_contiguous else (3, 5, 7, 1)))
        patches = patches.to(product_dtype(x_BCXYZ), memory_format=torch.contiguous_format)
        return F.linear(patches.flatten(4).flatten(1, 3), weight.flatten(1), self.bias)


class AlignedLinear(nn.Linear):
    """A linear layer whose weight may have rows and columns of zeros at the end, to multiples of `copy_multiple`.

    Rows of 16 bytes are what tensor cores read at full speed. So whoever runs the network on copies of its weights in
    half precision makes those of this layer so much larger; its own weight has no zeros.
    """

    copy_multiple = 8

    def forward(self, x: Tensor, adds_bias: bool = True) -> Tensor:
        """(..., in_features or the weight's columns) -> (..., the weight's rows)."""
        rows, columns = self.weight.shape
        bias: Tensor | None = self.bias if adds_bias else None
        if bias is not None and len(bias) < rows:
            bias = F.pad(bias, (0, rows - len(bias)))
        return F.linear(x if x.shape[-1] == columns else F.pad(x, (0, columns - x.shape[-1])), self.weight, bias)


class BiasedLinear(nn.Linear):
    """A linear layer that may leave its bias to its caller."""

    def forward(self, x: Tensor, adds_bias: bool = True) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight, self.bias if adds_bias else None)


class Mlp(nn.Sequential):
    """Two linear layers with exact GELU between them, each followed by dropout."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        first, last = nn.Linear(dim, hidden_dim), BiasedLinear(hidden_dim, dim)
        super().__init__(first, nn.GELU(), nn.Dropout(dropout), last, nn.Dropout(dropout))

    @property
    def bias(self) -> Tensor:
        """Of the last linear layer."""
        last = self[3]
        assert isinstance(last, BiasedLinear)
        return last.bias

    def forward(self, x: Tensor, adds_bias: bool = True) -> Tensor:
        """(..., dim) -> (..., dim), with `bias` or without."""
        first, gelu, dropout, last, last_dropout = self
        return last_dropout(last(dropout(gelu(first(x))), adds_bias))


class ResidualNorm(nn.LayerNorm):
    """LayerNorm of a residual stream with the last update added: (tokens, update) -> (tokens + update, its norm).

    A bias that the next update lacks is added to the first result alone. It may have zeros at the end, as those of
    `AlignedLinear`.
    """

    def forward(  # type: ignore[override]
        self, tokens_BND: Tensor, update_BND: Tensor | None, stream_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        dtype = product_dtype(tokens_BND)
        if stream_bias is not None:
            features = tokens_BND.shape[-1]
            stream_bias = stream_bias if len(stream_bias) == features else stream_bias[:features]
            stream_bias = stream_bias.to(dtype)  # rounded as autocast rounds the bias of a product
        return residual_layer_norm(tokens_BND, update_BND, self.weight, self.bias, self.eps, dtype, stream_bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention of tokens (B, N, D)."""

    def __init__(self, dim: int, num_heads: int, out_bias: bool) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = AlignedLinear(dim, 3 * num_heads * self.head_dim, bias=False)
        self.out = AlignedLinear(num_heads * self.head_dim, dim, bias=out_bias)

    def forward(self, tokens_BND: Tensor, adds_bias: bool = True) -> Tensor:
        """(B, N, D) -> (B, N, D), with the bias of the output projection or without."""
        columns = self.out.weight.shape[1]
        heads = flash_attention_packed(self.qkv(tokens_BND), self.num_heads, self.head_dim, out_columns=columns)
        out_BND = self.out(heads, adds_bias)
        return out_BND if out_BND.shape[-1] == self.dim else out_BND[..., : self.dim]


class TransformerBlock(nn.Module):
    """Pre-norm transformer block of tokens (B, N, D): attention, then an MLP with exact GELU.

    A norm adds to the tokens what the layer before it computed, its update; so a block begins with the update of the
    block before, and leaves its own to the next.
    """

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, out_bias: bool, dropout: float) -> None:
        super().__init__()
        self.norm1 = ResidualNorm(dim)
        self.attention = SelfAttention(dim, num_heads, out_bias)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = ResidualNorm(dim)
        self.mlp = Mlp(dim, mlp_dim, dropout)

    def forward(self, tokens_BND: Tensor, update_BND: Tensor | None, is_taken: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The tokens that enter, those before the MLP, and the MLP's update of these; each (B, N, D).

        The first have the attention's bias already, unless `is_taken`: they are a result. The second have the MLP's.
        """
        drops = self.training and self.dropout.p > 0
        out_bias = None if drops or is_taken else self.attention.out.bias
        mlp_bias = None if drops else self.mlp.bias
        entering_BND, normed_BND = self.norm1(tokens_BND, update_BND, out_bias)
        update_BND = self.dropout(self.attention(normed_BND, out_bias is None))
        tokens_BND, normed_BND = self.norm2(entering_BND, update_BND, mlp_bias)
        return entering_BND, tokens_BND, self.mlp(normed_BND, mlp_bias is None)


class VisionTransformer(nn.Module):
    """Twelve transformer blocks over 16^3 patches.

    Args:
        in_channels: modalities.
        img_size: voxels of the input on each axis, multiples of 16.
        dim, num_heads, mlp_dim: features of a token, heads, hidden features of the MLP.
        layers: layers, counted from 1 and rising to the last, whose tokens are returned.
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
        self.patch_embedding = PatchEmbedding(in_channels, dim, bias)
        self.position_embedding = nn.Parameter(torch.randn(1, math.prod(self.grid), dim) * position_std)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(dim, num_heads, mlp_dim, bias, dropout) for _ in range(NUM_LAYERS))
        self.norm = ResidualNorm(dim) if final_norm else None

    def forward(self, x_BCXYZ: Tensor) -> list[Tensor]:
        """Feature maps (B, dim, X/16, Y/16, Z/16) after each of `layers`, from a volume (B, C, X, Y, Z)."""
        patches_BND = self.patch_embedding(x_BCXYZ)
        tokens_BND: Tensor = self.position_embedding.expand_as(patches_BND)
        update_BND: Tensor | None = patches_BND
        if self.training and self.dropout.p > 0:
            tokens_BND, update_BND = self.dropout(tokens_BND + patches_BND), None
        extracted = []
        for layers_before, block in enumerate(self.blocks):
            is_taken = layers_before in self.layers
            entering_BND, tokens_BND, update_BND = block(tokens_BND, update_BND, is_taken)
            if is_taken:
                extracted.append(entering_BND)
        assert update_BND is not None
        extracted.append(tokens_BND + update_BND if self.norm is None else self.norm(tokens_BND, update_BND)[1])
        return [tokens.transpose(1, 2).unflatten(2, self.grid) for tokens in extracted]
