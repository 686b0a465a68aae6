"""The engine in this process: its steps against a plain MONAI loop, exact resume, waiting."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR, UNet

from engine.config import Config, DataConfig, LossConfig, OptimConfig, PhantomConfig, TrainConfig
from engine.data import Data, load_data
from engine.distributed import Ranks, init_ranks
from engine.progress import DataWait
from engine.trainer import Trainer
from kernels.dice_ce import region_masks
from models import build_model
from models.convert import to_reference

ROOT = Path(__file__).resolve().parent.parent
CROP = (32, 32, 16)
PHANTOM = PhantomConfig(cases=5, size_voxels=(48, 48, 32))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    yield init_ranks("cpu")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIOFORGE_CACHE", str(folder))
        return load_data(DataConfig(phantom=PHANTOM, spacing_mm=(4.5, 4.5, 4.5), crop_size_voxels=CROP, workers=1))


@pytest.mark.parametrize("name", ["unetr_monai", "unet"])
def test_twenty_steps_give_the_losses_of_a_plain_monai_loop(
    name: str, data: Data, ranks: Ranks, tmp_path: Path
) -> None:
    """float32, one rank, same weights, same batches: every loss equal to 1e-4 relative."""
    crop = (32, 32, 32)  # smaller ones leave norms over a handful of voxels, which amplify rounding
    widths = {"unetr_monai": {"feature_size": 8, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}, "unet": {}}[name]
    config = Config(
        data=DataConfig(crop_size_voxels=crop, crops_per_case=10),
        loss=LossConfig(ce="multihot"),
        optim=OptimConfig(lr=1e-4, weight_decay=1e-5),
        train=TrainConfig(epochs=1, batch_size=2),
        run_dir=tmp_path,
    )
    torch.manual_seed(0)
    model = build_model(name, in_channels=4, img_size=crop, **widths)
    if name == "unet":
        reference: torch.nn.Module = UNet(3, 4, 3, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2)
    else:
        reference = UNETR(4, 3, crop, feature_size=8, hidden_size=24, mlp_dim=32, num_heads=2)
    reference.load_state_dict(to_reference(name, model.state_dict()))
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-4, weight_decay=1e-5)
    loss_function = DiceCELoss(to_onehot_y=False, sigmoid=True)

    trainer = Trainer(config, ranks, data, model)
    assert len(trainer.train_loader) == 20
    ours, plain = [], []
    for image, labels in trainer.train_loader.epoch(0):
        ours.append(trainer.step(image.contiguous(), labels).loss.item())
        optimizer.zero_grad()
        loss = loss_function(reference(image.contiguous()), region_masks(labels, data.store.coding.regions).float())
        loss.backward()
        optimizer.step()
        plain.append(loss.item())
    assert ours == pytest.approx(plain, rel=1e-4)
    assert plain[-1] < plain[0]


def test_time_spent_waiting_for_batches_is_measured_and_work_on_them_is_not() -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    wait = DataWait(torch.device("cpu"))
    for _ in wait.over(batches()):
        time.sleep(0.1)
    assert 0.15 <= wait.seconds() < 0.25


@pytest.mark.gpu
def test_waiting_is_measured_on_the_gpu_where_the_host_runs_ahead() -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            time.sleep(0.05)
            yield number

    work = torch.randn(4096, 4096, device="cuda")
    times = []
    for steps in (0, 200):  # without work the GPU waits; with enough of it in flight it does not
        wait = DataWait(torch.device("cuda"))
        for _ in wait.over(batches()):
            for _ in range(steps):
                work @ work
        times.append(wait.seconds())
    assert times[0] >= 0.1 > times[1]


def test_a_run_stopped_at_any_step_sees_the_batches_that_it_would_have_seen(
    data: Data, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(name: str, stop_at: int | None = None, resume: bool = False) -> tuple[list[torch.Tensor], Trainer]:
        config = Config(
            data=DataConfig(crop_size_voxels=CROP),
            train=TrainConfig(epochs=2, batch_size=1, save_every_steps=1, val_every_epochs=2),
            run_dir=tmp_path / name,
            resume=name if resume else None,
        )
        torch.manual_seed(0)
        widths = {"feature_size": 8, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
        trainer = Trainer(config, ranks, data, build_model("unetr", in_channels=4, img_size=CROP, **widths))
        seen: list[torch.Tensor] = []
        step = trainer.step

        def recorded(image: torch.Tensor, labels: torch.Tensor) -> Any:
            if len(seen) == stop_at:
                raise KeyboardInterrupt
            seen.append(image.clone())
            return step(image, labels)

        monkeypatch.setattr(trainer, "step", recorded)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.fit()
        return seen, trainer

    expected, whole = fit("whole")
    assert len(expected) == 8
    for stop_at in (1, 4, 6):  # within an epoch, between two, in the second
        before, _ = fit(f"stopped{stop_at}", stop_at)
        after, resumed = fit(f"stopped{stop_at}", resume=True)
        assert len(before) == stop_at
        equal = [torch.equal(image, wanted) for image, wanted in zip([*before, *after], expected, strict=True)]
        assert all(equal), (stop_at, equal)
        assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
        for value, wanted in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(value, wanted)


WAITING = """
import datetime, sys, time
from engine import distributed
distributed.PREPARATION_LIMIT = datetime.timedelta(seconds=2)
ranks = distributed.init_ranks("cpu")
distributed.first_on_node(lambda: time.sleep(6), ranks)
"""


def test_ranks_do_not_wait_for_ever_for_the_one_that_prepares(tmp_path: Path) -> None:
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29583"}
    waiting = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING],
            env=environment | {"RANK": rank, "LOCAL_RANK": rank},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    errors = [process.communicate(timeout=60)[1] for process in waiting]
    assert "TimeoutError: rank 1 waited for the first rank of each node to prepare the data" in errors[1]
    assert "0:00:02" in errors[1]
    assert all(process.returncode for process in waiting)


def test_bf16_lowers_the_networks_arithmetic_under_deepspeed(data: Data, ranks: Ranks, tmp_path: Path) -> None:
    """Seen inside the engine's own forward; weights and losses stay float32."""
    config = Config(
        data=DataConfig(crop_size_voxels=CROP), train=TrainConfig(batch_size=1, precision="bf16"), run_dir=tmp_path
    )
    model = build_model("unet", in_channels=4, img_size=CROP)
    trainer = Trainer(config, ranks, data, model)
    image, labels = next(iter(trainer.train_loader.epoch(0)))
    assert trainer.engine(image.to(ranks.device)).dtype == torch.bfloat16
    assert trainer.step(image, labels).loss.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
