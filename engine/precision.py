"""What a network computes in: `--train.precision`. Weights, gradients, moments and losses are float32 in each.

float32   IEEE products everywhere          bf16   autocast
tf32      TF32 products on a GPU            fp16   autocast, the loss scaled so that no gradient underflows
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch

Precision = Literal["float32", "tf32", "bf16", "fp16"]
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_network(network: torch.nn.Module, precision: str) -> torch.nn.Module:
    """A network in the memory format of its device, and with a forward in a precision of `--train.precision`."""
    device = next(network.parameters()).device.type
    if device == "cuda":  # whose convolutions want the channels last in memory
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if precision in LOW_PRECISION:
        # Inside the module: DeepSpeed turns off an autocast that it finds around its own forward.
        lowered = torch.autocast(device, LOW_PRECISION[precision])
        network.forward = lowered(network.forward)
    return network


def set_up_torch(precision: str, deterministic: bool) -> None:
    """Set the process-wide switches of training: TF32, cuDNN's search, and reproducible bits.

    For a command that owns its process; a library uses `tf32`.
    """
    _set_tf32(precision == "tf32")
    torch.backends.cudnn.benchmark = not deterministic  # crops have one size: the search pays
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)


@contextmanager
def tf32(is_on: bool) -> Iterator[None]:
    """Within it, float32 products on a GPU are TF32, or IEEE; afterwards whatever they were before."""
    matmul = _readable(torch.get_float32_matmul_precision)
    convolution = _readable(lambda: torch.backends.cudnn.allow_tf32)
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    products: tuple[Any, ...] = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)  # type: ignore[attr-defined]
    before = [product.fp32_precision for product in products]
    _set_tf32(is_on)
    try:
        yield
    finally:  # the older switches first: they also set the newer ones
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
        if convolution is not None:
            torch.backends.cudnn.allow_tf32 = convolution
        for product, precision in zip(products, before, strict=True):
            if product.fp32_precision != precision:
                product.fp32_precision = precision


def _readable(switch: Callable[[], Any]) -> Any:
    """The value of an older switch; None if the process has set the newer ones, which it can't express."""
    try:
        return switch()
    except RuntimeError:
        return None


def _set_tf32(is_on: bool) -> None:
    torch.set_float32_matmul_precision("high" if is_on else "highest")
    torch.backends.cudnn.allow_tf32 = is_on
