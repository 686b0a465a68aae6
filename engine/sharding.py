"""The network under DeepSpeed, and its weights and moments unsharded, at any ZeRO stage.

Precision is not left to DeepSpeed: weights, gradients and moments are float32 at every stage, and bf16 and fp16 are
torch autocast inside the network. DeepSpeed's own bf16 takes a wrong first Adam step without ZeRO (0.744 of the right
one in 0.19.8, because of a step on zeros at the start), and its loss scaling and clipping read the device at each step.
DeepSpeed does two things here: it reduces gradients while the backward runs, and it shards.

    ZeRO   sharded over ranks                  gradients are reduced during the backward, by
    0      nothing                             torch's DistributedDataParallel, inside the engine
    1      moments                             DeepSpeed
    2      moments, gradients                  DeepSpeed
    3      moments, gradients, weights         DeepSpeed; weights are gathered when they are used

At stage 0 DeepSpeed alone would reduce only after the backward. It does so when a CUDA graph replays the backward, or
when its JSON file sets how gradients are communicated.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.optim import GuardedAdamW
from engine.ranks.distributed import Ranks

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 10_000_000
"""Gradients reduced together. The 50 million of a UNETR in one bucket would leave no backward to overlap with."""
REDUCTION_SETTINGS = {"communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"}
"""Settings of DeepSpeed's file about its own reduction of gradients."""


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
    """The model in a `deepspeed.DeepSpeedEngine`.

    Args:
        model: float32 weights, on the device already. optimizer: of its parameters.
        settings: DeepSpeed's own, see `engine.deepspeed_json`. ranks: who this process is.
        zero_stage, batch_size, accumulate_steps, cuda_graph: as in `TrainConfig`.
    """
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns about other libraries' optimizers
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # it uses old names
    if ranks.device.type == "cpu":
        # By default DeepSpeed probes all its ops at start and compiles this one, which needs ninja and a C++ compiler.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    zero = _zero_settings(zero_stage, settings, ranks)
    bucket = zero.get("reduce_bucket_size", BUCKET_ELEMENTS)
    overlaps = ranks.world_size > 1 and not zero_stage and not cuda_graph and not REDUCTION_SETTINGS & settings.keys()
    wrapped = _in_ddp(model, bucket, ranks) if overlaps else model
    # DeepSpeed broadcasts weights as bytes, which fails if they are channels-last in memory.
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
            "zero_allow_untested_optimizer": True,  # ours is a subclass of torch's AdamW
            "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at norm 1.0 by default
        },
    )
    if not zero_stage:  # else they are in flat buffers now
        for parameter, data in given:
            parameter.data = data.copy_(parameter.data)
    if overlaps or (not zero_stage and ranks.world_size == 1):  # one rank would only copy its gradients
        engine.enable_backward_allreduce = False
    return engine


