"""The engine in this process: its steps against a plain MONAI loop, exact resume, waiting."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from commands import free_port
from monai.losses import DiceCELoss
from monai.networks.nets import UNETR, UNet
from test_step_trial import BOTH, COMPILED, EAGER, GRAPH, Clock

from engine.checkpoint import state_name, states
from engine.config import Config
from engine.data import Data, DataConfig, PhantomConfig, load_data, make_val_loader
from engine.diagnosis import Diverged
from engine.optim import OptimConfig
from engine.progress import DataWait
from engine.ranks.distributed import Ranks
from engine.ranks.signals import TrainingStopped
from engine.step import LossConfig, TrainConfig, TrainingStep
from engine.step_trial import Way
from engine.trainer import Trainer
from engine.weights_file import read_content
from kernels import dispatch
from kernels.dice_ce import region_masks
from kernels.measured_cache import MeasuredCache
from models import build_model, to_reference

ROOT = Path(__file__).resolve().parent.parent
CROP = (32, 32, 16)
PHANTOM = PhantomConfig(cases=5, size_voxels=(48, 48, 32))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLIOFORGE_CACHE", str(folder))
        return load_data(DataConfig(phantom=PHANTOM, spacing_mm=(4.5, 4.5, 4.5), crop_size_voxels=CROP, workers=1))


def test_a_case_comes_as_the_configuration_validates_it(data: Data) -> None:
    """The centre crop, z-scored; or the full volume as it is stored, for sliding windows to do that."""
    name, cpu = data.train[1], torch.device("cpu")
    config = Config(data=DataConfig(crop_size_voxels=CROP), train=TrainConfig(validation="center_crop"))
    ((found, image, labels),) = make_val_loader(config.data, config.train.validation, data.store, [name], cpu)
    assert (found, image.shape, labels.shape) == (name, (1, 4, *CROP), (1, *CROP))
    assert image[image != 0].mean().abs() < 0.01
    config = replace(config, train=TrainConfig(validation="full_volume"))
    ((_, image, _),) = make_val_loader(config.data, config.train.validation, data.store, [name], cpu)
    stored = torch.tensor(data.store.image(data.store.index(name))).permute(3, 0, 1, 2)
    assert torch.equal(image[0], stored) and image.is_contiguous()


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
        time.sleep(0.3)
    assert 0.15 <= wait.seconds() < 0.9


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


Hook = Callable[[int, torch.Tensor], None]


@pytest.fixture
def make(data: Data, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trainer]:
    """Trainer of a small UNETR: name of its run, a hook that sees step and image before each pass, options."""
    hooks: dict[int, tuple[list[int], Hook]] = {}
    call = TrainingStep.__call__

    def hooked(step: TrainingStep, image: torch.Tensor, labels: torch.Tensor) -> Any:
        if id(step) in hooks:
            count, hook = hooks[id(step)]
            hook(count[0], image)
            count[0] += 1
        return call(step, image, labels)

    monkeypatch.setattr(TrainingStep, "__call__", hooked)
    monkeypatch.setattr(Trainer, "_log_memory", lambda trainer: None)  # two seconds each

    def make(name: str = "run", hook: Hook | None = None, resume: bool = False, **options: Any) -> Trainer:
        optim = OptimConfig(**options.pop("optim", {}))
        train = {"epochs": 2, "batch_size": 1, "save_every_steps": 1, "val_every_epochs": 2, **options}
        config = Config(
            data=DataConfig(crop_size_voxels=CROP),
            optim=optim,
            train=TrainConfig(**train),
            run_dir=tmp_path / name,
            resume=name if resume else None,
        )
        torch.manual_seed(0)
        widths = {"feature_size": 8, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2}
        trainer = Trainer(config, ranks, data, build_model("unetr", in_channels=4, img_size=CROP, **widths))
        if hook:
            hooks[id(trainer.step)] = ([0], hook)
        return trainer

    return make


def equal_weights(one: Trainer, other: Trainer) -> bool:
    pairs = zip(one.step.model.parameters(), other.step.model.parameters(), strict=True)
    return all(torch.equal(value, wanted) for value, wanted in pairs)


def losses(trainer: Trainer) -> list[float]:
    return [row["loss"] for row in trainer.history]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"zero_stage": 2, "accumulate_steps": 2, "optim": {"ema_decay": 0.9, "schedule": "cosine", "warmup_steps": 3}},
    ],
)
def test_a_run_stopped_at_any_step_resumes_bit_for_bit(make: Callable[..., Trainer], options: dict[str, Any]) -> None:
    """The batches that it sees, losses, weights: bit for bit."""

    drawn: dict[Trainer, float] = {}

    def fit(name: str, stop_at: int | None = None, resume: bool = False) -> tuple[list[torch.Tensor], Trainer]:
        seen: list[torch.Tensor] = []

        def hook(step: int, image: torch.Tensor) -> None:
            if step == stop_at:
                raise KeyboardInterrupt
            torch.rand(1)  # as dropout would
            seen.append(image.clone())

        trainer = make(name, hook, resume, **options)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.fit()
        drawn[trainer] = torch.rand(1).item()
        return seen, trainer

    expected, whole = fit("whole")
    assert len(expected) == 8
    for stop_at in (1, 4, 6):  # within an epoch, between two, in the second
        before, _ = fit(f"stopped{stop_at}", stop_at)
        passes = options.get("accumulate_steps", 1)
        saved = stop_at - stop_at % passes
        if not saved:
            continue
        after, resumed = fit(f"stopped{stop_at}", resume=True)
        assert len(before) == stop_at
        pairs = zip([*before[:saved], *after], expected, strict=True)
        equal = [torch.equal(image, wanted) for image, wanted in pairs]
        assert all(equal), (stop_at, equal)
        assert [row["lr"] for row in resumed.history] == [row["lr"] for row in whole.history]
        assert losses(resumed) == losses(whole) and drawn[resumed] == drawn[whole]
        assert equal_weights(resumed, whole)
        if whole.step.average and resumed.step.average:
            averages = zip(resumed.step.average.averages, whole.step.average.averages, strict=True)
            assert all(torch.equal(value, wanted) for value, wanted in averages)


@pytest.mark.parametrize("way", [EAGER, COMPILED, GRAPH])
def test_a_run_that_chose_how_to_step_is_the_run_with_that_written_out(
    way: Way, make: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: batches, losses, weights, random numbers, what `last.pt` holds. And so is one that is resumed."""
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("engine.step_choice.GAIN", 1e6)  # else so short a run chooses nothing
    traced = partial(torch.compile, backend="eager")
    clock = Clock(**dict.fromkeys(("eager", "graph", "compiled", "both"), 1.0)).patch(monkeypatch)
    clock.seconds[way] = 0.5
    monkeypatch.setattr(torch, "compile", traced)

    def fit(name: str, stop_at: int | None = None, resume: bool = False, **options: Any) -> Trainer:
        def hook(step: int, image: torch.Tensor) -> None:
            if step == stop_at:
                raise KeyboardInterrupt
            torch.rand(1)  # as dropout would

        trainer = make(name, hook, resume, **options)
        with contextlib.suppress(KeyboardInterrupt):
            trainer.fit()
        return trainer

    chosen, drawn = fit("chosen"), torch.rand(1)
    assert Way.of(chosen.config.train) == way and set(clock.taken) == {EAGER, COMPILED, GRAPH, BOTH}
    clock.taken.clear()
    written, drawn_then = fit("written", compile=way.compile, cuda_graph=way.cuda_graph), torch.rand(1)
    assert torch.equal(drawn, drawn_then) and losses(chosen) == losses(written) and equal_weights(chosen, written)
    hashes = {read_content(run.run_dir / "checkpoints" / "last.pt")["sha256"] for run in (chosen, written)}
    assert len(hashes) == 1

    fit("stopped", stop_at=5)
    MeasuredCache("steps").clear()
    clock.taken.clear()
    clock.seconds = dict.fromkeys(clock.seconds, 1.0)  # another choice, were there one
    resumed = fit("stopped", resume=True)
    assert set(clock.taken) == {way} and losses(resumed) == losses(written) and equal_weights(resumed, written)


