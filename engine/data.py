"""From `--data.*` to prepared volumes: synthetic scans or a download if asked for, cases, split, store, loaders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from engine.ranks.distributed import Ranks, gather_on_node
from engine.step import TrainConfig
from pipelines.basics.errors import DataError
from pipelines.basics.machine import cache_dir
from pipelines.basics.option_values import MANY, MOST_SEED, number
from pipelines.basics.text import first_few
from pipelines.decathlon import TASK, download_task01
from pipelines.layouts.cases import CaseSet, find_cases, split_cases, survey_cases
from pipelines.layouts.labels import Release
from pipelines.loading.augment import Augment
from pipelines.loading.loader_options import CropOptions, LoaderOptions, Residence
from pipelines.loading.loaders import CropLoader, TrainLoader, ValLoader
from pipelines.loading.raw import resample_on_gpus
from pipelines.loading.raw_loader import RawLoader
from pipelines.phantom import FORMAT, make_phantoms
from pipelines.preparing.prepared_case import Resample, StoreDtype, resample_on_cpu
from pipelines.preparing.store import Store, prepare
from pipelines.scans.geometry import Spacing, SpacingAxes

log = logging.getLogger(__name__)
WORKERS_PER_GPU = 4  # that prepare scans: each takes 0.5 to 1 GB for its CUDA context, and mostly decodes


@dataclass
class PhantomConfig:
    """Synthetic scans, made if no `--data.root` is given."""

    cases: int = number(20, least=2, most=10_000)
    """Number of synthetic cases."""
    size_voxels: tuple[int, int, int] = number((240, 240, 155), least=16, most=512)
    """Voxels along each axis; the head always fills the field of view."""
    seed: int = number(0, least=0, most=MOST_SEED)
    """Seed of anatomy, tumours, contrast and noise."""


@dataclass
class DataConfig:
    """Which scans, which regions, and how they are cropped."""

    root: Path | None = None
    """A Decathlon task folder, a folder of BraTS cases, nnU-Net's raw folder, or a JSON or CSV list. None: synthetic
    scans."""
    download: bool = False
    """First download Decathlon Task01_BrainTumour (7.1 GB) to `root`; resumable, with a checksum."""
    release: Release | None = None
    """Label coding of the scans, if their file names don't show it."""
    regions: Literal["release", "tutorial"] = "release"
    """TC, WT and ET by the release's coding, or by the published tutorial's swapped one (Decathlon only)."""
    modalities: list[str] | None = None
    """Channels of the network in order, out of flair, t1, t1c, t2; e.g. flair,t1c. None: all that the scans have."""
    val_fraction: float = number(0.2, least=0, below=1)
    """Fraction of the cases held out, chosen as MONAI's DecathlonDataset does."""
    split_seed: int = number(0, least=0, most=MOST_SEED)
    """Seed of that split."""
    train_cases: list[str] | None = None
    """Names of the training cases, instead of a split."""
    val_cases: list[str] | None = None
    """Names of the validation cases, instead of a split."""
    folds: int = number(0, least=0, most=MANY)
    """Split into this many folds by `split_seed`, each case validating in one of them. 0: split by `val_fraction`."""
    fold: int | None = number(None, least=0, most=MANY)
    """The fold that validates, from 0; the others train."""
    spacing_mm: tuple[float, float, float] = number((1.5, 1.5, 2.0), least=0.1, most=100)
    """Voxel size of the prepared volumes in mm, along the patient's axes R, A and S."""
    spacing_axes: SpacingAxes = "patient"
    """patient: `spacing_mm` is R, A, S, however a file stores its axes; file: its first, second and third axis, as in
    MONAI and the published tutorial. The same for files with their axes in this order, such as those of BraTS."""
    crop_size_voxels: tuple[int, int, int] = number((128, 128, 64), least=1, most=2048)
    """Size of the training crops, and of the network's input."""
    crops_per_case: int = number(1, least=1, most=MANY)
    """Crops drawn from each case per epoch."""
    foreground_prob: float = number(0.0, least=0, most=1)
    """Fraction of the crops centred on a tumour voxel; 0: crops are uniform, as in the tutorial."""
    pad: bool = False
    """Pad volumes smaller than the crop with zeros, instead of refusing them."""
    store_dir: Path | None = None
    """Folder of the prepared volumes. None: below `$GLIOFORGE_CACHE`, else `~/.cache/glioforge`."""
    store_dtype: StoreDtype = "float32"
    """Of images on disk and in memory; float16 halves the bytes and changes no voxel by more than 0.05 %."""
    residence: Residence = "auto"
    """Where volumes are during training: gpu, pinned (page-locked memory) or mapped (the store's files, through the
    page cache); auto: the first of these that fits; on a CPU, mapped."""
    skip_faulty: bool = False
    """Skip cases that can't be read, with a warning for each, instead of stopping."""
    workers: int | None = number(None, least=1, most=1024)
    """Processes that prepare volumes. None: one per core, if that is faster. On GPUs at most four for each."""
    augment: Augment = field(default_factory=Augment)
    """Extra augmentations besides flip, scale and shift; all off."""
    prepare_on: Literal["cpu", "gpu"] = "cpu"
    """gpu: resample scans by DALI on the GPUs that this process sees, in turn."""
    unprepared: bool = False
    """Prepare only the validation cases, and make training crops from the scans at each step: nothing to store, but
    every step decodes scans."""
    phantom: PhantomConfig = field(default_factory=PhantomConfig)
    """Synthetic scans."""

    @property
    def spacing(self) -> Spacing:
        """`spacing_mm` along `spacing_axes`."""
        return Spacing(self.spacing_mm, self.spacing_axes)


