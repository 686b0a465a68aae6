"""The two training loops that `bench_train` compares, and how one is put under the clock.

`Ours` is the trainer of this engine. `Plain` is the published tutorial's loop over the same network: MONAI's
transforms, a DataLoader with two workers, DiceCELoss, AdamW, cuDNN's search on, and the loss read at each step. Both
have `batches`, endless and on the device, and `step`.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from monai.data import CacheDataset, DataLoader, Dataset
from monai.losses import DiceCELoss
from torch import Tensor, nn

from benchmarks.common import DEVICE, IS_GPU, synchronize
from benchmarks.monai_chain import case_to_dict, seed_transforms
from benchmarks.report import OURS
from benchmarks.step_profile import allocated_peak
from engine.config import Config
from engine.data import Data, DataConfig
from engine.network import ModelConfig, make_model
from engine.precision import set_up_torch
from engine.ranks.distributed import Ranks
from engine.step import LossConfig, TrainConfig
from engine.trainer import Trainer
from models import NETWORKS
from pipelines.basics.machine import cache_dir
from pipelines.layouts.cases import CaseSet, find_cases
from pipelines.preparing.store import prepare

BATCH = 2
WORKERS = 2
WARM_STEPS = 5
"""Before the clock starts: as many batches as lie ready in a DataLoader of two workers, and one."""
LEAST_STEPS = 3
SECONDS = 2.0 if IS_GPU else 1.0
"""A measurement takes this long, and at least `LEAST_STEPS` steps."""


@dataclass(frozen=True)
class Size:
    """Crop in voxels, and widths of the network where they are not the reference's own."""

    crop: tuple[int, int, int]
    widths: dict[str, int] = field(default_factory=dict)


FULL = Size((128, 128, 64))
SMALL = Size((48, 48, 32), {"feature_size": 8, "hidden_size": 96, "mlp_dim": 192, "num_heads": 4})


@dataclass(frozen=True)
class Scene:
    """One network, its size, and cases for it: prepared for us, as files for MONAI."""

    model: str
    size: Size
    cases: CaseSet
    data: Data
    ranks: Ranks

    @classmethod
    def of(cls, model: str, size: Size, root: Path, ranks: Ranks) -> Scene:
        """With the cases below `root`, all to train on."""
        cases = find_cases(root)
        store = prepare(cases, cache_dir() / "store")
        widths = {name: width for name, width in size.widths.items() if name in NETWORKS[model].widths}
        return cls(model, Size(size.crop, widths), cases, Data(store, store.names, ()), ranks)

    @cached_property
    def cached(self) -> CacheDataset:
        """MONAI's chain with everything that is not random done and kept."""
        data = [case_to_dict(case) for case in self.cases.cases]
        return CacheDataset(data, seed_transforms(self.cases.coding, self.size.crop), progress=False, num_workers=None)


@dataclass(frozen=True)
class LoopVariant:
    """One way to train.

    Fields:
        name: begins with ours or "plain". precision: as `--train.precision`; "tf32" of the plain loop are PyTorch's
            defaults. compiled, graphed: torch.compile (the plain loop also channels last), CUDA graphs.
        from_files: without a cache.
    """

    name: str
    precision: str = "float32"
    compiled: bool = False
    graphed: bool = False
    from_files: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.startswith(OURS)


def plain_network(scene: Scene) -> nn.Module:
    """The reference of `--model`, as its package makes it.

    Raises:
        ValueError: there is none, or its package is not installed.
    """
    network = NETWORKS[scene.model]
    reference = network.reference
    if reference is None:
        raise ValueError(f"--model {scene.model}: no other package has it, so there is nothing to compare with")
    module, name = reference.class_name.rsplit(".", 1)
    if reference.package == "self_attention_cv":
        _import_self_attention_cv()
    widths = {**network.widths, **scene.size.widths}
    arguments = reference.arguments(len(scene.data.store.modalities), 3, scene.size.crop, widths)
    return getattr(importlib.import_module(module), name)(**arguments)


def _import_self_attention_cv() -> None:
    """The package imports torchvision for one ResNet that UNETR does not use."""
    if importlib.util.find_spec("self_attention_cv") is None:
        raise ValueError(
            "this network's reference needs self-attention-cv: pip install --no-deps self-attention-cv==1.2.3"
        )
    stand_in = ModuleType("torchvision.models")
    stand_in.resnet50 = None  # type: ignore[attr-defined]
    stubs = {} if importlib.util.find_spec("torchvision") else {"torchvision": ModuleType("torchvision")}
    with mock.patch.dict(sys.modules, {**stubs, "torchvision.models": stand_in}):
        importlib.import_module("self_attention_cv.UnetTr")
        loaded = {name: module for name, module in sys.modules.items() if name.startswith("self_attention_cv")}
    sys.modules.update(loaded)  # also for torch.compile, which looks modules up by name


# ---------- the two loops


class Ours:
    """The trainer of this engine."""

    def __init__(self, scene: Scene, variant: LoopVariant, batch: int) -> None:
        ways: dict[str, Any] = {"compile": variant.compiled, "cuda_graph": variant.graphed}
        options: dict[str, Any] = {"precision": variant.precision, **ways}  # nothing is left to the engine
        config = Config(
            data=DataConfig(crop_size_voxels=scene.size.crop, crops_per_case=1000),
            model=ModelConfig(scene.model, **scene.size.widths),
            loss=LossConfig(ce="multihot"),  # MONAI's own
            train=TrainConfig(batch_size=batch, **options),
            run_dir=cache_dir() / "benchmark",  # nothing is saved
        )
        network = make_model(config.model, config.data.crop_size_voxels, len(scene.data.store.modalities))
        set_up_torch(config.train.precision, config.train.deterministic)
        self.trainer = Trainer(config, scene.ranks, scene.data, network)
        self.step = self.trainer.step
        self.network: nn.Module = self.step.model
        self.batches = (batch for epoch in count() for batch in self.trainer.train_loader.epoch(epoch))

    def rest(self) -> None:
        """DALI stops by itself when enough batches lie ready."""


