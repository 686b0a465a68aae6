"""The layouts of a data set on disk, and what their names say. No image is opened here.

* A Medical Segmentation Decathlon task: a folder with `dataset.json`. One 4D image per case; "modality" names its last
  axis, "labels" names the label values, "training" lists the cases. Order is the file's: the split depends on it.
* BraTS folders: a folder per case, one 3D file per modality, up to two levels below the root (HGG/, LGG/) or the root
  itself. Naming tells the release apart only in part:
      -t2f -t1n -t1c -t2w -seg                 2023 on: what the coding of 2024 adds, the cavity that surgery leaves,
                                               is asked for where it is met; that of children (BraTS-PED-*) is another
                                               from 2024 on, so there a year decides, and without one it is asked for
      Flair_subtrMeanDivStd ... OTMultiClass   2013 (as re-released, z-scored)
      _flair _t1 _t1ce _t2 _seg                2012 to 2022: the coding changed in 2018, so a year in a name decides
                                               (`BraTS20_Training_001`), and without one the release is asked for
  Real data spell these in any letter case (`t2W`); one case of BraTS 2020 has its label in `W39_1998.09.19_Segm.nii`.
* A list: CSV with a column "name", one per modality, and "label"; or JSON with the same records, [{...}, ...]. JSON may
  also be {"modalities": ["flair", ...], "cases": [{"name": ..., "image": 4D file, "label": ...}, ...]}. Paths are
  relative to the list, and the release is always asked for.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.labels import CODINGS, Coding, coding_from_dataset_json

log = logging.getLogger(__name__)

MODALITIES = ("flair", "t1", "t1c", "t2")
SPELLINGS = {
    "flair": ("flair", "t2f", "t2flair"),
    "t1": ("t1", "t1n", "t1w", "t1pre", "t1native"),
    "t1c": ("t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1contrast", "t1km", "t1wc", "t1wce", "t1wgd", "t1wpost", "ct1"),
    "t2": ("t2", "t2w"),
}
"""How each modality is spelled in file names, lists and options, in any letter case; what follows "t1" or "t2" may
stand apart (`t1_ce`, `T2-FLAIR`)."""
_MODALITY_OF = {spelling: modality for modality, spellings in SPELLINGS.items() for spelling in spellings}
_APART = "[-_. ]"
_SPELLED = "|".join(re.sub("^(t[12])(.)", rf"\1{_APART}?\2", spelling) for spelling in _MODALITY_OF)
# The end of a file's stem. BIDS tells a contrast agent before the modality (`ce-gd_T1w`), BRATS until 2015 had a number
# after it (`MR_T1c.54514`), that of 2013 how it was normalised.
_ENDS_IN_MODALITY = re.compile(
    rf"(?:^|{_APART})(?:(?P<agent>ce-[a-z0-9]+_)t1w?|(?P<spelling>{_SPELLED}))(?:_subtrmeandivstd|\.\d+)?$",
    re.IGNORECASE,
)
# End of a file's stem, lower case; group 1 is the modality or the label.
_NAMING = {
    "2023": re.compile(r"-(t2f|t1n|t1c|t2w|seg)$"),
    "2013": re.compile(r"^(flair|t1c|t1|t2|otmulticlass)(?:_subtrmeandivstd|(?<=otmulticlass))$"),
    "2012-2022": re.compile(r"_(flair|t1ce|t1|t2|segm?)$"),
}
_LABEL_NAMES = ("seg", "segm", "otmulticlass")
# "BraTS2021_00000", "brats_2013_pat0001", "Brats18_x", "BraTS-PEDs2024"; but "BraTS_12", "BraTS_0012" and
# "BraTS-PED-00024" are numbers of cases.
_YEAR = re.compile(r"(?:brats|fets)(?:(?:-[a-z]+)?[_-]?(20\d\d)|(1[2-9]|2\d))(?!\d)", re.IGNORECASE)
_CHILDREN = re.compile(r"brats-peds?-", re.IGNORECASE)
_YEARS_OF = {"brats2013": "until 2017", "brats2018": "2018 to 2022", "brats2023": "2023", "brats2024-ped": "2024 on"}
_FOLDER_DEPTH = 2


class DataError(ValueError):
    """A fault of the user's data or of what was asked of it; the message has path or value, rule and remedy."""


