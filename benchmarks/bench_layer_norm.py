"""Residual add and LayerNorm: ours, eager PyTorch, torch.compile.

Work: what our kernels read and write, for every variant, so that shares of the roofline compare times. Bytes for each
element with an update, forward + backward:

                        eager      ours
    bfloat16 update     24 + 44    12 + 16
    float32 update      20 + 32    16 + 16

The stream is float32. Eager: the add reads two tensors and writes one, the norm reads one and writes one (backward
reads two and writes one, and reads both once more for the parameters), the gradients of the stream are added, and half
precision is cast on the way out and, as a gradient, on the way back. torch.compile can do what ours does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import IS_GPU, LeastWork, calls_of
from benchmarks.conftest import Measure
from benchmarks.report import OURS
from benchmarks.workloads import LayerNormWorkload, measured
from kernels.dispatch import DIRECTIONS
from kernels.layer_norm import residual_layer_norm

pytestmark = pytest.mark.kernel
WORKLOADS = measured("layer_norm") if IS_GPU else (LayerNormWorkload((2, 64, 128), torch.float32),)
CHOICES = ("torch.compile",)
"""What path "torch" can take."""


def work(workload: LayerNormWorkload, direction: str) -> LeastWork:
    """Bytes of the (B, N, D) tensors; weight, bias and statistics are small beside them."""
    size, stream = workload.dtype.itemsize, 4
    forward = [stream, size]  # tokens, norm
    gradients = [size, stream]  # of the norm, of the tokens
    if workload.update:
        forward.append(size)
        gradients += [size] * (size != stream)  # of the update where it is not the tokens'
    if workload.has_stream:
        forward.append(stream)
        gradients.append(stream)
    count = torch.Size(workload.shape).numel()
    if direction == DIRECTIONS[0]:
        return LeastWork(count * sum(forward), count * sum(forward))
    tensors = sum(forward) + sum(gradients)
    return LeastWork(count * (tensors + stream), count * tensors)


def ours(workload: LayerNormWorkload, *tensors: Tensor) -> Any:
    """The one operation; with nothing added its first result is its input."""
    tokens, update, weight, bias, stream_bias = workload.split(tensors)
    stream, y = residual_layer_norm(tokens, update, weight, bias, 1e-5, workload.dtype, stream_bias)
    return (stream, y) if workload.has_stream else y


def eager(workload: LayerNormWorkload, *tensors: Tensor) -> Any:
    """The chain of functions that it replaces."""
    tokens, update, weight, bias, stream_bias = workload.split(tensors)
    stream = tokens if update is None else tokens + update
    y = F.layer_norm(stream, weight.shape, weight, bias).to(workload.dtype)
    stream = stream if stream_bias is None else stream + stream_bias
    return (stream, y) if workload.has_stream else y


VARIANTS: dict[str, Callable[..., Any]] = {OURS: ours, "eager": eager}
if IS_GPU:
    VARIANTS["torch.compile"] = torch.compile(eager, dynamic=False)


def calls(workload: LayerNormWorkload, variant: str, direction: str) -> list[Callable[[], object]]:
    """Calls to time; in a training step, too, the inputs come from the cache: a product has just written the update."""
    return calls_of(partial(VARIANTS[variant], workload), workload, direction, cached=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_layer_norm(workload: LayerNormWorkload, direction: str, variant: str, measure: Measure) -> None:
    labels = {"op": "layer norm", "case": str(workload), "direction": direction, "variant": variant}
    measure(partial(calls, workload, variant, direction), work(workload, direction), **labels)
