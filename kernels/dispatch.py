"""Which path an operation takes, and how its kernels are launched.

Every operation of this package has up to three paths with one signature and one meaning:

    triton      our kernels: on an NVIDIA GPU of compute capability 8.0 or more, or in Triton's interpreter
                (`TRITON_INTERPRET=1` before anything imports triton), which runs them on a CPU for tests
    torch       the fastest that PyTorch itself offers (the reference compiled, or `scaled_dot_product_attention`):
                where `tuned.json` says that it beat our kernel, and for instance norm on a CPU (`group_norm`)
    reference   plain PyTorch in float32: everywhere else

`path` chooses by mode (`use`), device, dtype and measurements; callers never ask. float64 always takes the reference,
and so does bfloat16 in the interpreter, which computes it wrongly.

A kernel has several configurations (block sizes, warps, pipeline stages), its `candidates`; the first is the default,
good on every GPU. `python -m benchmarks.tune` writes `tuned.json`: for each compute capability the fastest
configuration by kernel and key, and the operations and keys where PyTorch won, and with what. It compares forward +
backward, which decides where a gradient will be taken, and the forward alone, which decides elsewhere. A key holds what
the best choice depends on: sizes, dtype, memory layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, wraps
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, TypeVar, get_args
from warnings import warn

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend

Kernels = Literal["auto", "triton", "reference"]
OpPath = Literal["triton", "torch", "reference"]
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

_mode: Kernels = "auto"
_Function = TypeVar("_Function", bound=Callable[..., Any])


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` does the same in some microseconds."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def constant_when_compiled(function: _Function) -> _Function:
    """Have `torch.compile` call a function while it traces and keep the result as a constant of the graph.

    As `torch.compiler.assume_constant_result`, which imports `torch._dynamo`: a second of processor time.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def once_per_shape(make: _Function) -> _Function:
    """Cache a function of a shape and more. Not while tracing: sizes may be symbols, and Dynamo warns of caches."""
    cached = cache(make)

    @wraps(make)
    def call(shape: torch.Size, *others: Any) -> Any:
        is_traced = torch.compiler.is_compiling() or torch.SymInt in map(type, shape)
        return make(shape, *others) if is_traced else cached(shape, *others)

    return call  # type: ignore[return-value]


@cache
def compiled(function: FunctionType, shape: torch.Size) -> Callable[..., Any]:
    """A function compiled for inputs of one shape.

    Each shape has a code object of its own, because Dynamo counts compilations by code object and goes back to eager
    mode after eight (`torch._dynamo.config.recompile_limit`, which belongs to the user).
    """
    code, name = function.__code__.replace(), function.__name__
    copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    return torch.compile(copy, dynamic=False)


