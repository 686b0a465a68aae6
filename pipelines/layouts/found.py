"""A case as a layout's reader finds it, before its modalities are chosen; no image is opened.

The readers are `pipelines.layouts.folders` (BraTS folders), `pipelines.layouts.tasks` (`dataset.json` of Decathlon and
nnU-Net, MONAI's datalists) and `pipelines.layouts.lists` (CSV and JSON). Each returns a coding and the cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.input_files import file_fault
from pipelines.basics.text import brief
from pipelines.layouts.labels import CODINGS, Coding
from pipelines.layouts.names import name_fault

_PATH_CHARACTERS = 4096


@dataclass(frozen=True)
class FoundCase:
    """The files of a case by modality, or a 4D file and its channels by modality.

    A fault of one case does not keep the others from being found: it is noted in `faults`.
    """

    name: str
    source: Path  # its folder, or the list that names it
    files: Mapping[str, Path]
    channels: Mapping[str, int] | None = None
    label: Path | None = None
    releases: tuple[str, ...] = ()  # that its names allow, empty where they say nothing; if several, the user decides
    faults: tuple[CaseError, ...] = ()
    patient: str | None = None  # None: this case is all that there is of its patient
    unused: tuple[Path, ...] = ()  # scans beside its files whose names match no modality
    held_out: bool = False  # a list names it for validation


def listed_case(
    name: str,
    listed_in: Path,
    files: Mapping[str, Path],
    label: Path | None,
    patient: str | None,
    channels: Mapping[str, int] | None = None,
    faults: Sequence[CaseError] = (),
) -> FoundCase:
    """A case that a file lists, its paths joined to the file's folder; what is missing or not a file is a fault."""
    missing = f"case {name}: listed in {listed_in}, but does not exist"
    distinct = filter(None, dict.fromkeys([*files.values(), label]))
    of_files = [file_fault(path, missing, "Put the file there, or correct the list") for path in distinct]
    return FoundCase(name, listed_in, dict(files), channels, label, (), (*filter(None, of_files), *faults), patient)


def unstated_coding(path: Path, found: Sequence[FoundCase], unlabelled_as: Coding | None, remedy: str = "") -> Coding:
    """The coding of a file that does not say what its labels mean: any, where no case has one.

    Raises:
        DataError: there are labels; the message asks for the release, or for the other `remedy`.
    """
    if unlabelled_as or not any(case.label for case in found):
        return unlabelled_as or CODINGS["decathlon"]
    raise DataError(f"{path} does not say what its labels mean: give --data.release ({', '.join(CODINGS)}){remedy}")


def require_text(value: Any, where: str) -> str:
    """A value of a JSON file that must be text, stripped; `where` is its entry and key, for the message.

    Raises:
        DataError: it is not text, or text that no path can hold.
    """
    if not isinstance(value, str):
        raise DataError(f'{where} is {brief(value)} and must be text in quotes, as "a.nii.gz"')
    if len(value) > _PATH_CHARACTERS:
        raise DataError(f"{where} is {brief(value)}, {len(value)} characters; no path has over {_PATH_CHARACTERS}")
    fault = name_fault(value)
    if fault:
        raise DataError(f"{where}: {fault}: correct it")
    return value.strip()
