"""Files of tensors and plain values: written whole, and read without running code from them."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipelines.basics.atomic import replacing


class Unreadable(ValueError):
    """What is wrong with a file, without its name."""


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
