"""The training loop: crops in, weights and a table of Dice out.

An epoch draws `crops_per_case` crops of every training case; a step is forward, Dice + CE, backward and AdamW under
DeepSpeed. Every few epochs the validation cases are scored and a checkpoint is written. The draws of an epoch depend
only on its number and the seed, so a resumed run sees the crops that it would have seen.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from engine import checkpoint, metrics
from engine.config import Config, to_dict
from engine.data import Data
from engine.distributed import Ranks, deepspeed_engine, gather
from engine.inference import sliding_window_logits
from engine.optim import make_optimizer, make_schedule
from engine.progress import DataWait, TrainingProgress
from kernels.dice_ce import DiceCE, dice_ce_loss, region_masks
from pipelines.labels import REGIONS
from pipelines.loaders import CropLoader, TrainLoader, ValLoader
from pipelines.raw import RawLoader

log = logging.getLogger(__name__)


class Trainer:
    """One run, from loaders to checkpoints.

    Args:
        config: of the run. ranks: who this process is. data: prepared volumes and the split. model: on the CPU.
    """

    def __init__(self, config: Config, ranks: Ranks, data: Data, model: torch.nn.Module) -> None:
        self.config, self.ranks, self.data = config, ranks, data
        assert config.run_dir is not None
        self.run_dir = config.run_dir
        self.regions = data.store.coding.regions
        settings, on_gpu = config.data, ranks.device.type == "cuda"
        shard: dict[str, Any] = {
            "device": "gpu" if on_gpu else "cpu",
            "device_id": ranks.local_rank if on_gpu else None,
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "pad": settings.pad,
            # A GPU's convolutions want the channels last in memory, a CPU's first.
            "memory_format": torch.channels_last_3d if on_gpu else torch.contiguous_format,
        }
        crop = settings.crop_size_voxels
        crops: dict[str, Any] = {
            "names": data.train,
            "crop_size": crop,
            "batch_size": config.train.batch_size,
            "seed": config.train.seed,
            "crops_per_case": settings.crops_per_case,
            "foreground_prob": settings.foreground_prob,
            "extras": settings.augment,
            # Autocast rounds the input of the first convolutions in any case; so half the bytes come.
            "dtype": torch.bfloat16 if on_gpu and config.train.precision == "bf16" else torch.float32,
            **shard,
        }
        self.train_loader: CropLoader
        if data.scans is None:
            crops |= {"residence": settings.residence, "ranks_on_node": ranks.ranks_on_node}
            self.train_loader = TrainLoader(data.store, **crops)
        else:
            self.train_loader = RawLoader(data.scans, spacing_mm=settings.spacing_mm, **crops)
        self.full_volume = config.train.validation == "full_volume"
        self.val_loader: Iterable[tuple[str, torch.Tensor, torch.Tensor]] = ()
        if data.val:
            size = None if self.full_volume else crop
            self.val_loader = ValLoader(data.store, data.val, size, normalise=not self.full_volume, **shard)
        self.model = model.to(ranks.device)
        if config.train.precision == "bf16":
            # Inside the module: DeepSpeed turns off an autocast that it finds around its own forward.
            self.model.forward = torch.autocast(ranks.device.type, torch.bfloat16)(self.model.forward)
        optimizer = make_optimizer(self.model, config.optim)
        schedule = make_schedule(optimizer, config.optim, config.train.epochs * len(self.train_loader))
        self.engine = deepspeed_engine(
            self.model, optimizer, schedule, config.train.batch_size, config.train.zero_stage
        )
        self.epoch, self.first_step = 0, 0
        self.epoch_sums: list[float] | None = None
        self.history: list[dict[str, Any]] = []
        self.cases: list[metrics.CaseDice] = []
        self.best: dict[str, Any] = {"epoch": None, "mean": None}
        if config.resume:
            self._load()

    def fit(self) -> None:
        """Train from the current epoch to the last."""
        train = self.config.train
        writer = self._writer() if self.ranks.is_first else None
        steps = len(self.train_loader)
        done = self.epoch * steps + self.first_step
        with TrainingProgress(train.epochs * steps, done, self.ranks.is_first) as progress:
            for epoch in range(self.epoch, train.epochs):
                row = self._train_epoch(epoch, progress)
                self.epoch, self.first_step, self.epoch_sums = epoch + 1, 0, None
                is_due = self.epoch % train.val_every_epochs == 0 or self.epoch == train.epochs
                if is_due:
                    row |= self.validate(progress)
                self.history.append(row)
                progress.epoch(row, train.epochs)
                if writer:
                    _write_scalars(writer, row)
                    _write_log(self.run_dir, self.history)
                if is_due:
                    self._save(row)
                elif self._is_save_due(self.epoch * steps):
                    self._save_state()
        if writer:
            writer.close()

    def step(self, image: torch.Tensor, labels: torch.Tensor) -> DiceCE:
        """One optimizer step.

        Args:
            image: float32 (B, C, X, Y, Z). labels: uint8 (B, X, Y, Z). Both on this rank's device.
        """
        loss = self._loss(self.engine(image), labels)
        self.engine.backward(loss.loss)
        self.engine.step()
        return loss

    def validate(self, progress: TrainingProgress) -> dict[str, Any]:
        """Score the validation cases of all ranks; returns the columns that the log gains."""
        cases = []
        for name, image, labels in self.val_loader:
            cases.append(metrics.case_dice(name, self.predict(image), self.truth(labels)))
            progress.validating(len(cases))
        self.cases = sorted((case for part in gather(cases, self.ranks) for case in part), key=lambda case: case.name)
        summary = metrics.summarise(self.cases)
        return {"val_mean": summary["mean"], **{f"val_{region}": summary[region] for region in REGIONS}}

    @torch.inference_mode()
    def predict(self, image: torch.Tensor) -> torch.Tensor:
        """Masks, bool (R, X, Y, Z), of a batch (1, C, X, Y, Z) as the validation loader gives it."""
        self.engine.eval()
        image = image.to(self.ranks.device)
        if self.full_volume:
            logits = sliding_window_logits(self.engine, image, self.config.data.crop_size_voxels)
        else:
            logits = self.engine(image)
        return (logits > 0)[0]  # sigmoid(x) > 0.5

    def truth(self, labels: torch.Tensor) -> torch.Tensor:
        """Masks, bool (R, X, Y, Z), of a label map (1, X, Y, Z)."""
        return region_masks(labels.to(self.ranks.device), self.regions)[0]

    def _train_epoch(self, epoch: int, progress: TrainingProgress) -> dict[str, Any]:
        self.engine.train()
        rate = self.engine.get_lr()[0]
        sums = torch.tensor(self.epoch_sums or [0.0, 0.0, 0.0], device=self.ranks.device)
        started, steps = time.perf_counter(), len(self.train_loader)
        samples = self.config.train.batch_size * self.ranks.world_size
        wait = DataWait(self.ranks.device)
        for image, labels in wait.over(self.train_loader.epoch(epoch, self.first_step)):
            loss = self.step(image, labels)
            sums += torch.stack([loss.loss.detach(), loss.dice.detach(), loss.ce.detach()])
            progress.step(loss.loss.detach(), samples)
            _, step = self.train_loader.position
            if step < steps and self._is_save_due(epoch * steps + step):
                self._save_state(gather(sums.tolist(), self.ranks))
        total, dice, ce = (sum(values) / len(values) for values in zip(*gather((sums / steps).tolist(), self.ranks)))
        if not math.isfinite(total):
            raise ValueError(
                f"the loss became {total} in epoch {epoch + 1}; lower --optim.lr ({self.config.optim.lr}) or give it "
                "--optim.warmup_steps"
            )
        seconds = time.perf_counter() - started
        return {"epoch": epoch + 1, "step": (epoch + 1) * steps, "lr": rate, "loss": total, "dice_loss": dice,
                "ce_loss": ce, "samples_per_s": (steps - self.first_step) * samples / seconds,
                "data_wait": wait.seconds() / seconds}  # fmt: skip

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> DiceCE:
        loss = self.config.loss
        return dice_ce_loss(logits, labels, self.regions, ce=loss.ce, dice_weight=loss.dice_weight,
                            ce_weight=loss.ce_weight, squared_pred=loss.squared_pred)  # fmt: skip

    def _save(self, row: dict[str, Any]) -> None:
        score = row["val_mean"]
        is_best = score is not None and (self.best["mean"] is None or score > self.best["mean"])
        if is_best:
            self.best = {"epoch": row["epoch"], **metrics.summarise(self.cases)}
        folder = self.run_dir / "checkpoints"
        self._save_state()
        if not self.ranks.is_first:
            return
        coding = self.data.store.coding
        about = {"config": to_dict(self.config), "epoch": self.epoch, "validation": metrics.summarise(self.cases),
                 "modalities": list(self.data.store.modalities), "release": coding.release,
                 "regions": [list(values) for values in coding.regions]}  # fmt: skip
        checkpoint.save_weights(folder / "last.pt", self.model, about)
        if is_best:
            checkpoint.save_weights(folder / "best.pt", self.model, about)
        _write_validation(self.run_dir, self.cases, self.summary())

    def _is_save_due(self, step: int) -> bool:
        every = self.config.train.save_every_steps
        return every > 0 and step % every == 0

    def _save_state(self, epoch_sums: list[list[float]] | None = None) -> None:
        """All that training needs to continue; within an epoch also each rank's sums of losses so far."""
        cases = [dataclasses.asdict(case) for case in self.cases]
        state = {"epoch": self.epoch, "history": self.history, "best": self.best, "cases": cases,
                 "loader": self.train_loader.state_dict(), "epoch_sums": epoch_sums}  # fmt: skip
        folder = self.run_dir / "checkpoints"
        checkpoint.save_state(self.engine, folder, state, self.ranks, self.config.train.zero_stage)

    def summary(self) -> dict[str, Any]:
        """What `metrics.json` holds: definition, last and best validation, length."""
        return {
            "definition": "Dice per case and region on masks (sigmoid > 0.5); a region's Dice is the mean over cases "
            "whose truth has it; mean is the mean over regions",
            "validated_on": self.config.train.validation,
            "epochs": self.epoch,
            "last": {"epoch": self.epoch, **metrics.summarise(self.cases)},
            "last_empty_truth_as_one": metrics.summarise(self.cases, empty_as_one=True),
            "best": self.best,
        }

    def _load(self) -> None:
        folder, stage = self.run_dir / "checkpoints", self.config.train.zero_stage
        state = checkpoint.load_state(self.engine, folder, self.ranks, stage)
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        self.cases = [metrics.CaseDice(**case) for case in state["cases"]]
        within = state["epoch_sums"]
        if within:
            _, self.first_step = self.train_loader.load_state_dict(state["loader"])
            self.epoch_sums = within[self.ranks.rank]
        log.info(
            "resumed %s after epoch %d of %d%s", self.run_dir, self.epoch, self.config.train.epochs,
            f", step {self.first_step} of {len(self.train_loader)}" if within else "",
        )  # fmt: skip

    def _writer(self) -> SummaryWriter:
        first_step = self.epoch * len(self.train_loader) + 1
        return SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=first_step)


def _write_scalars(writer: SummaryWriter, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if name not in ("epoch", "step") and value is not None:
            writer.add_scalar(name.replace("val_", "val/"), value, row["step"])
    writer.flush()


def _write_log(run_dir: Path, history: list[dict]) -> None:
    """`log.csv`, a row for each epoch."""
    columns = list(dict.fromkeys(name for row in history for name in row))
    with open(run_dir / "log.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(history)


def _write_validation(run_dir: Path, cases: list[metrics.CaseDice], summary: dict) -> None:
    """`validation.csv` by case (of the last validation), `metrics.json`."""
    with open(run_dir / "validation.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["case", *REGIONS, *(f"{region}_voxels" for region in REGIONS)])
        for case in cases:
            dice = ["" if math.isnan(value) else f"{value:.4f}" for value in case.dice()]
            table.writerow([case.name, *dice, *case.truth])
    (run_dir / "metrics.json").write_text(json.dumps(summary, indent=2) + "\n")