class Plain:
    """The tutorial's loop."""

    def __init__(self, scene: Scene, variant: LoopVariant, batch: int) -> None:
        torch.backends.cudnn.benchmark = True
        self.variant = variant
        self.format = torch.channels_last_3d if variant.compiled else torch.contiguous_format
        self.network = plain_network(scene).to(DEVICE)
        self.network.to(memory_format=self.format)  # type: ignore[call-overload]
        self.forward = torch.compile(self.network, dynamic=False) if variant.compiled else self.network
        self.loss = DiceCELoss(to_onehot_y=False, sigmoid=True)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4, weight_decay=1e-5)
        self.epoch_loss = 0.0
        self.start = partial(self._batches, scene, batch)
        self.batches = self.start()

    def rest(self) -> None:
        """Stop the workers, which would keep loading during the steps; they restart when a batch is asked for."""
        self.batches.close()
        self.batches = self.start()

    def step(self, image: Tensor, target: Tensor) -> None:
        """Image (B, C, X, Y, Z) and regions (B, 3, X, Y, Z), float32."""
        self.optimizer.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.variant.precision == "bf16"):
            loss = self.loss(self.forward(image), target)
        loss.backward()
        self.optimizer.step()
        self.epoch_loss += loss.item()

    def _batches(self, scene: Scene, batch: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        if self.variant.from_files:
            data = [case_to_dict(case) for case in scene.cases.cases]
            one: Any = Dataset(data, seed_transforms(scene.cases.coding, scene.size.crop))
        else:
            one = scene.cached
        # Many epochs as one, so that none ends under the clock.
        dataset: Any = torch.utils.data.ConcatDataset([one] * 1000)
        options = {"num_workers": WORKERS, "timeout": 300 if WORKERS else 0}
        loader = DataLoader(dataset, batch_size=batch, shuffle=True, pin_memory=IS_GPU, **options)
        for content in loader:
            image, target = (content[key].as_tensor().to(DEVICE, non_blocking=True) for key in ("image", "label"))
            yield image.contiguous(memory_format=self.format), target


# ---------- one variant under the clock


class Timed:
    """A variant, built and warm.

    Attributes:
        batch: on the device. peak_bytes: of a step.
    """

    def __init__(self, scene: Scene, variant: LoopVariant, batch_size: int = BATCH) -> None:
        self.variant = variant
        _apply(DEFAULTS)
        before = torch.cuda.memory_allocated() if IS_GPU else 0
        self.loop = (Ours if variant.is_ours else Plain)(scene, variant, batch_size)
        self.flags = _flags()
        self.batch = next(self.loop.batches)
        self.loop.rest()
        _reset_peak()
        for _ in range(WARM_STEPS):
            self.step()
        self.peak_bytes = self._peak(before)

    def step(self) -> None:
        """One step on the batch that is there."""
        self.loop.step(*self.batch)

    def step_seconds(self) -> float:
        """Of a step alone."""
        with self.own_flags():
            return seconds(self.step)

    def loop_seconds(self) -> float:
        """Of a step with its loading."""
        with self.own_flags():
            for _ in range(WARM_STEPS):
                self._load_and_step()
            result = seconds(self._load_and_step)
        self.loop.rest()
        return result

    @contextmanager
    def own_flags(self) -> Iterator[None]:
        """TF32 and cuDNN as this variant set them."""
        before = _flags()
        _apply(self.flags)
        try:
            yield
        finally:
            _apply(before)

    def _load_and_step(self) -> None:
        self.loop.step(*next(self.loop.batches))

    def _peak(self, before: int) -> int:
        if not IS_GPU:
            return held(self.loop.network) + allocated_peak(self.step)
        if (
            not self.variant.graphed
        ):  # the pool of a graph is in use while it is recorded, a search's workspace never again
            _reset_peak()
            self.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def seconds(step: Callable[[], Any]) -> float:
    """Seconds of a step over `SECONDS`, for which the first few stand as a measure."""
    estimate = timed(step, 2)
    return timed(step, max(LEAST_STEPS, math.ceil(SECONDS / estimate)))


def timed(step: Callable[[], Any], steps: int) -> float:
    synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize()
    return (time.perf_counter() - started) / steps


def _reset_peak() -> None:
    if IS_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _flags() -> tuple[Any, ...]:
    cudnn = torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic


def _apply(flags: tuple[Any, ...]) -> None:
    cudnn = torch.backends.cudnn
    torch.set_float32_matmul_precision(flags[0])
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = flags[1:]


DEFAULTS = _flags()


def free() -> None:
    """Give back what a variant that is gone held."""
    gc.collect()
    torch.compiler.reset()  # compiled code holds the network it was made for
    if IS_GPU:
        torch.cuda.empty_cache()


def held(network: nn.Module) -> int:
    """Bytes of weights, their gradients as they are, and two moments each."""
    return sum(3 * p.nbytes + (p.grad.nbytes if p.grad is not None else 0) for p in network.parameters())
