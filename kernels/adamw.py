"""AdamW over all parameters of a network at once, with clipping, loss scaling and a check of the gradients.

With g a gradient, s the scale of the loss, c the largest norm allowed, and t the steps taken so far, this one included:

    norm = |all g| / s                      a step whose norm is not finite changes nothing but the counts below
    g    = g / (s max(norm / c, 1))
    m    = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
    p    = p - lr weight_decay p            (decoupled, before the update)
    p    = p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

as torch's fused AdamW. Where a parameter has a copy in low precision, the same pass writes the rounded result there;
and a gradient may be float32, or of the copy's dtype and shape. A copy may have longer rows than its parameter, for
products that want multiples of eight: what is beyond them stays as it is in the copy, and is ignored in the gradient.

Three launches for any number of tensors:

    sum      a program per chunk of a gradient: its sum of squares; reads each gradient once
    finish   one program adds these in a fixed order (no atomics: the same bits on every run), judges the norm, moves
             the loss's scale, counts the step of every parameter, and computes the corrections for bias in float64
    adamw    a program per chunk: 24 bytes of parameter and moments, a gradient and a copy for each element

The tensors reach the kernels as a table of addresses on the device. Gradients of eager code move from step to step:
then one copy of some kilobytes, which the host does not wait for, renews the table. A row of it is a tensor; a chunk is
CHUNK consecutive elements of one, as they lie in memory: parameter, moments, gradient and copy have the same strides.

Source: Loshchilov and Hutter, Decoupled Weight Decay Regularization, https://arxiv.org/abs/1711.05101.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.adamw import adamw as torch_adamw

from . import dispatch
from .dispatch import ceil_div

CHUNK = 8192
"""Elements of a program: of a UNETR's 50 million, 6,000 programs."""
_COLUMNS: tl.constexpr = tl.constexpr(10)
"""Of the table: addresses of parameter, gradient, two moments, copy (or 0) and step count; elements; elements of a row,
and of a row of copy and gradient, if these differ; whether the gradient has the copy's dtype."""
_STEP_BITS: tl.constexpr = tl.constexpr(24)  # a float32 counts no further
_LOW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class AdamWTensors(NamedTuple):
    """The tensors of a step, in lists of one length.

    Fields:
        parameters, exp_avgs, exp_avg_sqs: float32, dense, each with the strides of its parameter.
        gradients: the same, or of the copy's dtype, shape and strides.
        steps: steps taken so far, float32 ().
        copies: bfloat16 or float16, one dtype for all, with the strides of the parameter; or of shape (R', C') for a
            contiguous parameter (R, C), and (C',) for (C,), with R' >= R and C' >= C; or None.
    """

    parameters: list[Tensor]
    gradients: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    copies: list[Tensor | None]

    @classmethod
    def of(cls, rows: Iterable[tuple[Tensor | None, ...]]) -> AdamWTensors:
        """From a row for each parameter, in the order of the fields."""
        columns: list[Any] = [list(column) for column in zip(*rows, strict=True)]
        return cls(*columns)


