"""Label codings of the BraTS releases, and the three regions that are scored.

A label map holds one tissue code per voxel, and what a code means changed between releases:

    release        years                   1               2               3               4
    decathlon      MSD Task01              oedema          non-enhancing   enhancing       -
    brats2013      2013 to 2017            necrosis        oedema          non-enhancing   enhancing
    brats2018      2018 to 2022            non-enhancing   oedema          -               enhancing
    brats2023      2023                    necrosis        oedema          enhancing       -
    brats2024      2024 on, adults         necrosis        oedema          enhancing       resection cavity
    brats2024-ped  2024 on, children       enhancing       non-enhancing   cyst            oedema

"non-enhancing" of decathlon and brats2018 includes the necrosis. Codes {1, 2, 3} and {1, 2, 3, 4} fit several rows, so
a coding is never guessed from the values: it comes from `dataset.json`'s label names, the files' names, or the user.

What is scored is the same for all: TC (tumour core: everything but oedema), WT (whole tumour: everything) and ET
(enhancing tumour), always in this order. They overlap, so a region map has one channel per region. The cavity that
surgery leaves is no tumour (BraTS 2024, arXiv:2405.18368) and in none of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

REGIONS = ("TC", "WT", "ET")
OEDEMA, NECROSIS, NON_ENHANCING, ENHANCING = "oedema", "necrosis", "non-enhancing", "enhancing"
CYST, CAVITY = "cyst", "resection cavity"
TUTORIAL = "decathlon-tutorial"


@dataclass(frozen=True)
class Coding:
    """What the values of a label map mean.

    Args:
        release: name of the coding, a key of `CODINGS` or `TUTORIAL`.
        tissues: label value -> tissue; background (0) is left out.
        regions: the label values of TC, WT and ET, in that order.
    """

    release: str
    tissues: dict[int, str]
    regions: tuple[tuple[int, ...], ...]

    @property
    def values(self) -> tuple[int, ...]:
        """All values that a label map may hold, 0 included."""
        return (0, *sorted(self.tissues))


def _coding(release: str, tissues: dict[int, str]) -> Coding:
    whole = tuple(v for v in sorted(tissues) if tissues[v] != CAVITY)
    core = tuple(v for v in whole if tissues[v] != OEDEMA)
    enhancing = tuple(v for v in whole if tissues[v] == ENHANCING)
    return Coding(release, tissues, (core, whole, enhancing))


CODINGS: dict[str, Coding] = {
    "decathlon": _coding("decathlon", {1: OEDEMA, 2: NON_ENHANCING, 3: ENHANCING}),
    "brats2013": _coding("brats2013", {1: NECROSIS, 2: OEDEMA, 3: NON_ENHANCING, 4: ENHANCING}),
    "brats2018": _coding("brats2018", {1: NON_ENHANCING, 2: OEDEMA, 4: ENHANCING}),
    "brats2023": _coding("brats2023", {1: NECROSIS, 2: OEDEMA, 3: ENHANCING}),
    "brats2024": _coding("brats2024", {1: NECROSIS, 2: OEDEMA, 3: ENHANCING, 4: CAVITY}),
    "brats2024-ped": _coding("brats2024-ped", {1: ENHANCING, 2: NON_ENHANCING, 3: CYST, 4: OEDEMA}),
}


def coding_for_release(release: str) -> Coding:
    """The coding of a release.

    Raises:
        ValueError: the release is not a key of `CODINGS`.
    """
    if release not in CODINGS:
        raise ValueError(f"unknown release {release!r}: choose one of {', '.join(CODINGS)}")
    return CODINGS[release]


def _tissue(name: str) -> str | None:
    """The tissue that a label name of a `dataset.json` speaks of; None where it speaks of none."""
    text = name.lower().replace("_", "-").replace(" ", "-")
    if "edema" in text:
        return OEDEMA
    if "non-enhanc" in text or "nonenhanc" in text:  # before "enhanc"; a joint "necrotic and non-enhancing" is this too
        return NON_ENHANCING
    if "necro" in text:
        return NECROSIS
    if "cavity" in text:
        return CAVITY
    return ENHANCING if "enhanc" in text else None


def coding_from_dataset_json(labels: Mapping[str, str]) -> Coding:
    """The coding that a Decathlon `dataset.json` states.

    Args:
        labels: its "labels" entry, label value -> name: {"0": "background", "1": "edema", ...}.

    Raises:
        ValueError: a value is not an integer from 0 to 255, a name is not a known tissue, or oedema or enhancing
            tumour is missing.
    """
    tissues: dict[int, str] = {}
    for key, name in labels.items():
        if not str(key).isdecimal() or int(key) > 255:
            raise ValueError(f"label value {key!r} ({name!r}) must be an integer from 0 to 255: correct dataset.json")
        if int(key) == 0:
            continue
        tissue = _tissue(str(name))
        if tissue is None:
            raise ValueError(
                f"label {key} is named {name!r}, which is no known tissue: name it edema, non-enhancing tumor, "
                "necrosis or enhancing tumour in dataset.json, or give the release"
            )
        tissues[int(key)] = tissue
    missing = [t for t in (OEDEMA, ENHANCING) if t not in tissues.values()]
    if missing:
        raise ValueError(f"labels {dict(labels)} lack {', '.join(missing)}: correct dataset.json, or give the release")
    return _coding("decathlon", tissues)


def tutorial_coding(coding: Coding) -> Coding:
    """The published MONAI tutorial's reading of Decathlon labels: 2 for enhancing, 3 for non-enhancing tumour.

    `dataset.json` names them the other way round (Project-MONAI/tutorials#1355). It exists to compare with figures that
    were made with it: TC and WT are unaffected, ET is another region.

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
    table = np.zeros((len(REGIONS), 256), dtype=bool)
    for row, members in zip(table, coding.regions, strict=True):
        row[list(members)] = True
    return np.stack([row[labels] for row in table])
