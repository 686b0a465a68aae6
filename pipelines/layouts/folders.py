"""BraTS folders: a folder per case, one 3D file per modality, up to three levels below the root, or the root itself.

Which modality a file is, or the label, its name tells (`pipelines.layouts.names`). The rest of the naming tells the
release, in part:
    -t2f -t1n -t1c -t2w -seg                 2023 on: what the coding of 2024 adds, the cavity that surgery leaves, is
                                             asked for where it is met; that of children (BraTS-PED-*) is another from
                                             2024 on, so there a year decides, and without one it is asked for
    Flair_subtrMeanDivStd ... OTMultiClass   2013 (as re-released, z-scored), and VSD.Brain.XX.O.MR_Flair.54512 alike
    all others (_flair _t1 _t1ce _t2 _seg)   2012 to 2022: until 2016 there were four tissues, so a year in a name
                                             decides (`BraTS20_Training_001`), and without one the release is asked for
Real data spell these in any letter case (`t2W`); one case of BraTS 2020 has its label in `W39_1998.09.19_Segm.nii`; on
Kaggle files lie in folders named like them (`X_flair.nii/00000057_brain_flair.nii`).

A case has the name of its folder. A folder that is named by a time point alone (`ses-02`), or `anat` as in BIDS, has
the names of those above it too, up to the patient's.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.basics.text import printable
from pipelines.labels import CODINGS, Coding
from pipelines.layouts.names import (
    CaseError,
    DataError,
    Found,
    file_fault,
    is_annexed,
    is_label,
    is_time_point,
    modality_of,
    patient_of,
    some,
    stem_of,
)

log = logging.getLogger(__name__)

# "BraTS2021_00000", "brats_2013_pat0001", "Brats18_x", "BraTS-PEDs2024"; but "BraTS_12", "BraTS_0012" and
# "BraTS-PED-00024" are numbers of cases.
_YEAR = re.compile(r"(?:brats|fets)(?:(?:-[a-z]+)?[_-]?(20\d\d)|(1[2-9]|2\d))(?!\d)", re.IGNORECASE)
_CHILDREN = re.compile(r"brats-peds?-", re.IGNORECASE)
_FROM_2023 = re.compile(r"(?:(?:^|[-_. ])(?:t2f|t1n)|-(?:t1c|t2w))$", re.IGNORECASE)
_UNTIL_2013 = re.compile(r"_subtrmeandivstd$|^otmulticlass$|^VSD\.Brain.*\.\d+$", re.IGNORECASE)
_YEARS_OF = {"brats2013": "until 2016", "brats2018": "2017 to 2022", "brats2023": "2023", "brats2024-ped": "2024 on"}
_DEPTH = 3
_OF_THE_DISK = "lost+found"  # at the root of a file system, closed to all but root


@dataclass(frozen=True)
class _Listing:
    """What is in a folder, sorted by name: its scans, each with the path whose name tells what it is; its folders."""

    scans: tuple[tuple[Path, Path], ...]
    folders: tuple[Path, ...]
    faults: tuple[CaseError, ...]


def from_folders(root: Path, asked: Coding | None, unlabelled_as: Coding | None = None) -> tuple[Coding, list[Found]]:
    """The cases of BraTS folders, sorted by path, of one release; of any with `unlabelled_as` (see `survey_cases`).

    Raises:
        DataError: no folder, no case in it, or a release left open or mixed.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not there: give a Decathlon task folder, a BraTS folder, or a .json or .csv list")
    found: list[Found] = []
    strangers: list[Path] = []  # scans that are of no case
    for folder, listing in _walk(root, _DEPTH):
        case = _folder_case(folder, root, listing)
        if case:
            found.append(case)
        strangers += case.unused if case else [named for named, _ in listing.scans]
    readable = [f for f in found if f.files]
    if not readable:
        raise _nothing_found(root, strangers, found)
    if strangers:
        log.warning("%s: %s", root, _described(strangers))
    if unlabelled_as:
        releases = {release for f in readable for release in f.releases}
        return asked or (CODINGS[releases.pop()] if len(releases) == 1 else unlabelled_as), found
    coding, fits = _one_release(readable, root, asked)
    fitting = {id(f) for f in fits}
    return coding, [f for f in found if id(f) in fitting or not f.files]


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, _Listing]]:
    """A folder and those below it, sorted."""
    listing = _list(folder)
    yield folder, listing
    here = os.path.realpath(folder)
    for below in listing.folders if depth else ():
        # A link to a folder above it would come round again.
        if not below.is_symlink() or not Path(here).is_relative_to(os.path.realpath(below)):
            yield from _walk(below, depth - 1)