class CaseError(DataError):
    """A fault in the files of a case.

    Args:
        path: the file at fault.
        problem: what is wrong with it, with the value and the rule.
        remedy: what the user can do.
    """

    def __init__(self, path: Path, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)  # args: what pickle needs to bring it from a worker process
        self.path = path
        self.problem = problem
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
    releases: tuple[str, ...]  # that its names allow, none where they say nothing; if several, the user decides
    faults: tuple[CaseError, ...] = ()


def modality_of(path: Path) -> str | None:
    """Which of `MODALITIES` a file's name tells, None where it tells none: `BraTS2021_00000_t1ce.nii.gz` is t1c."""
    stem = stem_of(path)
    match = _ENDS_IN_MODALITY.search(stem) if stem else None
    if match is None:
        return None
    return "t1c" if match["agent"] else modality_named(match["spelling"])


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


def _absent(paths: Iterable[Path | None], listed_in: Path, case: str) -> tuple[CaseError, ...]:
    """A fault for each listed file that is not there."""
    problem, remedy = f"case {case}: listed in {listed_in}, and not there", "Put the file there, or correct the list"
    return tuple(CaseError(path, problem, remedy) for path in paths if path is not None and not path.is_file())


def stem_of(path: Path) -> str | None:
    """File name without .nii or .nii.gz; None for other files and for hidden ones (macOS's `._*`)."""
    match = re.fullmatch(r"(?!\.)(.+?)\.nii(\.gz)?", path.name, re.IGNORECASE)
    return match and match.group(1)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON ({error}): correct or replace the file") from error


# Decathlon


def from_decathlon(path: Path, asked: Coding | None, with_test: bool) -> tuple[Coding, list[Found]]:
    """The cases that a `dataset.json` lists under "training", and under "test" where asked, in its order.

    Raises:
        DataError: the file is malformed, or a modality or label name is unknown.
    """
    info = _read_json(path)
    kinds = {"modality": dict, "labels": dict, "training": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(info, dict) or not isinstance(info.get(key), kind)]
    if wrong:
        raise DataError(
            f"{path}: a Decathlon task has modality {{number: name}}, labels {{value: name}} and training [cases], and "
            f"here {', '.join(wrong)} is missing or another thing. A data set of another kind is given by a .json or "
            ".csv list"
        )
    try:
        coding = asked or coding_from_dataset_json(info["labels"])
    except ValueError as error:
        raise DataError(f"{path}: {error} (--data.release)") from error
    channels: dict[str, int] = {}
    for index, name in info["modality"].items():
        canonical = modality_named(str(name))
        if canonical is None or canonical in channels or not index.isdecimal():
            raise DataError(f"{path}: modality {index} is {name!r}; each must be one of FLAIR, T1w, T1gd, T2w, once")
        channels[canonical] = int(index)
    listed = [*info["training"], *({"image": image} for image in (info.get("test", []) if with_test else []))]
    malformed = [e for e in listed if not isinstance(e, dict) or not isinstance(e.get("image"), str)]
    if malformed:
        raise DataError(f'{path}: entry {malformed[0]!r} must be {{"image": file, "label": file}}, in "test" the file')
    entries = [(e["image"], e.get("label")) for e in listed]
    found = []
    for image, label in entries:
        name = stem_of(Path(image))
        if name is None:
            continue
        image_path = path.parent / image
        label_path = None if label is None else path.parent / label
        faults = _absent((image_path, label_path), path, name)
        files = dict.fromkeys(channels, image_path)
        found.append(Found(name, path, files, channels, label_path, ("decathlon",), faults))
    if not found:
        raise DataError(f"{path} lists no case under 'training': a Decathlon task lists its images and labels there")
    return coding, found


# BraTS folders


