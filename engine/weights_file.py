"""Weights files: a trained network, and what it is for.

    checkpoints/last.pt   weights, model and data settings after the newest validation
    checkpoints/best.pt   the same of the epoch with the best validation Dice

`WeightsFile` is what such a file holds; it reads, checks and writes itself, as `.pt` or as `.safetensors`. Below it are
`read_archive` and `write_archive`, for any file of `torch.save`: written whole, read without running code from it.

A file may come from anybody. No code in it is run, and each of its values is checked before it is used. `torch.load`
ignores the checksums in the zip files that `torch.save` writes: where a bit is flipped, it returns other weights. So a
weights file holds a hash of its tensors and values, the same in either container, which must still match when it is
read. A hash shows damage, not intent: whoever makes a file can hash it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.basics.atomic import replacing
from pipelines.basics.option_values import as_typed
from pipelines.basics.text import one_line
from pipelines.layouts.labels import CODINGS, ENHANCING, OEDEMA, REGIONS, TUTORIAL, Coding
from pipelines.layouts.names import canonical_modalities

log = logging.getLogger(__name__)

FORMAT = 3
UNSEALED_FORMAT = 2
"""Of files before they had a hash. They are read, with a warning: training takes days."""
HASH = "sha256"
METADATA_KEY = "glioforge"
"""Metadata of a `.safetensors` file: everything but the weights, as JSON."""
VALUES_LIMIT = 2**24
"""Characters of a file's values as JSON; a run's are some thousand, and a million case names fit."""
PLAIN_NAME = re.compile("[A-Za-z0-9_]{1,64}")
_AS_THEY_ARE = ("weights", "config", "epoch", "validation", "scans")
"""Fields of a `WeightsFile` that need no conversion."""
_ODD = (ArithmeticError, AttributeError, KeyError, RecursionError, RuntimeError, TypeError, ValueError)


class Unreadable(ValueError):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds.

    Attributes:
        weights: the network's state dict; dense tensors on the CPU.
        config: of the run, plain values as `to_dict` or `to_portable_dict` gives them; not checked here.
        epoch: after which the weights were taken.
        validation: Dice then, as in `metrics.json`: numbers by name, possibly in groups.
        modalities: of the network's channels, in order.
        coding: of the labels that it was trained on.
        scans: what its training scans look like, see `pipelines.preparing.domain_shift`; may be empty.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any]
    epoch: int
    validation: dict[str, Any]
    modalities: tuple[str, ...]
    coding: Coding
    scans: dict[str, list[list[float]]]

    @classmethod
    def read(cls, path: Path) -> WeightsFile:
        """Read what `write` wrote, in this format or the one before, onto the CPU.

        Raises:
            ValueError: no such file, a damaged one, another program's, or values that this version does not know.
        """
        content = read_content(path)
        with written_by_this_version(path):
            weights, config, epoch, validation, scans = (content[name] for name in _AS_THEY_ARE)
            if not isinstance(config, dict):
                raise ValueError("its configuration is not options by name")
            if type(epoch) is not int or not 0 <= epoch < 2**31:
                raise ValueError("its epoch is not a whole number, 0 or more")
            _check_numbers(validation)
            modalities = canonical_modalities(list(content["modalities"]))
            _check_ranges(scans, len(modalities))
            coding = _coding(content["release"], content["tissues"], content["regions"])
            return cls(weights, config, epoch, validation, modalities, coding, scans)

    def content(self) -> dict[str, Any]:
        """Tensors and plain values as a file holds them."""
        return {
            **{name: getattr(self, name) for name in _AS_THEY_ARE},
            "modalities": list(self.modalities),
            "release": self.coding.release,
            "tissues": dict(self.coding.tissues),
            "regions": [list(values) for values in self.coding.regions],
        }

    def write(self, path: Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the file; arguments and errors as `write_content`."""
        write_content(path, self.content(), metadata)


@contextlib.contextmanager
def written_by_this_version(path: Path) -> Iterator[None]:
    """Turn any error that odd values raise into a ValueError of one line that names the file."""
    try:
        yield
    except _ODD as error:
        reason = one_line(f"it has no {error}" if isinstance(error, KeyError) else error, 300)
        raise ValueError(
            f"{path} was written by another version of this program: {reason}; update this one, or use that one"
        ) from error