def _list(folder: Path) -> _Listing:
    scans: list[tuple[Path, Path]] = []
    folders: list[Path] = []
    faults: list[CaseError] = []
    entries = _entries(folder)
    if isinstance(entries, CaseError):
        return _Listing((), (), (entries,))
    for path, is_folder in entries:
        is_named = modality_of(path) is not None or is_label(path)
        if is_folder and not is_named:
            folders.append(path)
        elif stem_of(path) is not None:
            scan = _within(path) if is_folder else path
            if is_named and isinstance(scan, Path):
                scan = file_fault(scan, "is gone", "Put it back") or scan
            if isinstance(scan, CaseError):
                faults.append(scan)
            else:
                scans.append((path, scan))
    return _Listing(tuple(scans), tuple(folders), tuple(faults))


def _entries(folder: Path) -> list[tuple[Path, bool]] | CaseError:
    """What is in a folder but for what is hidden, sorted, each with whether it is a folder."""
    try:
        with os.scandir(folder) as entries:
            seen = (entry for entry in entries if not entry.name.startswith(".") and entry.name != _OF_THE_DISK)
            listed = sorted((entry.path, _is_folder(entry)) for entry in seen)
    except OSError as error:
        remedy = "Change its permissions, or move it out of the data set"
        broken = file_fault(folder, "is gone", remedy) if not os.path.exists(folder) else None
        return broken or CaseError(folder, f"the folder can't be read ({error.strerror})", remedy)
    return [(Path(path), is_folder) for path, is_folder in listed]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link that must have led to one."""
    if not entry.is_symlink():
        return entry.is_dir()
    is_broken = not os.path.exists(entry.path)
    return os.path.isdir(entry.path) or (is_broken and not Path(entry.name).suffix and not is_annexed(entry.path))


def _within(folder: Path) -> Path | CaseError:
    """The scan in a folder that is named like one, as on Kaggle."""
    entries = _entries(folder)
    if isinstance(entries, CaseError):
        return entries
    scans = [path for path, is_folder in entries if stem_of(path) is not None and not is_folder]
    if len(scans) != 1:
        problem = f"is a folder named like a scan, and holds {len(scans)}; it must hold one"
        return CaseError(folder, problem, "Put the scan itself in its place")
    says, means = modality_of(scans[0]), modality_of(folder)
    if says and says != means:
        problem = f"is {says} by its name, and its folder says {means or 'label'}"
        return CaseError(scans[0], problem, "Find out which is right, and rename the other")
    return scans[0]


def _folder_case(folder: Path, root: Path, listing: _Listing) -> Found | None:
    """The case in a folder; None where no file is named like an image."""
    files: dict[str, Path] = {}
    named_so: dict[str, Path] = {}
    unused: list[Path] = []
    faults = list(listing.faults)
    twice = False  # said once: a folder of many cases has as many as files
    for named, scan in listing.scans:
        key = modality_of(named) or ("label" if is_label(named) else None)
        if key is None:
            unused.append(named)
            continue
        if key in files and not twice:
            problem = f"{named_so[key].name} and {named.name} are both its {key}; a folder holds one file of each kind"
            remedy = "Remove one, give each case its folder, or use a .csv list"
            faults.append(CaseError(folder, problem, remedy))
            twice = True
        files[key], named_so[key] = scan, named
    label = files.pop("label", None)
    if not files and not faults:
        return None
    name, patient = _name_of(folder, root)
    releases = _releases([*named_so.values()], folder, root) if files else ()
    return Found(name, folder, files, None, label, releases, tuple(faults), patient, tuple(unused))


def _name_of(folder: Path, root: Path) -> tuple[str, str | None]:
    """Name and patient of the case in a folder."""
    parts: list[str] = []
    while True:
        part = _own_name(folder)
        above = is_time_point(part)
        if part.lower() != "anat" or folder == root:
            parts.insert(0, part)
        if folder == root or not (above or part.lower() == "anat"):
            break
        folder = folder.parent
    name = "_".join(parts)
    return name, patient_of(name) or (parts[0] if len(parts) > 1 else None)


def _own_name(folder: Path) -> str:
    return os.path.basename(os.path.realpath(folder))  # of a root that is "." too; never raises, as resolve() may


def _releases(files: Sequence[Path], folder: Path, root: Path) -> tuple[str, ...]:
    """The releases that the names of a case's files, of its folder and of those up to the root allow."""
    stems = [stem_of(path) or "" for path in files]
    if any(map(_UNTIL_2013.search, stems)):
        return ("brats2013",)
    names = [path.name for path in files]
    year = _year(names, folder, root)
    if not any(map(_FROM_2023.search, stems)):
        if year is None:
            return "brats2013", "brats2018"
        until = {2016: "brats2013", 2017: "brats2017", 2022: "brats2018"}
        return (next((release for last, release in until.items() if year <= last), "brats2023"),)
    if any(map(_CHILDREN.match, (*names, _own_name(folder)))):
        return ("brats2023", "brats2024-ped") if year is None else ("brats2024-ped" if year >= 2024 else "brats2023",)
    return ("brats2024" if year and year >= 2024 else "brats2023",)


