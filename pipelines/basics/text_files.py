"""Text and JSON files that users write: UTF-8, and an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipelines.basics.errors import DataError
from pipelines.basics.text import brief


def read_text(path: Path, remedy: str = "save it as UTF-8") -> str:
    """A text file in UTF-8, its line ends unchanged; `remedy` is for one in another encoding.

    Raises:
        DataError: it can't be read, or is in another encoding.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error}): {remedy}") from error
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror}): check its permissions and the disk") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: it can't be read, is not JSON, or gives a key twice with different values.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        twice = [key for key, value in pairs if value is not found[key] and value != found[key]]
        if twice:
            raise DataError(f"{path}: the key {brief(twice[0])} is given twice in one object: keep one of the two")
        return found

    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also a number of over 4300 digits
        raise DataError(f"{path} is not valid JSON ({error}): correct or replace the file") from error
