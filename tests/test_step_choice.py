"""What a run takes where its options say `auto`: what insists, what is remembered, what is timed, on several ranks."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import free_port
from test_step import batch, network
from test_step_trial import BOTH, COMPILED, EAGER, GRAPH, Change, Clock, fail, set_value, step_of

from engine.checkpoint import CheckpointWriter, state_name
from engine.config import Config, to_portable_dict
from engine.ranks.distributed import Ranks
from engine.step import TrainConfig
from engine.step_choice import GAIN, ways_of, with_precision, with_way
from engine.step_trial import STEPS, Way
from kernels.measured_cache import MeasuredCache

ROOT = Path(__file__).resolve().parent.parent
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
LONG = 1_000_000
"""Steps of a run that is long enough to try everything."""
ALL = {"eager": 1.0, "graph": 0.5, "compiled": 0.75, "both": 0.875}


class Loader:
    """One batch for ever, at a position."""

    position = (0, 0)

    def epoch(self, epoch: int, first_step: int = 0) -> Any:
        self.position = (epoch, first_step + 1)
        yield batch(0)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("engine.step_trial.gc.collect", lambda: 0)  # a fifth of a second in a process of tests


def config_of(**train: Any) -> Config:
    return Config(train=TrainConfig(**{"precision": "float32", **train}))


def way_of(ranks: Ranks, config: Config | None = None, steps_left: int = LONG, **settings: Any) -> Way:
    loader: Any = Loader()
    chosen = with_way(config or config_of(), ranks, network(), loader, step_of(ranks), settings, steps_left)
    assert loader.position == (0, 0)
    assert "auto" not in (chosen.train.compile, chosen.train.cuda_graph)
    return Way.of(chosen.train)


# Precision


def on_a_gpu(patch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Ranks:
    patch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    patch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA X")
    return Ranks(0, 1, 0, GPU)


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_a_gpu_computes_in_bf16_if_it_can(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ranks = on_a_gpu(monkeypatch, capability)
    assert with_precision(Config(), ranks).train.precision == precision
    assert caplog.messages == [f"precision: {precision}, NVIDIA X"]
    assert with_precision(config_of(precision="tf32"), ranks).train.precision == "tf32"


def test_a_cpu_computes_in_float32_and_an_explicit_precision_insists(ranks: Ranks) -> None:
    assert with_precision(Config(), ranks).train.precision == "float32"
    for precision in ("bf16", "fp16", "tf32"):
        assert with_precision(config_of(precision=precision), ranks).train.precision == precision


# Which ways there are


@pytest.mark.parametrize(
    ("device", "options", "ways"),
    [
        (GPU, {}, [EAGER, GRAPH, COMPILED, BOTH]),
        (CPU, {}, [EAGER, COMPILED]),
        (GPU, {"zero_stage": 1}, [EAGER, COMPILED]),
        (GPU, {"accumulate_steps": 2}, [EAGER, COMPILED]),
        (GPU, {"zero_stage": 3}, [EAGER]),
        (GPU, {"compile": True}, [COMPILED, BOTH]),
        (GPU, {"cuda_graph": False}, [EAGER, COMPILED]),
        (GPU, {"compile": False, "cuda_graph": True}, [GRAPH]),
        (CPU, {"cuda_graph": True}, [GRAPH]),  # which the step refuses
    ],
)
def test_ways_are_those_that_options_and_device_leave(
    device: torch.device, options: dict[str, Any], ways: list[Way]
) -> None:
    assert ways_of(config_of(**options).train, Ranks(0, 1, 0, device)) == ways


# Which is taken


@pytest.mark.parametrize(
    ("seconds", "way"),
    [
        (ALL, GRAPH),
        (ALL | {"compiled": 0.25}, COMPILED),
        (ALL | {"both": 0.125}, BOTH),
        (ALL | {"graph": 0.98, "compiled": 0.98, "both": 0.98}, EAGER),
        (ALL | {"graph": 0.96, "compiled": 0.98, "both": 0.98}, GRAPH),
        ({name: 2 - taken for name, taken in ALL.items()}, EAGER),
    ],
)
def test_the_fastest_way_is_taken_if_it_leads_by_3_percent(
    seconds: dict[str, float], way: Way, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(**seconds).patch(monkeypatch)
    assert way_of(ranks) == way


def test_the_log_has_the_times_and_the_choice(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    Clock(eager=2.0, graph=0.125, compiled=0.25, both=0.0078125).patch(monkeypatch)
    way_of(ranks)
    assert caplog.messages == [
        "step: eager 2,000 ms, CUDA graph 125 ms, compiled 250 ms, compiled CUDA graph 7.8 ms: compiled CUDA graph"
    ]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({GRAPH: fail(RuntimeError("no"))}, ["step: CUDA graph is not taken: RuntimeError: no"]),
        ({GRAPH: fail(torch.OutOfMemoryError("CUDA"))}, ["step: CUDA graph is not taken: out of memory"]),
        ({GRAPH: set_value(0, 9.0)}, ["step: CUDA graph is not taken: its first step has a loss of 9, not of "]),
    ],
)
def test_a_way_that_fails_or_computes_something_else_never_wins_and_is_named(
    changes: dict[Way, Change], lines: list[str], ranks: Ranks, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    clock = Clock(**ALL | {"graph": 0.125, "both": 0.0625}).patch(monkeypatch, changes)
    assert way_of(ranks) == COMPILED
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(lines) and all(map(str.startswith, warnings, lines)), warnings
    assert BOTH not in clock.taken  # half of it failed


def test_if_the_plainest_way_fails_it_is_taken_untimed(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The run then says itself what is wrong."""
    clock = Clock(**ALL).patch(monkeypatch, {EAGER: fail(RuntimeError("no"))})
    assert way_of(ranks) == EAGER and set(clock.taken) == {EAGER}
    assert caplog.messages == ["step: eager is not taken: RuntimeError: no"]


