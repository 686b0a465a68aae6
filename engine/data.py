"""From `--data.*` to prepared volumes: synthetic scans or a download where asked for, cases, split, store."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import Config, DataConfig
from engine.ranks.distributed import Ranks
from pipelines.basics.home import cache_dir
from pipelines.cases import CaseSet, DataError, find_cases, split_cases, survey_cases
from pipelines.decathlon import download_task01
from pipelines.layouts.names import some
from pipelines.loaders import CropLoader, TrainLoader, ValLoader
from pipelines.phantom import FORMAT, make_phantoms
from pipelines.raw_loader import RawLoader
from pipelines.store import Store, prepare

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """Prepared volumes, and the names of the cases to train on and to validate on.

    Attributes:
        store: all cases; with `--data.unprepared` those to validate on.
        train, val: names.
        scans: where training crops are made from the scans at each step, those of all cases.
    """

    store: Store
    train: tuple[str, ...]
    val: tuple[str, ...]
    scans: CaseSet | None = None


def obtain_root(config: DataConfig) -> Path:
    """Folder or list of the scans; downloads or synthesises them first where the configuration says so."""
    if config.root is None:
        phantom = config.phantom
        log.info("no --data.root: synthetic scans")
        return make_phantoms(_phantoms(config), phantom.cases, phantom.size_voxels, phantom.seed)
    if config.download:
        return download_task01(config.root.parent if config.root.name == "Task01_BrainTumour" else config.root)
    return config.root


def existing_root(config: DataConfig) -> Path:
    """Folder or list of the scans, of which nothing is made or fetched: the configuration may be somebody else's.

    Raises:
        DataError: synthetic scans that are not in the cache.
    """
    root = config.root or _phantoms(config)
    if config.root is None and not root.is_dir():
        raise DataError(f"the run's synthetic scans are not in the cache any more ({root}): give other scans")
    return root


def _phantoms(config: DataConfig) -> Path:
    phantom = config.phantom
    size = "x".join(map(str, phantom.size_voxels))
    return cache_dir() / "phantoms" / f"{phantom.cases}-cases-{size}-seed-{phantom.seed}-format-{FORMAT}"


def list_cases(config: DataConfig, root: Path) -> CaseSet:
    """The cases below `root` that the configuration asks for; with `skip_faulty` those without a fault."""
    if not config.skip_faulty:
        return find_cases(root, config.release, config.modalities, config.regions)
    survey = survey_cases(root, config.release, config.modalities, config.regions)
    for fault in survey.faults:
        log.warning("left out: %s", fault)
    if not survey.usable.cases:
        raise DataError(f"{root}: each of its {survey.total} cases has a fault")
    return survey.usable


def split_names(config: DataConfig, cases: CaseSet) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the cases to train on and of those to validate on; errors as in `split_cases`."""
    named = config.train_cases, config.val_cases
    return split_cases(cases, config.val_fraction, config.split_seed, *named, config.folds, config.fold)


def prepared(config: DataConfig, cases: CaseSet) -> Store:
    """The store of these cases; what it lacks is prepared. With `skip_faulty` of those that could be."""
    folder = config.store_dir or cache_dir() / "store"
    return prepare(
        cases, folder, config.spacing, config.workers, config.store_dtype, config.skip_faulty, config.prepare_on
    )


def load_data(config: DataConfig) -> Data:
    """Everything up to prepared volumes; finds it done where another process did it.

    Raises:
        ValueError: whatever is wrong with the scans or the options.
    """
    cases = list_cases(config, obtain_root(config))
    train, val = split_names(config, cases)
    _say_sizes(cases, train, val)
    if config.unprepared:
        if not val:
            raise DataError("--data.unprepared true needs a case to validate on: see --data.val_fraction")
        return Data(prepared(config, cases.select(val)), train, val, cases)
    store = prepared(config, cases.select([name for name in cases.names if name in {*train, *val}]))
    train, val = (tuple(name for name in names if name in store.names) for names in (train, val))
    if not train:
        raise DataError("every training case has a fault and was left out (--data.skip_faulty): nothing to train on")
    for use, names in (("train on", train), ("validate on", val)):
        _say_tumours(store, names, use)
    return Data(store, train, val)


