"""The training loop: crops in, weights and a table of Dice out.

An epoch draws `crops_per_case` crops of every training case. Every few epochs the validation cases are scored and a
checkpoint is written, in the background. The draws of an epoch depend only on its number and the seed, and a checkpoint
holds all else, so a run that was stopped at any step goes on as if it had not been, at another number of ranks too.

A step is never waited for: its losses, and whether its gradients were finite, are read when the next one is under way.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine import checkpoint, memory, metrics
from engine.config import Config, to_portable_dict
from engine.data import Data, make_loaders
from engine.diagnosis import Diverged, first_nonfinite
from engine.progress import DataWait, LateValues, TrainingProgress
from engine.ranks.distributed import Ranks, gather
from engine.ranks.memory_limits import is_out_of_memory, limit_bytes
from engine.ranks.signals import TrainingStopped
from engine.ranks.stop_signal import StopSignal
from engine.reports.run_tables import EpochLog, write_validation
from engine.sharding import full_moments, full_weights, load_moments
from engine.sliding_window import sliding_window_logits
from engine.step import TrainingStep
from engine.weights_file import WeightsFile
from kernels.dice_ce import region_masks
from models import parameter_count
from pipelines.basics.text import first_few
from pipelines.domain_shift import filled, looks_of_store
from pipelines.labels import REGIONS

log = logging.getLogger(__name__)

SMALL = 10_000_000  # parameters of a network whose memory on a CPU is not worth the two seconds of foretelling it
QUICK_VALIDATION_S = 10.0  # a state written before it would be waited for longer than it could save
SUMS = 5  # of an epoch: loss, Dice loss and CE over passes with a finite loss, those passes, steps left out


class Trainer:
    """One run, from loaders to checkpoints.

    Args:
        config: of the run, with a `run_dir`.
        ranks: who this process is.
        data: prepared volumes and the split.
        model: float32, on the CPU.
        settings: DeepSpeed's own, see `engine.deepspeed_json`.

    Raises:
        ValueError: options that do not fit together, or a run that can't be resumed.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        data: Data,
        model: torch.nn.Module,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.ranks, self.data = config, ranks, data
        assert config.run_dir is not None
        self.run_dir = config.run_dir
        self.regions = data.store.coding.regions
        self.train_loader, self.val_loader = make_loaders(config.data, config.train, ranks, data)
        self.steps = len(self.train_loader) // config.train.accumulate_steps  # optimizer steps of an epoch
        state = self._read_state() if config.resume else None
        if state:
            with checkpoint.restoring(self.run_dir):
                _load_weights(model, state["weights"])
        self.step = TrainingStep(
            model, config.train, config.optim, config.loss, ranks, self.regions, config.train.epochs * self.steps,
            settings or {},
        )  # fmt: skip
        self.writer = checkpoint.CheckpointWriter(self.run_dir / "checkpoints", config.train.keep_checkpoints)
        self.epoch, self.first_batch = 0, 0
        self.rate = self.step.rate  # of the epoch's first step
        self.sums = torch.zeros(SUMS, device=ranks.device)
        self.history: list[dict[str, Any]] = []
        self.cases: list[metrics.CaseDice] = []
        self.best: dict[str, Any] = {"epoch": None, "mean": None}
        in_store = [name for name in data.train if name in data.store.names] or data.store.names
        self.scans = looks_of_store(data.store, in_store) if ranks.is_first else {}
        advice = filled(self.scans, data.store.modalities)
        if advice:
            log.warning(advice)
        if state:
            with checkpoint.restoring(self.run_dir):
                self._restore(state)

    def fit(self) -> None:
        """Train from the current position to the last epoch.

        Raises:
            TrainingStopped: a signal asked to stop; a checkpoint is written.
            Diverged: the gradients were not finite for `max_skipped_steps` steps in a row.
            ValueError: memory ran out.
        """
        train, is_first = self.config.train, self.ranks.is_first
        if is_first:
            self._log_memory()
        records = EpochLog(self.run_dir, self.step.taken) if is_first else None
        try:
            with (
                StopSignal(self.ranks) as stop,
                TrainingProgress(train.epochs * self.steps, self.step.done, is_first) as progress,
            ):
                for epoch in range(self.epoch, train.epochs):
                    if self._is_patience_over():
                        break
                    self._fit_epoch(epoch, progress, stop, records)
                if self.history and "val_mean" not in self.history[-1]:  # --train.epochs lowered to what was done
                    row = self.history.pop()
                    self._close_epoch(row | self.validate(progress), progress, records)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            device, limit = self.ranks.device, self._memory_limit()
            message = memory.out_of_memory_message(error, self._estimate_memory(), device, limit)
            raise ValueError(message) from error
        finally:
            self.writer.wait()
            if records:
                records.close()

    def validate(self, progress: TrainingProgress | None = None) -> dict[str, Any]:
        """Score the validation cases of all ranks; returns the columns that the log gains."""
        started, scored, finite = time.perf_counter(), [], []
        with self.step.evaluating() as network:
            for name, image, labels in self.val_loader or ():
                image, labels = image.to(self.ranks.device), labels.to(self.ranks.device)
                logits, truth = self.logits(network, image), region_masks(labels, self.regions)[0]
                masks = self.masks_of(logits)
                finite.append(torch.stack(torch.aminmax(logits)).isfinite().all())
                scored.append((name, metrics.count_voxels(name, masks, truth)))
                if progress:
                    progress.validating(len(scored))
        own = [metrics.CaseDice.of(name, counts) for name, counts in scored]
        broken = [case.name for case, is_finite in zip(own, finite, strict=True) if not is_finite]
        found = gather((own, broken, time.perf_counter() - started), self.ranks)
        cases, overflowed, seconds = zip(*found, strict=True)
        _warn_of_overflow(sorted(name for part in overflowed for name in part))
        self.cases = sorted((case for part in cases for case in part), key=lambda case: case.name)
        summary = metrics.summarise(self.cases)
        return {"val_mean": summary["mean"], **{f"val_{region}": summary[region] for region in REGIONS},
                "val_seconds": max(seconds)}  # fmt: skip

    def masks(self, network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        """What is scored, bool (R, X, Y, Z), of a batch (1, C, X, Y, Z) as the validation loader gives it."""
        return self.masks_of(self.logits(network, image))

    @torch.no_grad()
    def logits(self, network: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
        """Logits (1, R, X, Y, Z) of such a batch, by the way that is validated."""
        if self.config.train.validation == "full_volume":
            return sliding_window_logits(network, image, self.config.data.crop_size_voxels)
        return network(image)

    def masks_of(self, logits: torch.Tensor) -> torch.Tensor:
        """What is scored of logits (1, R, X, Y, Z): bool (R, X, Y, Z)."""
        masks = (logits > 0)[0]  # sigmoid(x) > 0.5
        return metrics.scored_regions(masks, self.data.store.coding, self.config.train.score)

    def summary(self) -> dict[str, Any]:
        """What `metrics.json` holds: definition, last and best validation, length."""
        return {
            "definition": metrics.definition(self.config.train.score),
            "scored": self.config.train.score,
            "validated_on": self.config.train.validation,
            "epochs": self.epoch,
            "last": {"epoch": self.epoch, **metrics.summarise(self.cases)},
            "last_empty_truth_as_one": metrics.summarise(self.cases, empty_as_one=True),
            "best": self.best,
        }

    # An epoch

    def _fit_epoch(self, epoch: int, progress: TrainingProgress, stop: StopSignal, records: EpochLog | None) -> None:
        train = self.config.train
        row = self._train_epoch(epoch, progress, stop)
        is_due = (epoch + 1) % train.val_every_epochs == 0 or epoch + 1 == train.epochs
        if is_due:
            if not self._validates_quickly():  # a scheduler may not have the patience for it
                self._save()
            row |= self.validate(progress)
        self.epoch, self.first_batch = epoch + 1, 0
        self.sums.zero_()
        self._close_epoch(row, progress, records)

    def _close_epoch(self, row: dict[str, Any], progress: TrainingProgress, records: EpochLog | None) -> None:
        self.history.append(row)
        progress.epoch(row, self.config.train.epochs)
        if records:
            records.write(self.history)
        if "val_mean" in row:
            self._save_validated(row)
        elif self._is_save_due():
            self._save()

    def _train_epoch(self, epoch: int, progress: TrainingProgress, stop: StopSignal) -> dict[str, Any]:
        train = self.config.train
        if not self.first_batch:
            self.rate = self.step.rate
        samples = train.batch_size * self.ranks.world_size
        started, passes = time.perf_counter(), len(self.train_loader) - self.first_batch
        wait, late, batch = DataWait(self.ranks.device), LateValues(), None
        for batch in wait.over(self.train_loader.epoch(epoch, self.first_batch)):
            done = self.step.done
            self.step(*batch)
            stepped = self.step.done > done
            self._add(self.step.values, stepped)
            values = late.push(self.step.values)
            progress.step(values[0] if values else None, self.step.done, samples)
            self._give_up_if_due(values, batch)
            if stepped:
                self._stop_or_save(stop)
        if batch:
            self._give_up_if_due(late.last(), batch)
        losses, skipped = self._means(gather(self.sums.tolist(), self.ranks))
        seconds = time.perf_counter() - started
        return {"epoch": epoch + 1, "step": self.step.taken, "lr": self.rate, **losses, "skipped_steps": skipped,
                "samples_per_s": passes * samples / seconds, "data_wait": wait.seconds() / seconds}  # fmt: skip

    def _add(self, values: torch.Tensor, stepped: bool) -> None:
        losses = values[:3]
        is_finite = losses.isfinite().all()
        left_out = values[4:5] if stepped else torch.zeros_like(values[4:5])
        self.sums += torch.cat([losses.where(is_finite, 0), is_finite.float()[None], left_out])

    @staticmethod
    def _means(sums: list[list[float]]) -> tuple[dict[str, float | None], int]:
        """Losses over the passes of all ranks, and steps left out (which all ranks leave out together)."""
        count = sum(rank[3] for rank in sums)
        names = ("loss", "dice_loss", "ce_loss")
        means = {name: sum(rank[i] for rank in sums) / count if count else None for i, name in enumerate(names)}
        return means, int(sums[0][4])

    def _stop_or_save(self, stop: StopSignal) -> None:
        """After a step: a checkpoint where one is due within the epoch, and the end where a signal asks for it."""
        asked = stop.due()
        is_within = self.train_loader.position[1] < len(self.train_loader)
        if asked or (is_within and self._is_save_due()):
            self._save()
        if asked:
            self.writer.wait()
            raise TrainingStopped(stop.name)

    def _give_up_if_due(self, values: list[float] | None, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        limit = self.config.train.max_skipped_steps
        if not values or values[5] < limit:
            return
        epoch, done = self.train_loader.position
        with self.step.inspecting() as network:
            try:
                found = first_nonfinite(network, lambda *pair: self.step.loss_of(*pair).loss, *batch)
            except RuntimeError as error:  # every layer's gradient at once may be too much
                if not is_out_of_memory(error):
                    raise
                found = None
        names = ", ".join(self.train_loader.names_of(epoch, done - 1))
        findings = [part for part in gather(found and f"{found}, for crops of {names}", self.ranks) if part]
        where = f"first in {'; '.join(findings[:3])}" if findings else "where, could not be found out"
        raise Diverged(
            f"the gradients were not finite in {limit} steps in a row, up to step {self.step.done} of epoch "
            f"{epoch + 1}; {where}; lower --optim.lr ({self.config.optim.lr:g}), give it --optim.warmup_steps or "
            "--optim.grad_clip 1, or, with --train.precision fp16, take bf16"
        )

    def _is_patience_over(self) -> bool:
        patience = self.config.train.patience
        since = [row for row in self.history if "val_mean" in row and row["epoch"] > (self.best["epoch"] or 0)]
        if not patience or len(since) < patience:
            return False
        log.info("stopped after epoch %d: no better mean Dice in %d validations", self.epoch, len(since))
        return True

    # Checkpoints

    def _is_save_due(self) -> bool:
        every = self.config.train.save_every_steps
        return every > 0 and self.step.done % every == 0

    def _validates_quickly(self) -> bool:
        """Whether the last validation was over soon; the same on all ranks, and False before the first."""
        seconds = [row["val_seconds"] for row in self.history if "val_seconds" in row]
        return bool(seconds) and seconds[-1] < QUICK_VALIDATION_S

    def _save_validated(self, row: dict[str, Any]) -> None:
        score = row["val_mean"]
        is_best = score is not None and (self.best["mean"] is None or score > self.best["mean"])
        if is_best:
            self.best = {"epoch": row["epoch"], **metrics.summarise(self.cases)}
        self._save(("last.pt", "best.pt") if is_best else ("last.pt",))
        if self.ranks.is_first:
            write_validation(self.run_dir, self.cases, self.summary())

    def _save(self, weights_files: tuple[str, ...] = ()) -> None:
        """Copy all that training needs to go on, and write it in the background."""
        step, average = self.step, self.step.average
        weights = full_weights(step.model)
        averaged = average.full_weights() if average else None
        rank = {"sums": self.sums.tolist(), "random": _random_states(self.ranks.device)}
        state = {
            "weights": weights,
            "average": {"weights": averaged, "steps": average.steps} if average else None,
            "moments": full_moments(step.engine, step.optimizer),
            "optimizer": step.optimizer.scalars(),
            "loader": self.train_loader.state_dict(),
            "epoch": self.epoch,
            "rate": self.rate,
            "taken": step.taken,
            "history": self.history.copy(),
            "best": self.best,
            "scored": self.config.train.score,
            "cases": [dataclasses.asdict(case) for case in self.cases],
            "ranks": gather(rank, self.ranks),
        }
        if not self.ranks.is_first:
            return
        store, config = self.data.store, to_portable_dict(self.config)
        file = WeightsFile(averaged or weights, config, self.epoch, metrics.summarise(self.cases),
                           store.modalities, store.coding, self.scans)  # fmt: skip
        about = {"epoch": self.epoch, "world_size": self.ranks.world_size, "zero_stage": self.config.train.zero_stage,
                 "config": config}  # fmt: skip
        name = checkpoint.state_name(step.taken, is_validated=bool(weights_files))
        self.writer.write(name, state, about, {name: file for name in weights_files})

    def _read_state(self) -> dict[str, Any]:
        """The newest state that is whole, the same on all ranks."""
        folder = self.run_dir / "checkpoints"
        path = checkpoint.find_state(folder) if self.ranks.is_first else None
        path = gather(path, self.ranks)[0]
        assert path is not None
        return checkpoint.load_state(path)

    def _restore(self, state: dict[str, Any]) -> None:
        step, ranks, scored = self.step, state["ranks"], state.get("scored", "masks")
        if state["best"]["epoch"] is not None and scored != self.config.train.score:
            raise ValueError(
                f"--train.score {self.config.train.score}: the validations of {self.run_dir} so far scored {scored}, "
                f"and a best epoch can't be chosen by two measures: go on with --train.score {scored}"
            )
        load_moments(step.engine, step.optimizer, state["moments"])
        step.optimizer.load_scalars(state["optimizer"])
        if step.average and state["average"]:
            step.average.load(state["average"]["weights"], state["average"]["steps"])
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        self.cases = [metrics.CaseDice(**case) for case in state["cases"]]
        epoch, batch = self.train_loader.load_state_dict(state["loader"])
        if epoch == self.epoch:  # else the position is the end of the epoch before
            self.first_batch = batch
        step.taken, self.rate = state["taken"], state.get("rate", self.rate)
        step.done = self.epoch * self.steps + self.first_batch // self.config.train.accumulate_steps
        if len(ranks) == self.ranks.world_size:
            self.sums += torch.tensor(ranks[self.ranks.rank]["sums"], device=self.ranks.device)
            _set_random_states(ranks[self.ranks.rank]["random"], self.ranks.device)
        else:
            log.warning(
                "saved by %d rank(s), resumed by %d: a step has another number of crops, unless --train.batch_size or "
                "--train.accumulate_steps makes up for it", len(ranks), self.ranks.world_size,
            )  # fmt: skip
            if self.ranks.is_first:
                self.sums += torch.tensor([rank["sums"] for rank in ranks], device=self.ranks.device).sum(0)
                self.sums[4] = ranks[0]["sums"][4]  # steps that all ranks left out together
        within = f", step {self.first_batch // self.config.train.accumulate_steps} of {self.steps}"
        log.info("resumed %s after epoch %d of %d%s", self.run_dir, self.epoch, self.config.train.epochs,
                 within if self.first_batch else "")  # fmt: skip

    # Memory

    def _log_memory(self) -> None:
        device = self.ranks.device
        if device.type == "cpu" and parameter_count(self.step.skeleton or self.step.model) < SMALL:
            return
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
        log.info(self._estimate_memory().describe(self._memory_limit(), name))

    def _memory_limit(self) -> int:
        return limit_bytes(self.ranks.device, self.ranks.ranks_on_node)

    def _estimate_memory(self) -> memory.MemoryEstimate:
        config = self.config
        return memory.estimate(
            self.step.skeleton or self.step.model,
            (len(self.data.store.modalities), *config.data.crop_size_voxels),
            config.train,
            config.loss,
            self.regions,
            self.ranks.device,
            world_size=self.ranks.world_size,
            ema=config.optim.ema_decay > 0,
            volume_bytes=self.train_loader.gpu_bytes + (self.val_loader.gpu_bytes if self.val_loader else 0),
        )


def _warn_of_overflow(names: Sequence[str]) -> None:
    if names:
        log.warning(
            "the logits of %d validation cases are NaN or infinite (%s) and count as background: lower --optim.lr, or "
            "take --train.precision bf16 instead of fp16",
            len(names),
            first_few(names),
        )


def _load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"--resume: the checkpoint holds the weights of another model: {error}") from error


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
