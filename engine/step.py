"""One optimizer step: forward, loss, backward, AdamW.

Precision. Weights, gradients, moments, losses are float32; `precision` is what the network computes in:

    float32   IEEE products everywhere          bf16   autocast
    tf32      TF32 products on a GPU            fp16   autocast, the loss scaled so that no gradient underflows

Nothing here waits for the device, but for what DeepSpeed and, at ZeRO 0, PyTorch do on several GPUs (docs/training.md).
The values of a pass stay on it as one tensor, which the trainer reads a step later. The order of wrapping: autocast
inside, torch.compile around it, DeepSpeed around that. Validation runs the network without the compiled code, so that
no compilation can fail there.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from engine.config import Config, TrainConfig
from engine.optim import GuardedAdamW, learning_rate
from engine.ranks.distributed import Ranks
from engine.sharding import copy_weights, deepspeed_engine, held_by_rank, shard_of
from kernels.dice_ce import DiceCE, dice_ce_loss

LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}
WARM_UP_PASSES = 3  # compilation, cuDNN's search, lazy initialisations: none of them may be recorded


def set_up_torch(train: TrainConfig) -> None:
    """Process-wide switches: TF32, and bits that do not depend on the run."""
    set_tf32(train.precision == "tf32")
    torch.backends.cudnn.benchmark = not train.deterministic  # crops have one size: the search pays
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(train.deterministic)


def set_tf32(is_on: bool) -> None:
    """Products of float32 in TF32 on a GPU, or as IEEE has them, in the whole process. PyTorch mixes the two."""
    torch.set_float32_matmul_precision("high" if is_on else "highest")
    torch.backends.cudnn.allow_tf32 = is_on


class TrainingStep:
    """The network under training; called with a batch, it makes a pass, and a step where one is due.

    Args:
        config: of the run, as `read_deepspeed_json` left it. settings: what that returned.
        ranks: who this process is.
        model: float32 weights; moved to the device.
        regions: labels of each region, as `dice_ce_loss` takes them.
        total_steps: optimizer steps of the whole run, for the learning rate.

    Attributes:
        done: optimizer steps so far of the `total_steps`; a run that goes on with another number of ranks counts in
            steps of these. taken: steps that were really taken since the run began.
        values: float32 (6,) of the last pass, on the device: loss, Dice loss, CE, gradient norm, 1 where the step was
            left out, such steps in a row.

    Raises:
        ValueError: options that do not go together.
    """

    def __init__(
        self,
        config: Config,
        settings: dict[str, Any],
        ranks: Ranks,
        model: torch.nn.Module,
        regions: Sequence[Sequence[int]],
        total_steps: int,
    ) -> None:
        _check_options(config.train, ranks)
        train, self.config = config.train, config
        self.regions, self.total_steps = regions, total_steps
        self.done = self.taken = 0
        # Under ZeRO 3 a forward gathers weights, which all ranks must do as often.
        self.spare = copy.deepcopy(model).to("meta") if train.zero_stage == 3 else None
        self.model = prepare_network(model.to(ranks.device), train.precision)
        if train.compile:
            self.model.forward = torch.compile(self.model.forward, dynamic=False)
        self.optimizer = GuardedAdamW(
            self.model.parameters(),
            config.optim,
            scales_loss=train.precision == "fp16",
            is_sharded=train.zero_stage > 0 and ranks.world_size > 1,
        )
        self.engine = deepspeed_engine(self.model, self.optimizer, config, settings, ranks)
        self.average = WeightAverage(self.model, config.optim.ema_decay) if config.optim.ema_decay else None
        self.graph = GraphedPass(self._plain_pass, self.model) if train.cuda_graph else None
        self.values = torch.zeros(6, device=ranks.device)
        module = self.engine.module
        self.reducer = module if isinstance(module, DistributedDataParallel) else None
        self._knows_order = self.reducer is None

    def __call__(self, image: Tensor, labels: Tensor) -> DiceCE:
        """A pass over a batch, and an optimizer step after every `accumulate_steps` of them.

        Args:
            image: (B, C, X, Y, Z), float32 or the precision's own. labels: uint8 (B, X, Y, Z). On this rank's device.
        """
        if not self._knows_order:
            self._learn_order(image, labels)
        if self.graph:
            loss = self.graph(image, labels)
            if self.engine.enable_backward_allreduce:
                self.engine.allreduce_gradients()
        else:
            loss = self.loss(image, labels)
            self.backward(loss)
        self.update()
        optimizer = self.optimizer
        terms = [loss.loss.detach(), loss.dice.detach(), loss.ce.detach()]
        self.values = torch.stack([*terms, optimizer.norm, optimizer.found_inf, optimizer.in_row])
        return loss

    def loss(self, image: Tensor, labels: Tensor) -> DiceCE:
        """Forward and loss."""
        is_due = self.engine.is_gradient_accumulation_boundary()
        with self.reducer.no_sync() if self.reducer and not is_due else nullcontext():
            return self.loss_of(self.engine(image), labels)

    def backward(self, loss: DiceCE) -> None:
        """Gradients, averaged over ranks where a step is due."""
        self.engine.backward(loss.loss * self.optimizer.scale if self.optimizer.scales_loss else loss.loss)

    def update(self) -> None:
        """The optimizer's step, where one is due."""
        is_due = self.engine.is_gradient_accumulation_boundary()
        if is_due:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate
        self.engine.step()
        if not is_due:
            return
        self.done += 1
        self.taken += 1
        if getattr(self.engine.optimizer, "overflow", False):
            self.optimizer.skip()
        if self.average:
            self.average.update()

    @property
    def rate(self) -> float:
        """Learning rate of the step that comes next."""
        return learning_rate(self.config.optim, self.done, self.total_steps)

    @contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module]:
        """The network as validation wants it: averaged weights where there are any, nothing compiled, no gradients."""
        self.engine.eval()
        with torch.no_grad(), self._uncompiled(), self.averaged():
            yield self._whole().eval() if self.spare else self.engine
        self.engine.train()

    @contextmanager
    def inspecting(self) -> Iterator[torch.nn.Module]:
        """The network for a look inside, by hooks and gradients: nothing compiled, and DeepSpeed not in between."""
        with torch.enable_grad(), self._uncompiled():
            yield self._whole() if self.spare else self.model

    def _learn_order(self, image: Tensor, labels: Tensor) -> None:
        """A pass for nothing, after which buckets of gradients are as in all later ones.

        A run that is resumed then sums over ranks in the order of one that was not stopped, from its first step on.
        """
        assert self.reducer is not None
        with torch.random.fork_rng([image.device] if image.is_cuda else []):
            self.loss_of(self.reducer(image), labels).loss.backward()
        self.optimizer.zero_grad()
        self._knows_order = True

    def _uncompiled(self) -> Any:
        return torch.compiler.set_stance("force_eager") if self.config.train.compile else nullcontext()

    def _whole(self) -> torch.nn.Module:
        """The network with its weights whole, for ranks that do not run it equally often; all make it together."""
        assert self.spare is not None
        network = copy.deepcopy(self.spare)
        weights = {name: value.to(self.values.device) for name, value in copy_weights(self.model).items()}
        network.load_state_dict(weights, assign=True)
        return prepare_network(network, self.config.train.precision)

    def averaged(self) -> Any:
        """Within it the weights are the averaged ones, where an average is kept."""
        return self.average.applied() if self.average else nullcontext()

    def _plain_pass(self, image: Tensor, labels: Tensor) -> DiceCE:
        loss = self.loss_of(self.model(image), labels)
        (loss.loss * self.optimizer.scale).backward()
        return loss

    def loss_of(self, logits: Tensor, labels: Tensor) -> DiceCE:
        """The loss of logits (B, R, X, Y, Z)."""
        loss = self.config.loss
        return dice_ce_loss(logits, labels, self.regions, ce=loss.ce, dice_weight=loss.dice_weight,
                            ce_weight=loss.ce_weight, squared_pred=loss.squared_pred, check_labels=False)  # fmt: skip