class AdamWOptions(NamedTuple):
    """Numbers of a step; `grad_clip` 0 is no limit. The scale doubles after `growth_interval` finite steps."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float
    scales_loss: bool
    growth_interval: int


@dataclass
class Guard:
    """What is known of the gradients, all () on the device.

    Fields:
        scale: of the loss, float32. growth: finite steps since it last changed, int32.
        norm: of the last step's gradients, before clipping. found_inf: 1 if that step was skipped, else 0.
        in_row: steps skipped in a row; with loss scaling, only those that a lower scale can't help. float32 all three.
    """

    scale: Tensor
    growth: Tensor
    norm: Tensor
    found_inf: Tensor
    in_row: Tensor


def count_skipped(guard: Guard, options: AdamWOptions) -> None:
    """Count the last step in `in_row`, and move the scale: what follows from `found_inf`."""
    final = guard.found_inf * (guard.scale <= 1) if options.scales_loss else guard.found_inf
    guard.in_row.copy_((guard.in_row + final) * guard.found_inf)
    if options.scales_loss:
        torch._amp_update_scale_(guard.scale, guard.growth, guard.found_inf, 2.0, 0.5, options.growth_interval)


def guarded_adamw_reference(
    tensors: AdamWTensors,
    guard: Guard,
    options: AdamWOptions,
    sum_over_ranks: Callable[[Tensor], object] | None = None,
) -> None:
    """A step by torch's own fused AdamW, in some two dozen launches. Arguments as `AdamWStep`."""
    pairs = zip(tensors.gradients, tensors.parameters, strict=True)
    gradients = [_within(gradient, parameter).to(parameter.dtype) for gradient, parameter in pairs]
    total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    if sum_over_ranks is not None:
        total = total.square()
        sum_over_ranks(total)
        total = total.sqrt()
    guard.norm.copy_(total / guard.scale)
    guard.found_inf.copy_(1 - torch.isfinite(total).float())
    grad_scale = guard.scale.clone()
    if options.grad_clip:
        grad_scale *= (guard.norm / options.grad_clip).nan_to_num(1.0, 1.0).clamp(min=1)
    torch_adamw(
        tensors.parameters, gradients, tensors.exp_avgs, tensors.exp_avg_sqs, [], tensors.steps, fused=True,
        grad_scale=grad_scale, found_inf=guard.found_inf, amsgrad=False, beta1=options.betas[0],
        beta2=options.betas[1], lr=options.lr, weight_decay=options.weight_decay, eps=options.eps, maximize=False,
    )  # fmt: skip
    round_into(tensors.copies, tensors.parameters)
    count_skipped(guard, options)


