"""What a network computes in: `--train.precision`. Weights, gradients, moments and losses are float32 in each.

float32   IEEE products everywhere          bf16   autocast
tf32      TF32 products on a GPU            fp16   autocast, the loss scaled so that no gradient underflows

Autocast casts every weight of a convolution and of a linear layer at each use, and its gradient back: two hundred
launches a pass. `WeightCopies` keeps the casts instead: the optimizer writes them with the weights, and reads their
gradients as they are. The values are the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernels.adamw import round_into

Precision = Literal["float32", "tf32", "bf16", "fp16"]
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def prepare_network(network: nn.Module, precision: str) -> nn.Module:
    """A network in the memory format of its device, and with a forward in a precision of `--train.precision`."""
    device = next(network.parameters()).device.type
    if device == "cuda":  # whose convolutions want the channels last in memory
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if precision in LOW_PRECISION:
        # Inside the module: DeepSpeed turns off an autocast that it finds around its own forward.
        lowered = torch.autocast(device, LOW_PRECISION[precision])
        network.forward = lowered(network.forward)
    return network


class WeightCopies:
    """Lasting copies, in low precision, of the weights and biases that autocast would cast.

    Those of linear layers, 3D convolutions and their transposes; norms and position embeddings stay float32. A layer
    with an attribute `copy_multiple` gets copies whose sizes are rounded up to multiples of it, filled with zeros.
    Copies are written anew if something else than the optimizer changed a weight in place (not through `.data`).

    Args:
        network: on its device, in its memory format.
        dtype: of the copies; None: no copies, and everything here does nothing.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype | None) -> None:
        self._copies: dict[Tensor, nn.Parameter] = {}
        self._places: list[tuple[dict[str, Any], str, Tensor]] = []  # where modules keep the weights
        self._versions: list[int] = []
        if dtype is None:
            return
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv3d | nn.ConvTranspose3d):
                multiple = getattr(module, "copy_multiple", 1)
                for name, weight in module.named_parameters(recurse=False):
                    if weight not in self._copies:
                        self._copies[weight] = nn.Parameter(_empty_copy(weight, dtype, multiple), weight.requires_grad)
                    self._places.append((module._parameters, name, weight))

    def __getitem__(self, weight: Tensor) -> Tensor | None:
        """The copy of a weight, or None."""
        return self._copies.get(weight)

    def leaves(self, weights: Iterable[Tensor]) -> list[Tensor]:
        """The tensors that get the gradients of weights: their copies, where they have one."""
        return [self._copies.get(weight, weight) for weight in weights]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the network's weights are the copies, for a forward of a training pass."""
        self._refresh()
        for parameters, name, weight in self._places:
            parameters[name] = self._copies[weight]
        try:
            yield
        finally:
            for parameters, name, weight in self._places:
                parameters[name] = weight

    def stepped(self) -> None:
        """Say that the optimizer has changed weights and copies alike, and used the gradients."""
        self._versions = [weight._version for weight in self._copies]
        for copy in self._copies.values():
            copy.grad = None

    @torch.no_grad()
    def _refresh(self) -> None:
        """Round the weights again if something has changed them since, such as `load_state_dict`."""
        versions = [weight._version for weight in self._copies]
        if versions != self._versions:
            round_into(list(self._copies.values()), list(self._copies))
            self._versions = versions


def _empty_copy(weight: Tensor, dtype: torch.dtype, multiple: int) -> Tensor:
    """Zeros with the strides of a weight, or with the larger sizes that `multiple` asks for."""
    sizes = [-(-size // multiple) * multiple for size in weight.shape]
    if sizes == list(weight.shape):
        return torch.zeros_like(weight, dtype=dtype, memory_format=torch.preserve_format)
    return torch.zeros(sizes, dtype=dtype, device=weight.device)


def set_up_torch(precision: str, deterministic: bool) -> None:
    """Set the process-wide switches of training: TF32, cuDNN's search, and reproducible bits.

    For a command that owns its process; a library uses `tf32`.
    """
    _set_tf32(precision == "tf32")
    torch.backends.cudnn.benchmark = not deterministic  # crops have one size: the search pays
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Else every torch.empty would be filled with NaN first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


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
