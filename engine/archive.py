"""Files of tensors and plain values: written whole, read without trust, and known by their content.

What `torch.save` writes is a zip file with checksums that `torch.load` does not look at: where a bit is flipped, it
gives other weights. So a weights file holds a hash of what was written, of tensors and values alike and whatever their
container, and what is read must have the same one. A hash tells damage, not intent: whoever makes a file can hash it.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.basics.atomic import replacing

HASH = "sha256"
VALUES_LIMIT = 2**24
"""Characters of a file's values as JSON; those of a run come to some thousand, and a million case names fit."""


class Unreadable(ValueError):
    """What is wrong with a file, without its name."""


def read_archive(path: Path) -> Any:
    """What `torch.save` wrote, onto the CPU. No code from the file is run, and nothing is inflated.

    Raises:
        Unreadable: it can't be read so.
        PermissionError: it must not be read.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"  # else of torch before 1.6, which reads it as it goes
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            stored = sum(entry.file_size for entry in entries)
            if stored > path.stat().st_size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise Unreadable("its parts are compressed or overlap, as torch.save never writes them")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged file, which an error follows
            return torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, Unreadable):
        raise
    except Exception as error:  # of zipfile, pickle and torch, which have many
        raise Unreadable(
            f"it is damaged, or holds more than tensors and plain values ({type(error).__name__}), and no code from a "
            "file is run"
        ) from error


def write_archive(content: Mapping[str, Any], path: Path) -> None:
    """Write tensors and plain values by `torch.save`, whole and synced.

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
            # PyTorch raises an error of its own, about positions in a file, in place of a full disk's.
            raise OSError(cause.errno, cause.strerror, str(path)) from error


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a weights file with its hash."""
    return {**content, HASH: content_hash(content)}


def content_hash(content: Mapping[str, Any]) -> str:
    """The hash of tensors ("weights", a state dict) and of the plain values beside them, the hash itself left out.

    Values count as JSON has them, where keys are strings: a `.pt` and a `.safetensors` file of one network have the
    same hash.

    Raises:
        Unreadable: values that JSON does not have, or too many of them; weights that are no dense tensors on the CPU.
    """
    weights = content.get("weights", {})
    if not isinstance(weights, dict) or not all(_is_plain(*item) for item in weights.items()):
        raise Unreadable("its weights are not dense tensors by name")
    names = sorted(weights)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(_tensor_digest, (weights[name] for name in names)))
    total = hashlib.new(HASH, _as_json({key: content[key] for key in content if key not in ("weights", HASH)}))
    for name, digest in zip(names, digests, strict=True):
        total.update(f"\n{name} {weights[name].dtype} {tuple(weights[name].shape)} ".encode() + digest)
    return total.hexdigest()


def _is_plain(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and type(value) in (Tensor, torch.nn.Parameter)
        and (value.layout, value.device.type) == (torch.strided, "cpu")
        and not (value.is_quantized or value.is_conj() or value.is_neg())
        and value.numel() * value.itemsize <= value.untyped_storage().nbytes()  # else a few bytes are expanded to many
    )


def _tensor_digest(value: Tensor) -> bytes:
    content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.new(HASH, content.data).digest()


def _as_json(values: dict[str, Any]) -> bytes:
    """Values as JSON in one order; a few that refer to each other may stand for more than any memory holds."""
    try:
        parts, size = [], 0
        for part in json.JSONEncoder().iterencode(values):
            parts.append(part)
            size += len(part)
            if size > VALUES_LIMIT:
                raise Unreadable(f"its values are longer than {VALUES_LIMIT:,} characters")
        return json.dumps(json.loads("".join(parts)), sort_keys=True).encode()
    except (TypeError, RecursionError) as error:
        raise Unreadable(f"it holds other values than plain ones ({type(error).__name__})") from error
    except Unreadable:
        raise
    except ValueError as error:  # values within themselves, numbers of too many digits
        raise Unreadable(f"it holds values that JSON does not have ({error})") from error