def round_into(copies: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> None:
    """Write parameters into their copies, where they have one."""
    pairs = [(_within(copy, full), full) for copy, full in zip(copies, parameters, strict=True) if copy is not None]
    if pairs:
        torch._foreach_copy_([copy for copy, _ in pairs], [full for _, full in pairs])


def _within(copy: Tensor, parameter: Tensor) -> Tensor:
    """The part of a copy, or of its gradient, that is the parameter."""
    if copy.shape == parameter.shape:
        return copy
    return copy[tuple(slice(size) for size in parameter.shape)]


@triton.jit
def _offsets(table_ptr, first, BLOCK: tl.constexpr):
    """Where copy and gradient have a block of elements, if their rows are longer than the parameter's."""
    columns = tl.load(table_ptr + 7).to(tl.int32)
    elements = first.to(tl.int32) + tl.arange(0, BLOCK)
    return elements // columns * tl.load(table_ptr + 8).to(tl.int32) + elements % columns


@triton.jit
def _pointer(table_ptr, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(table_ptr + column).to(tl.pointer_type(dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _gradient(table_ptr, first, mask, LOW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a gradient from element `first` on, in float32."""
    lanes = first + tl.arange(0, BLOCK)
    gradient = tl.zeros([BLOCK], tl.float32)
    if LOW is None:
        gradient = tl.load(_pointer(table_ptr, 1, tl.float32, ALIGNED) + lanes, mask, other=0.0)
    else:
        if tl.load(table_ptr + 9) == 0:
            gradient = tl.load(_pointer(table_ptr, 1, tl.float32, ALIGNED) + lanes, mask, other=0.0)
        elif tl.load(table_ptr + 7) == tl.load(table_ptr + 8):
            gradient = tl.load(_pointer(table_ptr, 1, LOW, ALIGNED) + lanes, mask, other=0.0).to(tl.float32)
        else:
            offsets = _offsets(table_ptr, first, BLOCK)
            gradient = tl.load(_pointer(table_ptr, 1, LOW, ALIGNED) + offsets, mask, other=0.0).to(tl.float32)
    return gradient


@triton.jit
def adamw_sum_kernel(
    table_ptr,  # (tensors, _COLUMNS)
    chunks_ptr,  # (chunks, 2): row of the table, number of the chunk in the tensor
    partials_ptr,  # (chunks,)
    LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    table_ptr += tl.load(chunks_ptr + 2 * chunk) * _COLUMNS
    first = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
    size = tl.load(table_ptr + 6)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        block = first + start
        # A mask from a length of unknown divisibility would split the loads into single elements.
        if block + BLOCK <= size:
            gradient = _gradient(table_ptr, block, tl.full([BLOCK], 1, tl.int1), LOW, ALIGNED, BLOCK)
            total += gradient * gradient
        elif block < size:
            gradient = _gradient(table_ptr, block, block + tl.arange(0, BLOCK) < size, LOW, ALIGNED, BLOCK)
            total += gradient * gradient
    tl.store(partials_ptr + chunk, tl.sum(total))


@triton.jit
def _is_finite(x):
    return tl.abs(x) < float("inf")  # false for nan too


@triton.jit
def _one_minus_power(base, exponents, BLOCK: tl.constexpr):
    """1 - base^n in float64, for a block of whole numbers n."""
    power = tl.full([BLOCK], 1.0, tl.float64)
    for bit in tl.static_range(_STEP_BITS):
        power = tl.where((exponents >> bit) & 1 == 1, power * base, power)
        base = base * base
    return 1.0 - power


@triton.jit
def adamw_finish_kernel(
    table_ptr,  # (tensors, _COLUMNS)
    partials_ptr,  # (partials,) sums of squares
    corrections_ptr,  # (tensors, 2): 1 - beta1^t, sqrt(1 - beta2^t)
    grad_scale_ptr,  # () what gradients are divided by
    scale_ptr,  # () of `Guard`, as the next four
    growth_ptr,
    norm_ptr,
    found_inf_ptr,
    in_row_ptr,
    betas_ptr,  # (2,) float64
    partials,
    tensors,
    grad_clip,
    growth_interval,
    CLIPS: tl.constexpr,
    SCALES_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, partials, BLOCK):
        squares += tl.load(partials_ptr + start + lanes, start + lanes < partials, other=0.0)
    total = tl.sqrt_rn(tl.sum(squares))
    scale = tl.load(scale_ptr)
    norm = tl.div_rn(total, scale)
    is_found = tl.where(_is_finite(total), 0.0, 1.0)
    grad_scale = scale
    if CLIPS:
        ratio = tl.div_rn(norm, grad_clip)
        grad_scale = scale * tl.where(_is_finite(ratio), tl.maximum(ratio, 1.0), 1.0)
    tl.store(grad_scale_ptr, grad_scale)
    tl.store(norm_ptr, norm)
    tl.store(found_inf_ptr, is_found)
    final = is_found
    if SCALES_LOSS:
        final = tl.where(scale <= 1.0, is_found, 0.0)
        growth = tl.load(growth_ptr) + 1
        is_grown = (is_found == 0.0) & (growth == growth_interval) & _is_finite(2.0 * scale)
        tl.store(scale_ptr, tl.where(is_found == 1.0, 0.5 * scale, tl.where(is_grown, 2.0 * scale, scale)))
        tl.store(growth_ptr, tl.where((is_found == 1.0) | (growth == growth_interval), 0, growth))
    tl.store(in_row_ptr, (tl.load(in_row_ptr) + final) * is_found)
    for start in range(0, tensors, BLOCK):
        mask = start + lanes < tensors
        steps_ptr = tl.load(table_ptr + (start + lanes) * _COLUMNS + 5, mask, other=0).to(tl.pointer_type(tl.float32))
        steps = tl.load(steps_ptr, mask, other=0.0) + (1.0 - is_found)
        tl.store(steps_ptr, steps, mask)
        first = _one_minus_power(tl.load(betas_ptr), steps.to(tl.int32), BLOCK)
        second = _one_minus_power(tl.load(betas_ptr + 1), steps.to(tl.int32), BLOCK)
        tl.store(corrections_ptr + 2 * (start + lanes), first.to(tl.float32), mask)
        tl.store(corrections_ptr + 2 * (start + lanes) + 1, tl.sqrt_rn(second.to(tl.float32)), mask)


@triton.jit
def _store_copy(table_ptr, first, p, mask, LOW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a parameter into its copy, if it has one."""
    if tl.load(table_ptr + 4) != 0:
        copy_ptr = _pointer(table_ptr, 4, LOW, ALIGNED)
        if tl.load(table_ptr + 7) == tl.load(table_ptr + 8):
            tl.store(copy_ptr + first + tl.arange(0, BLOCK), p.to(LOW), mask)
        else:
            tl.store(copy_ptr + _offsets(table_ptr, first, BLOCK), p.to(LOW), mask)


@triton.jit
def _update(
    table_ptr, first, mask, grad_scale, correction1, correction2, lr, beta1, one_minus_beta1, beta2, one_minus_beta2,
    eps, weight_decay, LOW: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Step a block of a tensor from element `first` on."""
    lanes = tl.arange(0, BLOCK)
    p_ptr = _pointer(table_ptr, 0, tl.float32, ALIGNED) + first + lanes
    m_ptr = _pointer(table_ptr, 2, tl.float32, ALIGNED) + first + lanes
    v_ptr = _pointer(table_ptr, 3, tl.float32, ALIGNED) + first + lanes
    g = tl.div_rn(_gradient(table_ptr, first, mask, LOW, ALIGNED, BLOCK), grad_scale)
    p, m, v = tl.load(p_ptr, mask), tl.load(m_ptr, mask), tl.load(v_ptr, mask)
    p -= lr * weight_decay * p
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * g * g
    p -= tl.div_rn(tl.div_rn(lr, correction1) * m, tl.div_rn(tl.sqrt_rn(v), correction2) + eps)
    tl.store(p_ptr, p, mask)
    tl.store(m_ptr, m, mask)
    tl.store(v_ptr, v, mask)
    if LOW is not None:
        _store_copy(table_ptr, first, p, mask, LOW, ALIGNED, BLOCK)


@triton.jit
def adamw_kernel(
    table_ptr,  # (tensors, _COLUMNS)
    chunks_ptr,  # (chunks, 2): row of the table, number of the chunk in the tensor
    corrections_ptr,  # (tensors, 2)
    grad_scale_ptr,  # ()
    found_inf_ptr,  # ()
    lr,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    weight_decay,
    LOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(found_inf_ptr) == 0.0:
        row = tl.load(chunks_ptr + 2 * tl.program_id(0))
        first = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
        table_ptr += row * _COLUMNS
        size, grad_scale = tl.load(table_ptr + 6), tl.load(grad_scale_ptr)
        correction1, correction2 = tl.load(corrections_ptr + 2 * row), tl.load(corrections_ptr + 2 * row + 1)
        for start in range(0, CHUNK, BLOCK):
            block = first + start
            if block + BLOCK <= size:  # as in `adamw_sum_kernel`
                _update(
                    table_ptr, block, tl.full([BLOCK], 1, tl.int1), grad_scale, correction1, correction2, lr, beta1,
                    one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, LOW, ALIGNED, BLOCK,
                )  # fmt: skip
            elif block < size:
                _update(
                    table_ptr, block, block + tl.arange(0, BLOCK) < size, grad_scale, correction1, correction2, lr,
                    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, LOW, ALIGNED, BLOCK,
                )  # fmt: skip


CANDIDATES = tuple(
    {"BLOCK": block, "num_warps": warps} for block, warps in ((1024, 8), (1024, 4), (2048, 8), (512, 4), (2048, 4))
)


@dataclass
class AdamWStep:
    """Steps of one optimizer, whose tensors' addresses are kept on the device between them."""

    _rows: list[tuple[int, ...]] = field(default_factory=list)  # of the table
    _device: dict[str, Tensor] = field(default_factory=dict)

    def __call__(
        self,
        tensors: AdamWTensors,
        guard: Guard,
        options: AdamWOptions,
        sum_over_ranks: Callable[[Tensor], object] | None = None,
    ) -> None:
        """Change parameters, moments, copies and `guard`, all in place.

        Args:
            tensors: on one device. guard: there too. options: numbers of this step.
            sum_over_ranks: adds a tensor up over ranks in place, if each rank has other elements of the gradients.
        """
        copy = next((copy for copy in tensors.copies if copy is not None), tensors.parameters[0])
        key = str(copy.dtype).removeprefix("torch.")
        if dispatch.path("adamw", copy, key) != "triton":
            return guarded_adamw_reference(tensors, guard, options, sum_over_ranks)
        self._renew(tensors)
        chunks, gradient_bytes = self._chunks(copy.dtype), sum(map(_nbytes, tensors.gradients))
        partials = self._device["partials"]
        self._launch(adamw_sum_kernel, {**chunks, "partials_ptr": partials}, key, gradient_bytes)
        if sum_over_ranks is not None:
            partials = partials.sum(dim=0, keepdim=True)
            sum_over_ranks(partials)
        self._finish(len(tensors.steps), guard, options, partials, key)
        lr, (beta1, beta2), eps, weight_decay, *_ = options
        args = {
            **chunks, "corrections_ptr": self._device["corrections"], "grad_scale_ptr": self._device["grad_scale"],
            "found_inf_ptr": guard.found_inf, "lr": float(lr), "beta1": beta1, "one_minus_beta1": 1 - beta1,
            "beta2": beta2, "one_minus_beta2": 1 - beta2, "eps": eps, "weight_decay": float(weight_decay),
        }  # fmt: skip
        copy_bytes = sum(_nbytes(copy) for copy in tensors.copies if copy is not None)
        parameter_bytes = sum(map(_nbytes, tensors.parameters))
        self._launch(adamw_kernel, args, key, 6 * parameter_bytes + gradient_bytes + copy_bytes, repeatable=False)

    def _launch(self, kernel: Any, args: dict[str, Any], key: str, nbytes: int, repeatable: bool = True) -> None:
        """Launch a kernel with a program per chunk."""
        chunks = len(self._device["chunks"])
        dispatch.launch(kernel, lambda config: (chunks,), args, CANDIDATES, key, repeatable, nbytes)

    def _chunks(self, low: torch.dtype) -> dict[str, Any]:
        """Arguments of both kernels over the chunks."""
        is_aligned = not any(address % 16 for row in self._rows for address in row[:5])
        return {
            "table_ptr": self._device["table"], "chunks_ptr": self._device["chunks"], "LOW": _LOW.get(low),
            "ALIGNED": is_aligned, "CHUNK": CHUNK,
        }  # fmt: skip

    def _finish(self, count: int, guard: Guard, options: AdamWOptions, partials: Tensor, key: str) -> None:
        """Judge the norm and count the step, of so many tensors."""
        device = self._device
        if "betas" not in device:
            device["betas"] = torch.tensor(options.betas, dtype=torch.float64, device=guard.scale.device)
        args = {
            "table_ptr": device["table"], "partials_ptr": partials, "corrections_ptr": device["corrections"],
            "grad_scale_ptr": device["grad_scale"], **{f"{name}_ptr": value for name, value in vars(guard).items()},
            "betas_ptr": device["betas"], "partials": len(partials), "tensors": count,
            "grad_clip": float(options.grad_clip), "growth_interval": options.growth_interval,
            "CLIPS": options.grad_clip > 0, "SCALES_LOSS": options.scales_loss,
        }  # fmt: skip
        dispatch.launch(adamw_finish_kernel, lambda config: (1,), args, ({"BLOCK": 1024, "num_warps": 8},), key)

    def _renew(self, tensors: AdamWTensors) -> None:
        """Bring table and chunks on the device up to date."""
        sizes = [_size(*pair) for pair in zip(tensors.parameters, tensors.copies, strict=True)]
        kinds = (tensors.parameters, tensors.gradients, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.copies)
        addresses = [tuple(map(_address, row)) for row in zip(*kinds, tensors.steps, strict=True)]
        is_low = [gradient.dtype != torch.float32 for gradient in tensors.gradients]
        rows = [(*row, *size, low) for row, size, low in zip(addresses, sizes, is_low, strict=True)]
        if rows == self._rows:
            return
        device = tensors.parameters[0].device
        if [row[6:9] for row in self._rows] != sizes:
            self._allocate(sizes, device)
        # Page-locked memory is not given out again before the copy is done.
        host = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device["table"].copy_(host, non_blocking=True)
        self._rows = rows

    def _allocate(self, sizes: Sequence[tuple[int, ...]], device: torch.device) -> None:
        counts = [ceil_div(size, CHUNK) for size, *_ in sizes]
        chunks = [(row, number) for row, count in enumerate(counts) for number in range(count)]
        self._device |= {
            "chunks": torch.tensor(chunks, dtype=torch.int32, device=device),
            "partials": torch.empty(len(chunks), device=device),
            "corrections": torch.empty(len(sizes), 2, device=device),
            "grad_scale": torch.empty((), device=device),
            "table": torch.empty(len(sizes), _COLUMNS.value, dtype=torch.int64, device=device),
        }


def _size(parameter: Tensor, copy: Tensor | None) -> tuple[int, int, int]:
    """Elements, elements of a row, and of a row of the copy; 1 and 1 if rows need not be told apart."""
    if copy is None or parameter.dim() != 2 or copy.shape[1] == parameter.shape[1]:
        return parameter.numel(), 1, 1
    assert parameter.is_contiguous() and parameter.numel() < 2**31
    return parameter.numel(), parameter.shape[1], copy.shape[1]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or isinstance(tensor, FakeTensor) else tensor.data_ptr()


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