class GraphedPass:
    """Forward, loss and backward of a batch as one CUDA graph: replays `run`, which the first call records.

    With a batch of one to four crops the networks here launch about a thousand kernels of a few microseconds each, and
    the host is the bottleneck; a replay launches all of them at once. Reducing the gradients and the optimizer's step
    stay outside: a handful of launches, and NCCL where there are several ranks.

    Args:
        run: (image, labels) -> loss; leaves gradients in the parameters, and waits for nothing.
        model: whose parameters those are.
    """

    def __init__(self, run: Callable[[Tensor, Tensor], DiceCE], model: torch.nn.Module) -> None:
        self.run, self.parameters = run, list(model.parameters())
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, image: Tensor, labels: Tensor) -> DiceCE:
        """Gradients of this batch in the parameters, in place of what was there; the loss, until the next call.

        Raises:
            ValueError: a batch of another shape than the first.
        """
        if self.graph is None:
            self._record(image, labels)
            assert self.graph is not None
        if image.shape != self.image.shape:
            raise ValueError(f"a batch of {tuple(image.shape)} in a graph recorded for {tuple(self.image.shape)}")
        self.image.copy_(image)
        self.labels.copy_(labels)
        self.graph.replay()
        # The optimizer's side drops gradients after a step; those of the graph stay where they are.
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss

    def _record(self, image: Tensor, labels: Tensor) -> None:
        self.image, self.labels = image.clone(), labels.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_PASSES):
                self._drop()
                self.run(self.image, self.labels)
            self._drop()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # DALI's threads are at work meanwhile, and must not be forbidden what a capture forbids.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.loss = self.run(self.image, self.labels)
        self.gradients = [parameter.grad for parameter in self.parameters]
        self.graph = graph

    def _drop(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


class WeightAverage:
    """An exponential moving average of the weights, which is validated and kept in their place.

    average = decay * average + (1 - decay) * weights after every step.

    The first steps decay faster, (1 + n) / (10 + n) after n of them, so that the initial weights are soon forgotten.
    Each rank averages what it holds: whole weights, or its shards under ZeRO 3.

    Args:
        model: as DeepSpeed left it. decay: below 1.
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        self.model, self.decay, self.steps = model, decay, 0
        self.averages = [tensor.clone() for tensor in self._weights()]

    def update(self) -> None:
        """After a step."""
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.averages, self._weights(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within it the model has the averages for weights."""
        weights = self._weights()
        kept = [tensor.clone() for tensor in weights]
        torch._foreach_copy_(weights, self.averages)
        try:
            yield
        finally:
            torch._foreach_copy_(weights, kept)

    def copy(self) -> dict[str, torch.Tensor]:
        """Whole, by name, on the CPU; every rank takes part."""
        with self.applied():
            return copy_weights(self.model)

    def load(self, weights: dict[str, torch.Tensor], steps: int) -> None:
        """Take what `copy` gave, after so many updates."""
        self.steps = steps
        for (name, parameter), average in zip(self.model.named_parameters(), self.averages, strict=True):
            average.copy_(shard_of(parameter, weights[name]).view_as(average))

    def _weights(self) -> list[torch.Tensor]:
        return [held_by_rank(parameter) for parameter in self.model.parameters()]


def prepare_network(network: torch.nn.Module, precision: str) -> torch.nn.Module:
    """A network in the memory format of its device, and with a forward in a precision of `--train.precision`."""
    device = next(network.parameters()).device.type
    if device == "cuda":  # whose convolutions want the channels last in memory
        network.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    if precision in LOW_PRECISION:
        # Inside the module: DeepSpeed turns off an autocast that it finds around its own forward.
        lowered = torch.autocast(device, LOW_PRECISION[precision])
        network.forward = lowered(network.forward)
    return network


def _check_options(train: TrainConfig, ranks: Ranks) -> None:
    if train.compile and train.zero_stage == 3:
        raise ValueError(
            "--train.compile true with --train.zero_stage 3 compiles anew at every layer: take a stage from 0 to 2"
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