def from_folders(root: Path, asked: Coding | None, unlabelled_as: Coding | None = None) -> tuple[Coding, list[Found]]:
    """The cases of BraTS folders, sorted by path, of one release; of any with `unlabelled_as` (see `survey_cases`).

    Raises:
        DataError: no folder, no case in it, or a release left open or mixed.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not there: give a Decathlon task folder, a BraTS folder, or a .json or .csv list")
    found = [f for folder in _folders(root, _FOLDER_DEPTH) if (f := _folder_case(folder, root))]
    if not found:
        tasks = [p.parent for p in sorted(root.glob("*/dataset.json"))]
        hint = f" Did you mean {tasks[0]}?" if tasks else ""
        raise DataError(
            f"{root}: no cases found. Looked for dataset.json (Decathlon), and in it and {_FOLDER_DEPTH} levels below "
            "for .nii or .nii.gz files ending in _flair/_t1/_t1ce/_t2 (2012-2022) or -t2f/-t1n/-t1c/-t2w "
            f"(2023 on), or named Flair_subtrMeanDivStd and alike (2013).{hint}"
        )
    if unlabelled_as:
        releases = {release for f in found for release in f.releases}
        return asked or (CODINGS[releases.pop()] if len(releases) == 1 else unlabelled_as), found
    return _one_release(found, root, asked)


def _folders(folder: Path, depth: int) -> Iterable[Path]:
    yield folder
    if depth:
        for entry in sorted(e.path for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")):
            yield from _folders(Path(entry), depth - 1)


def _folder_case(folder: Path, root: Path) -> Found | None:
    """The case in a folder; None where no file is named like an image of any release."""
    matches: dict[str, list[tuple[str, Path]]] = {naming: [] for naming in _NAMING}
    for path in sorted(folder.iterdir()):
        stem = stem_of(path)
        if stem is None or not path.is_file():
            continue
        for naming, pattern in _NAMING.items():
            match = pattern.search(stem.lower())
            if match:
                matches[naming].append((match.group(1), path))
    naming = max(matches, key=lambda key: len(matches[key]))
    files: dict[str, Path] = {}
    faults: tuple[CaseError, ...] = ()  # one at most: a folder of many cases has as many as files
    for role, path in matches[naming]:
        key = "label" if role in _LABEL_NAMES else _MODALITY_OF[role]
        if key in files and not faults:
            problem = f"{files[key].name} and {path.name} are both its {key}; a folder holds one file of each kind"
            faults = (CaseError(folder, problem, "Remove one, give each case its folder, or use a .csv list"),)
        files[key] = path
    label = files.pop("label", None)
    if not files:
        return None
    releases = _releases(naming, [path.name for path in files.values()], folder, root)
    return Found(folder.resolve().name, folder, files, None, label, releases, faults)


def _releases(naming: str, files: Sequence[str], folder: Path, root: Path) -> tuple[str, ...]:
    """The releases that the names of a case's files, of its folder and of those up to the root allow."""
    if naming == "2013":
        return ("brats2013",)
    year = _year(files, folder, root)
    if naming == "2012-2022":
        if year is None:
            return "brats2013", "brats2018"
        return ("brats2013" if year <= 2017 else "brats2018" if year <= 2022 else "brats2023",)
    if any(map(_CHILDREN.match, files)):
        return ("brats2023", "brats2024-ped") if year is None else ("brats2024-ped" if year >= 2024 else "brats2023",)
    return ("brats2024" if year and year >= 2024 else "brats2023",)


def _year(files: Sequence[str], folder: Path, root: Path) -> int | None:
    """The year in the name nearest to the files: theirs, then the case's folder, up to the root."""
    names = [*files]
    while True:
        names.append(folder.resolve().name)
        if folder == root:
            break
        folder = folder.parent
    for name in names:
        match = _YEAR.search(name)
        if match:
            return 2000 + int(match.group(1) or match.group(2)) % 100
    return None


def _one_release(found: list[Found], root: Path, asked: Coding | None) -> tuple[Coding, list[Found]]:
    counts = Counter(f.releases for f in found)
    listing = ", ".join(f"{n} of {' or '.join(releases)}" for releases, n in counts.items())
    if asked is None:
        if len(counts) > 1:
            choice = ", ".join(dict.fromkeys(release for releases in counts for release in releases))
            raise DataError(
                f"{root} mixes releases, whose label codes differ: its cases are {listing} by their names. "
                f"Choose with --data.release ({choice}), which takes the cases that fit"
            )
        releases = found[0].releases
        if len(releases) > 1:
            choice = " or ".join(f"{release} ({_YEARS_OF[release]})" for release in releases)
            raise DataError(
                f"{root}: the naming (case {found[0].name}) is that of several releases, whose label codes differ, and "
                f"no name carries a year. Give --data.release {choice}"
            )
        return CODINGS[releases[0]], found
    # Codes of 2023 mean the same in 2024, but for children, whose names leave both open.
    also = ("brats2023",) if asked.release == "brats2024" else None
    fits = [f for f in found if asked.release in f.releases or f.releases == also]
    if fits:
        if len(fits) < len(found):
            log.warning("release %s: %d of %d cases fit by name (%s)", asked.release, len(fits), len(found), listing)
        return asked, fits
    if len(counts) > 1:
        raise DataError(f"{root}: no case fits release {asked.release}; its cases are {listing} by their names")
    log.warning("%s: names say %s; read as %s, as asked", root, listing, asked.release)
    return asked, found


