"""The memory that a step of training will take, or a window of prediction, and what to lower if it was too much.

    weights      float32; ZeRO 3: a shard, and all of them while they are gathered
    gradients    float32; ZeRO 2 and 3: a shard. ZeRO 0 on several ranks keeps their memory between steps
    optimizer    AdamW's two moments, float32; from ZeRO 1 on a shard of them, and a shard of the weights' copy
    buffers      from ZeRO 1 on the bucket in which gradients are reduced, allocated at once; on a GPU two of them
    activations  the peak of forward, loss and backward: what autograd saved and has not freed, the temporaries of the
                 current operation, and the gradients that exist by then
    volumes      prepared volumes that the GPU keeps
    batches      on a GPU, those on their way to a step: in the loader's buffers and in DALI, which allocates memory of
                 its own beside PyTorch

Gradients, optimizer and EMA are those of the trainable weights.

    total = weights + optimizer + buffers + EMA + volumes + batches + max(activations, gradients)

The peak comes just after the backward begins: nearly everything is still saved, and there are few gradients. It is not
modelled but measured: forward, loss and backward run once on fake tensors, which have shapes and no memory, and every
storage is counted from the operation that makes it until nothing refers to it. So autocast, the path that
`kernels.dispatch` takes and the order in which autograd frees are those of a real step. A second forward, with another
number of crops, separates what grows with the batch (activations) from what does not (autocast's copies of weights).
The lasting copies that stand for these on one rank take as much, and so do they and their gradients at the step's end.

Not included: cuDNN's workspaces, the allocator's fragments and the CUDA context, for which `HEADROOM` is kept; what
`torch.compile` saves by recomputing (with it the estimate is an upper bound); and, where PyTorch's compiled form of an
operation was measured faster than our kernel, that it saves less than the plain one counted here.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.config import Config
from engine.precision import LOW_PRECISION
from engine.ranks.distributed import Ranks
from engine.ranks.memory_limits import first_line, gb, peak_bytes
from engine.sharding import BUCKET_ELEMENTS
from engine.step import LossConfig, TrainConfig, training_loss
from models import parameter_count
from pipelines.loading.dali import gpu_bytes

FLOAT32 = 4
HEADROOM = 0.1
"""Share of the memory that `largest_batch` leaves to cuDNN's workspaces and the allocator's fragments."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a rank takes.

    Attributes:
        weights, gradients, optimizer, buffers, ema, volumes, batches: see the head of this file; 0 if there are none.
        saved: what autograd saves for the backward, without parameters.
        activations: peak of forward, loss and backward; each crop of the batch adds `activations_per_crop` to it.
        accumulates: gradients take memory during a forward: those of earlier passes, or buckets.
        crop: (C, X, Y, Z). train, world_size: what the estimate is for.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    ema: int
    volumes: int
    batches: int
    saved: int
    activations: int
    activations_per_crop: int
    accumulates: bool
    crop: tuple[int, ...]
    train: TrainConfig
    world_size: int

    @property
    def lasting(self) -> int:
        """What stays between steps."""
        return self.weights + self.optimizer + self.buffers + self.ema + self.volumes + self.batches

    @property
    def total(self) -> int:
        """Peak of a step."""
        if self.accumulates:
            return self.lasting + self.activations + self.gradients
        return self.lasting + max(self.activations, self.gradients)

    def largest_batch(self, limit: int) -> int:
        """Largest number of crops whose step fits into `limit` bytes minus `HEADROOM`; 0: not even one."""
        batches_per_crop = self.batches // self.train.batch_size
        room = math.floor(limit * (1 - HEADROOM)) - (self.lasting - self.batches)
        if self.gradients > room:
            return 0
        constant = self.activations - self.train.batch_size * self.activations_per_crop
        kept = self.gradients if self.accumulates else 0
        return max(0, (room - kept - constant) // (self.activations_per_crop + batches_per_crop))

    def describe(self, limit: int, device: str) -> str:
        """The line for the log; `limit` is the device's bytes, `device` its name."""
        sizes = {name: getattr(self, name.lower()) for name in ("weights", "gradients", "optimizer", "buffers", "EMA")}
        parts = [f"{name} {gb(size)}" for name, size in sizes.items() if size]
        parts.append(f"activations {gb(self.activations)} ({gb(self.activations_per_crop)} per crop)")
        parts += [f"{name} {gb(size)}" for name, size in (("volumes", self.volumes), ("batches", self.batches)) if size]
        fits = self.largest_batch(limit)
        advice = f"--train.batch_size up to {fits} would fit" if fits else "not even one crop would fit"
        return f"memory: {', '.join(parts)}; about {gb(self.total)} of {gb(limit)} on {device}: {advice}"


def estimate(
    model: torch.nn.Module,
    config: Config,
    channels: int,
    regions: Sequence[Sequence[int]],
    ranks: Ranks,
    volume_bytes: int = 0,
) -> MemoryEstimate:
    """What training will take on each rank. Takes about two seconds and no memory.

    Args:
        model: the network before DeepSpeed and `torch.compile` take it; on any device, "meta" too.
        config: of the run, with its precision. channels: of the images.
        regions: labels of each, as `dice_ce_loss` takes them.
        ranks: how many share the shards, and their device. volume_bytes: prepared volumes in its memory.
    """
    train, size, device = config.train, config.data.crop_size_voxels, ranks.device
    crop = (channels, *size)
    batch_size, stage = train.batch_size, train.zero_stage
    other_size = 1 if batch_size > 1 else 2
    step = partial(_simulate, model, crop, train.precision, config.loss, regions, device)
    saved, activations = step(batch_size, with_backward=True)
    other, _ = step(other_size, with_backward=False)
    saved_per_crop = (saved - other) // (batch_size - other_size)
    constant = saved - batch_size * saved_per_crop + activations.gradients
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) * FLOAT32
    weights = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model).values())
    shard = math.ceil(trained / ranks.world_size)
    all_shards = math.ceil(parameter_count(model) * FLOAT32 / ranks.world_size)  # frozen ones too
    keeps_buckets = stage == 0 and ranks.world_size > 1  # of DDP, whose buckets are the gradients' memory
    return MemoryEstimate(
        weights=weights + all_shards if stage == 3 else weights,
        gradients=shard if stage >= 2 else trained,
        optimizer=3 * shard if stage else 2 * trained,
        buffers=BUCKET_ELEMENTS * FLOAT32 * (2 if device.type == "cuda" else 1) if stage else 0,
        ema=(shard if stage == 3 else trained) if config.optim.ema_decay else 0,
        volumes=volume_bytes,
        batches=gpu_bytes(size, channels, batch_size) if device.type == "cuda" else 0,
        saved=saved,
        activations=activations.peak,
        activations_per_crop=(activations.peak - constant) // batch_size,
        accumulates=train.accumulate_steps > 1 or keeps_buckets,
        crop=crop,
        train=train,
        world_size=ranks.world_size,
    )


