"""One optimizer step: forward, loss, backward, AdamW.

Nothing here waits for the device, apart from what DeepSpeed and, at ZeRO 0, PyTorch do on several GPUs
(docs/training.md). A pass leaves its values on the device as one tensor, which the trainer reads a step later.
Wrapping, from the inside out: autocast, torch.compile, DeepSpeed. Validation runs the network uncompiled, so that no
compilation can fail there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from engine.optim import GuardedAdamW, OptimConfig, learning_rate
from engine.precision import LOW_PRECISION, Precision, WeightCopies, prepare_network
from engine.ranks.distributed import Ranks
from engine.sharding import deepspeed_engine, full_weights, local_shard, shard_of, trainable
from kernels import dispatch
from kernels.dice_ce import DiceCE, dice_ce_loss
from pipelines.basics.option_values import MANY, MOST_SEED, number

WARM_UP_PASSES = 3  # compilation, cuDNN's search and lazy initialisation must not be recorded


@dataclass
class LossConfig:
    """Sigmoid Dice over the regions plus cross-entropy."""

    ce: Literal["multihot", "argmax", "bce"] = "bce"
    """multihot: softmax against the multi-hot target (MONAI today); argmax: against its argmax (MONAI before October
    2022, and so the tutorial); bce: binary, the right one for overlapping regions."""
    dice_weight: float = number(1.0, least=0, most=MANY)
    """Weight of the Dice term."""
    ce_weight: float = number(1.0, least=0, most=MANY)
    """Weight of the cross-entropy term."""
    squared_pred: bool = False
    """Squared predictions and targets in the Dice denominator."""


@dataclass
class TrainConfig:
    """Length, batch, precision and validation."""

    epochs: int = number(180, least=1, most=MANY)
    """Passes over the training cases."""
    batch_size: int = number(2, least=1, most=65_536)
    """Crops per GPU (or process) and pass."""
    accumulate_steps: int = number(1, least=1, most=MANY)
    """Passes averaged into one optimizer step."""
    save_every_steps: int = number(0, least=0, most=1000 * MANY)
    """Optimizer steps between further checkpoints; 0: checkpoints only at validations."""
    keep_checkpoints: int = number(2, least=1, most=MANY)
    """How many of the newest checkpoints to keep; if the newest is damaged, a run resumes from the one before."""
    val_every_epochs: int = number(5, least=1, most=MANY)
    """Epochs between validations; the last epoch is always validated."""
    validation: Literal["center_crop", "full_volume"] = "center_crop"
    """Dice on the centre crop, as in the tutorial, or on the full prepared volume by sliding window."""
    score: Literal["label_map", "masks"] = "label_map"
    """What validations score, and so choose the best weights by: the regions of the label map that would be written (ET
    within TC within WT), or the network's overlapping masks, as in the published tutorial."""
    patience: int = number(0, least=0, most=MANY)
    """Stop after this many validations without a better mean Dice; 0: never."""
    precision: Literal["auto", Precision] = "auto"
    """tf32: float32 with TF32 products on a GPU; bf16, fp16: torch autocast, fp16 with loss scaling. Weights,
    gradients, losses and Dice are always float32. auto: bf16 on a GPU that computes in it (compute capability 8.0 and
    up), fp16 on an older one, float32 on a CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 1 shards the optimizer's states over ranks, 2 also the gradients, 3 also the weights."""
    deepspeed: Path | None = None
    """DeepSpeed JSON file; it overrides the options here."""
    compile: Literal["auto", True, False] = "auto"
    """Compile the network with torch.compile; validation runs it uncompiled. auto: if a few steps, timed when the run
    starts, are faster so, and the run is long enough to make up for the timing."""
    cuda_graph: Literal["auto", True, False] = "auto"
    """Replay forward and backward as one CUDA graph: faster for small batches, where launches take longer than work.
    auto: as compile."""
    deterministic: bool = False
    """The same bits in every run: slower algorithms on a GPU, and nothing is chosen by timing, so that compile and
    cuda_graph are false where they are auto."""
    max_skipped_steps: int = number(10, least=1, most=MANY)
    """Stop with a diagnosis after this many steps in a row with non-finite gradients."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    seed: int = number(0, least=0, most=MOST_SEED)
    """Seed of the weights and of all random draws of the pipelines."""


class StepValues(NamedTuple):
    """The values of a pass: numbers, or tensors () on the device."""

    loss: Any
    dice_loss: Any
    ce_loss: Any
    gradient_norm: Any
    was_skipped: Any  # 1 or 0
    skipped_in_row: Any


class TrainingStep:
    """The network under training; a call makes one pass over a batch, and an optimizer step when one is due.

    Args:
        model: float32 weights; moved to the device. train, optim, loss: of the run. ranks: who this process is.
        regions: labels of each region, as `dice_ce_loss` takes them.
        total_steps: optimizer steps of the whole run, for the learning rate.
        settings: DeepSpeed's own, see `engine.deepspeed_json`.

    Attributes:
        done: optimizer steps so far, of `total_steps`. A run resumed by another number of ranks has steps of another
            size, and `done` counts in those. taken: steps actually taken since the run began.
        values: `StepValues` of the last pass as one tensor (6,), float32, on the device.

    Raises:
        ValueError: options that do not go together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        train: TrainConfig,
        optim: OptimConfig,
        loss: LossConfig,
        ranks: Ranks,
        regions: Sequence[Sequence[int]],
        total_steps: int,
        settings: Mapping[str, Any],
    ) -> None:
        check_options(train, ranks)
        self.train, self.optim, self.loss_config = train, optim, loss
        self.regions, self.total_steps = regions, total_steps
        self.done = self.taken = 0
        # The network without weights. Under ZeRO 3 a forward gathers weights, which all ranks must do equally often.
        self.skeleton = copy.deepcopy(model).to("meta") if train.zero_stage == 3 else None
        self.model, self.copies, self.optimizer = prepare_training(model.to(ranks.device), train, optim, ranks)
        if train.compile:
            self.model.forward = torch.compile(self.model.forward, dynamic=False)
        self.engine = deepspeed_engine(
            self.model, self.optimizer, settings, ranks, zero_stage=train.zero_stage, batch_size=train.batch_size,
            accumulate_steps=train.accumulate_steps, cuda_graph=train.cuda_graph is True,
        )  # fmt: skip
        self.average = WeightAverage(self.model, optim.ema_decay) if optim.ema_decay else None
        leaves = self.copies.leaves(trainable(self.model))
        self.cuda_graph = CudaGraphPass(self._plain_pass, leaves) if train.cuda_graph else None
        self.values = torch.zeros(len(StepValues._fields), device=ranks.device)
        module = self.engine.module
        self.ddp = module if isinstance(module, DistributedDataParallel) else None
        self._is_first_pass = True

    def __call__(self, image: Tensor, labels: Tensor) -> DiceCE:
        """A pass over a batch, and an optimizer step after every `accumulate_steps` of them.

        Args:
            image: (B, C, X, Y, Z), float32 or the precision's own. labels: uint8 (B, X, Y, Z). On this rank's device.
        """
        if self._is_first_pass and dispatch.may_measure(image.device) and not self.skeleton:
            self.tune_kernels(image, labels)
        if self.ddp and self._is_first_pass:
            # A throw-away pass that fixes DDP's bucket order: DDP rebuilds its buckets after the first backward. So a
            # resumed run sums over ranks in the same order as one that was never stopped, from its first step on.
            with torch.random.fork_rng([image.device] if image.is_cuda else []):
                self.loss_of(self.ddp(image), labels).loss.backward()
            self.optimizer.zero_grad()
        self._is_first_pass = False
        if self.cuda_graph:
            with self.copies.applied():
                loss = self.cuda_graph(image, labels)
            if self.engine.enable_backward_allreduce:
                self.engine.allreduce_gradients()
        else:
            loss = self.loss(image, labels)
            self.backward(loss)
        self.update()
        losses = loss.loss.detach(), loss.dice.detach(), loss.ce.detach()
        optimizer = self.optimizer
        self.values = torch.stack(StepValues(*losses, optimizer.norm, optimizer.found_inf, optimizer.in_row))
        return loss

    def tune_kernels(self, image: Tensor, labels: Tensor) -> None:
        """A throw-away pass in which kernels that are not known of this GPU are measured, for all ranks together.

        Eager, without reducing or keeping gradients. Not under ZeRO 3, where no rank has the weights.
        """
        with (
            dispatch.tuning(image.device),
            torch.random.fork_rng([image.device] if image.is_cuda else []),
            self._uncompiled(),
        ):
            loss = self.loss_of(self.model(image), labels).loss
            wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, wanted, allow_unused=True)

    def loss(self, image: Tensor, labels: Tensor) -> DiceCE:
        """Forward and loss."""
        is_due = self.engine.is_gradient_accumulation_boundary()
        with self.ddp.no_sync() if self.ddp and not is_due else nullcontext(), self.copies.applied():
            return self.loss_of(self.engine(image), labels)

    def backward(self, loss: DiceCE) -> None:
        """Gradients, averaged over ranks when a step is due."""
        self.engine.backward(loss.loss * self.optimizer.scale if self.optimizer.scales_loss else loss.loss)

    def update(self) -> None:
        """The optimizer's step, when one is due."""
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # which counts the pass
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        self.engine.step()
        self.done += 1
        self.taken += 1
        if getattr(self.engine.optimizer, "overflow", False):
            self.optimizer.skip()
        if self.average:
            self.average.update()

    def loss_of(self, logits: Tensor, labels: Tensor) -> DiceCE:
        """The loss of logits (B, R, X, Y, Z)."""
        return training_loss(logits, labels, self.regions, self.loss_config)

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return learning_rate(self.optim, self.done, self.total_steps)

    @contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module]:
        """The network as validation wants it: averaged weights if an average is kept, uncompiled, without gradients."""
        self.engine.eval()
        with torch.no_grad(), self._uncompiled(), self.average.applied() if self.average else nullcontext():
            yield self._whole_network().eval() if self.skeleton else self.engine
        self.engine.train()

    @contextmanager
    def inspecting(self) -> Iterator[torch.nn.Module]:
        """The network for a look inside, by hooks and gradients: uncompiled, and without DeepSpeed in between."""
        with torch.enable_grad(), self._uncompiled():
            yield self._whole_network() if self.skeleton else self.model

    def _plain_pass(self, image: Tensor, labels: Tensor) -> DiceCE:
        loss = self.loss_of(self.model(image), labels)
        (loss.loss * self.optimizer.scale).backward()
        return loss

    def _uncompiled(self) -> AbstractContextManager[Any]:
        return torch.compiler.set_stance("force_eager") if self.train.compile else nullcontext()

    def _whole_network(self) -> torch.nn.Module:
        """A copy with unsharded weights, for ranks that do not run it equally often; all ranks make it together."""
        assert self.skeleton is not None
        network = copy.deepcopy(self.skeleton)
        weights = {name: value.to(self.values.device) for name, value in full_weights(self.model).items()}
        network.load_state_dict(weights, assign=True)
        return prepare_network(network, self.train.precision)