@pytest.mark.parametrize(
    ("options", "way"),
    [
        ({"compile": False, "cuda_graph": False}, EAGER),
        ({"compile": True, "cuda_graph": True}, BOTH),
        ({"deterministic": True}, EAGER),
        ({"deterministic": True, "compile": True}, COMPILED),
    ],
)
def test_nothing_is_timed_where_nothing_is_open_or_bits_must_be_the_same(
    options: dict[str, Any], way: Way, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock(**ALL).patch(monkeypatch)
    assert way_of(ranks, config_of(**options)) == way and not clock.taken and not caplog.messages


def test_an_option_that_is_written_out_insists(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(**ALL).patch(monkeypatch)
    assert way_of(ranks, config_of(compile=True)) == COMPILED and set(clock.taken) == {COMPILED, BOTH}
    assert way_of(ranks, config_of(cuda_graph=False)) == COMPILED


# How long a run must be


def test_a_short_run_times_nothing(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a trial would take longer than it can save."""
    clock = Clock(**ALL).patch(monkeypatch)
    fewest = int(2 * STEPS / GAIN)
    assert way_of(ranks, steps_left=fewest) == EAGER and not clock.taken
    assert way_of(ranks, steps_left=fewest + 1) == EAGER and set(clock.taken) == {EAGER}


def test_what_takes_longer_to_make_is_tried_in_longer_runs_alone(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(eager=1.0, graph=0.5, compiled=0.25, both=0.125).patch(monkeypatch)
    for minutes, way in ((6, EAGER), (9, GRAPH), (26, COMPILED), (30, BOTH)):
        clock.taken.clear()
        MeasuredCache("steps").clear()
        assert way_of(ranks, steps_left=60 * minutes) == way, minutes


def test_the_demo_never_tries_to_compile(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten epochs of 32 steps, about three minutes on two cores; and twice as many on a machine as slow again."""
    clock = Clock(eager=0.5, compiled=0.001).patch(monkeypatch)
    monkeypatch.setattr("engine.step_choice.check_options", _as_on_a_cpu)
    for steps in (320, 640):
        assert way_of(ranks, steps_left=steps) == EAGER and COMPILED not in clock.taken


def _as_on_a_cpu(train: TrainConfig, ranks: Ranks) -> None:
    if train.cuda_graph:
        raise ValueError("needs a GPU")


# The cache


def test_a_second_run_of_the_same_kind_takes_the_way_of_the_first(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock(**ALL).patch(monkeypatch)
    assert way_of(ranks) == GRAPH
    clock.taken.clear()
    clock.seconds = dict.fromkeys(clock.seconds, 1.0)
    assert way_of(ranks) == GRAPH and not clock.taken
    assert caplog.messages[-1] == (
        "step: eager 1,000 ms, CUDA graph 500 ms, compiled 750 ms, compiled CUDA graph 875 ms, as timed in an earlier "
        "run: CUDA graph"
    )


@pytest.mark.parametrize("changed", ["batch_size", "precision", "crop", "model", "settings", "kernels", "versions"])
def test_a_run_of_another_kind_is_timed(changed: str, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(**ALL).patch(monkeypatch)
    config, settings = config_of(), dict[str, Any]()
    larger = torch.nn.Sequential(network(), torch.nn.Conv3d(3, 3, 1))
    way_of(ranks, config)
    clock.taken.clear()
    match changed:
        case "batch_size":
            config = config_of(batch_size=3)
        case "precision":
            config = config_of(precision="bf16")
        case "crop":
            config = replace(config, data=replace(config.data, crop_size_voxels=(64, 64, 64)))
        case "model":
            monkeypatch.setattr("test_step_choice.network", lambda: larger)
        case "settings":
            settings = {"zero_optimization": {"reduce_bucket_size": 7}}
        case "kernels":
            config = replace(config, kernels="reference")
        case "versions":
            monkeypatch.setattr(torch, "__version__", "9.9")
    assert way_of(ranks, config, **settings) == GRAPH and clock.taken


def test_a_longer_run_times_what_a_shorter_one_left_out(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(**ALL | {"compiled": 0.25}).patch(monkeypatch)
    assert way_of(ranks, steps_left=600) == GRAPH and COMPILED not in clock.taken
    assert way_of(ranks) == COMPILED
    clock.taken.clear()
    assert way_of(ranks, steps_left=600) == GRAPH and not clock.taken  # compiling would not pay in the shorter one


def test_what_failed_is_tried_again_by_the_next_run(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        Clock(**ALL).patch(patch, {GRAPH: fail(torch.OutOfMemoryError("CUDA"))})
        assert way_of(ranks) == COMPILED
        assert [*MeasuredCache("steps").entries().values()] == [{"eager": 1.0, "compiled": 0.75}]
    Clock(**ALL).patch(monkeypatch)
    assert way_of(ranks) == GRAPH


@pytest.mark.parametrize("entry", [3, [], {}, {"eager": "fast"}, {"eager": -1.0}, {"eager": float("nan")}, {"x": 1.0}])
def test_a_damaged_entry_is_said_and_timed_again(
    entry: Any, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(**ALL).patch(monkeypatch)
    way_of(ranks)
    clock.taken.clear()
    (key,) = MeasuredCache("steps").entries()
    MeasuredCache("steps").put(key, entry)
    assert way_of(ranks) == GRAPH and clock.taken
    assert caplog.messages == ["step: the cache's entry for this run is damaged: timed again"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00", b'{"version": 99, "entries": {}}', None])
def test_a_damaged_cache_or_one_that_cant_be_written_costs_one_line(
    content: bytes | None, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr("kernels.measured_cache._has_warned", False)
    Clock(**ALL).patch(monkeypatch)
    if content is None:
        (tmp_path / "cache").touch()  # a file where the folder should be
    else:
        (tmp_path / "cache" / "measured").mkdir(parents=True)
        (tmp_path / "cache" / "measured" / "steps.json").write_bytes(content)
    assert way_of(ranks) == GRAPH
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1, caplog.text


# The checkpoint


def resumed(tmp_path: Path, was: TrainConfig, now: TrainConfig) -> Config:
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", 1)
    about = {"config": to_portable_dict(Config(train=was)), "world_size": 1}
    writer.write(state_name(1, False), {}, about, {})
    writer.wait()
    return Config(train=now, run_dir=tmp_path / "run", resume="run")


def test_a_resumed_run_goes_on_as_it_began_and_times_nothing(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock(**ALL).patch(monkeypatch)
    was = TrainConfig(precision="bf16", compile=True, cuda_graph=False)
    config = with_precision(resumed(tmp_path, was, TrainConfig()), ranks)
    assert config.train.precision == "bf16"
    assert way_of(ranks, config) == COMPILED and not clock.taken
    assert caplog.messages == ["precision: bf16, as in the checkpoint", "step: compiled, as in the checkpoint"]


def test_an_option_written_out_insists_on_resuming_too(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(**ALL).patch(monkeypatch)
    was = TrainConfig(precision="bf16", compile=True, cuda_graph=False)
    config = with_precision(resumed(tmp_path, was, TrainConfig(precision="fp16", cuda_graph=True)), ranks)
    assert config.train.precision == "fp16"
    assert way_of(ranks, config) == BOTH and not clock.taken


def test_what_the_device_cant_do_is_chosen_again_and_said(
    tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(**ALL).patch(monkeypatch)
    monkeypatch.setattr("engine.step_choice.check_options", _as_on_a_cpu)
    was = TrainConfig(precision="bf16", compile=False, cuda_graph=True)
    config = resumed(tmp_path, was, TrainConfig())
    assert with_precision(config, on_a_gpu(monkeypatch, (7, 5))).train.precision == "fp16"
    assert way_of(ranks, with_precision(config, ranks)) == COMPILED and set(clock.taken) == {EAGER, COMPILED}
    assert caplog.messages == [
        "precision: the checkpoint's run computed in bf16, which a GPU here does not: fp16 from now on",
        "step: CUDA graph in the checkpoint, which does not work here: chosen again",
    ]


@pytest.mark.parametrize("train", [None, 3, {}, {"compile": "auto"}, {"compile": True}, {"precision": []}])
def test_a_record_of_any_content_is_no_reason_to_stop(
    train: Any, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    Clock(**ALL).patch(monkeypatch)
    config = resumed(tmp_path, TrainConfig(), TrainConfig())
    about = next((tmp_path / "run" / "checkpoints").glob("step-*/about.json"))
    about.write_text(json.dumps({"config": {"train": train}}))
    config = with_precision(config, ranks)
    assert config.train.precision == "float32" and way_of(ranks, config) == GRAPH


# Several ranks

TWO_RANKS = """
import gc, json, logging, os, sys
import pytest, torch, torch.distributed as dist
from engine.ranks.distributed import Ranks, gather, init_ranks
from engine.step_choice import with_precision
from kernels.measured_cache import MeasuredCache
from test_step import network
from test_step_choice import ALL, config_of, way_of
from test_step_trial import BOTH, COMPILED, EAGER, GRAPH, Clock, fail, set_value
ranks = init_ranks("cpu")
gc.collect = lambda: 0  # a fifth of a second
os.environ["GLIOFORGE_CACHE"] = f"{sys.argv[1]}/cache{ranks.rank}"
lines = []
class Lines(logging.Handler):
    def emit(self, record):
        lines.append(record.getMessage())
logging.getLogger("engine").addHandler(Lines())
logging.getLogger("engine").setLevel(logging.INFO)
result, random_kept = {}, []
network()  # seeds, as `way_of` does
untouched = torch.get_rng_state()

def choose(name, changes=None, keep=False, config=None, **seconds):
    lines.clear()
    if not keep:
        MeasuredCache("steps").clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.step_trial.TIMED_S", 1000.0)
        clock = Clock(**ALL | seconds).patch(patch, changes)
        way = str(way_of(ranks, config))
    random_kept.append(torch.equal(torch.get_rng_state(), untouched))
    result[name] = gather((way, len(clock.taken), list(lines)), ranks)

on_1 = ranks.rank == 1
choose("slowest", graph=2.0 if on_1 else 0.5)  # good on rank 0 alone
choose("wrong on 1", {GRAPH: set_value(0, 9.0)} if on_1 else {})
with pytest.MonkeyPatch.context() as patch:
    def local_failure(trial, step):
        if step.train.cuda_graph and on_1:
            raise torch.OutOfMemoryError("CUDA out of memory")
    patch.setattr("engine.step_trial.StepTrial._pass_alone", local_failure)
    choose("out of memory on 1")
choose("fails on both", {COMPILED: fail(RuntimeError("no compiler"))}, compiled=0.25)
choose("timed")
choose("both remember", keep=True, graph=2.0)
if on_1:
    MeasuredCache("steps").clear()
choose("only 0 remembers", keep=True, graph=2.0)
choose("timed again")
if not on_1:
    MeasuredCache("steps").clear()
choose("only 1 remembers", keep=True, graph=2.0)
for stage in (1, 2):
    choose(f"ZeRO {stage}", config=config_of(zero_stage=stage, cuda_graph=False))
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Ranks, "device_name", f"GPU {ranks.rank}")
    choose("other devices")
with pytest.MonkeyPatch.context() as patch:
    patch.setattr("engine.step_choice._native_precision", lambda device: "fp16" if on_1 else "bf16")
    result["precision"] = gather(with_precision(config_of(precision="auto"), ranks).train.precision, ranks)
result["random kept"] = gather(all(random_kept), ranks)
if ranks.is_first:
    print(json.dumps(result))
dist.destroy_process_group()  # gloo's threads must not outlive the interpreter
"""


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `TWO_RANKS` prints, from two processes: way, steps and log lines of each rank, by case."""
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "LOCAL_WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_RANKS, str(tmp_path_factory.getbasetemp())],
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


@pytest.mark.parametrize(
    ("case", "way"),
    [
        ("slowest", "compiled"),
        ("wrong on 1", "compiled"),
        ("out of memory on 1", "compiled"),
        ("fails on both", "CUDA graph"),
        ("timed", "CUDA graph"),
        ("both remember", "CUDA graph"),
        ("only 0 remembers", "CUDA graph"),
        ("only 1 remembers", "compiled"),  # so all time again, and a CUDA graph is slow now
        ("ZeRO 1", "compiled"),
        ("ZeRO 2", "compiled"),
        ("other devices", "CUDA graph"),
    ],
)
def test_ranks_take_one_way(case: str, way: str, on_two_ranks: dict[str, Any]) -> None:
    (first, steps, lines), (second, other_steps, other_lines) = on_two_ranks[case]
    assert first == second == way
    assert steps == other_steps and lines == other_lines
    assert (steps == 0) == (case in ("both remember", "only 0 remembers"))


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("wrong on 1", "step: CUDA graph is not taken: its first step has a loss of 9, not of "),
        ("out of memory on 1", "step: CUDA graph is not taken: out of memory (rank 1)"),
        ("fails on both", "step: compiled is not taken: RuntimeError: no compiler"),
        ("other devices", "step: the ranks' devices differ (GPU 0, GPU 1): the times of the slowest count"),
    ],
)
def test_all_ranks_say_why(case: str, line: str, on_two_ranks: dict[str, Any]) -> None:
    assert all(lines[0].startswith(line) for _, _, lines in on_two_ranks[case])


def test_ranks_compute_in_one_precision_which_all_gpus_have(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["precision"] == ["fp16", "fp16"]


def test_trials_of_several_ranks_leave_random_states_alone(on_two_ranks: dict[str, Any]) -> None:
    assert on_two_ranks["random kept"] == [True, True]
