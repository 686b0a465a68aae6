"""Attention: our kernels, eager PyTorch, torch.compile, and each backend of PyTorch's scaled_dot_product_attention.

Queries, keys and values are views into one projection (B, N, 3, H, D), as the model hands them over. Work: 4 B H N^2 D
floating-point operations forward and 10 backward (five products of which one repeats the forward's); q, k, v read and
out written, and backward q, k, v, out and its gradient read, three gradients written.

MONAI has no attention apart from its projections: its whole `SABlock` stands against our `SelfAttention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from monai.networks.blocks.selfattention import SABlock
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import DEVICE, DIRECTIONS, IS_GPU, Work, calls_of
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from kernels.attention import flash_attention
from models.vit import SelfAttention


@dataclass(frozen=True)
class Case:
    """Batch, heads, tokens, features of a head, dtype."""

    batch: int
    heads: int
    tokens: int
    features: int
    dtype: torch.dtype

    def __str__(self) -> str:
        shape = (self.batch, self.heads, self.tokens, self.features)
        return f"{shape} {str(self.dtype).removeprefix('torch.')}"

    def inputs(self) -> list[Tensor]:
        """q, k, v (B, H, N, D) as views of one projection."""
        shape = (self.batch, self.tokens, 3, self.heads, self.features)
        qkv = torch.randn(shape, device=DEVICE).to(self.dtype)
        return [view.requires_grad_() for view in qkv.permute(2, 0, 3, 1, 4).unbind(0)]

    def work(self, direction: str) -> Work:
        """The least bytes and operations."""
        size = self.batch * self.heads * self.tokens * self.features
        flops, tensors = (4, 4) if direction == "forward" else (14, 12)
        return Work(tensors * size * self.dtype.itemsize, flops * size * self.tokens, self.dtype)


GPU_CASES = (
    Case(2, 10, 256, 51, torch.bfloat16),  # UNETR of self-attention-cv, 128 x 128 x 64
    Case(16, 10, 256, 51, torch.bfloat16),
    Case(2, 10, 216, 51, torch.bfloat16),  # 96 x 96 x 96
    Case(2, 12, 512, 64, torch.bfloat16),  # UNETR of MONAI, 128 x 128 x 128
    Case(2, 12, 512, 64, torch.float16),
    Case(2, 12, 4096, 64, torch.bfloat16),  # 256 x 256 x 256
    Case(2, 10, 256, 51, torch.float32),
)
CASES = GPU_CASES if IS_GPU else (Case(2, 10, 256, 51, torch.float32),)


def sdpa(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention by one backend."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The equation in the inputs' own dtype, as it is commonly written."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


VARIANTS: dict[str, Callable[..., Tensor]] = {OURS: flash_attention, "eager": eager}
if IS_GPU:
    VARIANTS |= {
        "torch.compile": torch.compile(eager, dynamic=False),
        "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    }


def calls(case: Case, variant: str, direction: str) -> list[Callable[[], object]]:
    """Calls to time; in a training step the inputs come from the cache too, being the projection's fresh output."""
    return calls_of(VARIANTS[variant], case, direction, cached=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def bench_attention(case: Case, direction: str, variant: str, measure: Measure) -> None:
    try:
        timed = calls(case, variant, direction)
        timed[0]()
    except RuntimeError as error:
        if "No available kernel" in str(error):
            pytest.skip(f"{variant} does not take {case}")
        raise
    measure(timed, case.work(direction), op="attention", case=str(case), direction=direction, variant=variant)


@dataclass(frozen=True)
class ModuleCase:
    """Projections included: 12 heads of 64, as in MONAI's UNETR."""

    batch: int
    tokens: int
    dim: int = 768
    heads: int = 12

    def __str__(self) -> str:
        return f"tokens {(self.batch, self.tokens, self.dim)}"

    def inputs(self) -> list[Tensor]:
        """Tokens (B, N, D)."""
        return [torch.randn(self.batch, self.tokens, self.dim, device=DEVICE).requires_grad_()]

    def work(self, direction: str) -> Work:
        """Tokens in and out; the four projections and the two products of attention."""
        tokens = self.batch * self.tokens * self.dim
        flops = 8 * tokens * self.dim + 4 * tokens * self.tokens
        times = 1 if direction == DIRECTIONS[0] else 3
        return Work(2 * times * tokens * 4, times * flops, torch.bfloat16 if IS_GPU else torch.float32)


@pytest.mark.parametrize("variant", [OURS, "MONAI"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", [ModuleCase(2, 512 if IS_GPU else 64)], ids=str)
def bench_attention_module(case: ModuleCase, direction: str, variant: str, measure: Measure) -> None:
    made = SelfAttention(case.dim, case.heads, out_bias=True) if variant == OURS else SABlock(case.dim, case.heads)
    module = made.to(DEVICE)

    def op(tokens: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=IS_GPU):
            return module(tokens)

    timed = calls_of(op, case, direction, cached=True)
    measure(
        timed, case.work(direction), op="self-attention module", case=str(case), direction=direction, variant=variant
    )