# Lists


def from_list(path: Path, asked: Coding | None) -> tuple[Coding, list[Found]]:
    """The cases of a .csv or .json list, in its order.

    Raises:
        DataError: no release asked, a malformed or empty list, or an unknown column.
    """
    if path.suffix.lower() not in (".json", ".csv"):
        raise DataError(f"{path}: a list of cases must be .json or .csv; a data set is given by its folder")
    if asked is None:
        raise DataError(f"{path}: a list does not say what its labels mean: give --data.release ({', '.join(CODINGS)})")
    order: Sequence[str] = ()
    records: Any
    if path.suffix.lower() == ".csv":
        records = _read_csv(path)
    else:
        records = _read_json(path)
        if isinstance(records, dict):
            named = records.get("modalities", MODALITIES)
            order = canonical_modalities([named] if isinstance(named, str) else named)
            records = records.get("cases")
    if not records or not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
        raise DataError(f"{path} lists no cases: give records with name, {', '.join(MODALITIES)} and label")
    return asked, [_record_case(record, order, path) for record in records]


def _read_csv(path: Path) -> list[dict[str, str]]:
    """A record for each row; fields are separated by commas, or, as some spreadsheets do, by semicolons or tabs."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not in UTF-8 ({error}): save it as CSV UTF-8") from error
    lines = text.splitlines()
    header, *rows = csv.reader(lines, delimiter=max(",;\t", key=lines[0].count)) if lines else [[]]
    columns = [column.strip().lower() for column in header]
    records = []
    for row in filter(None, rows):
        if len(row) > len(columns):
            raise DataError(f"{path}: {', '.join(row)} are {len(row)} fields, and the first row names {len(columns)}")
        records.append(dict(zip(columns, row, strict=False)))
    if len(set(columns)) < len(columns):
        raise DataError(f"{path}: columns {', '.join(columns)}: name each once")
    return records


def _record_case(record: Mapping[str, Any], order: Sequence[str], listed_in: Path) -> Found:
    given = {str(key).strip().lower(): "" if value is None else str(value).strip() for key, value in record.items()}
    values = {key: value for key, value in given.items() if value}
    name = values.pop("name", None)
    if name is None:
        raise DataError(f"{listed_in}: record {dict(record)} has no name: give each case a unique one")
    unknown = [key for key in values if key not in ("label", "image") and not modality_named(key)]
    if unknown or ("image" in values and not order):
        raise DataError(
            f"{listed_in}: case {name} has {', '.join(unknown) or 'image'}; columns are name, {', '.join(MODALITIES)} "
            'and label, or in JSON with "modalities" (the order of the last axis of a 4D file) name, image and label'
        )
    paths = {key: listed_in.parent / value for key, value in values.items()}
    faults = _absent(paths.values(), listed_in, name)
    kinds = [modality_named(key) or key for key in paths]
    if len(set(kinds)) < len(kinds) or len(set(paths.values())) < len(paths):
        listed = ", ".join(f"{key} {values[key]}" for key in paths)
        problem = f"case {name}: {listed}: a file is given twice, or two for one modality"
        faults += (CaseError(listed_in, problem, "Correct the list: one file for each modality"),)
    label = paths.pop("label", None)
    if "image" in paths:
        channels = {m: i for i, m in enumerate(order)}
        return Found(name, listed_in, dict.fromkeys(order, paths["image"]), channels, label, (), faults)
    files = {modality: path for key, path in paths.items() if (modality := modality_named(key))}
    return Found(name, listed_in, files, None, label, (), faults)
