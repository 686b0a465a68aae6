"""DeepSpeed's JSON file: used as it is, or refused with what to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config
from engine.deepspeed_json import apply_deepspeed_json
from engine.optim import OptimConfig
from engine.step import TrainConfig


def read(tmp_path: Path, content: Any, world_size: int = 2, **train: Any) -> tuple[Config, dict[str, Any]]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    config = Config(train=TrainConfig(deepspeed=path, **train), optim=OptimConfig(lr=1e-4))
    return apply_deepspeed_json(config, world_size)


def test_a_usual_file_is_taken_as_it_is(tmp_path: Path) -> None:
    config, rest = read(
        tmp_path,
        {
            "train_batch_size": 32,
            "gradient_accumulation_steps": 4,
            "bf16": {"enabled": True},
            "fp16": {"enabled": False, "loss_scale": 0},
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.999], "weight_decay": 0.01}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-4, "warmup_num_steps": 100}},
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e7, "overlap_comm": True},
            "wall_clock_breakdown": False,
            "communication_data_type": "fp32",
            "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
            "tensorboard": {"enabled": False, "output_path": "/elsewhere"},
        },
    )
    train, optim = config.train, config.optim
    assert (train.batch_size, train.accumulate_steps, train.precision, train.zero_stage) == (4, 4, "bf16", 2)
    assert (optim.lr, optim.weight_decay, optim.grad_clip, optim.warmup_steps) == (3e-4, 0.01, 1.0, 100)
    assert rest == {
        "zero_optimization": {"reduce_bucket_size": 5e7, "overlap_comm": True},
        "wall_clock_breakdown": False,
        "communication_data_type": "fp32",
        "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None},
    }


def test_what_is_auto_or_not_there_stays_as_it_was(tmp_path: Path) -> None:
    config, rest = read(
        tmp_path,
        {"train_batch_size": "auto", "bf16": {"enabled": "auto"}, "zero_optimization": {"stage": "auto"}},
        batch_size=3, zero_stage=1, precision="fp16",
    )  # fmt: skip
    assert (config.train.batch_size, config.train.zero_stage, config.train.precision) == (3, 1, "fp16")
    assert rest == {"zero_optimization": {}}


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_deepspeeds_autocast_is_this_engines(dtype: str, precision: str, tmp_path: Path) -> None:
    config, rest = read(tmp_path, {"torch_autocast": {"enabled": True, "dtype": dtype}})
    assert config.train.precision == precision and rest == {}


def test_settings_that_change_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {
        "fp16": {"enabled": True, "loss_scale": 128},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "amsgrad": True}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 5, "total_num_steps": 1000}},
    }
    read(tmp_path, content)
    lines = [record.getMessage() for record in caplog.records if " ignored: " in record.getMessage()]
    expected = ["fp16: loss_scale 128", "optimizer: amsgrad True", "scheduler: total_num_steps 1000"]
    assert [line.split(" ignored: ")[0] for line in lines] == expected


def test_without_a_file_nothing_is_set() -> None:
    assert apply_deepspeed_json(Config(), 1) == (Config(), {})


def test_the_configuration_that_was_read_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 7, "gradient_clipping": 3}')
    config = Config(train=TrainConfig(deepspeed=path))
    changed, _ = apply_deepspeed_json(config, 1)
    assert (changed.train.batch_size, changed.optim.grad_clip) == (7, 3)
    assert config == Config(train=TrainConfig(deepspeed=path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read as JSON"),
        ('{"a":' * 100_000, "can't be read as JSON"),
        ('{"a":' * 600 + "1" + "}" * 600, "can't be read as JSON"),
        ([1], "must hold a JSON object"),
        ({"train_batch_size": 7}, "train_batch_size 7 must be"),
        ({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu 2 x"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "must not both be enabled"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer Lamb must be AdamW"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.99]}}}, r"betas \[0.8, 0.99\]"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler OneCycle must be one of"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer must be left out"),
        ({"gradient_clipping": -1}, "--optim.grad_clip -1 must be at least 0"),
        ({"train_micro_batch_size_per_gpu": 0}, "--train.batch_size 0 must be at least 1"),
        ({"gradient_accumulation_steps": 0, "train_batch_size": 8}, "a value has another type"),
        ({"gradient_clipping": "1.0"}, "--optim.grad_clip 1.0 must be a number, .*, not text"),
        ({"bf16": True}, "a value has another type"),
        ({"zero_optimization": None}, "a value has another type"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "a value has another type"),
        ({"zero_optimization": {"stage": 5}}, "stage 5 must be 0, 1, 2 or 3"),
        ({"tensorboard": {"enabled": True, "output_path": "/elsewhere"}}, "tensorboard must be left out"),
        ({"csv_monitor": {"output_path": "/elsewhere"}}, "csv_monitor must be left out"),
        ({"flops_profiler": {"enabled": True, "output_file": "/elsewhere"}}, "flops_profiler must be left out"),
        ({"compile": {"backend": "some.module"}}, "compile must be left out"),
        ({"zero_optimization": {"leaf_module": {"classes": ["some.module"]}}}, "leaf_module must be a number"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 1}}}, "zenflow must be a number"),
        ({"log_file": "/elsewhere"}, "log_file must be a number"),
    ],
)
def test_what_this_engine_cannot_do_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, content)
    assert "ds.json" in str(raised.value)
