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

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine.config import Config
from engine.optim import GuardedAdamW
from engine.ranks.distributed import Ranks

log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET_ELEMENTS = 10_000_000
"""Gradients that are reduced together: the 50 million of a UNETR in one bucket would leave no backward to overlap."""
OWN_REDUCTION = {"communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients"}
"""Settings of DeepSpeed's file that are about its own way to reduce gradients."""
DATA_TYPES = {"communication_data_type", "seq_parallel_communication_data_type"}
SECTIONS = {"zero_optimization", "activation_checkpointing", "aio"}
"""Sections of DeepSpeed's file that it gets, where they hold numbers and switches alone."""


def deepspeed_engine(
    model: torch.nn.Module, optimizer: GuardedAdamW, config: Config, settings: dict[str, Any], ranks: Ranks
) -> Any:
    """The model under DeepSpeed.

    Args:
        model: float32 weights, on the device already.
        optimizer: of its parameters.
        config: of the run, as `read_deepspeed_json` left it.
        settings: the rest of that file.
        ranks: who this process is.

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
    train = config.train
    zero = _zero_settings(config, settings, ranks)
    bucket = zero.get("reduce_bucket_size", BUCKET_ELEMENTS)
    overlaps = (
        ranks.world_size > 1 and not train.zero_stage and not train.cuda_graph and not OWN_REDUCTION & settings.keys()
    )
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
            "train_micro_batch_size_per_gpu": train.batch_size,
            "gradient_accumulation_steps": train.accumulate_steps,
            "zero_optimization": zero,
            "timers": {"throughput": {"enabled": False}},  # it waits for the device twice a step
            "zero_allow_untested_optimizer": True,  # the guarded AdamW is a subclass, and they ask for torch's own
            "gradient_clipping": 0.0,  # DeepSpeed 0.19 clips at norm 1.0 unless told otherwise
        },
    )
    if not train.zero_stage:  # else they lie in flat buffers now
        for parameter, data in given:
            parameter.data = data.copy_(parameter.data)
    if overlaps or (not train.zero_stage and ranks.world_size == 1):  # one rank would copy its gradients to and fro
        engine.enable_backward_allreduce = False
    return engine


def _zero_settings(config: Config, settings: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """DeepSpeed's `zero_optimization`."""
    train = config.train
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.zero_stage:
        zero |= {"overlap_comm": ranks.device.type == "cuda" and ranks.world_size > 1, "contiguous_gradients": True,
                 "reduce_bucket_size": BUCKET_ELEMENTS}  # fmt: skip
    if train.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # the optimizer does, and nobody waits for it
    zero |= settings.get("zero_optimization", {})
    if train.zero_stage == 3:
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


