"""Which path an operation takes, and how its kernels are launched.

Every operation of this package has up to three paths with one signature and one meaning:

    triton      our kernels: on an NVIDIA GPU of compute capability 8.0 or more, or in Triton's interpreter
                (`TRITON_INTERPRET=1` before anything imports triton), which runs them on a CPU for tests
    torch       the fastest that PyTorch itself offers (the reference compiled, or `scaled_dot_product_attention`):
                where it was measured to beat our kernel, and for instance norm on a CPU (`group_norm`)
    reference   plain PyTorch in float32: everywhere else

`path` chooses by mode (`use`), device, dtype and measurements; callers never ask. float64 always takes the reference,
and so does bfloat16 in the interpreter, which computes it wrongly.

A kernel has several configurations (block sizes, warps, pipeline stages), its `candidates`; the first is the default,
good on every GPU. Which is the fastest on this GPU, and where PyTorch beats our kernels, is measured within a block:

    with dispatch.tuning():
        loss(network(image), labels).backward()     # one eager step, thrown away

Each kernel that is met there is measured in its first three configurations, and each operation on our path and on
PyTorch's, at tens of milliseconds a key plus compilation. What is found is kept in the cache folder and taken from then
on, in later runs too (`self_tuning`). Outside such a block nothing is measured, unless a single process asks for it
(`use(..., measurements="measure")`). Nothing is ever measured while a graph is captured, traced or compiled, so run the
block before `torch.compile`. All ranks must enter and leave a block together. `choices` and `restore_choices` let a
checkpoint hold what a run took.

Forward + backward decides where a gradient will be taken, because training runs both and a gain in one must not cost
more in the other; the forward alone decides elsewhere. A key holds what the best choice depends on: sizes, dtype,
memory layout.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from pathlib import Path
from types import FunctionType
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import SDPBackend

from . import self_tuning
from .self_tuning import Session, Way

log = logging.getLogger(__name__)

Kernels = Literal["auto", "triton", "reference"]
OpPath = Literal["triton", "torch", "reference"]
Measurements = Literal["known", "measure", "default"]
Config = Mapping[str, int]
"""Values of a kernel's block-size arguments, and `num_warps`, `num_stages`."""

