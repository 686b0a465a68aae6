"""What the names of files, folders and cases say: modality, label, patient, time point; and which can't be used.

`in_order` puts the 3D files of one case into the order of a network's modalities, by their names or as the user says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from pipelines.basics.errors import DataError
from pipelines.basics.text import escape_controls, printable

MODALITIES = ("flair", "t1", "t1c", "t2")
SPELLINGS = {
    "flair": ("flair", "t2f", "t2flair"),
    "t1": ("t1", "t1n", "t1w", "t1pre", "t1native"),
    "t1c": ("t1c", "t1ce", "t1gd", "t1gad", "t1post", "t1contrast", "t1km", "t1wc", "t1wce", "t1wgd", "t1wpost",
            "t1+c", "ct1"),
    "t2": ("t2", "t2w"),
}  # fmt: skip
"""How each modality is spelled in file names, lists and options, in any letter case; what follows "t1" or "t2" may
stand apart (`t1_ce`, `T2-FLAIR`)."""
LABEL_SPELLINGS = ("label", "labels", "seg", "segm", "segmentation")
CASE_NAME_BYTES = 200  # a file system takes 255, and the files made of a case are named after it
_MODALITY_OF = {spelling: modality for modality, spellings in SPELLINGS.items() for spelling in spellings}
_APART = "[-_. ]"
_SPELLED = "|".join(re.sub("^(t[12])(.)", rf"\1{_APART}?\2", re.escape(spelling)) for spelling in _MODALITY_OF)
# The end of a file's stem. BIDS puts the contrast agent before the modality (`ce-gd_T1w`). BRATS put a number after it
# until 2015 (`MR_T1c.54514`), and in 2013 how the scan was normalised.
_ENDS_IN_MODALITY = re.compile(
    rf"(?:^|{_APART})(?:(?P<agent>ce-[a-z0-9]+_)t1w?|(?P<spelling>{_SPELLED}))(?:_subtrmeandivstd|\.\d+)?$",
    re.IGNORECASE,
)
_ENDS_IN_LABEL = re.compile(
    rf"(?:^|(?<!brain)(?<!parenchyma){_APART})"
    rf"(?:{'|'.join(LABEL_SPELLINGS)}|tumou?r_?mask|otmulticlass|ot(?=\.\d))(?:\.\d+)?$",
    re.IGNORECASE,
)
TIME_POINT = re.compile(
    r"(?:(?:ses|session|time_?-?point|time|tp|visit|week|month|day)[-_ ]?\d[\d-]*|"
    r"(?:19|20)\d\d[-_]?[01]\d[-_]?[0-3]\d)",
    re.IGNORECASE,
)
"""A name that is nothing but a time point: `ses-02`, `Timepoint_1`, `2017-03-01`."""
_PATIENT_AND_TIME = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(brats\d*-[a-z]+(?:-[a-z]+)*-\d+)-\d+",  # from 2023 on: BraTS-GLI-02062-101
        r"(brats(?:1[2-9])?_(?:2013|tcia\d*|cbica|tmc)_[a-z0-9]+)_\d+",  # until 2019: brats_tcia_pat153_0109
        r"(upenn-gbm-\d+|ucsf-pdgm-\d+)_.+",  # UCSF-PDGM-0289_FU003d
        r"(sub-[a-z0-9]+)_.+",  # BIDS
        rf"(.*\d.*?){_APART}{TIME_POINT.pattern}(?:{_APART}.*)?",
    )
)


def modality_of(path: Path) -> str | None:
    """Which of `MODALITIES` a file's name says, None where it says none: `BraTS2021_00000_t1ce.nii.gz` is t1c."""
    match = _ENDS_IN_MODALITY.search(stem_of(path) or "")
    return match and ("t1c" if match["agent"] else modality_named(match["spelling"]))


def is_label(path: Path) -> bool:
    """Whether a file's name says that it is a label map."""
    return _ENDS_IN_LABEL.search(stem_of(path) or "") is not None


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