def _year(files: Sequence[str], folder: Path, root: Path) -> int | None:
    """The year in the name nearest to the files: theirs, then the case's folder, up to the root."""
    names = [*files]
    while True:
        names.append(_own_name(folder))
        if folder == root:
            break
        folder = folder.parent
    for name in names:
        match = _YEAR.search(name)
        if match:
            return 2000 + int(match.group(1) or match.group(2)) % 100
    return None


def _one_release(found: list[Found], root: Path, asked: Coding | None) -> tuple[Coding, list[Found]]:
    """The coding of cases, and those of them that it fits."""
    counts = Counter(f.releases for f in found)
    listing = ", ".join(f"{n} of {' or '.join(releases)}" for releases, n in counts.items())
    if asked is None:
        return _told(found, root, listing), found
    fits = [f for f in found if any(_is_read_as(release, asked) for release in f.releases) or _may_be(f, asked)]
    if fits:
        if len(fits) < len(found):
            log.warning("release %s: %d of %d cases fit by name (%s)", asked.release, len(fits), len(found), listing)
        return asked, fits
    if len(counts) > 1:
        raise DataError(f"{root}: no case fits release {asked.release}; its cases are {listing} by their names")
    log.warning("%s: names say %s; read as %s, as asked", root, listing, asked.release)
    return asked, found


def _told(found: list[Found], root: Path, listing: str) -> Coding:
    """The coding that the names of cases tell; any where no case has a label."""
    releases = list(dict.fromkeys(release for f in found for release in f.releases))
    newest = CODINGS[max(releases, key=list(CODINGS).index)]
    if not any(f.label for f in found) or all(_is_read_as(release, newest) for release in releases):
        return newest
    if len({f.releases for f in found}) > 1:
        raise DataError(
            f"{root} mixes releases, whose label codes differ: its cases are {listing} by their names. "
            f"Choose with --data.release ({', '.join(releases)}), which takes the cases that fit"
        )
    choice = " or ".join(f"{release} ({_YEARS_OF[release]})" for release in releases)
    raise DataError(
        f"{root}: the naming (case {found[0].name}) is that of several releases, whose label codes differ, and "
        f"no name carries a year. Give --data.release {choice}"
    )


def _is_read_as(release: str, coding: Coding) -> bool:
    """Whether the codes of a release mean what those of a coding do, as in 2017 and 2018."""
    return CODINGS[release].tissues == coding.tissues


def _may_be(found: Found, coding: Coding) -> bool:
    """Codes of 2023 mean the same in 2024, but for children, whose names leave both open."""
    return coding.release == "brats2024" and found.releases == ("brats2023",)


def _nothing_found(root: Path, strangers: Sequence[Path], faulty: Sequence[Found]) -> DataError:
    faults = "".join(f"\n  {fault}" for f in faulty for fault in f.faults)
    tasks = [p.parent for p in sorted(root.glob("*/dataset.json"))]
    hints = [f"Did you mean {tasks[0]}?"] if tasks else []
    if strangers:
        hints.append(f"What is there: {_described(strangers)}")
    return DataError(
        f"{root}: no cases found. Looked for dataset.json (Decathlon, nnU-Net), and in it and {_DEPTH} levels below "
        "for .nii or .nii.gz files ending in _flair/_t1/_t1ce/_t2 (2012-2022) or -t2f/-t1n/-t1c/-t2w (2023 on), or "
        f"named Flair_subtrMeanDivStd and alike (2013). {' '.join(hints)}".rstrip()
        + faults
    )


def _described(strangers: Sequence[Path]) -> str:
    """How scans are named that no rule knows, by the last word of their names."""
    words = Counter(re.split(r"[-_. ]", stem_of(path) or "")[-1] for path in strangers)
    counts = some([f"{word} ({count})" for word, count in words.most_common()])
    return (
        f"{len(strangers)} scans are not used: their names tell neither image nor label, or they are labels without "
        f"images; the last words of their names are {printable(counts)}; the first is {printable(str(strangers[0]))}"
    )
