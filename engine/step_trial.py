"""How long a training step takes each way it can be computed: eager, as a CUDA graph, compiled, or both.

A way is tried on a throw-away copy of the network, with a real batch of the run. The first step must give the loss and
the gradient norm of the plainest way; another warms up; the rest are timed one by one, from an idle device to an idle
device, and their median counts. The original network, the random states, what `torch.compile` remembers and the
counter of the GPU's peak memory are afterwards as they were.

Ranks try a way together, as a step waits for all of them, and the time of the slowest counts. A way that fails on one
rank has failed on all. Whatever may fail on one rank alone, for want of memory or of a compiler, is therefore first
done where no other rank waits for it: the copy of the network, then a pass without reduction. What fails after that
fails on all ranks alike, or is the loss of a rank, as it is in training.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from engine.precision import LOW_PRECISION
from engine.ranks.distributed import Ranks, gather
from engine.ranks.memory_limits import is_out_of_memory
from engine.step import StepValues, TrainConfig, TrainingStep
from models import parameter_count
from pipelines.basics.text import one_line

WARM_UP_STEPS = 2
"""The first compiles, records, and has cuDNN search; its values are compared."""
TIMED_STEPS = 5
TIMED_S = 10.0
"""No more steps are timed once they took this long together: on a CPU one may take a minute."""
STEPS = WARM_UP_STEPS + TIMED_STEPS
TOLERANCE, LOW_TOLERANCE = 1e-3, 0.05
"""Of a first step's loss and gradient norm, relative; the second under autocast, where a fusion rounds less often."""

clock = time.perf_counter
T = TypeVar("T")


class Way(NamedTuple):
    """How a step is computed."""

    compile: bool
    cuda_graph: bool

    @classmethod
    def of(cls, train: TrainConfig) -> Way:
        """The way of options that are decided."""
        return cls(train.compile is True, train.cuda_graph is True)

    def __str__(self) -> str:
        return " ".join(["compiled"] * self.compile + ["CUDA graph"] * self.cuda_graph) or "eager"


class Tried(NamedTuple):
    """What came of a way: seconds of a step on the slowest rank, or why it can't be taken."""

    seconds: float = math.inf
    fault: str = ""


class WayFailed(Exception):
    """A way can't be taken; the message says why, and on which rank."""


class StepTrial:
    """Tries the ways to compute the steps of a run.

    Args:
        make_step: from a network, which it may change, and the options of training to a step.
        model: the network, float32; it stays as it is. train: options; `compile` and `cuda_graph` are set here.
        ranks: who this process is. batch: image and labels, as the loader gives them.
    """

    def __init__(
        self,
        make_step: Callable[[nn.Module, TrainConfig], TrainingStep],
        model: nn.Module,
        train: TrainConfig,
        ranks: Ranks,
        batch: tuple[Tensor, Tensor],
    ) -> None:
        self.make_step, self.model, self.train, self.ranks, self.batch = make_step, model, train, ranks, batch
        self._expected: StepValues | None = None  # of the first way's first step

    def tried(self, way: Way) -> Tried:
        """Try a way; all ranks must call it. The first one is what the others are compared with."""
        with self._random_kept():
            try:
                found = Tried(self._median_seconds(way))
            except Exception as error:  # whatever it is, training can go on in another way
                found = Tried(fault=_in_words(error))
        self._free(way)  # not before the error is gone, which holds the step
        return found

    def _median_seconds(self, way: Way) -> float:
        train = replace(self.train, compile=way.compile, cuda_graph=way.cuda_graph)
        step = self.make_step(self._together(lambda: copy.deepcopy(self.model).to(self.ranks.device)), train)
        if self.ranks.world_size > 1:
            self._together(lambda: self._pass_alone(step))
        self._step(step)
        values = StepValues(*step.values.tolist())
        self._together(lambda: self._compare(values))
        if step.cuda_graph:  # it keeps the memory of a pass for itself: a validation must fit beside it
            self._together(lambda: self._validate(step))
        for _ in range(WARM_UP_STEPS - 1):
            self._step(step)
        seconds: list[float] = []
        while len(seconds) < TIMED_STEPS and sum(seconds) < TIMED_S:
            self._wait()
            started = clock()
            self._step(step)
            self._wait()
            seconds.append(max(gather(clock() - started, self.ranks)))
        return statistics.median(seconds)

    def _step(self, step: TrainingStep) -> None:
        for _ in range(self.train.accumulate_steps):
            step(*self.batch)

    def _pass_alone(self, step: TrainingStep) -> None:
        """Compile, or record, and use the memory of a pass, while no other rank waits for this one."""
        image, labels = self.batch
        shares = self.ranks.world_size if self.train.zero_stage else 1
        moments = torch.empty(2 * parameter_count(step.model) // shares, device=image.device)  # of the step to come
        with self._random_kept():
            if step.cuda_graph:
                step.cuda_graph(image, labels)
                return
            with step.ddp.no_sync() if step.ddp else nullcontext():
                loss = step.loss_of((step.ddp or step.model)(image), labels).loss
            # Not `backward`, whose gradients DeepSpeed would reduce as they come.
            wanted = [parameter for parameter in step.model.parameters() if parameter.requires_grad]
            torch.autograd.grad(loss, wanted, allow_unused=True)
        del moments

    def _validate(self, step: TrainingStep) -> None:
        with step.evaluating() as network:
            network(self.batch[0][:1])

    def _compare(self, values: StepValues) -> None:
        """Raise WayFailed if the values of a first step are not those of the first way."""
        expected = self._expected = self._expected or values
        tolerance = LOW_TOLERANCE if self.train.precision in LOW_PRECISION else TOLERANCE
        for name in ("loss", "gradient_norm"):
            found, wanted = getattr(values, name), getattr(expected, name)
            if math.isfinite(wanted) and not math.isclose(found, wanted, rel_tol=tolerance):
                raise WayFailed(f"its first step has a {name.replace('_', ' ')} of {found:.6g}, not of {wanted:.6g}")

    def _together(self, work: Callable[[], T]) -> T:
        """The result of work in which no rank waits for another. Raises WayFailed on all ranks if it fails on any."""
        result: T | None = None
        fault = ""
        try:
            result = work()
        except Exception as error:
            fault = _in_words(error)
        for rank, its_fault in enumerate(gather(fault, self.ranks)):
            if its_fault:
                raise WayFailed(f"{its_fault}{f' (rank {rank})' if self.ranks.world_size > 1 else ''}")
        return result  # type: ignore[return-value]  # nothing failed

    @contextmanager
    def _random_kept(self) -> Iterator[None]:
        device = self.ranks.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield

    def _wait(self) -> None:
        if self.ranks.device.type == "cuda":
            torch.cuda.synchronize(self.ranks.device)

    def _free(self, way: Way) -> None:
        if way.compile:
            torch.compiler.reset()  # compiled code holds the network it was made for
        gc.collect()  # DeepSpeed's engine refers to itself
        if self.ranks.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.ranks.device)


def _in_words(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out of memory"
    return str(error) if isinstance(error, WayFailed) else one_line(f"{type(error).__name__}: {error}", 200)
