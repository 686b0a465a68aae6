"""BraTS folders: a folder per case, one 3D file per modality, up to three levels below the root, or the root itself.

A file's name says which modality it is, or that it is the label (`pipelines.layouts.names`). The rest of the naming
gives the release, in part:
    -t2f -t1n -t1c -t2w -seg                 2023 on; adults of 2024 add one value, the resection cavity, and a label
                                             that has it needs the release. The coding of children (BraTS-PED-*) changed
                                             in 2024: a year decides; without one the release must be given
    Flair_subtrMeanDivStd ... OTMultiClass   2013 (as re-released, z-scored), and likewise VSD.Brain.XX.O.MR_Flair.54512
    all others (_flair _t1 _t1ce _t2 _seg)   2012 to 2022: until 2016 there were four tissues, so a year in a name
                                             decides (`BraTS20_Training_001`); without one the release must be given
Real data spell these in any letter case (`t2W`); one case of BraTS 2020 has its label in `W39_1998.09.19_Segm.nii`; on
Kaggle files lie in folders named like them (`X_flair.nii/00000057_brain_flair.nii`).

A case has the name of its folder. A folder named after a time point alone (`ses-02`), or `anat` as in BIDS, takes the
names of those above it too, up to the patient's.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.input_files import file_fault, is_annexed
from pipelines.basics.text import first_few, printable
from pipelines.layouts.found import FoundCase
from pipelines.layouts.labels import CODINGS, Coding
from pipelines.layouts.names import TIME_POINT, is_label, modality_of, patient_of, stem_of

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
_Scan = tuple[Path, Path]  # the path whose name says what it is, and the file; they differ on Kaggle
_MOVE_AWAY = "Change its permissions, or move it out of the data set"


def from_folders(
    root: Path, asked: Coding | None, unlabelled_as: Coding | None = None
) -> tuple[Coding, list[FoundCase]]:
    """The cases of BraTS folders, sorted by path, of one release; of any with `unlabelled_as` (see `survey_cases`).

    Raises:
        DataError: no folder, no case in it, or a release left open or mixed.
    """
    if not root.is_dir():
        raise DataError(f"{root} does not exist: give a Decathlon task folder, a BraTS folder, or a .json or .csv list")
    found: list[FoundCase] = []
    unused: list[Path] = []  # scans that belong to no case
    for folder, scans, faults in _walk(root, _DEPTH):
        case = _folder_case(folder, root, scans, faults)
        if case:
            found.append(case)
        unused += case.unused if case else [named for named, _ in scans]
    readable = [case for case in found if case.files]
    if not readable:
        raise _nothing_found(root, unused, found)
    if unused:
        log.warning("%s: %s", root, _describe_unused(unused))
    if unlabelled_as:
        releases = {release for case in readable for release in case.releases}
        return asked or (CODINGS[releases.pop()] if len(releases) == 1 else unlabelled_as), found
    if asked is None:
        return _release_by_name(readable, root), found
    fitting = {id(case) for case in _cases_that_fit(readable, root, asked)}
    return asked, [case for case in found if id(case) in fitting or not case.files]


def _walk(folder: Path, depth: int) -> Iterator[tuple[Path, list[_Scan], list[CaseError]]]:
    """A folder and those below it, sorted, each with its scans and its faults."""
    scans, folders, faults = list[_Scan](), list[Path](), list[CaseError]()
    try:
        entries = _entries(folder)
    except CaseError as error:
        entries = []
        faults.append(error)
    for path, is_folder in entries:
        if _kind_of(path):
            try:
                scans.append((path, _scan(path, is_folder)))
            except CaseError as error:
                faults.append(error)
        elif is_folder:
            folders.append(path)
        elif stem_of(path):
            scans.append((path, path))
    yield folder, scans, faults
    here = os.path.realpath(folder)
    for inner in folders if depth else ():
        # A link to a folder above would lead here again.
        if not inner.is_symlink() or not Path(here).is_relative_to(os.path.realpath(inner)):
            yield from _walk(inner, depth - 1)


def _kind_of(path: Path) -> str | None:
    """A modality or "label", as the name says; None where it says neither."""
    return modality_of(path) or ("label" if is_label(path) else None)


def _entries(folder: Path) -> list[tuple[Path, bool]]:
    """What is in a folder, sorted, without hidden files; and whether each is a folder. Raises CaseError."""
    try:
        with os.scandir(folder) as entries:
            seen = (entry for entry in entries if not entry.name.startswith(".") and entry.name != _OF_THE_DISK)
            return sorted((Path(entry.path), _is_folder(entry)) for entry in seen)
    except OSError as error:
        broken = file_fault(folder, remedy=_MOVE_AWAY) if not os.path.exists(folder) else None
        raise broken or CaseError(folder, f"the folder can't be read ({error.strerror})", _MOVE_AWAY) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a broken link that must have led to one."""
    if not entry.is_symlink():
        return entry.is_dir()
    if os.path.exists(entry.path):
        return os.path.isdir(entry.path)
    return not Path(entry.name).suffix and not is_annexed(entry.path)


