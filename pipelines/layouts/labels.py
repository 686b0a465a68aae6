"""Label codings of the BraTS releases, and the three regions that are scored.

A label map holds one tissue code per voxel, and what a code means changed between releases:

    release        years                   1               2               3               4
    decathlon      MSD Task01              oedema          non-enhancing   enhancing       -
    brats2013      2012 to 2016            necrosis        oedema          non-enhancing   enhancing
    brats2017      2017                    non-enhancing   oedema          -               enhancing
    brats2018      2018 to 2022            non-enhancing   oedema          -               enhancing
    brats2023      2023                    necrosis        oedema          enhancing       -
    brats2024      2024 on, adults         necrosis        oedema          enhancing       resection cavity
    brats2024-ped  2024 on, children       enhancing       non-enhancing   cyst            oedema

"non-enhancing" of decathlon, brats2017 and brats2018 includes the necrosis. Codes {1, 2, 3} and {1, 2, 3, 4} fit
several rows, so a coding is never guessed from the values: it comes from the label names in `dataset.json`, the
files' names, or the user.

The scored regions are the same for all: TC (tumour core: everything but oedema), WT (whole tumour: everything) and ET
(enhancing tumour), always in this order. They overlap, so a region map has one channel per region. The cavity left by
surgery is not tumour (BraTS 2024, arXiv:2405.18368) and belongs to no region.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipelines.basics.text import brief

REGIONS = ("TC", "WT", "ET")
OEDEMA, NECROSIS, NON_ENHANCING, ENHANCING = "oedema", "necrosis", "non-enhancing", "enhancing"
CYST, CAVITY = "cyst", "resection cavity"
TUTORIAL = "decathlon-tutorial"


@dataclass(frozen=True)
class Coding:
    """What the values of a label map mean."""

    release: str  # name of the coding, a key of `CODINGS` or `TUTORIAL`
    tissues: dict[int, str]  # label value -> tissue, without background (0)
    regions: tuple[tuple[int, ...], ...]  # the label values of TC, WT and ET, in that order

    @property
    def values(self) -> tuple[int, ...]:
        """All values that a label map may hold, 0 included."""
        return (0, *sorted(self.tissues))


def _coding(release: str, tissues: dict[int, str]) -> Coding:
    whole = tuple(v for v in sorted(tissues) if tissues[v] != CAVITY)
    core = tuple(v for v in whole if tissues[v] != OEDEMA)
    enhancing = tuple(v for v in whole if tissues[v] == ENHANCING)
    return Coding(release, tissues, (core, whole, enhancing))


Release = Literal["decathlon", "brats2013", "brats2017", "brats2018", "brats2023", "brats2024", "brats2024-ped"]
CODINGS: dict[str, Coding] = {
    "decathlon": _coding("decathlon", {1: OEDEMA, 2: NON_ENHANCING, 3: ENHANCING}),
    "brats2013": _coding("brats2013", {1: NECROSIS, 2: OEDEMA, 3: NON_ENHANCING, 4: ENHANCING}),
    "brats2017": _coding("brats2017", {1: NON_ENHANCING, 2: OEDEMA, 4: ENHANCING}),
    "brats2018": _coding("brats2018", {1: NON_ENHANCING, 2: OEDEMA, 4: ENHANCING}),
    "brats2023": _coding("brats2023", {1: NECROSIS, 2: OEDEMA, 3: ENHANCING}),
    "brats2024": _coding("brats2024", {1: NECROSIS, 2: OEDEMA, 3: ENHANCING, 4: CAVITY}),
    "brats2024-ped": _coding("brats2024-ped", {1: ENHANCING, 2: NON_ENHANCING, 3: CYST, 4: OEDEMA}),
}


def coding_for_release(release: str) -> Coding:
    """The coding of a release. Raises ValueError: it is not a key of `CODINGS`."""
    if release not in CODINGS:
        raise ValueError(f"unknown release {release!r}: choose one of {', '.join(CODINGS)}")
    return CODINGS[release]


# The first pattern that is found decides: "necrotic and non-enhancing" is non-enhancing.
_TISSUE_NAMES = {
    r"edema|^(ed|snfh)$": OEDEMA,
    r"non-?enhanc|^(netc?|ncr[/-]net)$": NON_ENHANCING,
    r"necro|^ncr$": NECROSIS,
    r"cavity|^rc$": CAVITY,
    r"cyst|^cc$": CYST,
    r"enhanc|^et$": ENHANCING,
}


def _tissue(name: str) -> str | None:
    """The tissue that a label name in a `dataset.json` means; None where it means none."""
    text = re.sub("[_ ]", "-", name.lower().strip())
    return next((tissue for pattern, tissue in _TISSUE_NAMES.items() if re.search(pattern, text)), None)


def coding_from_dataset_json(labels: Mapping[str, Any]) -> Coding:
    """The coding that a `dataset.json` states, of Decathlon or of nnU-Net.

    Args:
        labels: its "labels" entry: label value -> name, {"0": "background", "1": "edema", ...}; or, as nnU-Net has it,
            name -> label value; or region -> its label values, {"whole tumor": [1, 2, 3], "tumor core": [2, 3], ...}.

    Raises:
        ValueError: a value is not an integer from 0 to 255 or is used twice, a name is not a known tissue or region, or
            oedema or enhancing tumour is missing.
    """
    if any(isinstance(value, list) for value in labels.values()):
        return _coding_from_regions(labels)
    by_name = not any(re.fullmatch("[0-9]+", key) for key in labels)
    tissues: dict[int, str] = {}
    for key, name in ((value, key) if by_name else (key, value) for key, value in labels.items()):
        value = _label_value(key, name)
        tissue = _tissue(name) if isinstance(name, str) else None
        if value == 0 and tissue is None:
            continue
        if tissue is None or value == 0 or value in tissues:
            problem = "is used twice" if value in tissues else "is the background" if tissue else "is not a tissue"
            raise ValueError(
                f"label {value} is named {brief(name)}, which {problem}: name it edema, non-enhancing tumor, "
                "necrosis or enhancing tumour in dataset.json, or give the release"
            )
        tissues[value] = tissue
    missing = [t for t in (OEDEMA, ENHANCING) if t not in tissues.values()]
    if missing:
        raise ValueError(
            f"labels {brief(dict(labels), 200)} lack {', '.join(missing)}: correct dataset.json, or give the release"
        )
    return _coding_of(tissues)


def _coding_of(tissues: dict[int, str]) -> Coding:
    """The newest release's coding with these tissues, else a new one under Decathlon's name."""
    known = (coding for coding in reversed(CODINGS.values()) if coding.tissues == tissues)
    return next(known, _coding("decathlon", tissues))


def _label_value(value: Any, name: Any) -> int:
    text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not re.fullmatch("0*[0-9]{1,3}", text) or int(text) > 255:
        raise ValueError(
            f"label value {brief(value)} ({brief(name)}) must be an integer from 0 to 255: correct dataset.json"
        )
    return int(text)


_REGION_NAMES = {"TC": "tc|tumou?rcore", "WT": "wt|wholetumou?r", "ET": "et|enhancingtumou?r"}


def _coding_from_regions(labels: Mapping[str, Any]) -> Coding:
    """The coding of nested regions: whole tumour outside the core is oedema, the core outside ET does not enhance."""
    members: dict[str, set[int]] = {}
    for name, values in labels.items():
        word = re.sub("[-_ ]", "", name.lower())
        region = next((region for region, names in _REGION_NAMES.items() if re.fullmatch(names, word)), None)
        found = {_label_value(value, name) for value in (values if isinstance(values, list) else [values])}
        if region is None and found != {0}:
            raise ValueError(
                f"label {brief(name)} is not a scored region: name them whole tumor, tumor core and enhancing "
                "tumor in dataset.json, or give the release"
            )
        if region:
            members[region] = found
    if len(members) < 3 or not members["ET"] < members["TC"] < members["WT"] or 0 in members["WT"]:
        raise ValueError(
            f"regions {brief(dict(labels), 200)} must be whole tumor, tumor core and enhancing tumor, each within the "
            "one before: correct dataset.json, or give the release"
        )
    tissues = dict.fromkeys(members["WT"], OEDEMA)
    tissues |= dict.fromkeys(members["TC"], NON_ENHANCING) | dict.fromkeys(members["ET"], ENHANCING)
    return _coding_of(dict(sorted(tissues.items())))


def tutorial_coding(coding: Coding) -> Coding:
    """The published MONAI tutorial's reading of Decathlon labels: 2 for enhancing, 3 for non-enhancing tumour.

    `dataset.json` names them the other way round (Project-MONAI/tutorials#1355). It exists for comparison with figures
    made with it: TC and WT are unaffected, ET is another region.

    Raises:
        ValueError: the coding is not Decathlon's.
    """
    if coding.tissues != CODINGS["decathlon"].tissues:
        raise ValueError(
            f"regions 'tutorial' is a reading of Decathlon's labels, and these are {coding.release}'s "
            f"{coding.tissues}: use regions 'release'"
        )
    warnings.warn(
        "regions 'tutorial': label 2 is scored as enhancing tumour (ET), as the published tutorial does, though "
        "dataset.json says that it is non-enhancing tumour and 3 is enhancing. ET is therefore not comparable with "
        "BraTS results; use regions 'release' for those.",
        stacklevel=2,
    )
    return _coding(TUTORIAL, {1: OEDEMA, 2: ENHANCING, 3: NON_ENHANCING})


def regions_from_labels(labels: np.ndarray, coding: Coding) -> np.ndarray:
    """The masks of TC, WT and ET.

    Args:
        labels: label map, uint8, any shape.
        coding: what its values mean.

    Returns:
        bool, (3, *labels.shape), channels in the order of `REGIONS`. A value outside the coding is in no region.

    Raises:
        ValueError: labels are not uint8.
    """
    if labels.dtype != np.uint8:
        raise ValueError(f"label map is {labels.dtype}, must be uint8: round it and cast it first")
    tables = np.stack([np.isin(np.arange(256), members) for members in coding.regions])
    return np.stack([is_member[labels] for is_member in tables])