def test_a_resumed_run_takes_the_kernels_of_the_run_before_it(
    make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    restored: list[Any] = []
    monkeypatch.setattr(dispatch, "choices", lambda: {"attention": "MATH"})
    monkeypatch.setattr(dispatch, "restore_choices", restored.append)
    make(epochs=1, save_every_steps=0).fit()
    make(epochs=1, resume=True)
    assert restored == [{"attention": "MATH"}]


def test_a_run_is_not_resumed_with_another_score(make: Callable[..., Trainer]) -> None:
    make("run", val_every_epochs=1).fit()
    with pytest.raises(ValueError, match="--train.score masks: the validations of .*run so far scored label_map"):
        make("run", val_every_epochs=1, resume=True, score="masks")


def test_a_finished_run_is_extended(make: Callable[..., Trainer]) -> None:
    whole = make("whole", epochs=3, val_every_epochs=1)
    whole.fit()
    make("short", val_every_epochs=1).fit()
    longer = make("short", epochs=3, val_every_epochs=1, resume=True)
    longer.fit()
    assert [row["epoch"] for row in longer.history] == [1, 2, 3]
    assert losses(longer) == losses(whole) and equal_weights(longer, whole)


def test_a_run_shortened_to_its_finished_epochs_is_validated(make: Callable[..., Trainer]) -> None:
    """Else its table would have the Dice of an earlier epoch, and `last.pt` the weights."""
    whole = make("whole", epochs=3)
    whole.fit()

    def stop(step: int, image: torch.Tensor) -> None:
        if step == 12:  # after three epochs, of which the second was validated
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        make("stopped", stop, epochs=9).fit()
    shortened = make("stopped", epochs=3, resume=True)
    shortened.fit()
    assert [row["epoch"] for row in shortened.history if "val_mean" in row] == [2, 3]
    assert shortened.summary()["last"] == whole.summary()["last"] and shortened.cases == whole.cases
    assert read_content(shortened.run_dir / "checkpoints" / "last.pt")["epoch"] == 3


@pytest.mark.parametrize(("quick_s", "before"), [(60.0, [True, False, False]), (0.0, [True, True, True])])
def test_a_state_is_written_before_a_validation_that_may_take_long(
    quick_s: float, before: list[bool], make: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows how long the first will last; writing it before a quick one would only be waited for."""
    monkeypatch.setattr("engine.trainer.QUICK_VALIDATION_S", quick_s)
    trainer = make("run", epochs=3, val_every_epochs=1, save_every_steps=0)
    writing = MagicMock(wraps=trainer.writer.write)
    monkeypatch.setattr(trainer.writer, "write", writing)
    trainer.fit()
    written = [call.args[0] for call in writing.call_args_list]
    steps = [step * trainer.steps for step in (1, 2, 3)]
    expected = [[state_name(step, False)] * saved + [state_name(step, True)] for step, saved in zip(steps, before)]
    assert written == [name for names in expected for name in names]


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(make: Callable[..., Trainer]) -> None:
    whole = make("damaged")
    whole.fit()
    newest = states(whole.run_dir / "checkpoints")[0]
    (newest / "state.pt").write_bytes(b"")
    resumed = make("damaged", resume=True)
    assert resumed.step.done == whole.step.done - 1
    resumed.fit()
    assert losses(resumed) == losses(whole) and equal_weights(resumed, whole)


def test_loss_scale_and_skipped_steps_are_restored(make: Callable[..., Trainer]) -> None:
    saved = make("scaled", precision="fp16")
    saved.step.optimizer.scale.fill_(8.0)
    saved.step.optimizer.in_row.fill_(3.0)
    saved.step.optimizer._growth.fill_(5)
    saved._save()
    saved.writer.wait()
    resumed = make("scaled", precision="fp16", resume=True)
    assert resumed.step.optimizer.scalars() == {"scale": 8.0, "growth": 5, "in_row": 3.0}


def test_a_signal_ends_a_run_after_a_checkpoint(make: Callable[..., Trainer]) -> None:
    for at in (2, 3):  # within an epoch, at its last step

        def hook(step: int, image: torch.Tensor, at: int = at) -> None:
            if step == at:
                os.kill(os.getpid(), signal.SIGUSR1)

        stopped = make(f"stopped{at}", hook, save_every_steps=0)
        with pytest.raises(TrainingStopped, match="SIGUSR1"):
            stopped.fit()
        assert stopped.step.done == make(f"stopped{at}", resume=True).step.done == at + 1
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_batch_with_a_nonfinite_loss_is_skipped_and_counted(make: Callable[..., Trainer]) -> None:
    def hook(step: int, image: torch.Tensor) -> None:
        if step == 1:
            image.fill_(float("nan"))

    trainer = make(hook=hook)
    trainer.fit()
    assert [row["skipped_steps"] for row in trainer.history] == [1, 0]
    assert all(math.isfinite(loss) for loss in losses(trainer))


def test_a_run_that_diverged_ends_with_the_layer_and_the_cases(make: Callable[..., Trainer]) -> None:
    trainer = make(max_skipped_steps=3)
    with torch.no_grad():
        trainer.step.model.get_parameter("decoder1.block.conv2.weight").fill_(float("inf"))
    cases = trainer.train_loader.names_of(0, 3)
    with pytest.raises(Diverged, match=r"in 3 steps in a row, up to step 4 of epoch 1; first in the output of "
                       rf"decoder1.block.conv2, for crops of {cases[0]}; lower --optim.lr"):  # fmt: skip
        trainer.fit()


def test_an_epoch_of_one_step_gives_up_too_and_shows_no_loss(
    make: Callable[..., Trainer], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    trainer = make(batch_size=4, epochs=9, val_every_epochs=1, max_skipped_steps=3)
    with torch.no_grad():
        trainer.step.model.get_parameter("decoder1.block.conv2.weight").fill_(float("inf"))
    with pytest.raises(Diverged, match="in 3 steps in a row, up to step 3 of epoch 3"):
        trainer.fit()
    assert "epoch 2/9  loss n/a" in caplog.text
    assert losses(trainer) == [None, None]


def test_training_stops_when_the_dice_no_longer_improves(make: Callable[..., Trainer]) -> None:
    trainer = make(epochs=9, val_every_epochs=1, patience=2, save_every_steps=0, optim={"lr": 0.0})
    trainer.fit()
    assert trainer.best["epoch"] in (None, 1) and trainer.epoch == (3 if trainer.best["epoch"] else 2)
    resumed = make(epochs=9, val_every_epochs=1, patience=2, optim={"lr": 0.0}, resume=True)
    resumed.fit()
    assert resumed.epoch == trainer.epoch


def test_memory_that_runs_out_says_what_to_lower(make: Callable[..., Trainer]) -> None:
    def hook(step: int, image: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    with pytest.raises(ValueError, match="--train.batch_size"):
        make(hook=hook).fit()


WAITING = """
import datetime, sys, time
from engine.ranks import distributed
distributed.PREPARATION_LIMIT = datetime.timedelta(seconds=2)
ranks = distributed.init_ranks("cpu")
distributed.first_on_node(lambda: time.sleep(6), ranks)
"""


def test_ranks_do_not_wait_for_ever_for_the_one_that_prepares(tmp_path: Path) -> None:
    environment = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
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
    errors = [process.communicate(timeout=300)[1] for process in waiting]
    assert "TimeoutError: rank 1 waited for the first rank of each node to prepare the data" in errors[1]
    assert "0:00:02" in errors[1]
    assert all(process.returncode for process in waiting)