def _scan(path: Path, is_folder: bool) -> Path:
    """A file that is named like a scan; of a folder that is named like one, as on Kaggle, the scan in it.

    Raises:
        CaseError: no regular file; no scan in the folder, several, or one of another modality.
    """
    scans = [each for each, is_inner in _entries(path) if stem_of(each) and not is_inner] if is_folder else [path]
    if len(scans) != 1:
        problem = f"is a folder named like a scan and holds {len(scans)} scans, must hold one"
        raise CaseError(path, problem, "Put the scan itself in its place")
    says, means = modality_of(scans[0]), modality_of(path)
    if says and says != means:
        problem = f"is {says} by name, but its folder says {means or 'label'}"
        raise CaseError(scans[0], problem, "Find out which is right, and rename the other")
    fault = file_fault(scans[0])
    if fault:
        raise fault
    return scans[0]


def _folder_case(
    folder: Path, root: Path, scans: Sequence[_Scan], other_faults: Sequence[CaseError]
) -> FoundCase | None:
    """The case in a folder; None where no file is named like an image."""
    files: dict[str, Path] = {}
    path_named: dict[str, Path] = {}
    twice: list[CaseError] = []  # at most one: a folder of many cases has as many duplicates as files
    for named, scan in scans:
        kind = _kind_of(named)
        if kind in path_named and not twice:
            names = f"{path_named[kind].name} and {named.name}"
            remedy = "Remove one, give each case its own folder, or use a .csv list"
            twice = [CaseError(folder, f"{names} are both {kind}; a folder holds one file of each kind", remedy)]
        if kind:
            files[kind], path_named[kind] = scan, named
    label, faults = files.pop("label", None), (*other_faults, *twice)
    if not files and not faults:
        return None
    name, patient = _name_and_patient(folder, root)
    releases = _releases([*path_named.values()], folder, root) if files else ()
    unused = tuple(named for named, _ in scans if not _kind_of(named))
    return FoundCase(name, folder, files, None, label, releases, faults, patient, unused)


def _name_and_patient(folder: Path, root: Path) -> tuple[str, str | None]:
    """Name and patient of the case in a folder."""
    parts: list[str] = []
    for each in _up_to(root, folder):
        part = _own_name(each)
        is_anat = part.lower() == "anat"
        if not is_anat or each == root:
            parts.insert(0, part)
        if not is_anat and not TIME_POINT.fullmatch(part):
            break
    name = "_".join(parts)
    return name, patient_of(name) or (parts[0] if len(parts) > 1 else None)


def _up_to(root: Path, folder: Path) -> list[Path]:
    """A folder and those above it up to the root."""
    return [folder, *(each for each in folder.parents if each.is_relative_to(root))]


def _own_name(folder: Path) -> str:
    return os.path.basename(os.path.realpath(folder))  # also of a root that is "."; resolve() may raise


