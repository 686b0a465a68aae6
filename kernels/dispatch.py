"""Which path an operation takes, and how its kernels are launched.

Every operation of this package has up to three paths with one signature and one meaning:

    triton      our kernels: on an NVIDIA GPU of compute capability 8.0 or more, or in Triton's interpreter
                (`TRITON_INTERPRET=1` before anything imports triton), which runs them on a CPU for tests
    torch       the fastest thing that PyTorch itself has for the operation (`torch.compile` of the reference, or
                `scaled_dot_product_attention`): taken where `tuned.json` says that our kernel lost to it, and for
                instance norm on a CPU (`group_norm`)
    reference   plain PyTorch, float32: everywhere else

The choice is made here, by the mode (`use`), the device, the dtype and what was measured (`path`), and a caller never
asks. float64 always takes the reference, and so does bfloat16 in the interpreter, which computes it wrongly.

A kernel comes with several configurations (block sizes, warps, pipeline stages): `candidates`, of which the first is
the default, good on every GPU. `tuned.json` holds what `python -m benchmarks.tune` found fastest, by compute
capability, kernel and key, the key being what the best choice depends on: sizes, dtype, memory layout. It also holds
where PyTorch's own won, and which of its implementations: once for forward + backward, which decides where a gradient
will be taken, for there the two are run together, and once for the forward alone, which decides elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args
from warnings import warn

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend

Kernels = Literal["auto", "triton", "reference"]
Taken = Literal["triton", "torch", "reference"]
Config = Mapping[str, int]
"""Values of a kernel's block-size arguments, and `num_warps`, `num_stages`."""

