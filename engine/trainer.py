"""The training loop: crops in, weights and a table of Dice out.

An epoch draws `crops_per_case` crops of every training case. Every few epochs the validation cases are scored and a
checkpoint is written in the background. The draws of an epoch depend only on its number and the seed, and a checkpoint
holds everything else: a run stopped at any step resumes as if it had never stopped, on another number of ranks too.

The loop never waits for a step: its losses, and whether its gradients were finite, are read during the next one.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from engine import checkpoint, memory, metrics
from engine.config import Config, to_portable_dict
from engine.data import Data, make_loaders
from engine.diagnosis import Diverged, first_nonfinite
from engine.progress import DataWait, EpochSums, LateValues, TrainingProgress, epoch_means
from engine.ranks.distributed import Ranks, gather
from engine.ranks.memory_limits import is_out_of_memory, limit_bytes
from engine.ranks.signals import StopSignal, TrainingStopped
from engine.run_tables import EpochLog, write_validation
from engine.sharding import full_moments, full_weights, load_moments
from engine.step import StepValues, TrainConfig, TrainingStep
from engine.step_choice import with_precision, with_way
from engine.validation import Validator
from engine.weights_file import WeightsFile
from kernels import dispatch
from models import parameter_count
from pipelines.layouts.labels import REGIONS
from pipelines.preparing.domain_shift import background_warning, store_statistics

log = logging.getLogger(__name__)

SMALL = 10_000_000  # parameters; on a CPU, estimating a smaller network's memory is not worth two seconds
QUICK_VALIDATION_S = 10.0  # a checkpoint before so short a validation would take longer than it could save


class Trainer:
    """One run, from loaders to checkpoints.

    Args:
        config: of the run, with a `run_dir`. ranks: who this process is. data: prepared volumes and the split.
        model: float32, on the CPU. settings: DeepSpeed's own, see `engine.deepspeed_json`.

    Attributes:
        config: the same with nothing left to `auto` in how steps are computed, see `engine.step_choice`.

    Raises:
        ValueError: options that can't be combined, or a run that can't be resumed.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        data: Data,
        model: torch.nn.Module,
        settings: Mapping[str, Any] = {},
    ) -> None:
        config = with_precision(config, ranks)
        self.ranks, self.data = ranks, data
        assert config.run_dir is not None
        self.run_dir = config.run_dir
        self.regions = data.store.coding.regions
        self.train_loader, val_loader = make_loaders(config.data, config.train, ranks, data)
        self.validator = Validator(config, ranks, data.store.coding, val_loader)
        self.steps = len(self.train_loader) // config.train.accumulate_steps  # optimizer steps of an epoch
        state = self._load_state(model) if config.resume else None
        total_steps = config.train.epochs * self.steps

        def make_step(model: torch.nn.Module, train: TrainConfig) -> TrainingStep:
            return TrainingStep(model, train, config.optim, config.loss, ranks, self.regions, total_steps, settings)

        steps_left = total_steps - (state["epoch"] * self.steps if state else 0)
        self.config = with_way(config, ranks, model, self.train_loader, make_step, settings, steps_left)
        self.step = make_step(model, self.config.train)
        self.writer = checkpoint.CheckpointWriter(self.run_dir / "checkpoints", config.train.keep_checkpoints)
        self.epoch, self.first_batch = 0, 0
        self.rate = self.step.rate  # of the epoch's first step
        self.sums = EpochSums(ranks.device)
        self.history: list[dict[str, Any]] = []
        self.cases: list[metrics.CaseDice] = []
        self.best: dict[str, Any] = {"epoch": None, "mean": None}
        in_store = [name for name in data.train if name in data.store.names] or data.store.names
        self.scans = store_statistics(data.store, in_store) if ranks.is_first else {}
        advice = background_warning(self.scans, data.store.modalities)
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
                if self.history and "val_mean" not in self.history[-1]:  # --train.epochs was lowered
                    row = self.history.pop()
                    self._close_epoch(row | self.validate(progress), progress, records)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            device, limit = self.ranks.device, limit_bytes(self.ranks.device, self.ranks.ranks_on_node)
            raise ValueError(memory.out_of_memory_message(error, self._estimate_memory(), device, limit)) from error
        finally:
            self.writer.wait()
            if records:
                records.close()

    def validate(self, progress: TrainingProgress | None = None) -> dict[str, Any]:
        """Score the validation cases of all ranks; returns the columns that the log gains."""
        with self.step.evaluating() as network:
            self.cases, seconds = self.validator.score(network, progress)
        summary = metrics.summarise(self.cases)
        return {"val_mean": summary["mean"], **{f"val_{region}": summary[region] for region in REGIONS},
                "val_seconds": seconds}  # fmt: skip

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
            seconds = [row["val_seconds"] for row in self.history if "val_seconds" in row]  # the same on all ranks
            if not seconds or seconds[-1] >= QUICK_VALIDATION_S:  # a scheduler may kill the job meanwhile
                self._save()
            row |= self.validate(progress)
        self.epoch, self.first_batch = epoch + 1, 0
        self.sums.values.zero_()
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
            self.sums.add(self.step.values, stepped)
            values = late.push(self.step.values)
            progress.step(StepValues(*values).loss if values else None, self.step.done, samples)
            self._give_up_if_due(values, batch)
            if stepped:
                is_asked = stop.due()
                is_within = self.train_loader.position[1] < len(self.train_loader)  # else `_close_epoch` saves
                if is_asked or (is_within and self._is_save_due()):
                    self._save()
                if is_asked:
                    self.writer.wait()
                    raise TrainingStopped(stop.name)
        if batch:
            self._give_up_if_due(late.last(), batch)
        losses, skipped = epoch_means(gather(self.sums.values.tolist(), self.ranks))
        seconds = time.perf_counter() - started
        return {"epoch": epoch + 1, "step": self.step.taken, "lr": self.rate, **losses, "skipped_steps": skipped,
                "samples_per_s": passes * samples / seconds, "data_wait": wait.seconds() / seconds}  # fmt: skip

    def _give_up_if_due(self, values: list[float] | None, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        limit = self.config.train.max_skipped_steps
        if not values or StepValues(*values).skipped_in_row < limit:
            return
        epoch, done = self.train_loader.position
        with self.step.inspecting() as network:
            try:
                found = first_nonfinite(network, lambda *pair: self.step.loss_of(*pair).loss, *batch)
            except RuntimeError as error:  # the gradients of all layers may need too much memory
                if not is_out_of_memory(error):
                    raise
                found = None
        names = ", ".join(self.train_loader.names_of(epoch, done - 1))
        findings = [part for part in gather(found and f"{found}, for crops of {names}", self.ranks) if part]
        where = f"first in {'; '.join(findings[:3])}" if findings else "in a layer that could not be found"
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

    def _save_validated(self, row: dict[str, Any]) -> None:
        score = row["val_mean"]
        is_best = score is not None and (self.best["mean"] is None or score > self.best["mean"])
        if is_best:
            self.best = {"epoch": row["epoch"], **metrics.summarise(self.cases)}
        self._save(("last.pt", "best.pt") if is_best else ("last.pt",))
        if self.ranks.is_first:
            write_validation(self.run_dir, self.cases, self.summary())

    def _save(self, weights_files: tuple[str, ...] = ()) -> None:
        """Copy everything that training needs to resume, and write it in the background."""
        step, average = self.step, self.step.average
        weights = full_weights(step.model)
        averaged = average.full_weights() if average else None
        random = {"cpu": torch.get_rng_state()}
        if self.ranks.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.ranks.device)
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
            "kernels": dispatch.choices(),
            "cases": [dataclasses.asdict(case) for case in self.cases],
            "ranks": gather({"sums": self.sums.values.tolist(), "random": random}, self.ranks),
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

    def _load_state(self, model: torch.nn.Module) -> dict[str, Any]:
        """The newest state, the same on all ranks; its weights go into the model."""
        found = checkpoint.find_state(self.run_dir / "checkpoints") if self.ranks.is_first else self.run_dir
        state = checkpoint.load_state(gather(found, self.ranks)[0])
        with checkpoint.restoring(self.run_dir):
            try:
                model.load_state_dict(state["weights"])
            except RuntimeError as error:
                raise ValueError(f"--resume: the checkpoint holds the weights of another model: {error}") from error
        return state

    def _restore(self, state: dict[str, Any]) -> None:
        step, ranks, scored = self.step, state["ranks"], state.get("scored", "masks")
        if state["best"]["epoch"] is not None and scored != self.config.train.score:
            raise ValueError(
                f"--train.score {self.config.train.score}: the validations of {self.run_dir} so far scored {scored}, "
                f"and a best epoch can't be chosen by two measures: continue with --train.score {scored}"
            )
        dispatch.restore_choices(state.get("kernels", {}))
        load_moments(step.engine, step.optimizer, state["moments"])
        step.optimizer.load_scalars(state["optimizer"])
        if step.average and state["average"]:
            step.average.load(state["average"]["weights"], state["average"]["steps"])
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        self.cases = [metrics.CaseDice(**case) for case in state["cases"]]
        epoch, batch = self.train_loader.load_state_dict(state["loader"])
        if epoch == self.epoch:  # else the position is the end of the previous epoch
            self.first_batch = batch
        step.taken, self.rate = state["taken"], state.get("rate", self.rate)
        step.done = self.epoch * self.steps + self.first_batch // self.config.train.accumulate_steps
        self.sums.restore([rank["sums"] for rank in ranks], self.ranks)
        if len(ranks) == self.ranks.world_size:
            random, device = ranks[self.ranks.rank]["random"], self.ranks.device
            torch.set_rng_state(random["cpu"])
            if device.type == "cuda" and "cuda" in random:
                torch.cuda.set_rng_state(random["cuda"], device)
        else:
            log.warning(
                "saved by %d rank(s), resumed by %d: a step has another number of crops, unless --train.batch_size or "
                "--train.accumulate_steps makes up for it", len(ranks), self.ranks.world_size,
            )  # fmt: skip
        within = f", step {self.first_batch // self.config.train.accumulate_steps} of {self.steps}"
        log.info("resumed %s after epoch %d of %d%s", self.run_dir, self.epoch, self.config.train.epochs,
                 within if self.first_batch else "")  # fmt: skip

    # Memory

    def _log_memory(self) -> None:
        device = self.ranks.device
        if device.type == "cpu" and parameter_count(self.step.skeleton or self.step.model) < SMALL:
            return
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine"
        log.info(self._estimate_memory().describe(limit_bytes(device, self.ranks.ranks_on_node), name))

    def _estimate_memory(self) -> memory.MemoryEstimate:
        model, channels = self.step.skeleton or self.step.model, len(self.data.store.modalities)
        volume_bytes = sum(loader.gpu_bytes for loader in (self.train_loader, self.validator.loader) if loader)
        return memory.estimate(model, self.config, channels, self.regions, self.ranks, volume_bytes)