def stem_of(path: Path) -> str | None:
    """File name without .nii or .nii.gz; None for other files and for hidden ones (macOS's `._*`)."""
    match = re.fullmatch(r"(?!\.)(.+?)\.nii(\.gz)?", path.name, re.IGNORECASE | re.DOTALL)
    return match and match.group(1)


def case_name_of(files: Sequence[Path]) -> str:
    """The name of a case: that of its files without the modality; that of their folder where nothing is left."""
    stems = [stem_of(path) or path.name for path in files]
    if len(files) == 1:
        return stems[0]
    # t1c and t2f share their t, which is not part of the name.
    common = re.sub(r"(^|[-_. ]+)(t[12]?)?$", "", os.path.commonprefix(stems), flags=re.IGNORECASE)
    return common or files[0].resolve().parent.name


def patient_of(case: str) -> str | None:
    """The patient in the name of a case that also has a time point: BraTS-GLI-02062 of BraTS-GLI-02062-101."""
    matches = (pattern.fullmatch(case) for pattern in _PATIENT_AND_TIME)
    return next((match[1] for match in matches if match), None)


def name_fault(name: str, most_bytes: int | None = None) -> str:
    """Why a case or a path can't have this name; empty where it can."""
    size = len(name.encode("utf-8", "surrogatepass"))
    if most_bytes and size > most_bytes:
        return f"the name of the case, {name[:40]}..., has {size} bytes; files are named after it: at most {most_bytes}"
    is_plain = escape_controls(name) == name and not set("\t\n") & set(name)
    problem = "is not plain text in UTF-8: it holds bytes of another encoding, or control characters"
    return "" if is_plain else f"{printable(name)} {problem}"


def in_order(files: Sequence[Path], needed: Sequence[str], given: Sequence[str] | None = None) -> tuple[Path, ...]:
    """The files of the modalities that are needed, in their order.

    Args:
        files: of one case, in any order where every name says its modality (`modality_of`).
        needed: modalities of the network, in its order.
        given: the modality of each file, as the user says; None: as the names say, else in the order of `needed`.

    Raises:
        ValueError: too many or too few files, one that is given twice (by a link, too), one whose name says another
            modality, or a needed modality without a file.
    """
    _check_different(files)
    named = [modality_of(path) for path in files]
    listing = ", ".join(path.name for path in files)
    by_name = [modality for modality in named if modality]
    order = list(canonical_modalities(given)) if given is not None else by_name if all(named) else list(needed)
    if len(order) != len(files):
        unnamed = [path.name for path, says in zip(files, named) if by_name and not says]
        raise ValueError(
            f"{len(files)} files ({listing}) for {len(order)} modalities: give the files of {', '.join(order)}, in "
            "this order unless every name says its modality (case_flair.nii.gz), or one 4D file"
            + (f"; no modality in {', '.join(unnamed)}" if unnamed else "")
        )
    for path, says, taken in zip(files, named, order):
        if says and says != taken:
            raise ValueError(
                f"{path} is given as {taken}, but its name says {says}: correct the order of the files or of the "
                "modalities, or rename the file"
            )
    for modality in order:
        same = [path.name for path, taken in zip(files, order) if taken == modality]
        if len(same) > 1:
            raise ValueError(
                f"{' and '.join(same)} are both {modality} by name: give one file of each modality of one case"
            )
    missing = [modality for modality in needed if modality not in order]
    if missing:
        raise ValueError(
            f"no {', '.join(missing)} among {listing} ({', '.join(order)}): the network needs {', '.join(needed)}"
        )
    return tuple(files[order.index(modality)] for modality in needed)


def _check_different(files: Sequence[Path]) -> None:
    """Refuse a file that is given twice; a missing one is reported when it is read."""
    first: dict[tuple[int, int], Path] = {}
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            continue
        key = (status.st_dev, status.st_ino)
        if key in first:
            what = "is given twice" if first[key] == path else f"is the same file as {first[key]}"
            raise ValueError(f"{path} {what}: give the file of each modality")
        first[key] = path