Direction = Literal["forward", "forward + backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)
INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter; fixed when triton is imported."""
TUNED_FILE = Path(__file__).with_name("tuned.json")
_SDPA_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)

_FASTER_ON_CPU = ("instance_norm",)
"""Operations for which PyTorch has, on a CPU, something faster than the reference."""

_mode: Kernels = "auto"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, not yet bound to a configuration.

    Fields:
        kernel: the `triton.jit` function.
        grid: from a configuration, the number of programs on each axis.
        args: every argument of the kernel by name but those of the configurations.
        candidates: configurations to choose from, the default first.
        key: what the best configuration depends on.
    """

    kernel: Any
    grid: Callable[[Config], tuple[int, ...]]
    args: Mapping[str, Any]
    candidates: Sequence[Config]
    key: str

    @property
    def name(self) -> str:
        """Name of the kernel, as in `tuned.json`."""
        return self.kernel.fn.__name__

    def run(self, config: Config) -> None:
        """Launch in one configuration, on the device of the tensors."""
        self.kernel[self.grid(config)](**self.args, **config)


_observer: Callable[[Launch], None] | None = None


def use(kernels: Kernels, device: torch.device | str = "cuda") -> str:
    """Choose for this process, and say what was chosen.

    Args:
        kernels: "auto" takes the fastest path that works on a tensor's device; "triton" insists on our kernels;
            "reference" takes plain PyTorch everywhere.
        device: where the tensors will be.

    Returns:
        A line for the log: the choice and its reason.

    Raises:
        ValueError: an unknown name; "triton" on a device that can't run the kernels.
    """
    global _mode
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels {kernels!r} must be one of {', '.join(get_args(Kernels))}")
    device = torch.device(device)
    refusal = _refusal(device)
    if kernels == "triton" and refusal:
        raise ValueError(f"kernels 'triton': {refusal}; leave the choice to 'auto'")
    _mode = kernels
    if kernels == "reference":
        return "kernels: reference (asked for)"
    if refusal:
        return f"kernels: PyTorch's own ({refusal})"
    if INTERPRETED:
        return "kernels: triton, interpreted on the CPU (TRITON_INTERPRET is set): slow, for tests"
    chosen = f"kernels: triton ({torch.cuda.get_device_name(device)}, {_capability(device)})"
    won = _tuned(device).get("torch", {}) if kernels == "auto" else {}
    slower = [f"{op_key} ({direction})" for direction in DIRECTIONS for op_key in won.get(direction, ())]
    return f"{chosen}; PyTorch's own where it was measured faster: {', '.join(slower)}" if slower else chosen


def path(op: str, x: Tensor, key: str) -> Taken:
    """The path of one call.

    Args:
        op: name of the operation, as in `tuned.json`.
        x: a tensor of the call, for its device and dtype, and for whether a gradient will be taken.
        key: what decides whether our kernel wins: sizes, dtype, layout.

    Raises:
        ValueError: "triton" was asked for and `x` is on a device that can't run the kernels.
    """
    if _mode == "reference" or x.dtype not in DTYPES or (INTERPRETED and x.dtype == torch.bfloat16):
        return "reference"
    refusal = _refusal(x.device)
    if refusal:
        if _mode == "triton":
            raise ValueError(f"kernels 'triton': {refusal}; leave the choice to 'auto', or move the tensors")
        return "torch" if op in _FASTER_ON_CPU and x.device.type == "cpu" else "reference"
    if _mode == "auto" and _faster_of_pytorch(f"{op} {key}", _direction(x), x.device):
        return "torch"
    return "triton"


def sdpa_backends(op: str, x: Tensor, key: str) -> list[SDPBackend]:
    """Backends of `scaled_dot_product_attention` for path "torch", that which was measured fastest first.

    The others follow for inputs that it does not take. Arguments as `path`.
    """
    fastest = _faster_of_pytorch(f"{op} {key}", _direction(x), x.device)
    return sorted(_SDPA_BACKENDS, key=lambda backend: backend.name != fastest)


def launch(
    kernel: Any,
    grid: Callable[[Config], tuple[int, ...]],
    args: Mapping[str, Any],
    candidates: Sequence[Config],
    key: str,
) -> None:
    """Run a kernel in the configuration tuned for this GPU and key, else in the first of `candidates`.

    Arguments as the fields of `Launch`.
    """
    it = Launch(kernel, grid, args, candidates, key)
    if _observer is not None:
        _observer(it)
        return
    if INTERPRETED:
        it.run(candidates[0])
        return
    x = next(value for value in args.values() if isinstance(value, Tensor))
    config = _tuned(x.device).get("configs", {}).get(it.name, {}).get(key, candidates[0])
    if config not in candidates:
        warn(f"{TUNED_FILE} holds {config} for {it.name} {key}, which is no candidate: tune again", stacklevel=2)
        config = candidates[0]
    with torch.cuda.device_of(x):
        it.run(config)


@contextmanager
def observed(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Hand every launch to `observer` instead of running it: for compilers ahead of time and for tuning."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


@torch.compiler.assume_constant_result
def _refusal(device: torch.device) -> str:
    """Why the kernels can't run on a device; empty where they can."""
    if INTERPRETED:
        elsewhere = f"TRITON_INTERPRET runs kernels on the CPU, the tensors are on {device.type}"
        return "" if device.type == "cpu" else elsewhere
    if device.type != "cuda":
        return f"Triton kernels need an NVIDIA GPU, the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is to be seen"
    name = torch.cuda.get_device_name(device)
    if torch.version.hip:
        return f"Triton kernels need an NVIDIA GPU, the tensors are on {name}"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"{name} is older than compute capability 8.0"
    return ""


@cache
def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _direction(x: Tensor) -> Direction:
    return "forward + backward" if torch.is_grad_enabled() and x.requires_grad else "forward"


@torch.compiler.assume_constant_result
def _faster_of_pytorch(op_key: str, direction: Direction, device: torch.device) -> str:
    """What PyTorch has that was measured faster than our kernel on this GPU; empty where nothing was."""
    return _tuned(device).get("torch", {}).get(direction, {}).get(op_key, "")


def _tuned(device: torch.device) -> dict[str, Any]:
    """What was measured for a GPU: {"configs": {kernel: {key: config}}, "torch": {direction: {"op key": name}}}."""
    return {} if INTERPRETED else tuned_table().get(_capability(device), {})


@cache
def tuned_table() -> dict[str, Any]:
    """What `tuned.json` holds, by compute capability; read once."""
    return json.loads(TUNED_FILE.read_text()) if TUNED_FILE.is_file() else {}