def gradients(forward: Any, **by_name: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a backward returns: gradients by the name of the forward's argument, None for all others."""
    code = forward.__code__
    return tuple(by_name.get(name) for name in code.co_varnames[: code.co_argcount])


LAUNCHERS: dict[Any, Callable[..., Any]] = {}
"""The function behind each of our operators, by `torch.ops.glioforge.<name>.default`."""


def operator(function: Callable[..., Any]) -> torch.library.CustomOpDef:
    """A function `<op>_forward` or `<op>_backward` as an operator of PyTorch: `torch.ops.glioforge.<op>[_backward]`.

    An operator whose results change needs a new name: Inductor keeps compiled graphs on disk by the name alone.
    """
    name = function.__name__.removesuffix("_forward")
    defined = torch.library.custom_op(f"glioforge::{name}", function, mutates_args=())
    LAUNCHERS[getattr(torch.ops.glioforge, name).default] = function
    return defined


def differentiable(
    forward_op: torch.library.CustomOpDef,
    backward_op: torch.library.CustomOpDef,
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., Any]:
    """Register the derivative of `forward_op`; returns the function to call in its place.

    Eager calls go through an `autograd.Function` around the same launches, which takes less of the host's time
    (`benchmarks/bench_dispatch.py`). Operators serve compilation, export, fake tensors and dispatch modes.

    Args:
        setup_context: (ctx, inputs, output), as for both.
        backward: (run, ctx, *gradients) to the gradient of each input, where `run` takes the arguments of
            `backward_op`. A gradient is None where an output was not used.
    """
    forward_op.register_autograd(partial(backward, backward_op), setup_context=setup_context)
    launch_forward, launch_backward = (LAUNCHERS[op._opoverload] for op in (forward_op, backward_op))

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return launch_forward(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:
            # With `create_graph` the operator, which refuses a second derivative when one is taken.
            return backward(backward_op if torch.is_grad_enabled() else launch_backward, ctx, *gradients)

    def call(*args: Any) -> Any:
        return Eager.apply(*args) if _is_eager(args) else forward_op(*args)

    return call


def _is_eager(args: Sequence[Any]) -> bool:
    """Whether a call's tensors have memory and nothing traces it. Fake ones will do while launches are observed."""
    if torch.compiler.is_compiling():
        return False
    if _observer is not None:
        return True
    is_plain = all(type(arg) in (Tensor, torch.nn.Parameter) for arg in args if isinstance(arg, Tensor))
    return is_plain and not torch._C._len_torch_dispatch_stack()


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, not yet bound to a configuration.

    Fields:
        kernel: the `triton.jit` function.
        grid: number of programs on each axis, for a configuration.
        args: the kernel's arguments by name, without those of the configuration.
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

    @property
    def is_fake(self) -> bool:
        """Whether the tensors have no memory."""
        first = next(value for value in self.args.values() if isinstance(value, Tensor))
        return first.is_meta or isinstance(first, FakeTensor)

    def run(self, config: Config) -> None:
        """Launch in one configuration, on the device of the tensors."""
        self.kernel[self.grid(config)](**self.args, **config)


_observer: Callable[[Launch], None] | None = None


def use(kernels: Kernels, device: torch.device | str = "cuda") -> str:
    """Choose for this process.

    Args:
        kernels: "auto" takes the fastest path that works on a tensor's device; "triton" insists on our kernels;
            "reference" takes plain PyTorch everywhere.
        device: where the tensors will be.

    Returns:
        a line for the log: the choice and its reason.

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


@contextmanager
def using(kernels: Kernels, device: torch.device | str = "cuda") -> Iterator[str]:
    """Within it, `use`; the choice from before returns at the end. Arguments, value and errors as `use`."""
    global _mode
    before = _mode
    try:
        yield use(kernels, device)
    finally:
        _mode = before


def path(op: str, x: Tensor, key: str) -> OpPath:
    """The path of one call.

    Args:
        op: name of the operation, as in `tuned.json`.
        x: a tensor of the call, for its device, its dtype and whether it needs a gradient.
        key: what decides whether our kernel wins: sizes, dtype, layout.

    Raises:
        ValueError: the mode is "triton" and `x` is on a device that can't run the kernels.
    """
    if _mode == "reference" or x.dtype not in DTYPES or (INTERPRETED and x.dtype == torch.bfloat16):
        return "reference"
    refusal = _refusal(x.device)
    if refusal:
        if _mode == "triton":
            raise ValueError(f"kernels 'triton': {refusal}; leave the choice to 'auto', or move the tensors")
        return "torch" if op == "instance_norm" and x.device.type == "cpu" else "reference"  # PyTorch's group_norm
    if _mode == "auto" and _faster_of_pytorch(f"{op} {key}", _direction(x), x.device):
        return "torch"
    return "triton"


def sdpa_backends(op: str, x: Tensor, key: str) -> list[SDPBackend]:
    """Backends of `scaled_dot_product_attention` for path "torch", the fastest first.

    The others follow, for inputs that it does not take. Arguments as `path`.
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
        return _observer(it)
    if it.is_fake:
        return None
    if INTERPRETED:
        return it.run(candidates[0])
    x = next(value for value in args.values() if isinstance(value, Tensor))
    config = _tuned(x.device).get("configs", {}).get(it.name, {}).get(key, candidates[0])
    if config not in candidates:
        warn(f"{TUNED_FILE} has {config} for {it.name} {key}, which is not a candidate: tune again", stacklevel=2)
        config = candidates[0]
    with torch.cuda.device_of(x):
        it.run(config)


@contextmanager
def observed(observer: Callable[[Launch], None]) -> Iterator[None]:
    """Pass every launch to `observer` instead of running it, for ahead-of-time compilation and tuning."""
    global _observer
    before, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = before


@constant_when_compiled
def _refusal(device: torch.device) -> str:
    """Why the kernels can't run on a device; empty where they can."""
    if INTERPRETED:
        on_cpu = device.type == "cpu"
        return "" if on_cpu else f"TRITON_INTERPRET runs kernels on the CPU, the tensors are on {device.type}"
    if device.type != "cuda":
        return f"Triton kernels need an NVIDIA GPU, the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "no NVIDIA GPU found"
    if torch.version.hip:
        return f"Triton kernels need an NVIDIA GPU, the tensors are on {torch.cuda.get_device_name(device)}"
    is_old = torch.cuda.get_device_capability(device) < MIN_CAPABILITY
    return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0" if is_old else ""


@cache
def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def _direction(x: Tensor) -> Direction:
    return "forward + backward" if torch.is_grad_enabled() and x.requires_grad else "forward"


@constant_when_compiled
def _faster_of_pytorch(op_key: str, direction: Direction, device: torch.device) -> str:
    """Name of what PyTorch has that beat our kernel on this GPU; empty where nothing did."""
    return _tuned(device).get("torch", {}).get(direction, {}).get(op_key, "")


def _tuned(device: torch.device) -> dict[str, Any]:
    """Measurements of a GPU: {"configs": {kernel: {key: config}}, "torch": {direction: {"op key": name}}}."""
    return {} if INTERPRETED else tuned_table().get(_capability(device), {})


@cache
def tuned_table() -> dict[str, Any]:
    """Content of `tuned.json`, by compute capability; read once."""
    return json.loads(TUNED_FILE.read_text()) if TUNED_FILE.is_file() else {}
