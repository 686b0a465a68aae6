"""DeepSpeed's engine: every ZeRO stage takes the steps of stage 0 and resumes its state, on one rank and on two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import free_port
from test_step import batch, make_step, network, plain_step

from engine.diagnosis import first_nonfinite
from engine.ranks.distributed import Ranks
from engine.sharding import full_moments, full_weights, load_moments

ROOT = Path(__file__).resolve().parent.parent
TOLERANCES = {  # relative; and absolute, or 0
    "channels last": (1e-3, 1e-5),
    "ZeRO stages": (1e-5, 0),
    "norms": (1e-4, 0),
    "orders of reduction": (1e-6, 0),
    "an update": (1e-3, 0),  # of the whole change, by its norm
}
FROZEN = "2.bias"


def near(expected: Any, of: str) -> Any:
    """What equals it within the tolerances of a comparison."""
    rtol, atol = TOLERANCES[of]
    return pytest.approx(expected, rel=rtol, abs=atol)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_weights_with_the_channels_last_in_memory_take_the_same_step(stage: int, ranks: Ranks) -> None:
    """As on a GPU. One of a single voxel counts as both formats, with strides of this one."""
    contiguous = make_step(ranks, zero_stage=stage)
    model = network()
    model.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    step = make_step(ranks, model, zero_stage=stage)
    first = next(step.model.parameters())
    assert stage or first.is_contiguous(memory_format=torch.channels_last_3d)
    for number in range(2):
        contiguous(*batch(number))
        step(*batch(number))
    expected = full_weights(contiguous.model)
    for name, value in full_weights(step.model).items():
        rtol, atol = TOLERANCES["channels last"]
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol)


def test_gradients_of_one_rank_are_not_reduced(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed would copy all of them into one buffer, reduce it over one rank, and copy them back."""
    step = make_step(ranks)
    monkeypatch.setattr(type(step.engine), "buffered_allreduce_fallback", lambda *_, **__: pytest.fail("reduced"))
    step(*batch(0))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_never_waits_for_the_device(stage: int, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its throughput timer did, twice a step."""
    from deepspeed.accelerator import get_accelerator

    step = make_step(ranks, zero_stage=stage)
    waits: list[tuple] = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *args: waits.append(args))
    for number in range(5):
        step(*batch(number))
    assert not waits


def test_zero_3_steps_all_parameters_as_one_group(ranks: Ranks) -> None:
    """Each would have a norm of its own, and could be skipped by itself."""
    settings = {"zero_optimization": {"sub_group_size": 50, "stage3_param_persistence_threshold": 1000}}
    plain, grouped = (make_step(ranks, settings=each, zero_stage=3, grad_clip=0.05) for each in ({}, settings))
    for number in range(2):
        plain(*batch(number))
        grouped(*batch(number))
        assert torch.equal(plain.values, grouped.values)


def partly_frozen() -> torch.nn.Module:
    model = network()
    model.get_parameter(FROZEN).requires_grad_(False)
    return model


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_parameters_stay_and_the_others_take_the_step_of_torchs_adamw(stage: int, ranks: Ranks) -> None:
    """The weight decay of 0.1 would change the frozen one too."""
    plain = partly_frozen()
    optimizer = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1)
    step = make_step(ranks, partly_frozen(), zero_stage=stage, ema_decay=0.9)
    start = full_weights(step.model)
    for number in range(3):
        step(*batch(number))
        plain_step(plain, optimizer, batch(number), "float32")
    found = full_weights(step.model)
    for name, value in plain.state_dict().items():
        change = (value - start[name]).norm()
        assert (found[name] - value).norm() <= TOLERANCES["an update"][0] * change, name
    assert torch.equal(found[FROZEN], start[FROZEN])
    assert step.average and torch.equal(step.average.full_weights()[FROZEN], start[FROZEN])
    assert set(full_moments(step.engine, step.optimizer)["exp_avg"]) == set(start) - {FROZEN}
    with step.inspecting() as model:
        assert first_nonfinite(model, lambda *pair: step.loss_of(*pair).loss, *batch(0)) is None
    with step.evaluating() as model:
        assert model(batch(0)[0]).isfinite().all()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_with_moments_of_a_parameter_that_is_frozen_now_resumes(stage: int, ranks: Ranks) -> None:
    trained = make_step(ranks, ema_decay=0.9)
    trained(*batch(0))
    moments = full_moments(trained.engine, trained.optimizer)
    step = make_step(ranks, partly_frozen(), zero_stage=stage, ema_decay=0.9)
    assert trained.average and step.average
    load_moments(step.engine, step.optimizer, moments)
    step.average.load(trained.average.full_weights(), 1)
    resumed = full_moments(step.engine, step.optimizer)
    assert all(torch.equal(value, moments["exp_avg"][name]) for name, value in resumed["exp_avg"].items())
    step(*batch(1))
    assert full_moments(step.engine, step.optimizer)["step"] == 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_without_moments_of_a_parameter_that_is_trained_now_is_refused(stage: int, ranks: Ranks) -> None:
    frozen = make_step(ranks, partly_frozen())
    frozen(*batch(0))
    step = make_step(ranks, zero_stage=stage)
    with pytest.raises(ValueError, match=f"no moments of {FROZEN}, which was frozen"):
        load_moments(step.engine, step.optimizer, full_moments(frozen.engine, frozen.optimizer))


TWO_RANKS = """
import json, sys
import torch, torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from engine.ranks.distributed import init_ranks
from engine.sharding import full_moments, full_weights, load_moments
from test_sharding import partly_frozen
from test_step import batch, cuda_graphs_on_a_cpu, make_step, network, values_of
import pytest
ranks = init_ranks("cpu")
result, states = {}, {}
CLIP = 0.02

def run(step, numbers):
    losses = []
    for number in numbers:
        image, labels = batch(number, size=4)
        step(image[ranks.rank::2], labels[ranks.rank::2])
        loss = step.values[:1].clone()
        dist.all_reduce(loss)
        losses.append(loss.item() / 2)
    return losses

with pytest.MonkeyPatch.context() as patch:
    cuda_graphs_on_a_cpu(patch)
    result["CUDA graph"] = run(make_step(ranks, cuda_graph=True, grad_clip=CLIP), range(20))
for stage in range(4):
    step = make_step(ranks, zero_stage=stage, grad_clip=CLIP, ema_decay=0.9)
    losses = run(step, range(20))
    result[f"norm at {stage}"] = values_of(step).gradient_norm
    states[stage] = full_weights(step.model), full_moments(step.engine, step.optimizer), step.average.full_weights()
    result[stage] = losses + run(step, range(20, 23))
    wrong = batch(0, size=4)[0]
    if ranks.rank == 1:
        wrong[3] = float("nan")
    step(wrong[ranks.rank::2], batch(0, size=4)[1][ranks.rank::2])
    result[f"skipped at {stage}"] = values_of(step).was_skipped
for stage in range(4):  # each continues from the state of the one before it
    weights, moments, average = states[(stage - 1) % 4]
    model = network()
    model.load_state_dict(weights)
    step = make_step(ranks, model, zero_stage=stage, grad_clip=CLIP, ema_decay=0.9)
    load_moments(step.engine, step.optimizer, moments)
    step.average.load(average, 20)
    step.done = 20
    result[f"resumed at {stage}"] = run(step, range(20, 23))
    result[f"average at {stage}"] = sum(float(value.double().sum()) for value in average.values())

frozen = {}
for stage in range(4):
    step = make_step(ranks, partly_frozen(), zero_stage=stage, grad_clip=CLIP)
    losses = run(step, range(3))
    frozen[stage] = full_weights(step.model), full_moments(step.engine, step.optimizer)
    result[f"frozen at {stage}"] = losses + run(step, range(3, 5))
    weights, start = full_weights(step.model), network().state_dict()
    result[f"stayed at {stage}"] = [name for name, value in weights.items() if torch.equal(value, start[name])]
for stage in range(4):
    weights, moments = frozen[(stage - 1) % 4]
    model = partly_frozen()
    model.load_state_dict(weights)
    step = make_step(ranks, model, zero_stage=stage, grad_clip=CLIP)
    load_moments(step.engine, step.optimizer, moments)
    result[f"frozen resumed at {stage}"] = run(step, range(3, 5))

def first_updates(**options):  # weights after two steps of eight crops each
    step = make_step(ranks, batch_size=4, grad_clip=CLIP, **options)
    step.loss_config.dice_weight = 0  # what is left is a mean over crops
    for number in range(2):
        image, labels = (tensor[ranks.rank::2] for tensor in batch(number, size=8))
        passes = step.train.accumulate_steps
        for part in range(passes):
            step(image[part::passes], labels[part::passes])
    return step, sum(float(value.double().abs().sum()) for value in full_weights(step.model).values())

_, result["whole"] = first_updates()
_, result["in parts"] = first_updates(accumulate_steps=2)
_, result["compiled"] = first_updates(compile=True)
_, result["channels last"] = first_updates(model=network().to(memory_format=torch.channels_last_3d))
one_channel = torch.nn.Sequential(torch.nn.Conv3d(2, 1, 1), torch.nn.Conv3d(1, 3, 3, padding=1))
first_updates(model=one_channel.to(memory_format=torch.channels_last_3d))
step, result["by DeepSpeed"] = first_updates(settings={"prescale_gradients": True})
result["by DeepSpeed alone"] = step.ddp is None
sent = []
step = make_step(ranks, torch.nn.Sequential(network(), torch.nn.Dropout()), accumulate_steps=2)
step.ddp.register_comm_hook(None, lambda state, bucket: sent.append(1) or allreduce_hook(None, bucket))
torch.manual_seed(3)
for number in range(2):
    torch.manual_seed(3)
    step(*batch(number))
    result[f"draws {number}"] = float(torch.rand(1))
    result.setdefault("laid out", step.ddp._has_rebuilt_buckets)
result["sent"] = len(sent)
if ranks.is_first:
    print(json.dumps(result))
dist.destroy_process_group()  # gloo's threads must not outlive the interpreter
"""


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, Any]:
    """What `TWO_RANKS` prints, from two processes."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error:Grad strides", "-c", TWO_RANKS],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=400) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][1] + outputs[1][1]
    return json.loads(outputs[0][0].splitlines()[-1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_zero_stage_gives_the_losses_of_stage_0(stage: int, on_two_ranks: dict[str, Any]) -> None:
    """Two ranks, float32, 20 steps and more."""
    assert on_two_ranks[str(stage)] == near(on_two_ranks["0"], "ZeRO stages")
    assert on_two_ranks["0"][19] < on_two_ranks["0"][0]
    assert on_two_ranks[f"norm at {stage}"] == near(on_two_ranks["norm at 0"], "norms")
    assert on_two_ranks["norm at 0"] > 0.02  # clipping was at work


def test_gradients_of_cuda_graphs_are_averaged_over_ranks(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["CUDA graph"] == near(on_two_ranks["0"][:20], "orders of reduction")


@pytest.mark.parametrize("way", ["in parts", "compiled", "channels last", "by DeepSpeed"])
def test_gradients_reduced_during_the_backward_are_those_reduced_after_it(
    way: str, on_two_ranks: dict[str, Any]
) -> None:
    assert on_two_ranks[way] == near(on_two_ranks["whole"], "orders of reduction")
    assert on_two_ranks["by DeepSpeed alone"]


def test_ddps_bucket_order_is_fixed_before_the_first_step(on_two_ranks: dict[str, Any]) -> None:
    """Else a resumed run would sum over ranks in another order. The pass for it leaves the random state alone."""
    assert on_two_ranks["laid out"] and on_two_ranks["draws 0"] == on_two_ranks["draws 1"]


def test_gradients_are_sent_once_for_all_passes_of_a_step(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["sent"] == 2  # when buckets are laid out, and after the second pass


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_state_saved_at_one_zero_stage_resumes_at_another(stage: int, on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks[f"resumed at {stage}"] == near(on_two_ranks["0"][20:], "ZeRO stages")
    assert on_two_ranks[f"average at {stage}"] == near(on_two_ranks["average at 0"], "ZeRO stages")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_ranks_skip_a_step_when_one_has_nonfinite_gradients(stage: int, on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks[f"skipped at {stage}"] == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_frozen_parameters_stay_on_two_ranks_and_resume_at_another_stage(
    stage: int, on_two_ranks: dict[str, Any]
) -> None:
    assert on_two_ranks[f"stayed at {stage}"] == [FROZEN]
    assert on_two_ranks[f"frozen at {stage}"] == near(on_two_ranks["frozen at 0"], "ZeRO stages")
    assert on_two_ranks[f"frozen resumed at {stage}"] == near(on_two_ranks["frozen at 0"][3:], "ZeRO stages")
