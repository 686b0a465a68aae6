"""What all layouts of a data set on disk have in common: how names tell modality, label and patient, and what is found.

The layouts themselves are read in `pipelines.layouts.folders` (BraTS folders), `pipelines.layouts.tasks`
(`dataset.json` of Decathlon and nnU-Net, MONAI's datalists) and `pipelines.layouts.lists` (CSV and JSON). No image is
opened in any of them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.basics.text import as_text, brief, printable

MODALITIES = ("flair", "t1", "t1c", "t2")
SPELLINGS = {
    "flair": ("flair", "t2f", "t2flair"),
    "t1": ("t1", "t1n", "t1w", "t1pre", "t1native"),
    "t1c": (
        "t1c",
        "t1ce",
        "t1gd",
        "t1gad",
        "t1post",
        "t1contrast",
        "t1km",
        "t1wc",
        "t1wce",
        "t1wgd",
        "t1wpost",
        "t1+c",
        "ct1",
    ),
    "t2": ("t2", "t2w"),
}
"""How each modality is spelled in file names, lists and options, in any letter case; what follows "t1" or "t2" may
stand apart (`t1_ce`, `T2-FLAIR`)."""
LABEL_SPELLINGS = ("label", "labels", "seg", "segm", "segmentation")
_MODALITY_OF = {spelling: modality for modality, spellings in SPELLINGS.items() for spelling in spellings}
_APART = "[-_. ]"
_SPELLED = "|".join(re.sub("^(t[12])(.)", rf"\1{_APART}?\2", re.escape(spelling)) for spelling in _MODALITY_OF)
# The end of a file's stem. BIDS tells a contrast agent before the modality (`ce-gd_T1w`), BRATS until 2015 had a number
# after it (`MR_T1c.54514`), that of 2013 how it was normalised.
_ENDS_IN_MODALITY = re.compile(
    rf"(?:^|{_APART})(?:(?P<agent>ce-[a-z0-9]+_)t1w?|(?P<spelling>{_SPELLED}))(?:_subtrmeandivstd|\.\d+)?$",
    re.IGNORECASE,
)
_ENDS_IN_LABEL = re.compile(
    rf"(?:^|(?<!brain)(?<!parenchyma){_APART})"
    rf"(?:{'|'.join(LABEL_SPELLINGS)}|tumou?r_?mask|otmulticlass|ot(?=\.\d))(?:\.\d+)?$",
    re.IGNORECASE,
)
_TIME_POINT = (
    r"(?:(?:ses|session|time_?-?point|time|tp|visit|week|month|day)[-_ ]?\d[\d-]*|"
    r"(?:19|20)\d\d[-_]?[01]\d[-_]?[0-3]\d)"
)
_IS_TIME_POINT = re.compile(_TIME_POINT, re.IGNORECASE)
# A name is that of a patient (group 1) and of one of his time points.
_PATIENTS = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(brats\d*-[a-z]+(?:-[a-z]+)*-\d+)-\d+",  # 2023 on: BraTS-GLI-02062-101
        r"(brats(?:1[2-9])?_(?:2013|tcia\d*|cbica|tmc)_[a-z0-9]+)_\d+",  # until 2019: brats_tcia_pat153_0109
        r"(upenn-gbm-\d+|ucsf-pdgm-\d+)_.+",  # UCSF-PDGM-0289_FU003d
        r"(sub-[a-z0-9]+)_.+",  # BIDS
        rf"(.*\d.*?){_APART}{_TIME_POINT}(?:{_APART}.*)?",
    )
)
_NAME_BYTES = 200  # a file system takes 255, and files of a case are named by it and by what they hold
_PATH_CHARACTERS = 4096
FETCH_ANNEXED = "Run git annex get or datalad get"


class DataError(ValueError):
    """A fault of the user's data or of what was asked of it; the message has path or value, rule and remedy."""

    def __str__(self) -> str:
        return as_text(super().__str__())


class CaseError(DataError):
    """A fault in the files of a case.

    Args:
        path: the file at fault; kept as any log and table can hold it, see `pipelines.basics.text`.
        problem: what is wrong with it, with the value and the rule.
        remedy: what the user can do.
    """

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)  # args: what pickle needs to bring it from a worker process
        self.path = Path(as_text(str(path)))
        self.problem = as_text(problem)
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}. {self.remedy}."


@dataclass(frozen=True)
class Found:
    """A case before its modalities are chosen: its files by modality, or a 4D file and its channels by modality.

    A fault of one case does not keep the others from being found: it is noted in `faults`.
    """

    name: str
    source: Path  # its folder, or the list that names it
    files: Mapping[str, Path]
    channels: Mapping[str, int] | None
    label: Path | None
    releases: tuple[str, ...] = ()  # that its names allow, none where they say nothing; if several, the user decides
    faults: tuple[CaseError, ...] = ()
    patient: str | None = None  # None: this case is all that there is of its patient
    unused: tuple[Path, ...] = ()  # scans beside its files that are named like none of them
    held_out: bool = False  # a list names it for validation


# What names tell


def modality_of(path: Path) -> str | None:
    """Which of `MODALITIES` a file's name tells, None where it tells none: `BraTS2021_00000_t1ce.nii.gz` is t1c."""
    stem = stem_of(path)
    match = _ENDS_IN_MODALITY.search(stem) if stem else None
    if match is None:
        return None
    return "t1c" if match["agent"] else modality_named(match["spelling"])


