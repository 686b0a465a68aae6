"""Which path an operation takes, and how its kernels are launched.

Every operation of this package has up to three paths with one signature and one meaning:

    triton      our kernels: on an NVIDIA GPU of compute capability 8.0 or more, or in Triton's interpreter
                (`TRITON_INTERPRET=1` before anything imports triton), which runs them on a CPU for tests
    torch       the fastest thing that PyTorch itself has for the operation (`torch.compile` of the reference, or
                `scaled_dot_product_attention`): taken where `tuned.json` says that our kernel lost to it
    reference   plain PyTorch, float32: everywhere else

The choice is made here, by the mode (`use`), the device, the dtype and what was measured (`path`), and a caller never
asks. float64 always takes the reference, and so does bfloat16 in the interpreter, which computes it wrongly.

A kernel comes with several configurations (block sizes, warps, pipeline stages): `candidates`, of which the first is
the default, good on every GPU. `tuned.json` holds what `python -m benchmarks.tune` found fastest, by compute
capability, kernel and key, the key being what the best choice depends on: sizes, dtype, memory layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import triton
from torch import Tensor

Kernels = Literal["auto", "triton", "reference"]
Taken = Literal["triton", "torch", "reference"]
Config = Mapping[str, int]
"""Values of a kernel's block-size arguments, and `num_warps`, `num_stages`."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)
INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter; fixed when triton is imported."""
TUNED_FILE = Path(__file__).with_name("tuned.json")

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
    refusal = _refusal(device.type)
    if kernels == "triton" and refusal:
        raise ValueError(f"kernels 'triton': {refusal}; leave the choice to 'auto'")
    _mode = kernels
    if kernels == "reference":
        return "kernels: reference (asked for)"
    if refusal:
        return f"kernels: reference ({refusal})"
    if INTERPRETED:
        return "kernels: triton, interpreted on the CPU (TRITON_INTERPRET is set): slow, for tests"
    chosen = f"kernels: triton ({torch.cuda.get_device_name(device)}, {_capability()})"
    slower = _tuned().get("torch", []) if kernels == "auto" else []
    return f"{chosen}; PyTorch's own where it was measured faster: {', '.join(slower)}" if slower else chosen


def path(op: str, x: Tensor, key: str) -> Taken:
    """The path of one call.

    Args:
        op: name of the operation, as in `tuned.json`.
        x: a tensor of the call, for its device and dtype.
        key: what decides whether our kernel wins: sizes, dtype, layout.

    Raises:
        ValueError: "triton" was asked for and `x` is on a device that can't run the kernels.
    """
    if _mode == "reference" or x.dtype not in DTYPES or (INTERPRETED and x.dtype == torch.bfloat16):
        return "reference"
    refusal = _refusal(x.device.type)
    if refusal:
        if _mode == "triton":
            raise ValueError(f"kernels 'triton': {refusal}; leave the choice to 'auto', or move the tensors")
        return "reference"
    if _mode == "auto" and _is_slower(f"{op} {key}"):
        return "torch"
    return "triton"


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
    config = _tuned().get("configs", {}).get(it.name, {}).get(key)
    if config not in candidates:  # nothing was measured, or it was before the kernel changed
        config = candidates[0]
    with torch.cuda.device_of(next(value for value in args.values() if isinstance(value, Tensor))):
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
def _refusal(device_type: str) -> str:
    """Why the kernels can't run on a kind of device; empty where they can."""
    if INTERPRETED:
        elsewhere = f"TRITON_INTERPRET runs kernels on the CPU, the tensors are on {device_type}"
        return "" if device_type == "cpu" else elsewhere
    if device_type != "cuda":
        return f"Triton kernels need an NVIDIA GPU, the tensors are on {device_type}"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU is to be seen"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip or capability < MIN_CAPABILITY:
        return f"{torch.cuda.get_device_name()} is older than compute capability 8.0"
    return ""


@cache
def _capability() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@torch.compiler.assume_constant_result
def _is_slower(op_key: str) -> bool:
    """Whether PyTorch's own was measured faster than our kernel on this GPU."""
    return op_key in _tuned().get("torch", [])


def _tuned() -> dict[str, Any]:
    """What was measured for this GPU: {"configs": {kernel: {key: config}}, "torch": ["op key", ...]}."""
    return {} if INTERPRETED else tuned_table().get(_capability(), {})


@cache
def tuned_table() -> dict[str, Any]:
    """What `tuned.json` holds, by compute capability; read once."""
    return json.loads(TUNED_FILE.read_text()) if TUNED_FILE.is_file() else {}