def _say_sizes(cases: CaseSet, train: Sequence[str], val: Sequence[str]) -> None:
    """How many patients and cases there are, and how many of each on either side."""
    patient_of = {name: patient for patient, names in cases.patients.items() for name in names}
    counts = [(len({patient_of[name] for name in names}), len(names)) for names in (patient_of, train, val)]
    if counts[0][0] == counts[0][1]:
        log.info("%d cases: %d to train on, %d to validate on", *(cases for _, cases in counts))
        return
    total, trained, validated = (f"{cases} cases of {patients} patients" for patients, cases in counts)
    log.info("%s: %s to train on, %s to validate on", total, trained, validated)


def _say_tumours(store: Store, names: Sequence[str], use: str) -> None:
    """Warn of cases whose label has no tumour."""
    empty = [name for name in names if not store.has_tumour(store.index(name))]
    if empty and len(empty) == len(names):
        log.warning("none of the %d cases to %s has a tumour in its label: check the labels", len(names), use)
    elif empty:
        log.warning("%d of %d cases to %s have no tumour in their label: %s", len(empty), len(names), use, some(empty))


def make_loaders(config: Config, ranks: Ranks, data: Data) -> tuple[CropLoader, ValLoader | None]:
    """This rank's training crops, and its validation cases where there are any.

    Raises:
        ValueError: as the loaders say.
    """
    settings = config.data
    crops: dict[str, Any] = {
        "names": data.train,
        "crop_size": settings.crop_size_voxels,
        "batch_size": config.train.batch_size,
        "accumulate_steps": config.train.accumulate_steps,
        "seed": config.train.seed,
        "crops_per_case": settings.crops_per_case,
        "foreground_prob": settings.foreground_prob,
        "extras": settings.augment,
        # Autocast rounds the input of the first convolutions in any case; so half the bytes come.
        "dtype": torch.bfloat16 if ranks.device.type == "cuda" and config.train.precision == "bf16" else torch.float32,
        "rank": ranks.rank,
        "world_size": ranks.world_size,
        **_placed(settings, ranks.device),
    }
    train: CropLoader
    if data.scans is None:
        crops |= {"residence": settings.residence, "ranks_on_node": ranks.ranks_on_node}
        train = TrainLoader(data.store, **crops)
    else:
        train = RawLoader(data.scans, spacing=settings.spacing, **crops)
    if not data.val:
        return train, None
    shard = {"rank": ranks.rank, "world_size": ranks.world_size, "ranks_on_node": ranks.ranks_on_node}
    return train, make_val_loader(config, data.store, data.val, ranks.device, residence=settings.residence, **shard)


def make_val_loader(
    config: Config, store: Store, names: Sequence[str], device: torch.device, **options: Any
) -> ValLoader:
    """Named cases as the configuration validates them: the centre crop, z-scored, or the full volume as it is.

    `options` are a rank's place, and where its volumes are, as `ValLoader` takes them.

    Raises:
        ValueError: as the loader says.
    """
    full = config.train.validation == "full_volume"
    size = None if full else config.data.crop_size_voxels
    placed = _placed(config.data, device)
    return ValLoader(store, names, size, normalise=not full, **placed, **options)


def _placed(config: DataConfig, device: torch.device) -> dict[str, Any]:
    """Options of all loaders: where their batches are, and how they lie in memory."""
    on_gpu = device.type == "cuda"
    return {
        "device": "gpu" if on_gpu else "cpu",
        "device_id": device.index,
        "pad": config.pad,
        # A GPU's convolutions want the channels last in memory, a CPU's first.
        "memory_format": torch.channels_last_3d if on_gpu else torch.contiguous_format,
    }
