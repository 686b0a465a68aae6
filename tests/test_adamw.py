"""AdamW of many tensors in three launches, against torch's fused AdamW and against float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kernel_paths import DEVICES, needs_kernels
from torch import Tensor

from kernels import dispatch
from kernels.adamw import CHUNK, AdamWOptions, AdamWStep, AdamWTensors, Guard, guarded_adamw_reference

pytestmark = pytest.mark.kernel

SIZES = ((3, 5), (CHUNK - 1,), (CHUNK + 3,), (2, 3, 2, 2, 2), (1,))
PADDED = {(3, 5): (8, 8), (1,): (8,)}
TOLERANCES = {  # relative; and absolute, or 0
    "parameters": (1e-6, 1e-7),
    "exp_avg": (1e-6, 1e-7),  # a difference of numbers of about 1
    "exp_avg_sq": (1e-6, 0),
    "norm": (1e-6, 0),
    "scalars": (1e-6, 0),
}
OPTIONS = AdamWOptions(
    lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, grad_clip=0.0, scales_loss=False, growth_interval=2
)
LOW = [None, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def assert_near(found: Any, expected: Any, of: str) -> None:
    rtol, atol = TOLERANCES[of]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def make(device: str, low: torch.dtype | None, seed: int = 0) -> AdamWTensors:
    """Parameters of `SIZES`; with `low`, all but the last two have copies, those of `PADDED` with longer rows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: tuple[int, ...]) -> Tensor:
        tensor = torch.randn(size, generator=generator)
        return (tensor.to(memory_format=torch.channels_last_3d) if len(size) == 5 else tensor).to(device)

    rows = []
    for number, size in enumerate(SIZES):
        parameter, has_copy = draw(size), low is not None and number not in (1, 4)
        copy = torch.empty_like(parameter, dtype=low) if has_copy else None
        if has_copy and size in PADDED:
            copy = torch.zeros(PADDED[size], dtype=low, device=device)
        gradient = draw(size)
        if copy is not None:
            padded = torch.full_like(copy, torch.nan)
            padded[tuple(map(slice, size))] = gradient
            gradient = padded
        row = (parameter, gradient, 0.1 * draw(size), draw(size).square(), torch.full((), 3.0 + number), copy)
        rows.append(tuple(tensor if tensor is None else tensor.to(device) for tensor in row))
    return AdamWTensors.of(rows)


def copied(tensors: AdamWTensors) -> AdamWTensors:
    rows = zip(*tensors, strict=True)
    return AdamWTensors.of(tuple(tensor if tensor is None else tensor.clone() for tensor in row) for row in rows)


def make_guard(device: str, scale: float = 1.0) -> Guard:
    zeros = (torch.zeros((), device=device) for _ in range(3))
    return Guard(torch.full((), scale, device=device), torch.zeros((), dtype=torch.int32, device=device), *zeros)


def assert_same_step(tensors: AdamWTensors, guard: Guard, options: AdamWOptions, steps: int = 1) -> None:
    """Ours and the reference take the same steps from the same state."""
    theirs, their_guard, ours = copied(tensors), dataclasses.replace(guard), AdamWStep()
    for name, value in vars(guard).items():
        setattr(their_guard, name, value.clone())
    for _ in range(steps):  # on a CPU torch's divides gradients by the scale where they are
        theirs.gradients[:] = [gradient.clone() for gradient in tensors.gradients]
        ours(tensors, guard, options)
        guarded_adamw_reference(theirs, their_guard, options)
    for found, expected in zip(tensors.parameters, theirs.parameters, strict=True):
        assert_near(found, expected, "parameters")
    for found, expected in zip(tensors.exp_avgs, theirs.exp_avgs, strict=True):
        assert_near(found, expected, "exp_avg")
    for found, expected in zip(tensors.exp_avg_sqs, theirs.exp_avg_sqs, strict=True):
        assert_near(found, expected, "exp_avg_sq")
    assert [step.item() for step in tensors.steps] == [step.item() for step in theirs.steps]
    for name, value in vars(guard).items():
        assert_near(value, getattr(their_guard, name), "norm" if name == "norm" else "scalars")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("changes", [{}, {"grad_clip": 3.0}, {"grad_clip": 1e9}, {"weight_decay": 0.0}], ids=str)
def test_steps_are_those_of_torchs_fused_adamw(changes: dict[str, Any], low: torch.dtype, device: str) -> None:
    needs_kernels(device)
    assert_same_step(make(device, low), make_guard(device), OPTIONS._replace(**changes), steps=2)


@pytest.mark.parametrize("device", DEVICES)
def test_a_first_step_is_close_to_adamw_in_float64(device: str) -> None:
    """Where the corrections for bias are largest."""
    needs_kernels(device)
    tensors, (beta1, beta2) = make(device, None), OPTIONS.betas
    for step, *moments in zip(tensors.steps, tensors.exp_avgs, tensors.exp_avg_sqs, strict=True):
        for tensor in (step, *moments):
            tensor.zero_()
    before = copied(tensors)
    AdamWStep()(tensors, make_guard(device), OPTIONS)
    for number, found in enumerate(tensors.parameters):
        p, g = before.parameters[number].double(), before.gradients[number].double()
        m, v = (1 - beta1) * g / (1 - beta1), (1 - beta2) * g * g / (1 - beta2)
        expected = p * (1 - OPTIONS.lr * OPTIONS.weight_decay) - OPTIONS.lr * m / (v.sqrt() + OPTIONS.eps)
        assert_near(found.double(), expected, "parameters")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", LOW[1:])