def _releases(files: Sequence[Path], folder: Path, root: Path) -> tuple[str, ...]:
    """The releases that the names of a case's files, of its folder and of those up to the root allow."""
    stems = [stem_of(path) or "" for path in files]
    if any(map(_UNTIL_2013.search, stems)):
        return ("brats2013",)
    names = [path.name for path in files]
    # The year in the name nearest to the files: theirs, then the case's folder, up to the root.
    matches = map(_YEAR.search, [*names, *map(_own_name, _up_to(root, folder))])
    year = next((2000 + int(match[1] or match[2]) % 100 for match in matches if match), None)
    if not any(map(_FROM_2023.search, stems)):
        until = {2016: "brats2013", 2017: "brats2017", 2022: "brats2018", 9999: "brats2023"}
        if year is None:
            return "brats2013", "brats2018"
        return (next(release for last, release in until.items() if year <= last),)
    is_child = any(map(_CHILDREN.match, (*names, _own_name(folder))))
    if is_child and year is None:
        return "brats2023", "brats2024-ped"
    if year is None or year < 2024:
        return ("brats2023",)
    return ("brats2024-ped" if is_child else "brats2024",)


def _cases_that_fit(found: list[FoundCase], root: Path, asked: Coding) -> list[FoundCase]:
    """The cases whose names allow the coding; all where they all say another release."""
    counts = _count_releases(found)
    fits = [case for case in found if _allows(case.releases, asked)]
    if fits:
        if len(fits) < len(found):
            log.warning("release %s: %d of %d cases fit by name (%s)", asked.release, len(fits), len(found), counts)
        return fits
    if len({case.releases for case in found}) > 1:
        raise DataError(f"{root}: no case fits release {asked.release}; by name, its cases are {counts}")
    log.warning("%s: names say %s; read as %s, as requested", root, counts, asked.release)
    return found


def _count_releases(found: Sequence[FoundCase]) -> str:
    counts = Counter(case.releases for case in found)
    return ", ".join(f"{count} of {' or '.join(releases)}" for releases, count in counts.items())


def _allows(releases: Sequence[str], coding: Coding) -> bool:
    """Whether one of the releases codes as `coding` does: 2018 as 2017, and 2024 as 2023 except for children."""
    is_adult_2024 = coding.release == "brats2024" and tuple(releases) == ("brats2023",)
    return is_adult_2024 or any(CODINGS[release].tissues == coding.tissues for release in releases)


def _release_by_name(found: list[FoundCase], root: Path) -> Coding:
    """The coding that the names of cases say; any where no case has a label."""
    releases = list(dict.fromkeys(release for case in found for release in case.releases))
    newest = CODINGS[max(releases, key=list(CODINGS).index)]
    if not any(case.label for case in found) or all(CODINGS[release].tissues == newest.tissues for release in releases):
        return newest
    if len({case.releases for case in found}) > 1:
        raise DataError(
            f"{root} mixes releases, whose label codes differ: by name, its cases are {_count_releases(found)}. "
            f"Choose one with --data.release ({', '.join(releases)}), which takes the cases that fit"
        )
    choice = " or ".join(f"{release} ({_YEARS_OF[release]})" for release in releases)
    raise DataError(
        f"{root}: the naming (case {found[0].name}) fits several releases, whose label codes differ, and no name has "
        f"a year. Give --data.release {choice}"
    )


def _nothing_found(root: Path, unused: Sequence[Path], faulty: Sequence[FoundCase]) -> DataError:
    faults = "".join(f"\n  {fault}" for case in faulty for fault in case.faults)
    hints = [f"Did you mean {path.parent}?" for path in sorted(root.glob("*/dataset.json"))[:1]]
    if unused:
        hints.append(f"What is there: {_describe_unused(unused)}")
    return DataError(
        f"{root}: no cases found. Looked for dataset.json (Decathlon, nnU-Net), and in it and {_DEPTH} levels below "
        "for .nii or .nii.gz files ending in _flair/_t1/_t1ce/_t2 (2012-2022) or -t2f/-t1n/-t1c/-t2w (2023 on), or "
        f"named like Flair_subtrMeanDivStd (2013). {' '.join(hints)}".rstrip()
        + faults
    )


def _describe_unused(unused: Sequence[Path]) -> str:
    """How the scans that match no rule are named, by the last word of their names."""
    words = Counter(re.split(r"[-_. ]", stem_of(path) or "")[-1] for path in unused)
    counts = first_few([f"{word} ({count})" for word, count in words.most_common()])
    return (
        f"{len(unused)} scans are not used: their names say neither modality nor label, or they are labels without "
        f"images; the last words of their names are {printable(counts)}; the first is {printable(str(unused[0]))}"
    )
