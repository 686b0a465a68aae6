"""DeepSpeed's JSON file: taken as it is, or refused with what to change. States and stages: tests/test_step.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, OptimConfig, TrainConfig
from engine.diagnosis import first_nonfinite
from engine.sharding import read_deepspeed_json


def read(tmp_path: Path, content: Any, world_size: int = 2, **train: Any) -> tuple[Config, dict[str, Any]]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    config = Config(train=TrainConfig(deepspeed=path, **train), optim=OptimConfig(lr=1e-4))
    return config, read_deepspeed_json(config, world_size)


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
    told = [record.getMessage() for record in caplog.records if "not heeded" in record.getMessage()]
    expected = ["fp16: loss_scale 128", "optimizer: amsgrad True", "scheduler: total_num_steps 1000"]
    assert [line.split(": not heeded")[0] for line in told] == expected


def test_without_a_file_nothing_is_set() -> None:
    assert read_deepspeed_json(Config(), 1) == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "can't be read as JSON"),
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
        ({"gradient_accumulation_steps": 0, "train_batch_size": 8}, "a value is of another kind"),
        ({"gradient_clipping": "1.0"}, "--optim.grad_clip 1.0 must be a number, .*, not text"),
        ({"bf16": True}, "a value is of another kind"),
        ({"zero_optimization": None}, "a value is of another kind"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "a value is of another kind"),
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


class Layers(torch.nn.Module):
    """`second` gives what `weight` makes of it; its square root has no finite gradient at zero."""

    def __init__(self, factor: float, takes_root: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.third = (torch.nn.Linear(2, 2) for _ in range(3))
        self.takes_root = takes_root
        torch.nn.init.constant_(self.second.weight, factor)
        torch.nn.init.zeros_(self.second.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        return self.third(x.square().sqrt() if self.takes_root else x)


@pytest.mark.parametrize(
    ("model", "image", "found"),
    [
        (Layers(1.0), torch.ones(1, 2), None),
        (Layers(1.0), torch.full((1, 2), float("nan")), "the images themselves"),
        (Layers(float("inf")), torch.ones(1, 2), "the output of second"),
        (Layers(0.0, takes_root=True), torch.ones(1, 2), "the gradient of the output of second"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_found(model: Layers, image: torch.Tensor, found: str | None) -> None:
    assert first_nonfinite(model, lambda logits, labels: logits.sum(), image, torch.zeros(1)) == found


def test_a_loss_that_is_not_finite_by_itself_is_told_from_its_logits() -> None:
    loss_of = lambda logits, labels: logits.sum() * float("nan")  # noqa: E731
    model = Layers(1.0)
    found = first_nonfinite(model, loss_of, torch.ones(1, 2), torch.zeros(1))
    assert found == "the loss, from finite logits"