def _simulate(
    model: torch.nn.Module,
    crop: tuple[int, ...],
    precision: str,
    loss: LossConfig,
    regions: Sequence[Sequence[int]],
    device: torch.device,
    batch_size: int,
    with_backward: bool,
) -> tuple[int, LiveBytes]:
    """A step on fake tensors: the bytes that autograd saved, and what was live."""
    on_gpu, low = device.type == "cuda", LOW_PRECISION.get(precision)
    with FakeTensorMode(), torch.device(device), torch.compiler.set_stance("force_eager"):
        fakes = _fakes(model)
        dtype = torch.bfloat16 if on_gpu and precision == "bf16" else torch.float32  # as the loaders give it
        layout = torch.channels_last_3d if on_gpu else torch.contiguous_format
        image = torch.empty((batch_size, *crop), dtype=dtype).contiguous(memory_format=layout)
        labels = torch.empty((batch_size, *crop[1:]), dtype=torch.uint8)
        with LiveBytes(fakes.values()) as live, saved_bytes(fakes.values()) as saved:
            live.count(image)
            live.count(labels)
            with torch.autocast(device.type, low, enabled=low is not None):
                logits = torch.func.functional_call(model, fakes, (image,))
            result = training_loss(logits, labels, regions, loss).loss
            if with_backward:
                for parameter in fakes.values():
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(live.count_gradient)
                result.backward()
        return sum(saved.values()), live