def read_deepspeed_json(config: Config, world_size: int) -> dict[str, Any]:
    """Take over what `--train.deepspeed` sets.

    Options that this program has too are changed in `config`: batch size, accumulation, precision, ZeRO stage,
    clipping, AdamW's rate and decay, a warm-up. "auto" leaves them as they are.

    Args:
        config: of the run; changed. world_size: number of ranks.

    Returns:
        the rest, for DeepSpeed itself; empty without a file.

    Raises:
        ValueError: a file that can't be read, or settings that this engine can't do.
    """
    path = config.train.deepspeed
    if path is None:
        return {}
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--train.deepspeed {path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--train.deepspeed {path} must hold a JSON object, as DeepSpeed's documentation shows")
    settings = _without_auto(found)
    before = dataclasses.replace(config.train), dataclasses.replace(config.optim)
    try:
        _take_over(config, settings, world_size)
        settings = _harmless(settings)
        config.__post_init__()
    except ValueError as error:
        raise ValueError(f"--train.deepspeed {path}: {error}") from error
    except (AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"--train.deepspeed {path}: a value is of another kind than in DeepSpeed's documentation, where sections "
            f'are objects and sizes numbers above 0, without quotes; what is not meant is left out or "auto" ({error})'
        ) from error
    for group, old in zip(("train", "optim"), before, strict=True):
        new = getattr(config, group)
        for item in dataclasses.fields(new):
            was, now = getattr(old, item.name), getattr(new, item.name)
            if was != now:
                log.info("%s sets --%s.%s %s (was %s)", path, group, item.name, now, was)
    return settings


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value


def _take_over(config: Config, settings: dict[str, Any], world_size: int) -> None:
    """Move from `settings` to `config` what both can say."""
    train, optim = config.train, config.optim
    train.accumulate_steps = settings.pop("gradient_accumulation_steps", train.accumulate_steps)
    total, micro = settings.pop("train_batch_size", None), settings.pop("train_micro_batch_size_per_gpu", None)
    if total is not None:
        passes = world_size * train.accumulate_steps
        if total % passes or (micro is not None and micro * passes != total):
            raise ValueError(
                f"train_batch_size {total} must be train_micro_batch_size_per_gpu {micro or '(any)'} x "
                f"gradient_accumulation_steps {train.accumulate_steps} x {world_size} rank(s)"
            )
        micro = total // passes
    train.batch_size = train.batch_size if micro is None else micro
    optim.grad_clip = settings.pop("gradient_clipping", optim.grad_clip)
    if settings.get("fp16", {}).get("enabled"):
        _name_unheeded("fp16", settings["fp16"], {"enabled"})
    autocast = settings.pop("torch_autocast", {})
    half = [name for name, key in (("bf16", "bf16"), ("bf16", "bfloat16"), ("fp16", "fp16"))
            if settings.pop(key, {}).get("enabled")]  # fmt: skip
    if autocast.get("enabled"):
        half.append("fp16" if autocast.get("dtype") in ("fp16", "half", "float16", "torch.float16") else "bf16")
    if len(half) > 1:
        raise ValueError("bf16 and fp16 must not both be enabled")
    train.precision = half[0] if half else train.precision  # type: ignore[assignment]
    zero = settings.get("zero_optimization", {})
    train.zero_stage = zero.pop("stage", train.zero_stage)
    if train.zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage {train.zero_stage} must be 0, 1, 2 or 3")
    for name in ("offload_optimizer", "offload_param", "cpu_offload"):
        wanted = zero.pop(name, None)
        if wanted not in (None, False) and (wanted is True or wanted.get("device", "none") != "none"):
            raise ValueError(f"{name} must be left out: these networks fit a GPU whole, and the optimizer runs there")
    _take_optimizer(config, settings.pop("optimizer", None))
    _take_schedule(config, settings.pop("scheduler", None))


def _harmless(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that DeepSpeed gets: none that names a file, a folder or code, as the file may be somebody else's.

    Raises:
        ValueError: another section that is not switched off, or text where a number belongs.
    """
    kept = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name not in SECTIONS:
            if value.get("enabled") is not False and value:
                raise ValueError(
                    f"{name} must be left out: DeepSpeed only reduces and shards here, and gets no settings that "
                    "write files, measure or change the network (docs/training.md)"
                )
            continue
        inner = value.items() if isinstance(value, dict) else [(name, value)]
        words = [key for key, item in inner if not isinstance(item, int | float | None) and key not in DATA_TYPES]
        if words:
            raise ValueError(f"{name}: {', '.join(words)} must be a number, true or false; or leave it out")
        kept[name] = value
    return kept


def _take_optimizer(config: Config, optimizer: dict[str, Any] | None) -> None:
    if optimizer is None:
        return
    kind, params = optimizer.get("type"), optimizer.get("params", {})
    if kind not in ("Adam", "AdamW") or not params.get("adam_w_mode", True):
        raise ValueError(f"optimizer {kind} must be AdamW (or Adam with adam_w_mode): this engine has no other")
    default = {"betas": (0.9, 0.999), "eps": 1e-8}
    other = [f"{name} {params[name]}" for name, value in default.items() if name in params
             and params[name] != value and tuple(_as_list(params[name])) != tuple(_as_list(value))]  # fmt: skip
    if other:
        raise ValueError(f"optimizer {', '.join(other)}: must be AdamW's defaults, betas [0.9, 0.999] and eps 1e-8")
    _name_unheeded("optimizer", params, {"lr", "weight_decay", "adam_w_mode", "torch_adam", *default})
    config.optim.lr = params.get("lr", config.optim.lr)
    config.optim.weight_decay = params.get("weight_decay", config.optim.weight_decay)


def _name_unheeded(section: str, given: dict[str, Any], heeded: set[str]) -> None:
    """Say which settings of a section change nothing, so that nobody believes that they do."""
    others = [f"{name} {value}" for name, value in given.items() if name not in heeded]
    if others:
        log.warning("%s: %s: not heeded, this engine has a way of its own (docs/training.md)", section,
                    ", ".join(others))  # fmt: skip


def _as_list(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _take_schedule(config: Config, schedule: dict[str, Any] | None) -> None:
    if schedule is None:
        return
    kinds = {"WarmupLR": "constant", "WarmupCosineLR": "cosine"}
    if schedule.get("type") not in kinds:
        raise ValueError(f"scheduler {schedule.get('type')} must be one of {', '.join(kinds)}; or leave it out")
    params = schedule.get("params", {})
    _name_unheeded("scheduler", params, {"warmup_num_steps", "warmup_max_lr"})
    config.optim.schedule = kinds[schedule["type"]]  # type: ignore[assignment]
    config.optim.warmup_steps = params.get("warmup_num_steps", config.optim.warmup_steps)
    config.optim.lr = params.get("warmup_max_lr", config.optim.lr)


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