class CudaGraphPass:
    """Forward, loss and backward of a batch as one CUDA graph: the first call records `run`, and each call replays it.

    With a batch of one to four crops the networks here launch some hundreds of kernels of a few microseconds each, and
    the host is the bottleneck; a replay launches all of them at once. Reducing the gradients and the optimizer's step
    stay outside: a handful of launches, and NCCL on several ranks.

    Args:
        run: (image, labels) -> loss; leaves gradients in the leaves, and never waits for the device.
        leaves: trainable parameters, or what stands for them.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], DiceCE], leaves: Sequence[Tensor]) -> None:
        self.run, self.leaves = run, leaves
        self.cuda_graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, image: Tensor, labels: Tensor) -> DiceCE:
        """Replace the leaves' gradients by those of this batch; the loss is valid until the next call.

        Raises:
            ValueError: a batch of another shape than the first.
        """
        if self.cuda_graph is None:
            self._record(image, labels)
        assert self.cuda_graph is not None
        if image.shape != self.image.shape:
            raise ValueError(f"a batch of {tuple(image.shape)} in a CUDA graph recorded for {tuple(self.image.shape)}")
        self.image.copy_(image)
        self.labels.copy_(labels)
        self.cuda_graph.replay()
        # The optimizer drops gradients after a step; the graph's stay where they are.
        for leaf, gradient in zip(self.leaves, self.gradients, strict=True):
            leaf.grad = gradient
        return self.loss

    def _record(self, image: Tensor, labels: Tensor) -> None:
        self.image, self.labels = image.clone(), labels.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                self._drop_gradients()
                self.run(self.image, self.labels)
            self._drop_gradients()
        torch.cuda.current_stream().wait_stream(stream)
        cuda_graph = torch.cuda.CUDAGraph()
        # DALI's threads work meanwhile: a capture must not forbid them what it forbids this one.
        with torch.cuda.graph(cuda_graph, capture_error_mode="thread_local"):
            self.loss = self.run(self.image, self.labels)
        self.gradients = [leaf.grad for leaf in self.leaves]
        self.cuda_graph = cuda_graph

    def _drop_gradients(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None


class WeightAverage:
    """An exponential moving average of the weights, which is validated and kept in their place.

    average = decay * average + (1 - decay) * weights after every step.

    The first steps decay faster, (1 + n) / (10 + n) after n of them, so that the initial weights are soon forgotten.
    Each rank averages what it holds: all weights, or its shards under ZeRO 3. A frozen weight is its own average.

    Args:
        model: as DeepSpeed left it. decay: below 1.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.averages = [tensor.clone() for tensor in self._weights()]

    def update(self) -> None:
        """Call after a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, self._weights(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model's weights are the averages."""
        weights = self._weights()
        kept = [tensor.clone() for tensor in weights]
        torch._foreach_copy_(weights, self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def full_weights(self) -> dict[str, Tensor]:
        """The averages by name, unsharded, on the CPU; all ranks must call it."""
        with self.applied():
            return full_weights(self.model)

    def load(self, weights: Mapping[str, Tensor], steps: int) -> None:
        """Take what `full_weights` gave, after so many updates."""
        self.steps = steps
        trained = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        for (name, parameter), average in zip(trained, self.averages, strict=True):
            average.copy_(shard_of(weights[name], parameter).view_as(average))

    def _weights(self) -> list[Tensor]:
        return [local_shard(parameter) for parameter in trainable(self.model)]


def prepare_training(
    model: torch.nn.Module, train: TrainConfig, optim: OptimConfig, ranks: Ranks
) -> tuple[torch.nn.Module, WeightCopies, GuardedAdamW]:
    """The network in a precision, low-precision copies of its weights, and the optimizer of both.

    Copies are kept where their gradients are final when they arrive: those of several passes or ranks are summed in
    float32, and ZeRO shards the weights themselves.
    """
    network = prepare_network(model, train.precision)
    is_final = train.accumulate_steps == 1 and ranks.world_size == 1 and not train.zero_stage
    copies = WeightCopies(network, LOW_PRECISION.get(train.precision) if is_final else None)
    optimizer = GuardedAdamW(
        trainable(network),
        optim,
        scales_loss=train.precision == "fp16",
        is_sharded=train.zero_stage > 0 and ranks.world_size > 1,
        copies=copies,
    )
    return network, copies, optimizer


def training_loss(logits: Tensor, labels: Tensor, regions: Sequence[Sequence[int]], config: LossConfig) -> DiceCE:
    """The loss of logits (B, R, X, Y, Z) and labels (B, X, Y, Z), whose values were checked when they were read."""
    return dice_ce_loss(
        logits, labels, regions, ce=config.ce, dice_weight=config.dice_weight, ce_weight=config.ce_weight,
        squared_pred=config.squared_pred, check_labels=False,
    )  # fmt: skip


def check_options(train: TrainConfig, ranks: Ranks) -> None:
    """Refuse options that do not go together on this rank's device, or that are still left to the program.

    Raises:
        ValueError: naming them.
    """
    open_ones = [name for name in ("precision", "compile", "cuda_graph") if getattr(train, name) == "auto"]
    if open_ones:
        raise ValueError(
            f"--train.{open_ones[0]} auto is decided before a step is made, by engine.step_choice: decide there, or "
            "give a value"
        )
    if train.compile and train.zero_stage == 3:
        raise ValueError(
            "--train.compile true with --train.zero_stage 3 recompiles at every layer: take a stage from 0 to 2"
        )
    if not train.cuda_graph:
        return
    if ranks.device.type != "cuda":
        raise ValueError("--train.cuda_graph true needs a GPU; leave it out on a CPU")
    if train.zero_stage or train.accumulate_steps > 1:
        raise ValueError(
            f"--train.cuda_graph true records gradients at fixed places, which --train.zero_stage {train.zero_stage} "
            f"and --train.accumulate_steps {train.accumulate_steps} move: use stage 0 and 1 pass a step"
        )
