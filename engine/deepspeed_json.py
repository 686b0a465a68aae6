"""DeepSpeed's JSON file (`--train.deepspeed`): which of our options it sets, and what is passed on to DeepSpeed."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from typing import Any

from engine.config import Config
from engine.optim import OptimConfig
from engine.step import TrainConfig

log = logging.getLogger(__name__)

DATA_TYPES = {"communication_data_type", "seq_parallel_communication_data_type"}
SECTIONS = {"zero_optimization", "activation_checkpointing", "aio"}
"""Sections that are passed on, as long as they hold only numbers and switches."""


def apply_deepspeed_json(config: Config, world_size: int) -> tuple[Config, dict[str, Any]]:
    """The configuration with what `--train.deepspeed` sets, and the remaining settings for DeepSpeed itself.

    The file overrides the options that this program has too: batch size, accumulation, precision, ZeRO stage,
    clipping, AdamW's rate and decay, warm-up. "auto" leaves an option as it is. Without a file, nothing changes.

    Raises:
        ValueError: a file that can't be read, or settings that this engine does not support.
    """
    path = config.train.deepspeed
    if path is None:
        return config, {}
    try:
        found = _without_auto(json.loads(path.read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"--train.deepspeed {path} can't be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--train.deepspeed {path} must hold a JSON object, as DeepSpeed's documentation shows")
    train, optim = replace(config.train), replace(config.optim)
    try:
        _move_options(found, train, optim, world_size)
        settings = _without_side_effects(found)
        changed = replace(config, train=train, optim=optim)
    except ValueError as error:
        raise ValueError(f"--train.deepspeed {path}: {error}") from error
    except (AttributeError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"--train.deepspeed {path}: a value has another type than in DeepSpeed's documentation, where sections are "
            f'objects and sizes are numbers above 0, without quotes; leave out, or set to "auto", what you do not need '
            f"({error})"
        ) from error
    for group, old, new in (("train", config.train, train), ("optim", config.optim, optim)):
        for name, was in vars(old).items():
            if (now := getattr(new, name)) != was:
                log.info("%s sets --%s.%s %s (was %s)", path, group, name, now, was)
    return changed, settings


def _without_auto(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_auto(item) for key, item in value.items() if item != "auto"}
    return value


def _move_options(settings: dict[str, Any], train: TrainConfig, optim: OptimConfig, world_size: int) -> None:
    """Move the settings that are options here out of `settings`, into `train` and `optim`."""
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
        _warn_ignored("fp16", settings["fp16"], {"enabled"})
    autocast = settings.pop("torch_autocast", {})
    half = [key.replace("bfloat", "bf") for key in ("bf16", "bfloat16", "fp16")
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
    for section, move in (("optimizer", _move_optimizer), ("scheduler", _move_schedule)):
        values = settings.pop(section, None)
        if values is not None:
            move(values, optim)


def _without_side_effects(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that DeepSpeed gets: no file, folder or code, because the JSON may be somebody else's.

    Raises:
        ValueError: another section that is not switched off, or text where a number belongs.
    """
    kept = {}
    for name, value in settings.items():
        if isinstance(value, dict) and name not in SECTIONS:
            if value.get("enabled") is not False and value:
                raise ValueError(
                    f"{name} must be left out: DeepSpeed only reduces and shards here, without settings that write "
                    "files, measure or change the network (docs/training.md)"
                )
            continue
        inner = value.items() if isinstance(value, dict) else [(name, value)]
        words = [key for key, item in inner if not isinstance(item, int | float | None) and key not in DATA_TYPES]
        if words:
            raise ValueError(f"{name}: {', '.join(words)} must be a number, true or false; or leave it out")
        kept[name] = value
    return kept


def _move_optimizer(optimizer: dict[str, Any], optim: OptimConfig) -> None:
    kind, params = optimizer.get("type"), optimizer.get("params", {})
    if kind not in ("Adam", "AdamW") or not params.get("adam_w_mode", True):
        raise ValueError(f"optimizer {kind} must be AdamW (or Adam with adam_w_mode): this engine has no other")
    default: dict[str, Any] = {"betas": [0.9, 0.999], "eps": 1e-8}
    other = [f"{name} {params[name]}" for name, value in default.items() if params.get(name, value) != value]
    if other:
        raise ValueError(f"optimizer {', '.join(other)}: must be AdamW's defaults, betas [0.9, 0.999] and eps 1e-8")
    _warn_ignored("optimizer", params, {"lr", "weight_decay", "adam_w_mode", "torch_adam", *default})
    optim.lr = params.get("lr", optim.lr)
    optim.weight_decay = params.get("weight_decay", optim.weight_decay)


def _warn_ignored(section: str, given: dict[str, Any], used: set[str]) -> None:
    """Warn of a section's settings that change nothing."""
    others = [f"{name} {value}" for name, value in given.items() if name not in used]
    if others:
        log.warning("%s: %s ignored: this engine has its own way (docs/training.md)", section, ", ".join(others))


def _move_schedule(schedule: dict[str, Any], optim: OptimConfig) -> None:
    kinds = {"WarmupLR": "constant", "WarmupCosineLR": "cosine"}
    if schedule.get("type") not in kinds:
        raise ValueError(f"scheduler {schedule.get('type')} must be one of {', '.join(kinds)}; or leave it out")
    params = schedule.get("params", {})
    _warn_ignored("scheduler", params, {"warmup_num_steps", "warmup_max_lr"})
    optim.schedule = kinds[schedule["type"]]  # type: ignore[assignment]
    optim.warmup_steps = params.get("warmup_num_steps", optim.warmup_steps)
    optim.lr = params.get("warmup_max_lr", optim.lr)
