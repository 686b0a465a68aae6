"""How the steps of a run are computed where its options leave it open: `--train.precision`, `compile`, `cuda_graph`.

    precision             bf16 on a GPU that computes in it (compute capability 8.0 and up), fp16 on an older one,
                          float32 on a CPU
    compile, cuda_graph   eager, or another way that was timed and takes at least 3 % less

An option that is written out is not touched. What is `auto` is as in the checkpoint that a run resumes, so that it goes
on as it began; else as timed in an earlier run of the same kind, which the cache keeps (`measured/steps.json`); else it
is timed now (step_trial.py). A trial has a price, and is made only where the run is long enough to earn it back.

All ranks take the same way: the first one's checkpoint and cache count, and the times of the slowest.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any, get_args

import torch
import triton
from torch import Tensor, nn

from engine import checkpoint
from engine.config import Config
from engine.precision import Precision
from engine.ranks.distributed import Ranks, gather
from engine.step import TrainConfig, TrainingStep, check_options
from engine.step_trial import STEPS, StepTrial, Tried, Way
from kernels.measured_cache import MeasuredCache
from pipelines.loading.loaders import CropLoader

log = logging.getLogger(__name__)

OPTIONS = ("precision", "compile", "cuda_graph")
"""Options of `--train` that can be `auto`."""
LEAD = 0.03
"""Share of the plainest way's time that another must save to be taken."""
GAIN = 0.05
"""Share that a trial is assumed to save, when it is asked whether the run is long enough for it."""
COMPILE_S, RECORD_S = 60.0, 5.0
"""Assumed seconds of compiling, and of recording a CUDA graph."""
CACHE = "steps"


def with_precision(config: Config, ranks: Ranks) -> Config:
    """The configuration with a precision in place of `auto`: the checkpoint's if it resumes one, else the device's."""
    if config.train.precision != "auto":
        return config
    found = gather(_native_precision(ranks.device), ranks)
    chosen: Any = "fp16" if "fp16" in found else found[0]
    recorded = _recorded(config, ranks).get("precision")
    if recorded == "bf16" and chosen == "fp16":
        log.warning("precision: the checkpoint's run computed in bf16, which a GPU here does not: fp16 from now on")
    elif recorded in get_args(Precision):
        chosen = recorded
    shown = logging.INFO if ranks.device.type == "cuda" or recorded else logging.DEBUG
    log.log(shown, "precision: %s, %s", chosen, "as in the checkpoint" if chosen == recorded else ranks.device_name)
    return replace(config, train=replace(config.train, precision=chosen))


def with_way(
    config: Config,
    ranks: Ranks,
    model: nn.Module,
    loader: CropLoader,
    make_step: Callable[[nn.Module, TrainConfig], TrainingStep],
    settings: Mapping[str, Any],
    steps_left: int,
) -> Config:
    """The configuration with true or false in place of `--train.compile auto` and `--train.cuda_graph auto`.

    Args:
        config: with its precision. ranks: who this process is; all must call it.
        model, make_step: as for `StepTrial`. loader: gives the batch of a trial; its position stays.
        settings: DeepSpeed's own. steps_left: optimizer steps that the run has still to make.
    """
    train = config.train
    ways = ways_of(train, ranks)
    way = ways[0] if train.deterministic or len(ways) == 1 else _recorded_way(config, ranks, ways)
    if way is None and not _pays(steps_left, step_s=1.0, price_s=0.0):  # whatever a step takes
        log.debug("step: %s; %d steps can't earn back a trial of other ways", ways[0], steps_left)
        way = ways[0]
    if way is None:
        key = _kind_of(config, ranks, model, settings)
        way = _known_way(key, ranks, ways, steps_left)
        if way is None:
            trial = StepTrial(make_step, model, train, ranks, _batch_of(loader))
            way = _timed_way(trial, key, ranks, ways, steps_left)
    return replace(config, train=replace(train, compile=way.compile, cuda_graph=way.cuda_graph))


def ways_of(train: TrainConfig, ranks: Ranks) -> list[Way]:
    """The ways that the options leave open and that work on this device, the plainest first; never none."""
    compiles, graphs = ([False, True] if each == "auto" else [each] for each in (train.compile, train.cuda_graph))
    ways = [Way(*pair) for pair in itertools.product(compiles, graphs)]
    fitting = [way for way in ways if _goes_together(train, way, ranks)]
    return fitting or ways[:1]  # which the step then refuses, with the reason


def fastest(seconds: Mapping[Way, float], ways: Sequence[Way]) -> Way:
    """The fastest of the ways, of which the first is left only for a lead of `LEAD`."""
    best = min(ways, key=lambda way: seconds[way])
    return best if seconds[best] <= (1 - LEAD) * seconds[ways[0]] else ways[0]


def _recorded(config: Config, ranks: Ranks) -> dict[str, Any]:
    """The options of `--train` in the checkpoint that a run resumes, where nothing is `auto`; else empty."""
    if not config.resume:
        return {}
    assert config.run_dir is not None
    found = checkpoint.recorded_config(config.run_dir / "checkpoints") if ranks.is_first else None
    train = (gather(found, ranks)[0] or {}).get("train")
    return train if isinstance(train, dict) else {}


def _recorded_way(config: Config, ranks: Ranks, ways: Sequence[Way]) -> Way | None:
    """The way of the checkpoint's run, as far as the options leave it open; None if there is none, or not here."""
    train, recorded = config.train, _recorded(config, ranks)
    chosen = [recorded.get(name) if getattr(train, name) == "auto" else getattr(train, name) for name in Way._fields]
    if not all(isinstance(value, bool) for value in chosen):
        return None
    way = Way(*map(bool, chosen))
    if way in ways:
        log.info("step: %s, as in the checkpoint", way)
        return way
    log.warning("step: %s in the checkpoint, which does not work here: chosen again", way)
    return None


