"""The network under DeepSpeed, and its states whole, whatever ZeRO stage they are sharded by.

Precision is not DeepSpeed's business here: weights, gradients and moments are float32 at every stage, and bf16 and fp16
are torch autocast inside the network. DeepSpeed's own bf16 takes a wrong first Adam step without ZeRO (0.744 of the
right one in 0.19.8, from a step on zeros at the start), and its loss scaling and clipping read the device at each step.
What is left to it is what it is for: reducing gradients while the backward runs, and sharding.

    ZeRO   over ranks                          gradients are reduced during the backward, by
    0      nothing                             torch's DistributedDataParallel, inside the engine
    1      moments                             DeepSpeed
    2      moments, gradients                  DeepSpeed
    3      moments, gradients, weights         DeepSpeed; weights are gathered when they are used

At stage 0 DeepSpeed alone would begin to reduce when the backward is over. It still does where a CUDA graph replays the
backward, or where its JSON file sets how gradients travel.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.optim import GuardedAdamW
from engine.ranks.distributed import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 10_000_000
"""Gradients that are reduced together: the 50 million of a UNETR in one bucket would leave no backward to overlap."""
OWN_REDUCTION = {"communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"}
"""Settings of DeepSpeed's file that are about its own way to reduce gradients."""


def deepspeed_engine(
    model: torch.nn.Module,
    optimizer: GuardedAdamW,
    settings: Mapping[str, Any],
    ranks: Ranks,
    *,
    zero_stage: int,
    batch_size: int,
    accumulate_steps: int,
    cuda_graph: bool,
) -> Any:
    """The model under DeepSpeed.

    Args:
        model: float32 weights, on the device already.
        optimizer: of its parameters.
        settings: what DeepSpeed gets of its JSON file, see `engine.deepspeed_json`.
        ranks: who this process is.
        zero_stage, batch_size, accumulate_steps, cuda_graph: as in `TrainConfig`.

    Returns:
        `deepspeed.DeepSpeedEngine`.
    """
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # names that it still uses
    if ranks.device.type == "cpu":
        # Left to itself, DeepSpeed probes all its ops at start and compiles this one, for which it wants ninja and a
        # C++ compiler on PATH.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    zero = _zero_settings(zero_stage, settings, ranks)
    bucket = zero.get("reduce_bucket_size", BUCKET_ELEMENTS)
    overlaps = ranks.world_size > 1 and not zero_stage and not cuda_graph and not OWN_REDUCTION & settings.keys()
    wrapped = reduced_during_backward(model, bucket, ranks) if overlaps else model
    # DeepSpeed sends weights to the other ranks as bytes, and fails where their channels are last in memory.
    given = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, data in given:
        parameter.data = data.clone(memory_format=torch.contiguous_format)
    engine, *_ = deepspeed.initialize(
        model=wrapped,
        optimizer=optimizer,
        config={
            "steps_per_print": 1_000_000_000,  # the trainer logs
            **settings,
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": accumulate_steps,
            "zero_optimization": zero,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
            "zero_allow_untested_optimizer": True,  # the guarded AdamW is a subclass, and they ask for torch's own
            "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at norm 1.0 unless told otherwise
        },
    )
    if not zero_stage:  # else they lie in flat buffers now
        for parameter, data in given:
            parameter.data = data.copy_(parameter.data)
    if overlaps or (not zero_stage and ranks.world_size == 1):  # one rank would copy its gradients to and fro
        engine.enable_backward_allreduce = False
    return engine


def _zero_settings(zero_stage: int, settings: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage:
        zero |= {"overlap_comm": ranks.device.type == "cuda" and ranks.world_size > 1, "contiguous_gradients": True,
                 "reduce_bucket_size": BUCKET_ELEMENTS}  # fmt: skip
    if zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # the optimizer does, and nobody waits for it
    zero |= settings.get("zero_optimization", {})
    if zero_stage == 3:
        # Weights kept whole would not be in the shards that the moving average and the checkpoints take, and a group
        # of parameters that is stepped by itself would have a norm, and be left out, by itself.
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 10**12}
    return zero