@dataclass(frozen=True)
class Data:
    """Prepared volumes, and the names of the cases to train on and to validate on.

    Attributes:
        store: all cases; with `--data.unprepared` those to validate on.
        train, val: names.
        scans: with `--data.unprepared` all cases, whose scans training crops are made from at each step.
    """

    store: Store
    train: tuple[str, ...]
    val: tuple[str, ...]
    scans: CaseSet | None = None


def obtain_root(config: DataConfig) -> Path:
    """Folder or list of the scans, downloaded or synthesised first if the configuration asks for it."""
    phantom = config.phantom
    if config.root is None:
        log.info("no --data.root: synthetic scans")
        return make_phantoms(_phantoms(config), phantom.cases, phantom.size_voxels, phantom.seed)
    if config.download:
        return download_task01(config.root.parent if config.root.name == TASK else config.root)
    return config.root


def existing_root(config: DataConfig) -> Path:
    """Folder or list of the scans; makes and downloads nothing, as the configuration may be somebody else's.

    Raises:
        DataError: synthetic scans that are not in the cache.
    """
    root = config.root or _phantoms(config)
    if config.root is None and not root.is_dir():
        raise DataError(f"the run's synthetic scans are no longer in the cache ({root}): give other scans")
    return root


def _phantoms(config: DataConfig) -> Path:
    phantom = config.phantom
    size = "x".join(map(str, phantom.size_voxels))
    return cache_dir() / "phantoms" / f"{phantom.cases}-cases-{size}-seed-{phantom.seed}-format-{FORMAT}"


def list_cases(config: DataConfig, root: Path) -> CaseSet:
    """The cases below `root` that the configuration asks for, with `skip_faulty` only those without a fault."""
    if not config.skip_faulty:
        return find_cases(root, config.release, config.modalities, config.regions)
    survey = survey_cases(root, config.release, config.modalities, config.regions)
    for fault in survey.faults:
        log.warning("skipped: %s", fault)
    if not survey.usable.cases:
        raise DataError(f"{root}: all {survey.total} cases are faulty")
    return survey.usable


