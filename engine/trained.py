"""Trained networks, as a run left them.

A weights file (`checkpoints/best.pt`, `last.pt`) says with its weights what they are for: the configuration, the
modalities and their order, the spacing, and what the label values of its training data mean. So nothing has to be
repeated, or can be mistaken, where a network is used.

A file may come from anybody. No code in it is run, each of its values is checked before anything is made by it, and of
its configuration only what describes the network and its scans is used: nothing that downloads, makes or writes files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import load_weights
from engine.config import Config, config_from_dict
from engine.data import DataConfig
from engine.network import make_model
from engine.step import TrainConfig
from pipelines.basics.option_values import shown
from pipelines.basics.text import first_few, one_line
from pipelines.decathlon import TASK
from pipelines.labels import CODINGS, ENHANCING, OEDEMA, REGIONS, TUTORIAL, Coding
from pipelines.layouts.names import canonical_modalities

NOT_DESCRIBING = ("download", "store_dir", "store_dtype", "residence", "workers", "prepare_on", "unprepared", "augment")
"""Options of `--data` that say how volumes are made and kept, not what the scans are."""
DESCRIBING = ("precision", "validation")
"""Options of `--train` that say how the network is run."""
PLAIN_NAME = re.compile("[A-Za-z0-9_]{1,64}")
_ODD = (ArithmeticError, AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Trained:
    """A trained network and all that belongs to it.

    Attributes:
        path: the weights file.
        network: in evaluation mode; float32 (N, C, X, Y, Z) of `config.data.crop_size_voxels` to logits (N, 3, ...).
        config: what of the run's describes network and scans; the rest is as by default.
        modalities: of the C channels, in order.
        coding: of the labels that it was trained on.
        epoch: after which the weights were taken.
        validation: Dice then, as in `metrics.json`.
        scans: what its training scans look like, see `pipelines.domain_shift`.
    """

    path: Path
    network: torch.nn.Module
    config: Config
    modalities: tuple[str, ...]
    coding: Coding
    epoch: int
    validation: dict[str, Any]
    scans: dict[str, Any]


def weights_path(run: Path) -> Path:
    """The weights that a run is known by: `checkpoints/best.pt`, else `last.pt`; a file is taken as it is.

    Raises:
        ValueError: there is neither.
    """
    if run.is_file():
        return run
    for path in (run / "checkpoints" / name for name in ("best.pt", "last.pt")):
        if path.is_file():
            return path
    raise ValueError(f"{run} is no run with weights (checkpoints/best.pt, last.pt), nor a weights file")


def load_trained(run: Path | str, device: torch.device | str = "cpu") -> Trained:
    """A trained network, on a device, ready to be used. No code from the file is run.

    Args:
        run: a run's folder, of which the best weights are taken, or a weights file.
        device: where the network goes.

    Raises:
        ValueError: no weights there, a damaged file, another program's, or one of a version that knew other options;
            weights of another network, or that are no numbers.
    """
    path = weights_path(Path(run))
    content = load_weights(path)
    try:
        config = describing(config_from_dict(content["config"]))
        modalities = canonical_modalities(_texts(content["modalities"]))
        coding = _coding(content["release"], content["tissues"], content["regions"])
        with torch.device("meta"):  # whatever sizes the file names, nothing is made of them before its weights fit
            network = make_model(config.model, config.data.crop_size_voxels, len(modalities))
        epoch, validation = _count(content["epoch"]), _numbers(content["validation"])
        scans = _ranges(content["scans"], len(modalities))
        fault = misfit(network, content["weights"])
    except _ODD as error:
        reason = one_line(f"it has no {error}" if isinstance(error, KeyError) else error, 300)
        raise ValueError(
            f"{path} was written by another version of this program: {reason}; update this one, or use that one"
        ) from error
    if fault:
        raise ValueError(
            f"{path} holds the weights of another network than its configuration, {config.model.name}: {fault}; take a "
            "file as a run wrote it"
        )
    network.load_state_dict({name: value.float().contiguous() for name, value in content["weights"].items()},
                            assign=True)  # fmt: skip
    broken = [name for name, value in network.state_dict().items() if not value.isfinite().all()]
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} of its tensors hold NaN or Inf ({first_few(broken, 1)}), and so would its "
            "segmentations: take weights of an earlier epoch, or train again"
        )
    network.to(device).eval()
    return Trained(path, network, config, modalities, coding, epoch, validation, scans)


def describing(config: Config) -> Config:
    """What a configuration says of a network and its scans; the rest as it is by default.

    Nothing of it makes or writes files: scans are where they were downloaded to.
    """
    given, usual = config.data, DataConfig()
    data = replace(given, **{name: getattr(usual, name) for name in NOT_DESCRIBING})
    if given.download and given.root is not None and given.root.name != TASK:
        data.root = given.root / TASK
    train = TrainConfig(**{name: getattr(config.train, name) for name in DESCRIBING})
    return Config(data=data, model=config.model, train=train)


def _texts(values: Any) -> list[str]:
    if not isinstance(values, list | tuple) or not all(isinstance(value, str) for value in values):
        raise ValueError("its modalities are not a list of names")
    return list(values)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError("its epoch is not a whole number, 0 or more")
    return value


def _numbers(values: Any, depth: int = 2) -> dict[str, Any]:
    """Numbers by plain names, possibly in groups; a bundle shows both to MONAI, to which `$` begins code."""
    if not isinstance(values, dict):
        raise ValueError("its validation is not numbers by name")
    for name, value in values.items():
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise ValueError("its validation has a name with other characters than letters, digits and _")
        if isinstance(value, dict) and depth > 1:
            _numbers(value, depth - 1)
        elif value is not None and not _is_number(value):
            raise ValueError(f"{name} of its validation is not a number")
    return values


def _ranges(scans: Any, channels: int) -> dict[str, list[list[float]]]:
    """What `pipelines.domain_shift.looks_of_store` found, or nothing."""
    lengths = {"spacing_mm": 3, "occupied": channels, "contrast": channels} if scans else {}
    if not isinstance(scans, dict) or any(len(scans[name]) != length for name, length in lengths.items()):
        raise ValueError("its scans are not ranges of numbers by name")
    for name, spans in scans.items():
        if not all(len(span) == 2 and all(map(_is_number, span)) for span in spans):
            raise ValueError(f"the {name} of its scans are not ranges of numbers")
    return scans


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _coding(release: Any, tissues: Any, regions: Any) -> Coding:
    names = {int(value): tissue for value, tissue in tissues.items()}
    known = {tissue for coding in CODINGS.values() for tissue in coding.tissues.values()}
    if release not in (*CODINGS, TUTORIAL) or not {OEDEMA, ENHANCING} <= set(names.values()) <= known:
        raise ValueError("it names a release or tissues that this version does not know")
    if not isinstance(regions, list | tuple) or len(regions) != len(REGIONS):
        raise ValueError(f"its regions are {shown(regions)}, must be the labels of {', '.join(REGIONS)}")
    core, whole, enhancing = members = tuple(tuple(map(int, values)) for values in regions)
    is_nested = set(enhancing) <= set(core) <= set(whole) <= set(names) <= set(range(1, 256))
    if (
        not is_nested
        or {names[value] for value in enhancing} != {ENHANCING}
        or OEDEMA in {names[value] for value in core}
    ):
        raise ValueError("its regions are not those of its labels, 1 to 255: ET of enhancing tumour, TC without oedema")
    return Coding(release, names, members)


def misfit(network: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> str:
    """What keeps a state dict from being that of a network, in words; empty where nothing does."""
    expected = network.state_dict()
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        return "they are not tensors by name"
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    shapes = [
        f"{name} {tuple(weights[name].shape)}, must be {tuple(value.shape)}"
        for name, value in expected.items()
        if name in weights and (weights[name].shape != value.shape or not weights[name].is_floating_point())
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    return "; ".join(
        f"{len(names)} tensors are {what} ({first_few(list(map(shown, names)), 1)})" for what, names in found if names
    )