def _known_way(key: str, ranks: Ranks, ways: Sequence[Way], steps_left: int) -> Way | None:
    """The way that an earlier run of this kind found, if it tried all that pay in this one."""
    found = gather(MeasuredCache(CACHE).get(key) if ranks.is_first else None, ranks)[0]
    if found is None:
        return None
    seconds = _seconds_by_way(found)
    if ways[0] not in seconds:
        log.warning("step: the cache's entry for this run is damaged: timed again")
        return None
    paying = _paying(ways, seconds[ways[0]], steps_left)
    if not seconds.keys() >= set(paying):
        return None
    way = fastest(seconds, paying)
    log.info("step: %s, as timed in an earlier run: %s", _in_words({each: seconds[each] for each in paying}), way)
    return way


def _timed_way(trial: StepTrial, key: str, ranks: Ranks, ways: Sequence[Way], steps_left: int) -> Way:
    tried = _tried(trial, ways, steps_left)
    for way, (_, fault) in tried.items():
        if fault:
            log.warning("step: %s is not taken: %s", way, fault)
    seconds = {way: each.seconds for way, each in tried.items() if not each.fault}
    if ways[0] not in seconds:
        return ways[0]
    way = gather(fastest(seconds, list(seconds)), ranks)[0]
    log.log(logging.INFO if len(seconds) > 1 else logging.DEBUG, "step: %s: %s", _in_words(seconds), way)
    if ranks.is_first:  # what failed is tried again by the next run: it may have lacked memory, or a compiler
        MeasuredCache(CACHE).put(key, {str(each): taken for each, taken in seconds.items()})
    return way


def _tried(trial: StepTrial, ways: Sequence[Way], steps_left: int) -> dict[Way, Tried]:
    """The plainest way, and every other that pays; none does if the plainest has failed, in infinite seconds."""
    tried = {ways[0]: trial.tried(ways[0])}
    for way in _paying(ways, tried[ways[0]].seconds, steps_left)[1:]:
        parts = (Way(way.compile, False), Way(False, way.cuda_graph))
        if not any(tried[part].fault for part in parts if part in tried):  # else both together fail too
            tried[way] = trial.tried(way)
    return tried


def _paying(ways: Sequence[Way], step_s: float, steps_left: int) -> list[Way]:
    """The first of the ways, and those whose trial the run can earn back; `step_s` is the first one's time."""
    price = {way: COMPILE_S * way.compile + RECORD_S * way.cuda_graph for way in ways}
    return [way for way in ways if way == ways[0] or _pays(steps_left, step_s, price[way])]


def _pays(steps_left: int, step_s: float, price_s: float) -> bool:
    """Whether saving `GAIN` of each step left makes up for the steps of a trial, of two ways, and its price."""
    return steps_left * step_s * GAIN > 2 * STEPS * step_s + price_s


def _goes_together(train: TrainConfig, way: Way, ranks: Ranks) -> bool:
    try:
        check_options(replace(train, compile=way.compile, cuda_graph=way.cuda_graph), ranks)
    except ValueError:
        return False
    return True


def _batch_of(loader: CropLoader) -> tuple[Tensor, Tensor]:
    """The batch that comes next, which will come again."""
    position = loader.position
    batch = next(loader.epoch(*position))
    loader.position = position
    return batch


def _native_precision(device: torch.device) -> Precision:
    if device.type == "cpu":
        return "float32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def _kind_of(config: Config, ranks: Ranks, model: nn.Module, settings: Mapping[str, Any]) -> str:
    """What the times depend on, as a key of the cache: devices, versions, network, sizes, options."""
    names = sorted(set(gather(ranks.device_name, ranks)))
    if len(names) > 1:
        log.info("step: the ranks' devices differ (%s): the times of the slowest count", ", ".join(names))
    shapes = [(name, list(parameter.shape)) for name, parameter in model.named_parameters()]
    train = config.train
    return json.dumps({
        "devices": names,
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "CUDA": torch.version.cuda,
                     "cuDNN": torch.backends.cudnn.version(), **_installed("deepspeed", "glioforge")},
        "model": config.model.name,
        "parameters": hashlib.blake2b(json.dumps(shapes).encode(), digest_size=8).hexdigest(),
        "crop": list(config.data.crop_size_voxels),
        "batch": [train.batch_size, train.accumulate_steps],
        "precision": train.precision,
        "ranks": [ranks.world_size, ranks.ranks_on_node],
        "zero": [train.zero_stage, dict(settings)],
        "kernels": config.kernels,
    }, sort_keys=True)  # fmt: skip


def _installed(*names: str) -> dict[str, str]:
    """Versions of distributions; none of one that only lies on the path."""
    return {each.name: each.version for each in metadata.distributions() if each.name in names}


def _seconds_by_way(found: Any) -> dict[Way, float]:
    """What the cache holds, as far as it is times of ways."""
    ways = {str(way): way for way in (Way(*pair) for pair in itertools.product((False, True), repeat=2))}
    entries = found.items() if isinstance(found, dict) else ()
    return {
        ways[name]: float(taken)
        for name, taken in entries
        if name in ways and isinstance(taken, int | float) and math.isfinite(taken) and taken > 0
    }


def _in_words(seconds: Mapping[Way, float]) -> str:
    return ", ".join(f"{way} {1000 * taken:,.{0 if taken >= 0.01 else 1}f} ms" for way, taken in seconds.items())