def _zero_settings(zero_stage: int, settings: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`."""
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage:
        zero |= {"overlap_comm": ranks.device.type == "cuda" and ranks.world_size > 1, "contiguous_gradients": True,
                 "reduce_bucket_size": BUCKET_ELEMENTS}  # fmt: skip
    if zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # the optimizer computes it, without waiting
    zero |= settings.get("zero_optimization", {})
    if zero_stage == 3:
        # The moving average and the checkpoints take shards, which must hold all weights. And a group of parameters
        # stepped separately would have its own norm, and be skipped separately.
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 10**12}
    return zero


def _in_ddp(model: torch.nn.Module, bucket_elements: int, ranks: Ranks) -> DistributedDataParallel:
    """The model in DDP, which averages gradients over ranks, bucket by bucket, during the backward."""
    for parameter in trainable(model):
        if 1 in parameter.shape:
            parameter.register_hook(_with_strides_of(parameter))
    return DistributedDataParallel(
        model,
        device_ids=[ranks.device] if ranks.device.type == "cuda" else None,
        bucket_cap_mb=bucket_elements * 4 / 2**20,
        gradient_as_bucket_view=True,
    )


def _with_strides_of(parameter: torch.nn.Parameter) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that gives a gradient exactly the strides of its weight, if both have the same layout in memory.

    The stride of an axis of length 1 means nothing, and a convolution's is arbitrary. DDP lays out buckets by the
    weights' strides, and warns when a gradient's differ.
    """
    shape, strides = parameter.shape, parameter.stride()

    def restride(gradient: torch.Tensor) -> torch.Tensor:
        is_alike = all(size == 1 or a == b for size, a, b in zip(shape, strides, gradient.stride(), strict=True))
        return gradient.as_strided(shape, strides) if is_alike else gradient

    return restride


# Weights and moments, unsharded


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that training changes; the others are frozen (`requires_grad` is False)."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def local_shard(parameter: torch.nn.Parameter) -> torch.Tensor:
    """What this rank keeps of a parameter between steps: all of it, or under ZeRO 3 a flat shard."""
    return getattr(parameter, "ds_tensor", parameter).data


def shard_of(full: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """The part of an unsharded tensor that goes with `local_shard` of a parameter; zeros pad the last shard."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return full
    size = shard.numel()
    padded = torch.nn.functional.pad(full.flatten(), (0, size * dist.get_world_size() - full.numel()))
    return padded.narrow(0, dist.get_rank() * size, size)


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The unsharded state dict as copies on the CPU; all ranks must call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(model.parameters())):  # does nothing unless they are sharded
        return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def full_moments(engine: Any, optimizer: GuardedAdamW) -> dict[str, Any]:
    """Adam's states, unsharded, on the CPU; all ranks must call it.

    Returns:
        "step", and "exp_avg" and "exp_avg_sq": float32 tensors by name of each trainable parameter; empty before the
        first step.
    """
    if not optimizer.state:
        return {}
    from deepspeed.utils import safe_get_full_optimizer_state

    result: dict[str, Any] = {"step": float(next(iter(optimizer.state.values()))["step"])}
    for key, name, parameter in _moments(engine):
        is_sharded = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        moment = safe_get_full_optimizer_state(parameter, key) if is_sharded else optimizer.state[parameter][key]
        result.setdefault(key, {})[name] = moment.to("cpu", copy=True)
    return result


def load_moments(engine: Any, optimizer: GuardedAdamW, moments: dict[str, Any]) -> None:
    """Put what `full_moments` gave into the optimizer; the stage and the number of ranks may have changed.

    Moments of parameters that are frozen now are ignored.

    Raises:
        ValueError: there are none of a parameter that is trained.
    """
    if not moments:
        return
    missing = [name for name, _ in _trained(engine) if any(name not in moments[key] for key in MOMENTS)]
    if missing:
        raise ValueError(
            f"the state has no moments of {missing[0]}, which was frozen when it was written and is trained now: "
            "freeze it again, or start a new run from the weights"
        )
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    for shard in _optimizer_tensors(engine, optimizer):
        optimizer.state[shard] = {"step": torch.full((), moments["step"], device=shard.device),
                                  **{key: torch.zeros_like(shard) for key in MOMENTS}}  # fmt: skip
    for key, name, parameter in _moments(engine):
        value = moments[key][name].to(optimizer.scale.device)
        if hasattr(parameter, "ds_id"):
            # safe_set_full_optimizer_state fails where the last shard is padded.
            safe_set_local_optimizer_state(parameter, shard_of(value, parameter), key)
        elif hasattr(parameter, "_hp_mapping"):
            safe_set_full_optimizer_state(parameter, value, key)
        else:
            optimizer.state[parameter][key].copy_(value)


def _optimizer_tensors(engine: Any, optimizer: GuardedAdamW) -> list[torch.Tensor]:
    """What the optimizer updates: the parameters, or flat shards of them."""
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return zero.fp32_partitioned_groups_flat
    if hasattr(zero, "single_partition_of_fp32_groups"):
        return zero.single_partition_of_fp32_groups
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _moments(engine: Any) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """Each moment's key in the optimizer's state, with the trainable parameter and its name."""
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO 1 and 2 map states to parameters late
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    return ((key, name, parameter) for key in MOMENTS for name, parameter in _trained(engine))


def _trained(engine: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Names, without DDP's prefix, and trainable parameters."""
    module = engine.module
    network = module.module if isinstance(module, DistributedDataParallel) else module
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