def forward_bytes(network: torch.nn.Module, window: Sequence[int], channels: int) -> int:
    """Peak of a forward of one window without gradients: input, activations and logits, without weights and workspaces.

    Args:
        network: on any device. window: (X, Y, Z) in voxels. channels: of the float32 input.
    """
    device = next(network.parameters()).device
    with FakeTensorMode(), torch.device(device), torch.no_grad():
        fakes = _fakes(network)
        image = torch.empty((1, channels, *window))
        with LiveBytes(fakes.values()) as live:
            live.count(image)
            torch.func.functional_call(network, fakes, (image,))
    return live.peak


def _fakes(model: torch.nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers without memory, within a `FakeTensorMode`."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).requires_grad_(tensor.requires_grad)
        for name, tensor in _tensors(model).items()
    }


def _tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def out_of_memory_message(error: BaseException, estimate: MemoryEstimate, device: torch.device, limit: int) -> str:
    """What happened, what to lower and how far, the simplest first; `limit` is what the device has, in bytes."""
    train, fits = estimate.train, estimate.largest_batch(limit)
    if fits >= train.batch_size:  # there was less than `limit`, or something took more than estimated
        fits = train.batch_size // 2
    ways = []
    if fits:
        ways.append(f"--train.batch_size {fits}, with --train.accumulate_steps for the same number of crops a step")
    if train.cuda_graph is True:
        ways.append("--train.cuda_graph false, as a CUDA graph keeps the memory of a pass for itself")
    if train.precision in ("float32", "tf32"):
        ways.append("--train.precision bf16, whose activations take fewer bytes")
    smaller = _smaller_crop(estimate.crop[1:])
    if smaller:
        share = math.prod(smaller) / math.prod(estimate.crop[1:])
        size = ",".join(map(str, smaller))
        ways.append(f"--data.crop_size_voxels '[{size}]', which takes {share:.0%} of the activations")
    if train.zero_stage < 2 and estimate.world_size > 1:
        shared = estimate.optimizer + estimate.gradients
        spared = shared - math.ceil(shared / estimate.world_size)
        ways.append(f"--train.zero_stage 2, which saves about {gb(spared)} per rank")
    if estimate.volumes:
        ways.append(f"--data.residence mapped, which saves the {gb(estimate.volumes)} of volumes")
    advice = f"Try {'; or '.join(ways)}" if ways else "Nothing else can be lowered: use a device with more memory"
    return (
        f"out of memory on {device} ({first_line(error)}): {gb(peak_bytes(device))} were in use at the peak; "
        f"--train.batch_size {train.batch_size} at {train.precision} takes about {gb(estimate.total)} of "
        f"{gb(limit)}. {advice}"
    )


def _smaller_crop(size: Sequence[int]) -> tuple[int, ...] | None:
    """The crop with its longest axes a quarter shorter, a multiple of 16; None where that is below 32."""
    shorter = max(size) * 3 // 4 // 16 * 16
    return None if shorter < 32 else tuple(shorter if axis == max(size) else axis for axis in size)


@contextmanager
def saved_bytes(parameters: Iterable[Tensor]) -> Iterator[dict[int, int]]:
    """Within it, bytes that autograd saves are counted: by storage, without those of `parameters`."""
    known = {parameter.untyped_storage()._cdata for parameter in parameters}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield sizes


class LiveBytes(TorchDispatchMode):
    """Within it, bytes of the storages that operations make are counted, until nothing refers to them.

    Args:
        known: tensors that are not counted.

    Attributes:
        now, peak: bytes. gradients: those of the parameters' gradients at the peak.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self._gradients_now = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace != "prim":  # those only ask about a tensor
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.count(leaf)
        return out

    def count_gradient(self, parameter: Tensor) -> None:
        """A hook for `register_post_accumulate_grad_hook`."""
        self._gradients_now += parameter.numel() * parameter.element_size()

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        if self.now > self.peak:
            self.peak, self.gradients = self.now, self._gradients_now
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size