def split_names(config: DataConfig, cases: CaseSet) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the cases to train on and of those to validate on; errors as in `split_cases`."""
    named = config.train_cases, config.val_cases
    return split_cases(cases, config.val_fraction, config.split_seed, *named, config.folds, config.fold)


def prepared(config: DataConfig, cases: CaseSet) -> Store:
    """The store of these cases, after preparing those it lacks; with `skip_faulty` without the faulty ones.

    Raises:
        ValueError: as `prepare`; `prepare_on` "gpu" where PyTorch sees none.
    """
    folder = config.store_dir or cache_dir() / "store"
    resample, most_workers = _resampling(config)
    options = config.spacing, config.workers, config.store_dtype, config.skip_faulty
    return prepare(cases, folder, *options, resample, most_workers)


def _resampling(config: DataConfig) -> tuple[Resample, int | None]:
    """How images are resampled, and the largest number of processes that do it."""
    if config.prepare_on == "cpu":
        return resample_on_cpu, None
    gpus = torch.cuda.device_count()
    if not gpus:
        raise DataError("--data.prepare_on gpu: PyTorch sees no GPU here; use --data.prepare_on cpu")
    most = gpus * WORKERS_PER_GPU
    on = f"{gpus} GPUs in turn" if gpus > 1 else "the GPU"
    log.info("scans are resampled on %s, by at most %d processes (%d for each GPU)", on, most, WORKERS_PER_GPU)
    return partial(resample_on_gpus, gpus), most


def load_data(config: DataConfig) -> Data:
    """Everything up to prepared volumes; cases that are already prepared are reused.

    Raises:
        ValueError: whatever is wrong with the scans or the options.
    """
    cases = list_cases(config, obtain_root(config))
    train, val = split_names(config, cases)
    _log_sizes(cases, train, val)
    if config.unprepared:
        if not val:
            raise DataError("--data.unprepared true needs a case to validate on: see --data.val_fraction")
        return Data(prepared(config, cases.select(val)), train, val, cases)
    store = prepared(config, cases.select([name for name in cases.names if name in {*train, *val}]))
    train, val = (tuple(name for name in names if name in store.names) for names in (train, val))
    if not train:
        raise DataError("every training case is faulty and was skipped (--data.skip_faulty): nothing to train on")
    for use, names in (("train on", train), ("validate on", val)):
        _warn_without_tumour(store, names, use)
    return Data(store, train, val)


def _log_sizes(cases: CaseSet, train: Sequence[str], val: Sequence[str]) -> None:
    """Log the number of cases to train and to validate on, and of patients where some have several."""
    patient_of = {name: patient for patient, names in cases.patients.items() for name in names}
    if len(cases.patients) == len(patient_of):
        log.info("%d cases: %d to train on, %d to validate on", len(patient_of), len(train), len(val))
        return
    counts = [(len(names), len({patient_of[name] for name in names})) for names in (patient_of, train, val)]
    texts = (f"{cases} cases of {patients} patients" for cases, patients in counts)
    log.info("%s: %s to train on, %s to validate on", *texts)


def _warn_without_tumour(store: Store, names: Sequence[str], use: str) -> None:
    """Warn of cases whose label has no tumour."""
    empty = [name for name in names if not store.has_tumour(store.index(name))]
    if empty and len(empty) == len(names):
        log.warning("none of the %d cases to %s has a tumour in its label: check the labels", len(names), use)
    elif empty:
        log.warning(
            "%d of %d cases to %s have no tumour in their label: %s", len(empty), len(names), use, first_few(empty)
        )


def make_loaders(
    config: DataConfig, train: TrainConfig, ranks: Ranks, data: Data
) -> tuple[CropLoader, ValLoader | None]:
    """This rank's training crops, and its validation cases if there are any. Errors as in the loaders."""
    crops = CropOptions(
        config.crop_size_voxels,
        train.batch_size,
        train.seed,
        config.crops_per_case,
        train.accumulate_steps,
        config.foreground_prob,
        extras=config.augment,
    )
    # Autocast rounds the input of the first convolutions anyway: in bfloat16 half the bytes are moved.
    in_bf16 = ranks.device.type == "cuda" and train.precision == "bf16"
    options = replace(_loader_options(config, ranks.device, ranks), dtype=torch.bfloat16 if in_bf16 else torch.float32)
    train_loader = (
        TrainLoader(data.store, data.train, crops, options)
        if data.scans is None
        else RawLoader(data.scans, data.train, crops, options, spacing=config.spacing)
    )
    if not data.val:
        return train_loader, None
    return train_loader, make_val_loader(config, train.validation, data.store, data.val, ranks.device, ranks)


def make_val_loader(
    config: DataConfig,
    validation: str,
    store: Store,
    names: Sequence[str],
    device: torch.device,
    ranks: Ranks | None = None,
) -> ValLoader:
    """Named cases of a store on a device: by `validation` the centre crop, z-scored, or the full volume as it is.

    Args:
        validation: `--train.validation`.
        ranks: share the cases among them, loaded to where `--data.residence` says; None: all cases, mapped.

    Raises:
        ValueError: as the loader.
    """
    full = validation == "full_volume"
    size = None if full else config.crop_size_voxels
    return ValLoader(store, names, size, _loader_options(config, device, ranks), normalise=not full)


def _loader_options(config: DataConfig, device: torch.device, ranks: Ranks | None) -> LoaderOptions:
    # A GPU's convolutions want the channels last in memory, a CPU's first.
    memory_format = torch.channels_last_3d if device.type == "cuda" else torch.contiguous_format
    share, residence = (ranks, config.residence) if ranks else (Ranks(0, 1, 0, device), "mapped")
    return LoaderOptions(device, rank=share.rank, world_size=share.world_size, ranks_on_node=share.ranks_on_node,
                         gather_on_node=partial(gather_on_node, ranks=share), pad=config.pad, residence=residence,
                         memory_format=memory_format)  # fmt: skip