Direction = Literal["forward", "forward + backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_CAPABILITY = (8, 0)
INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter; fixed when triton is imported."""
_SDPA_BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)

SDPA_WAYS = tuple(backend.name for backend in _SDPA_BACKENDS)
"""What path "torch" of attention can take."""

_mode: Kernels = "auto"
_measurements: Measurements = "known"
_forced: tuple[OpPath, str] | None = None
_session: Session | None = None
_choices = self_tuning.Choices()
_taken: dict[tuple[str, str, torch.device], Any] = {}
"""Choices made outside of a block, by kernel (or operation and direction), key and device."""
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
        repeatable: whether it writes to its arguments alone; one that is not is never measured.
        nbytes: bytes that it reads and writes; 0 if its arguments are all of them, each once.
    """

    kernel: Any
    grid: Callable[[Config], tuple[int, ...]]
    args: Mapping[str, Any]
    candidates: Sequence[Config]
    key: str
    repeatable: bool = True
    nbytes: int = 0

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.kernel.fn.__name__

    @property
    def first_tensor(self) -> Tensor:
        """The first of its tensors, which are all on one device."""
        return next(value for value in self.args.values() if isinstance(value, Tensor))

    @property
    def is_fake(self) -> bool:
        """Whether the tensors have no memory."""
        return self.first_tensor.is_meta or isinstance(self.first_tensor, FakeTensor)

    def run(self, config: Config) -> None:
        """Launch in one configuration, on the device of the tensors."""
        self.kernel[self.grid(config)](**self.args, **config)


_observer: Callable[[Launch], None] | None = None


def use(kernels: Kernels, device: torch.device | str = "cuda", measurements: Measurements = "known") -> str:
    """Choose for this process.

    Args:
        kernels: "auto" takes the fastest path that works on a tensor's device; "triton" insists on our kernels;
            "reference" takes plain PyTorch everywhere.
        device: where the tensors will be.
        measurements: "known" goes by what was measured on this GPU before; "measure" also measures what is not known,
            at its first eager call (of several ranks, none does); "default" goes by none, so that every run takes the
            same paths and configurations.

    Returns:
        a line for the log: the choice and its reason.

    Raises:
        ValueError: an unknown name; "triton" on a device that can't run the kernels.
    """
    global _mode, _measurements, _session
    if kernels not in get_args(Kernels):
        raise ValueError(f"kernels {kernels!r} must be one of {', '.join(get_args(Kernels))}")
    if measurements not in get_args(Measurements):
        raise ValueError(f"measurements {measurements!r} must be one of {', '.join(get_args(Measurements))}")
    device = torch.device(device)
    refusal = _refusal(device)
    if kernels == "triton" and refusal:
        raise ValueError(f"kernels 'triton': {refusal}; leave the choice to 'auto'")
    _mode, _measurements = kernels, measurements
    _session = Session(_choices) if measurements == "measure" and not self_tuning.are_several() else None
    _taken.clear()
    if kernels == "reference":
        return "kernels: reference (asked for)"
    if refusal:
        return f"kernels: PyTorch's own ({refusal})"
    if INTERPRETED:
        return "kernels: triton, interpreted on the CPU (TRITON_INTERPRET is set): slow, for tests"
    chosen = f"kernels: triton ({torch.cuda.get_device_name(device)}, {_capability(device)})"
    return f"{chosen}, default configurations" if measurements == "default" else chosen


@contextmanager
def using(kernels: Kernels, device: torch.device | str = "cuda", measurements: Measurements = "known") -> Iterator[str]:
    """Within it, `use`; the choice from before returns at the end. Arguments, value and errors as `use`."""
    global _mode, _measurements, _session
    before = _mode, _measurements, _session
    try:
        yield use(kernels, device, measurements)
    finally:
        _mode, _measurements, _session = before
        _taken.clear()


def may_measure(device: torch.device) -> bool:
    """Whether `tuning` may find something to measure; the same on all ranks of a run, also if their GPUs differ."""
    return device.type == "cuda" and not INTERPRETED and _mode != "reference" and _measurements != "default"


@contextmanager
def tuning(device: torch.device | str = "cuda", thorough: bool = False) -> Iterator[None]:
    """Within it, eager calls measure what is not known of this GPU; what is found is taken, and kept for later runs.

    Of several ranks the first measures, and the others wait for it in their next collective. All take the defaults
    within the block, and from its end on what the first found: all must enter and leave it, or none. On a CPU, in
    Triton's interpreter, and where `use` asked for defaults, nothing is measured.

    Args:
        device: of the tensors.
        thorough: measure every configuration, also of what is known, however long it takes.
    """
    global _session
    before = _session
    is_idle = INTERPRETED or _measurements == "default" or (self_tuning.are_several() and dist.get_rank() != 0)
    session = _session = Session(_choices, is_idle, thorough)
    try:
        yield
    finally:
        _session = before
        _taken.clear()
        _choices.taken.clear()
    if self_tuning.are_several():
        _choices.agree(device)
    if session.summary.measured or session.summary.left:
        log.info("%s", session.summary)


def choices() -> dict[str, Any]:
    """The choices that this process made or restored, defaults too, for `restore_choices`: JSON, by identity."""
    return _choices.restored | _choices.taken


def restore_choices(saved: Mapping[str, Any]) -> None:
    """Take the choices of an earlier process wherever GPU, versions and source file are the same as then."""
    _choices.restored = dict(saved)
    _choices.taken.clear()
    _taken.clear()


@contextmanager
def forced(path: OpPath, way: str = "") -> Iterator[None]:
    """Within it, every operation takes a path, and on path "torch" attention takes the backend `way`."""
    global _forced
    before, _forced = _forced, (path, way)
    try:
        yield
    finally:
        _forced = before


def path(op: str, x: Tensor, key: str) -> OpPath:
    """The path of one call.

    Args:
        op: name of the operation, which is that of its file.
        x: a tensor of the call, for its device, its dtype and whether it needs a gradient.
        key: what decides whether our kernel wins: sizes, dtype, layout.

    Raises:
        ValueError: the mode is "triton" and `x` is on a device that can't run the kernels.
    """
    if _forced is not None:
        return _forced[0]
    if _mode == "reference" or x.dtype not in DTYPES or (INTERPRETED and x.dtype == torch.bfloat16):
        return "reference"
    refusal = _refusal(x.device)
    if refusal:
        if _mode == "triton":
            raise ValueError(f"kernels 'triton': {refusal}; leave the choice to 'auto', or move the tensors")
        return "torch" if op == "instance_norm" and x.device.type == "cpu" else "reference"  # PyTorch's group_norm
    way = _way(op, key, _direction(x), x.device) if _mode == "auto" else "triton"
    return way if way in ("triton", "reference") else "torch"  # type: ignore[return-value]


def sdpa_backends(op: str, x: Tensor, key: str) -> list[SDPBackend]:
    """Backends of `scaled_dot_product_attention` for path "torch", the fastest first.

    The others follow, for inputs that it does not take. Arguments as `path`.
    """
    if _forced is not None:
        return [SDPBackend.__members__[_forced[1]]]
    fastest = _way(op, key, _direction(x), x.device)
    return sorted(_SDPA_BACKENDS, key=lambda backend: backend.name != fastest)


def compare(op: str, key: str, function: Callable[..., Any], args: Sequence[Any], of_pytorch: Sequence[str]) -> None:
    """Where choices are being measured and this one is not known: measure a public function on each of its paths.

    Call it before `path`. It returns at once outside of `tuning`, and changes nothing that the caller sees.

    Args:
        op, key: as `path`, for the first tensor of `args`.
        function: calls `path` itself; to a tensor or a tuple of them, differentiable.
        args: of the function.
        of_pytorch: what path "torch" can take: `way` of `forced`.
    """
    if _session is None or _forced is not None or torch.compiler.is_compiling():
        return

    def on(path: OpPath, way: str = "") -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with forced(path, way):
                return function(*args)

        return call

    ways = {"triton": on("triton"), **{way: on("torch", way) for way in of_pytorch}}
    choose(op, key, ways, args, on("reference"))


def choose(
    op: str, key: str, ways: Mapping[str, Callable[..., Any]], args: Sequence[Any], reference: Callable[..., Any]
) -> str:
    """Which of several complete ways to compute one thing to take; measured first, if it is not known, in `tuning`.

    A way is compared as a caller runs it, with all its launches, and with its backward where a gradient is taken.

    Args:
        op: name of the operation, which is that of the file in this folder that has the ways. key: as `path`.
        ways: by name, the default first and ours; from `args` to a tensor or a tuple of them.
        args: of this call; the first tensor decides device, dtype and direction.
        reference: what the results of the ways must agree with.

    Returns:
        a name of `ways`, or "reference". The default where mode "triton" insists on our kernels.

    Raises:
        ValueError: as `path`.
    """
    x = next(arg for arg in args if isinstance(arg, Tensor))
    if _mode == "reference" or x.dtype not in DTYPES or INTERPRETED or _refusal(x.device):
        return path(op, x, key)
    direction = _direction(x)
    if _session is not None and _mode == "auto" and not torch.compiler.is_compiling():
        _measure_ways(op, key, ways, args, reference, direction)
    default = next(iter(ways))
    way = _way(op, key, direction, x.device, default) if _mode == "auto" else default
    return way if way in ways else "reference"


def _measure_ways(
    op: str,
    key: str,
    ways: Mapping[str, Callable[..., Any]],
    args: Sequence[Any],
    reference: Callable[..., Any],
    direction: Direction,
) -> None:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    device = tensors[0].device
    name = _identity_of_way(op, key, direction, device)
    if _session is None or not _session.wants(name) or not self_tuning.can_measure(tensors):
        return

    def way(function: Callable[..., Any]) -> Way:
        run = partial(_results, function, args, direction)
        return Way(run, run)

    with torch.cuda.device_of(tensors[0]):
        with suppress(Exception):  # named in the log when it is measured
            _results(next(iter(ways.values())), args, direction)  # measures its launches
        timed = {label: way(function) for label, function in ways.items()}
        _session.measure(name, timed, {}, way(reference), device)


def _results(function: Callable[..., Any], args: Sequence[Any], direction: Direction) -> list[list[Tensor]]:
    """Each output in a group of its own, and all gradients in one: one of them may truly be zero."""
    inputs = [arg.detach().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
    with torch.set_grad_enabled(direction == DIRECTIONS[1]):
        found = function(*inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    results = [[output.detach()] for output in outputs]
    if direction == DIRECTIONS[1]:
        outputs = [output for output in outputs if output.requires_grad]
        draws = torch.Generator(outputs[0].device).manual_seed(0)  # the same for every way
        upstream = [torch.empty_like(output).normal_(generator=draws) for output in outputs]
        wanted = [arg for arg in inputs if isinstance(arg, Tensor) and arg.requires_grad]
        results.append(list(torch.autograd.grad(outputs, wanted, upstream)))
    return results


def launch(
    kernel: Any,
    grid: Callable[[Config], tuple[int, ...]],
    args: Mapping[str, Any],
    candidates: Sequence[Config],
    key: str,
    repeatable: bool = True,
    nbytes: int = 0,
) -> None:
    """Run a kernel in the fastest configuration known for this GPU and key, else in the first of `candidates`.

    Arguments as the fields of `Launch`.
    """
    it = Launch(kernel, grid, args, candidates, key, repeatable, nbytes)
    if _observer is not None:
        return _observer(it)
    if it.is_fake:
        return None
    if INTERPRETED:
        return it.run(candidates[0])
    is_fixed = _measurements == "default" or len(candidates) == 1
    with torch.cuda.device_of(it.first_tensor):
        it.run(candidates[0] if is_fixed else _config(it))


def _config(it: Launch) -> Config:
    """The configuration of a launch; measured first where that is asked for."""
    device = it.first_tensor.device
    if _session is None and (it.name, it.key, device) in _taken:
        return _taken[it.name, it.key, device]
    name = self_tuning.identity(f"{it.name} {it.key}", it.kernel.fn.__code__.co_filename, device)
    if _session is not None and it.repeatable and _session.wants(name):
        _measure_launch(it, name, _session)
    config = _choices.take(name, dict(it.candidates[0]))
    if config not in it.candidates:
        config = it.candidates[0]
    if _session is None:
        _taken[it.name, it.key, device] = config
    return config


def _measure_launch(it: Launch, name: str, session: Session) -> None:
    tensors = [value for value in it.args.values() if isinstance(value, Tensor)]
    if not self_tuning.can_measure(tensors):
        return
    copies: dict[str, Any] = {}

    def way(config: Config) -> Way:
        def run() -> None:
            replace(it, args=copies).run(config)

        def check() -> list[list[Tensor]]:
            for arg, value in it.args.items():
                copies[arg] = self_tuning.scratch(value) if isinstance(value, Tensor) else value
            run()
            return [[value] for value in copies.values() if isinstance(value, Tensor)]

        return Way(check, run)

    some = it.candidates if session.thorough else it.candidates[: self_tuning.CANDIDATES]
    values = {" ".join(f"{arg}={value}" for arg, value in config.items()): dict(config) for config in some}
    with torch.cuda.device_of(tensors[0]):
        session.measure(name, {label: way(config) for label, config in values.items()}, values, None, tensors[0].device)


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
def _way(op: str, key: str, direction: Direction, device: torch.device, default: str = "triton") -> str:
    """Name of the way to take: ours, or what PyTorch has that beat it on this GPU."""
    if _measurements == "default" or INTERPRETED:
        return default
    short = f"{op} {direction}", key, device
    if _session is None and short in _taken:
        return _taken[short]
    way = str(_choices.take(_identity_of_way(op, key, direction, device), default) or default)
    if _session is None:
        _taken[short] = way
    return way


def _identity_of_way(op: str, key: str, direction: Direction, device: torch.device) -> str:
    return self_tuning.identity(f"{op} {key} ({direction})", str(Path(__file__).with_name(f"{op}.py")), device)