def test_copies_are_the_rounded_parameters_and_their_padding_stays(low: torch.dtype, device: str) -> None:
    needs_kernels(device)
    tensors = make(device, low)
    AdamWStep()(tensors, make_guard(device), OPTIONS)
    for parameter, copy in zip(tensors.parameters, tensors.copies, strict=True):
        if copy is not None:
            inside = copy[tuple(map(slice, parameter.shape))]
            assert torch.equal(inside, parameter.to(low))
            assert copy.count_nonzero() == inside.count_nonzero()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("scales_loss", [False, True])
def test_one_nonfinite_gradient_leaves_everything_but_the_counts(scales_loss: bool, value: float, device: str) -> None:
    needs_kernels(device)
    tensors = make(device, None)
    tensors.gradients[2][CHUNK + 1] = value
    before, guard, step = copied(tensors), make_guard(device, 4.0), AdamWStep()
    for count in range(1, 5):
        step(tensors, guard, OPTIONS._replace(scales_loss=scales_loss))
        assert guard.found_inf == 1 and not guard.norm.isfinite()
        # With scaling, 4, 2 and then 1, which is final.
        assert guard.in_row == (max(0, count - 2) if scales_loss else count)
    assert guard.scale == (0.25 if scales_loss else 4.0)
    for kept, now in zip((*before.parameters, *before.steps), (*tensors.parameters, *tensors.steps), strict=True):
        assert torch.equal(kept, now)
    tensors.gradients[2][CHUNK + 1] = 0
    step(tensors, guard, OPTIONS._replace(scales_loss=scales_loss))
    assert guard.found_inf == 0 and guard.in_row == 0
    assert not torch.equal(before.parameters[0], tensors.parameters[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [2.0**10, 2.0**127])
def test_the_scale_divides_gradients_and_doubles_after_finite_steps(scale: float, device: str) -> None:
    """2^127 can't double."""
    needs_kernels(device)
    for steps in (1, 2, 5):
        tensors = make(device, None)
        assert_same_step(tensors, make_guard(device, scale), OPTIONS._replace(scales_loss=True), steps)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_that_moved_are_found_and_odd_addresses_are_right(device: str) -> None:
    needs_kernels(device)
    tensors, step, guard = make(device, None), AdamWStep(), make_guard(device)
    theirs, their_guard = copied(tensors), make_guard(device)
    for number in range(3):
        for each in (tensors, theirs):
            each.gradients[:] = make(device, None, seed=number).gradients
        if number == 1:  # as views of a bucket are
            for i, gradient in enumerate(tensors.gradients):
                room = torch.empty(gradient.numel() + 1, device=device)[1:]
                tensors.gradients[i] = room.as_strided(gradient.shape, gradient.stride()).copy_(gradient)
        step(tensors, guard, OPTIONS)
        guarded_adamw_reference(theirs, their_guard, OPTIONS)
    for found, expected in zip(tensors.parameters, theirs.parameters, strict=True):
        assert_near(found, expected, "parameters")


@pytest.mark.parametrize("device", DEVICES)
def test_a_sum_over_ranks_is_part_of_the_norm(device: str) -> None:
    needs_kernels(device)
    tensors, guard = make(device, None), make_guard(device)
    AdamWStep()(tensors, guard, OPTIONS, lambda squares: squares.mul_(4))
    single = make_guard(device)
    AdamWStep()(make(device, None), single, OPTIONS)
    assert_near(guard.norm, 2 * single.norm, "norm")


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_is_three_launches_that_count_every_tensor_once(device: str) -> None:
    needs_kernels(device)
    tensors, low = make(device, torch.float16), 2
    found: list[dispatch.Launch] = []
    with dispatch.observed(found.append):
        AdamWStep()(tensors, make_guard(device), OPTIONS)
    assert [launch.name for launch in found] == ["adamw_sum_kernel", "adamw_finish_kernel", "adamw_kernel"]
    gradients = sum(gradient.numel() * gradient.element_size() for gradient in tensors.gradients)
    copies = sum(copy.numel() * low for copy in tensors.copies if copy is not None)
    assert found[0].nbytes == gradients
    assert found[2].nbytes == gradients + copies + 24 * sum(p.numel() for p in tensors.parameters)


@pytest.mark.parametrize("device", DEVICES)
def test_wide_accesses_are_taken_only_where_every_address_allows_them(device: str) -> None:
    """In the interpreter wrong ones would work."""
    needs_kernels(device)
    tensors, found = make(device, None), []
    for shift in (0, 1):
        room = torch.empty(SIZES[1][0] + 4, device=device)
        first = -room.data_ptr() // 4 % 4 + shift  # from a multiple of 16 bytes on
        tensors.gradients[1] = room[first : first + SIZES[1][0]]
        with dispatch.observed(lambda launch: found.append(launch.args.get("ALIGNED"))):
            AdamWStep()(tensors, make_guard(device), OPTIONS)
    assert found == [True, None, True, False, None, False]