def is_label(path: Path) -> bool:
    """Whether a file's name says that it is a label map."""
    stem = stem_of(path)
    return stem is not None and _ENDS_IN_LABEL.search(stem) is not None


def modality_named(name: str) -> str | None:
    """Which of `MODALITIES` a word means (`T1w`, `t1ce`, `T2-FLAIR`, ...), None where it means none."""
    return _MODALITY_OF.get(re.sub(_APART, "", name.strip().lower()))


def canonical_modalities(modalities: Sequence[str]) -> tuple[str, ...]:
    """The names of `MODALITIES` for other spellings of them (T1w, t1ce, t2f, ...), in the order given.

    Raises:
        DataError: none given, one unknown, or one twice.
    """
    names = tuple(modality_named(m) or m for m in modalities)
    unknown = [m for m in names if m not in MODALITIES]
    if unknown or not names or len(set(names)) < len(names):
        raise DataError(f"modalities {list(modalities)}: name at least one of {', '.join(MODALITIES)}, each once")
    return names


def patient_of(name: str) -> str | None:
    """The patient that the name of a case tells beside the time point: BraTS-GLI-02062 of BraTS-GLI-02062-101."""
    for pattern in _PATIENTS:
        match = pattern.fullmatch(name)
        if match:
            return match.group(1)
    return None


def is_time_point(name: str) -> bool:
    """Whether the name of a folder is that of a time point alone: `ses-02`, `Timepoint_1`, `2017-03-01`."""
    return _IS_TIME_POINT.fullmatch(name) is not None


def stem_of(path: Path) -> str | None:
    """File name without .nii or .nii.gz; None for other files and for hidden ones (macOS's `._*`)."""
    match = re.fullmatch(r"(?!\.)(.+?)\.nii(\.gz)?", path.name, re.IGNORECASE | re.DOTALL)
    return match and match.group(1)


# Names and files that can't be used


def name_fault(name: str) -> str:
    """Why no case and no path may be called so; empty where it may."""
    if as_text(name) != name or set("\t\n") & set(name):
        return (
            f"{printable(name)} is not plain text in UTF-8: it holds bytes of another encoding, or control characters"
        )
    return ""


def case_name_fault(name: str) -> str:
    """Why no case may be called so; empty where it may."""
    size = len(name.encode("utf-8", "surrogatepass"))
    if size > _NAME_BYTES:
        return (
            f"the name of the case, {name[:40]}..., has {size} bytes; files are named by it, so {_NAME_BYTES} at most"
        )
    return name_fault(name)


def file_fault(path: Path, missing: str, remedy: str) -> CaseError | None:
    """What keeps a path from being that of a regular file; None where nothing does.

    Args:
        path: a path that a case names. missing, remedy: what to say where nothing is there.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a null character, or half a surrogate pair
        return CaseError(path, f"no file can be named so ({error})", "Correct the path or the list")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return CaseError(path, f"can't be read ({error.strerror})", "Check its name, its permissions and the disk")
        if not os.path.islink(path):
            return CaseError(path, missing, remedy)
        if is_annexed(path):
            return CaseError(path, "is a git-annex link to a file that is not here", FETCH_ANNEXED)
        problem = f"is a link to {os.readlink(path)}, which is not there"
        return CaseError(path, problem, "Put the file there, or correct the link")
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return CaseError(path, "is a folder, must be a file", "Name the scan itself, which may be in that folder")
    kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    return CaseError(path, f"is no regular file but {kind}", "Copy the scan to a file")


def is_annexed(link: Path | str) -> bool:
    """Whether a symbolic link leads to git-annex's store, which holds files, fetched or not."""
    return "annex/objects" in os.readlink(link)


def listed_faults(paths: Iterable[Path | None], listed_in: Path, case: str) -> tuple[CaseError, ...]:
    """A fault for each listed file that is not there, or is none."""
    missing, remedy = f"case {case}: listed in {listed_in}, but not there", "Put the file there, or correct the list"
    faults = (file_fault(path, missing, remedy) for path in paths if path is not None)
    return tuple(fault for fault in faults if fault)


# Text files


def read_text(path: Path, remedy: str) -> str:
    """A text file in UTF-8, with its line ends as they are.

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

    text = read_text(path, "save it as UTF-8")
    try:
        return json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: also a number of over 4300 digits
        raise DataError(f"{path} is not valid JSON ({error}): correct or replace the file") from error


def text_of(value: Any, where: str) -> str:
    """A value that must be text.

    Args:
        value: from a JSON file. where: which entry and key it is of, for the message.

    Raises:
        DataError: it is no text, or text that no path can hold.
    """
    if not isinstance(value, str):
        raise DataError(f'{where} is {brief(value)} and must be text in quotes, as "a.nii.gz"')
    if len(value) > _PATH_CHARACTERS:
        raise DataError(f"{where} is {brief(value)}, {len(value)} characters; no path has over {_PATH_CHARACTERS}")
    fault = name_fault(value)
    if fault:
        raise DataError(f"{where}: {fault}: correct it")
    return value.strip()


def some(names: Sequence[str], limit: int = 5) -> str:
    """The first few of many names."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