# Files


def read_content(path: Path) -> dict[str, Any]:
    """Read what `write_content` wrote, check its format and hash, but not its values.

    Raises:
        ValueError: no such file, a damaged one, or another program's.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}; a run writes checkpoints/best.pt and checkpoints/last.pt")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else read_archive(path)
        _check_format(path, content)
        written = content.get(HASH)
        if content["format"] == UNSEALED_FORMAT and written is None:
            log.warning(
                "%s is from an older version whose files have no hash, so damage to it would go unnoticed; "
                "launch/convert.py --to safetensors rewrites it with one", path,
            )  # fmt: skip
        elif written != content_hash(content):
            raise Unreadable("its content is not what was written: it is damaged")
    except Unreadable as error:
        raise ValueError(
            f"{path} can't be read as a checkpoint: {error}. Copy it again, or use the other of the run's best.pt and "
            "last.pt"
        ) from error
    return content


def write_content(path: Path, content: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and plain values, unchecked, with the format and the hash.

    Args:
        path: its folder is made. A name that ends in `.safetensors` gives such a file, any other a `.pt`.
        content: as `WeightsFile.content`.
        metadata: more to say in a `.safetensors` file.

    Raises:
        Unreadable: see `content_hash`.
        OSError: it can't be written.
    """
    content = {"format": FORMAT, **content}
    content[HASH] = content_hash(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        write_archive(content, path)
        return
    from safetensors.torch import save  # not save_file, whose files nobody else may read, whatever the umask says

    weights = {name: value.contiguous() for name, value in content.pop("weights").items()}
    with replacing(path, "wb", sync=True) as file:
        file.write(save(weights, {METADATA_KEY: json.dumps(content), **(metadata or {})}))


def _check_format(path: Path, content: Any) -> None:
    written = content.get("format") if isinstance(content, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise ValueError(f"{path} is from a newer version of this program; this one reads format {FORMAT}: update it")
    if written not in (FORMAT, UNSEALED_FORMAT):
        raise ValueError(
            f"{path} is not a checkpoint of this program's format {FORMAT}: launch/convert.py --from brings in state "
            "dicts of MONAI and self-attention-cv"
        )
    if "moments" in content:
        raise ValueError(
            f"{path} is a state to resume training from, not a network to use: take best.pt or last.pt of the run"
        )


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            rest = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    except PermissionError:
        raise
    except Exception as error:  # safetensors, JSON and torch raise many kinds
        raise Unreadable(f"it is damaged ({type(error).__name__})") from error
    return {**rest, "weights": weights} if isinstance(rest, dict) else {}


# Archives


def read_archive(path: Path) -> Any:
    """Read what `torch.save` wrote, onto the CPU. No code from the file is run, and nothing is decompressed.

    Raises:
        Unreadable: it is damaged, or holds more than tensors and plain values.
        PermissionError: the user may not read it.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # else a file of torch before 1.6, which is not an archive
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            stored = sum(entry.file_size for entry in entries)
            if stored > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise Unreadable("its parts are compressed or overlap, which torch.save never writes")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a damaged file, before the error
            return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, Unreadable):
        raise
    except Exception as error:  # zipfile, pickle and torch raise many kinds
        raise Unreadable(
            f"it is damaged, or holds more than tensors and plain values ({type(error).__name__}), and no code from a "
            "file is run"
        ) from error


def write_archive(content: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values with `torch.save`, complete and synced to the disk.

    Raises:
        OSError: it can't be written; `filename` is `path`.
    """
    with replacing(path, "wb", sync=True) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            cause = error.__context__
            if not isinstance(cause, OSError):
                raise
            # When the disk is full, PyTorch raises its own error, about positions in the file.
            raise OSError(cause.errno, cause.strerror, str(path)) from error


# The hash


def content_hash(content: Mapping[str, Any]) -> str:
    """The hash of tensors ("weights", a state dict) and of the plain values beside them, except the hash itself.

    Values count as JSON has them, where keys are strings: a `.pt` and a `.safetensors` file of one network have the
    same hash.

    Raises:
        Unreadable: values that JSON does not have, or too many of them; weights that are not dense tensors on the CPU.
    """
    weights = content.get("weights", {})
    if not isinstance(weights, dict) or not all(_is_dense(*item) for item in weights.items()):
        raise Unreadable("its weights are not dense tensors by name")
    names = sorted(weights)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(_tensor_digest, (weights[name] for name in names)))
    total = hashlib.new(HASH, _as_json({key: content[key] for key in content if key not in ("weights", HASH)}))
    for name, digest in zip(names, digests, strict=True):
        total.update(f"\n{name} {weights[name].dtype} {tuple(weights[name].shape)} ".encode() + digest)
    return total.hexdigest()


def _is_dense(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and type(value) in (Tensor, torch.nn.Parameter)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not (value.is_quantized or value.is_conj() or value.is_neg())
        and value.numel() * value.itemsize <= value.untyped_storage().nbytes()  # else few bytes are expanded to many
    )


def _tensor_digest(value: Tensor) -> bytes:
    content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.new(HASH, content.data).digest()


def _as_json(values: dict[str, Any]) -> bytes:
    """Values as JSON in a fixed order. Few values that refer to each other may expand to more than fits in memory."""
    try:
        parts, size = [], 0
        for part in json.JSONEncoder().iterencode(values):
            parts.append(part)
            size += len(part)
            if size > VALUES_LIMIT:
                raise Unreadable(f"its values are longer than {VALUES_LIMIT:,} characters")
        return json.dumps(json.loads("".join(parts)), sort_keys=True).encode()
    except Unreadable:
        raise
    except (TypeError, RecursionError, ValueError) as error:  # ValueError: it contains itself, or too many digits
        raise Unreadable(f"it holds other values than plain ones ({type(error).__name__}: {error})") from error


# Values


def _check_numbers(values: Any, depth: int = 2) -> None:
    """Accept numbers by plain names, possibly in groups: a bundle hands them to MONAI, which runs text after `$`."""
    if not isinstance(values, dict):
        raise ValueError("its validation is not numbers by name")
    for name, value in values.items():
        if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
            raise ValueError("its validation has a name with other characters than letters, digits and _")
        if isinstance(value, dict) and depth > 1:
            _check_numbers(value, depth - 1)
        elif value is not None and not _is_number(value):
            raise ValueError(f"{name} of its validation is not a number")


def _check_ranges(scans: Any, channels: int) -> None:
    lengths = {"spacing_mm": 3, "occupied": channels, "contrast": channels} if scans else {}
    if not isinstance(scans, dict) or any(len(scans[name]) != length for name, length in lengths.items()):
        raise ValueError("its scans are not ranges of numbers by name")
    for name, spans in scans.items():
        if not all(len(span) == 2 and all(map(_is_number, span)) for span in spans):
            raise ValueError(f"the {name} of its scans are not ranges of numbers")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _coding(release: Any, tissues: Any, regions: Any) -> Coding:
    names = {int(value): tissue for value, tissue in tissues.items()}
    known = {tissue for coding in CODINGS.values() for tissue in coding.tissues.values()}
    if release not in (*CODINGS, TUTORIAL) or not {OEDEMA, ENHANCING} <= set(names.values()) <= known:
        raise ValueError("it names a release or tissues that this version does not know")
    if not isinstance(regions, list | tuple) or len(regions) != len(REGIONS):
        raise ValueError(f"its regions are {as_typed(regions)}, must be the labels of {', '.join(REGIONS)}")
    core, whole, enhancing = members = tuple(tuple(map(int, values)) for values in regions)
    is_nested = set(enhancing) <= set(core) <= set(whole) <= set(names) <= set(range(1, 256))
    tissues_of_core, tissues_of_enhancing = ({names.get(value) for value in values} for values in (core, enhancing))
    if not is_nested or tissues_of_enhancing != {ENHANCING} or OEDEMA in tissues_of_core:
        raise ValueError("its regions are not those of its labels, 1 to 255: ET of enhancing tumour, TC without oedema")
    return Coding(release, names, members)
