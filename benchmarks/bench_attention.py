"""Attention: our kernels, eager PyTorch, torch.compile, and each backend of PyTorch's scaled_dot_product_attention.

Ours takes a fused projection as the models pass it; the others take views into it, and their three gradients are joined
to one, as PyTorch would. Work: 4 B H N^2 D
floating-point operations forward and 10 backward (five products, one of them the forward's again); q, k, v read and out
written, and backward q, k, v, out and its gradient read, three gradients written. The ceiling of float32 is three TF32
products for one, which keep its accuracy on tensor cores.

MONAI has no attention apart from its projections: its whole `SABlock` is measured against our `SelfAttention`.
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

from benchmarks.common import DEVICE, IS_GPU, LeastWork, calls_of
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from benchmarks.workloads import AttentionWorkload, measured
from kernels.attention import flash_attention, flash_attention_packed
from kernels.dispatch import DIRECTIONS
from models.vit import SelfAttention

pytestmark = pytest.mark.kernel
WORKLOADS = measured("attention") if IS_GPU else (AttentionWorkload(2, 10, 256, 51, torch.float32),)


def work(workload: AttentionWorkload, direction: str) -> LeastWork:
    """The least bytes and operations."""
    size = workload.batch * workload.heads * workload.tokens * workload.features
    flops, tensors = (4, 4) if direction == DIRECTIONS[0] else (14, 12)
    rate = "tf32 x 3" if IS_GPU and workload.dtype == torch.float32 else str(workload.dtype).removeprefix("torch.")
    touched = 4 if direction == DIRECTIONS[0] else 8
    return LeastWork(
        tensors * size * workload.dtype.itemsize,
        touched * size * workload.dtype.itemsize,
        flops * size * workload.tokens,
        rate,
    )


def ours(workload: AttentionWorkload, *tensors: Tensor) -> Tensor:
    """The operation of the models, or on views the one of other users."""
    if not workload.packed:
        q, k, v = tensors
        return flash_attention(q, k, v)
    (qkv,) = tensors
    return flash_attention_packed(qkv, workload.heads, workload.features, out_columns=workload.out_columns)


def sdpa(backend: SDPBackend, workload: AttentionWorkload, *tensors: Tensor) -> Tensor:
    """PyTorch's attention by one backend."""
    q, k, v = workload.split(tensors)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def eager(workload: AttentionWorkload, *tensors: Tensor) -> Tensor:
    """The equation in the inputs' own dtype, as it is commonly written."""
    q, k, v = workload.split(tensors)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


VARIANTS: dict[str, Callable[..., Tensor]] = {OURS: ours, "eager": eager}
if IS_GPU:
    VARIANTS |= {
        "torch.compile": torch.compile(eager, dynamic=False),
        "SDPA flash": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "SDPA efficient": partial(sdpa, SDPBackend.EFFICIENT_ATTENTION),
        "SDPA cuDNN": partial(sdpa, SDPBackend.CUDNN_ATTENTION),
        "SDPA math": partial(sdpa, SDPBackend.MATH),
    }


def calls(workload: AttentionWorkload, variant: str, direction: str) -> list[Callable[[], object]]:
    """Calls to time; in a training step, too, the inputs come from the cache: the projection has just written them."""
    return calls_of(partial(VARIANTS[variant], workload), workload, direction, cached=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_attention(workload: AttentionWorkload, direction: str, variant: str, measure: Measure) -> None:
    labels = {"op": "attention", "case": str(workload), "direction": direction, "variant": variant}
    measure(partial(calls, workload, variant, direction), work(workload, direction), **labels)


@dataclass(frozen=True)
class ModuleWorkload:
    """Projections included: 12 heads of 64, as in MONAI's UNETR. Parameters are float32; products bf16 on a GPU."""

    batch: int
    tokens: int
    dim: int = 768
    heads: int = 12

    def __str__(self) -> str:
        return f"tokens {(self.batch, self.tokens, self.dim)}"

    def inputs(self, device: torch.device | str) -> list[Tensor]:
        """Tokens (B, N, D)."""
        return [torch.randn(self.batch, self.tokens, self.dim, device=device).requires_grad_()]

    def work(self, direction: str) -> LeastWork:
        """The four projections and the two products of attention; tokens in and out, and the weights.

        Backward, the projections take twice as much, for the gradients of tokens and of weights, and attention 2.5
        times; tokens, weights and the gradient of the output are read, two gradients written.
        """
        tokens, weights = self.batch * self.tokens * self.dim, 4 * self.dim**2
        projections, products = 2 * self.batch * self.tokens * weights, 4 * tokens * self.tokens
        read, written = 4 * tokens, (2 if IS_GPU else 4) * tokens
        forward = read + 4 * weights + written
        rate = "bfloat16" if IS_GPU else "float32"
        if direction == DIRECTIONS[0]:
            return LeastWork(forward, forward, projections + products, rate)
        backward = written + read + 4 * weights + read + 4 * weights
        touched = forward + written + read + 4 * weights
        return LeastWork(forward + backward, touched, 3 * projections + 7 * products // 2, rate)


def module_calls(workload: ModuleWorkload, variant: str, direction: str) -> list[Callable[[], object]]:
    """As `calls`; backward asks for the gradients of tokens and parameters."""
    made = (
        SelfAttention(workload.dim, workload.heads, out_bias=True)
        if variant == OURS
        else SABlock(workload.dim, workload.heads)
    )
    module = made.to(DEVICE)

    def op(tokens: Tensor) -> Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=IS_GPU):
            return module(tokens)

    return calls_of(op, workload, direction, cached=True, parameters=list(module.parameters()))


@pytest.mark.parametrize("variant", [OURS, "MONAI"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", [ModuleWorkload(2, 512 if IS_GPU else 64)], ids=str)
def bench_attention_module(workload: ModuleWorkload, direction: str, variant: str, measure: Measure) -> None:
    labels = {"op": "self-attention module", "case": str(workload), "direction": direction, "variant": variant}
    measure(partial(module_calls, workload, variant, direction), workload.work(direction), **labels)