def reduced_during_backward(model: torch.nn.Module, bucket_elements: int, ranks: Ranks) -> DistributedDataParallel:
    """The model with gradients that are averaged over ranks, bucket by bucket, while the backward goes on.

    Its first backward tells the order in which gradients come, by which it lays out its buckets for good: see
    `TrainingStep`, which makes that pass before any that counts.
    """
    for parameter in model.parameters():
        if 1 in parameter.shape:
            parameter.register_hook(_with_strides_of(parameter))
    return DistributedDataParallel(
        model,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        bucket_cap_mb=bucket_elements * 4 / 2**20,
        gradient_as_bucket_view=True,
    )


def _with_strides_of(parameter: torch.nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
    """What makes of a gradient one with the very strides of its weight, if it lies in memory as that does.

    The stride of an axis of one voxel or channel means nothing, and a convolution sets it as it likes, by its device
    and the format of its input; PyTorch, which lays out buckets by the weights' strides, warns where it differs.
    """
    shape, strides = parameter.shape, parameter.stride()

    def restrided(gradient: torch.Tensor) -> torch.Tensor:
        is_alike = all(size == 1 or a == b for size, a, b in zip(shape, strides, gradient.stride(), strict=True))
        return gradient.as_strided(shape, strides) if is_alike else gradient

    return restrided


def network_of(engine: Any) -> torch.nn.Module:
    """The network in a DeepSpeed engine, which calls its parameters by their names."""
    module = engine.module
    return module.module if isinstance(module, DistributedDataParallel) else module


# States, whole


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """Within it every parameter is whole on every rank (ZeRO 3 gathers them; else they are)."""
    sharded = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def held_by_rank(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank holds of a parameter between steps: all, or under ZeRO 3 a flat shard."""
    return getattr(parameter, "ds_tensor", parameter).data


def shard_of(parameter: torch.nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """The part of a whole tensor that belongs to what `held_by_rank` gives; the last one is padded with zeros."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return value
    size = shard.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
    return padded.narrow(0, dist.get_rank() * size, size)


def copy_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict as copies on the CPU; every rank takes part."""
    with whole_weights(model):
        return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def copy_moments(engine: Any, optimizer: GuardedAdamW) -> dict[str, Any]:
    """Adam's states by name of the parameter, whole, on the CPU; every rank takes part.

    Returns:
        "step", and "exp_avg" and "exp_avg_sq": a dictionary of float32 tensors each; empty before the first step.
    """
    if not optimizer.state:
        return {}
    result: dict[str, Any] = {"step": float(next(iter(optimizer.state.values()))["step"])}
    _link(engine)
    for key in MOMENTS:
        result[key] = {name: _moment(optimizer, parameter, key).to("cpu", copy=True)
                       for name, parameter in network_of(engine).named_parameters()}  # fmt: skip
    return result


def load_moments(engine: Any, optimizer: GuardedAdamW, moments: dict[str, Any]) -> None:
    """Put what `copy_moments` gave into the optimizer, at whatever stage and number of ranks this is."""
    if not moments:
        return
    for shard in _shards(engine, optimizer):
        optimizer.state[shard] = {"step": torch.full((), moments["step"], device=shard.device),
                                  **{key: torch.zeros_like(shard) for key in MOMENTS}}  # fmt: skip
    _link(engine)
    for key in MOMENTS:
        for name, parameter in network_of(engine).named_parameters():
            _set_moment(optimizer, parameter, key, moments[key][name].to(optimizer.scale.device))


def _shards(engine: Any, optimizer: GuardedAdamW) -> list[torch.Tensor]:
    """What the optimizer steps: the parameters, or flat shards of them."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return zero.fp32_partitioned_groups_flat
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return zero.single_partition_of_fp32_groups
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _link(engine: Any) -> None:
    """ZeRO 1 and 2 map parameters to shards of the states when they are first asked to."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _moment(optimizer: GuardedAdamW, parameter: torch.nn.Parameter, key: str) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        return safe_get_full_optimizer_state(parameter, key)
    return optimizer.state[parameter][key]


def _set_moment(optimizer: GuardedAdamW, parameter: torch.nn.Parameter, key: str, value: torch.Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if hasattr(parameter, "ds_id"):
        # safe_set_full_optimizer_state fails where the last shard is padded.
        safe_set_local_optimizer_state(parameter, shard_of(parameter, value), key)
    elif hasattr(parameter, "_hp_mapping"):
        safe_set_full_optimizer_state(parameter, value, key)
    else:
        optimizer.state[parameter][key].copy_(value)
