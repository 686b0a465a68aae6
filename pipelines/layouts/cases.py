"""Find the cases of a data set, and split them.

`find_cases` reads a data set of any layout (`pipelines.layouts`), settles the label coding and the modalities, and
returns a `CaseSet` of names and paths: no image is opened. `survey_cases` does the same, but sets faulty cases aside
instead of refusing them. `split_cases` divides the set as MONAI does, in two parts as its `DecathlonDataset` or in
folds as its `partition_dataset`, so that the same seed gives the same cases in both. It divides patients: all time
points of a patient are on the same side.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.option_values import nearest
from pipelines.basics.text import first_few, printable
from pipelines.layouts.folders import from_folders
from pipelines.layouts.found import FoundCase
from pipelines.layouts.labels import Coding, coding_for_release, tutorial_coding
from pipelines.layouts.lists import from_list
from pipelines.layouts.names import CASE_NAME_BYTES, MODALITIES, canonical_modalities, modality_of, name_fault
from pipelines.layouts.tasks import from_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Case:
    """The files of a patient at one time."""

    name: str  # unique in its set
    images: tuple[Path, ...]  # one 3D file per modality, in the order of `CaseSet.modalities`; or one 4D file
    channels: tuple[int, ...] | None  # of a 4D file, the index of each modality on its last axis
    label: Path | None
    patient: str | None = None  # whose cases stay together in a split; None where neither name nor list says


@dataclass(frozen=True)
class CaseSet:
    """Cases that share modalities and label coding."""

    cases: tuple[Case, ...]  # in the order of the data set
    modalities: tuple[str, ...]  # in the order of the network's channels
    coding: Coding
    held_out: tuple[str, ...] = ()  # names of those that the data set itself lists for validation

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the cases, in order."""
        return tuple(case.name for case in self.cases)

    @property
    def patients(self) -> dict[str, tuple[str, ...]]:
        """The names of each patient's cases, by patient, in order; a case without one is its own."""
        found: dict[str, list[str]] = {}
        for case in self.cases:
            found.setdefault(case.patient or case.name, []).append(case.name)
        return {patient: tuple(names) for patient, names in found.items()}

    def select(self, names: Sequence[str]) -> CaseSet:
        """Only the named cases, in the order of `names`. Raises DataError: a name is unknown, or given twice."""
        _check_names(names, self.names, "names")
        by_name = {case.name: case for case in self.cases}
        return replace(self, cases=tuple(by_name[name] for name in names))


@dataclass(frozen=True)
class Survey:
    """What a data set holds by its names and lists."""

    usable: CaseSet  # the cases without a fault, possibly none
    faults: tuple[CaseError, ...]  # of the others, in the order of the cases; a case may have several
    total: int  # number of cases, faulty ones included


def find_cases(
    root: Path,
    release: str | None = None,
    modalities: Sequence[str] | None = None,
    regions: Literal["release", "tutorial"] = "release",
    labelled: bool = True,
) -> CaseSet:
    """Find the cases of a Decathlon task, an nnU-Net folder, BraTS folders, or a JSON or CSV list.

    Args:
        root: the folder, or the list.
        release: a key of `labels.CODINGS`. None reads it from `dataset.json` or the names. Where one root holds cases
            of several releases, it selects those whose names fit; where all say another release, it overrides them.
        modalities: which to use, in this order; None takes all that the data set has, in the order of `MODALITIES`.
        regions: "tutorial" swaps Decathlon's labels 2 and 3, as the published tutorial does (`labels.tutorial_coding`).
        labelled: skip cases without a label, which can't be trained on. False keeps them, and adds those that a
            `dataset.json` or nnU-Net's `imagesTs` has for testing.

    Raises:
        DataError: it lists every fault of every case (a listed file or a modality is missing, two files of one kind, a
            name that occurs twice). Also: no cases, or the release is open or mixed.
        ValueError: unknown release, or regions.
    """
    survey = survey_cases(root, release, modalities, regions, labelled)
    if not survey.faults:
        return survey.usable
    lines = [f"{root}: {survey.total - len(survey.usable.cases)} of {survey.total} cases are faulty"]
    for remedy in dict.fromkeys(fault.remedy for fault in survey.faults):
        lines += [f"  {fault.path}: {fault.problem}" for fault in survey.faults if fault.remedy == remedy]
        lines.append(f"{remedy}.")
    raise DataError("\n".join(lines))


def survey_cases(
    root: Path,
    release: str | None = None,
    modalities: Sequence[str] | None = None,
    regions: Literal["release", "tutorial"] = "release",
    labelled: bool = True,
    unlabelled_as: Coding | None = None,
) -> Survey:
    """Find cases as `find_cases` does, and return the faults of single cases beside the sound ones.

    Args:
        root, release, modalities, regions, labelled: as in `find_cases`.
        unlabelled_as: coding to use instead of an error where names leave the release open or mix several; for uses
            that read no label.

    Raises:
        DataError: what is wrong with the set as a whole: no cases, the release is open or mixed, a modality that no
            case has, a malformed list.
        ValueError: unknown release, or regions.
    """
    root = Path(root)
    fault = name_fault(str(root))
    if fault:
        raise DataError(f"{fault}: rename that folder")
    if regions not in ("release", "tutorial"):
        raise ValueError(f"unknown regions {regions!r}: choose release or tutorial")
    wanted = None if modalities is None else canonical_modalities(modalities)
    asked = None if release is None else coding_for_release(release)
    if root.is_file():
        coding, found = from_list(root, asked, not labelled, unlabelled_as)
    elif (root / "dataset.json").is_file():
        coding, found = from_task(root / "dataset.json", asked, not labelled, unlabelled_as)
    else:
        coding, found = from_folders(root, asked, unlabelled_as)
    if labelled:
        found = _with_label(found, root)
    # The union, so that one case without its T2 is an error, and does not silently drop T2 from all the others.
    present = tuple(m for m in MODALITIES if any(m in case.files for case in found))
    wanted = wanted or present
    absent = [m for m in wanted if m not in present]
    if absent or not present:
        raise DataError(
            f"{root}: no case has {', '.join(absent) or 'an image'}; they have {', '.join(present) or 'none'}: add "
            "the files, or train on what is there with --data.modalities"
        )
    first: dict[str, FoundCase] = {}
    faults = [_faults_of(case, wanted, first.setdefault(case.name, case)) for case in found]
    sound = [case for case, its_faults in zip(found, faults, strict=True) if not its_faults]
    usable = tuple(_case(case, wanted) for case in sound)
    coding = tutorial_coding(coding) if regions == "tutorial" else coding
    held_out = tuple(case.name for case in sound if case.held_out)
    return Survey(CaseSet(usable, wanted, coding, held_out), tuple(itertools.chain(*faults)), len(found))


def _faults_of(found: FoundCase, modalities: Sequence[str], first: FoundCase) -> list[CaseError]:
    """The faults of a case; `first` is the first case of its name."""
    faults = [*found.faults]
    at_fault = {modality_of(fault.path) for fault in found.faults}  # not missing, and reported already
    missing = [m for m in modalities if m not in found.files and m not in at_fault]
    if missing and (found.files or not faults):
        have = [m for m in MODALITIES if m in found.files]
        problem = f"case {found.name}: modality {', '.join(missing)} is missing; it has {', '.join(have) or 'none'}"
        if found.unused:
            problem += f", and {first_few([path.name for path in found.unused])}, whose names match no modality"
        remedy = "Add the file, move the case away, or train on what all cases have with --data.modalities"
        faults.append(CaseError(found.source, problem, remedy))
    if first is not found:
        problem = f"case {found.name}: another case has this name ({first.source}); names must be unique"
        faults.append(CaseError(found.source, problem, "Rename one of them"))
    names = (str(path) for path in (*found.files.values(), found.label) if path)
    bad_name = name_fault(found.name, CASE_NAME_BYTES) or next(filter(None, map(name_fault, names)), "")
    if bad_name:
        faults.append(CaseError(found.source, bad_name, "Rename it"))
    return faults


def _case(found: FoundCase, modalities: Sequence[str]) -> Case:
    files = tuple(found.files[m] for m in modalities)
    channels = found.channels and tuple(found.channels[m] for m in modalities)
    return Case(found.name, files[:1] if channels else files, channels or None, found.label, found.patient)


def _with_label(found: Sequence[FoundCase], root: Path) -> list[FoundCase]:
    skipped = [case.name for case in found if case.label is None and not case.faults]
    if len(skipped) == len(found):
        raise DataError(f"{root}: none of its {len(found)} cases has a label map: training and evaluation need one")
    if skipped:
        names = printable(first_few(skipped))
        log.warning("%d of %d cases have no label and are skipped: %s", len(skipped), len(found), names)
    return [case for case in found if case.label is not None or case.faults]


def split_cases(
    case_set: CaseSet,
    val_fraction: float = 0.2,
    seed: int = 0,
    train_cases: Sequence[str] | None = None,
    val_cases: Sequence[str] | None = None,
    folds: int = 0,
    fold: int | None = None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split by the rule of `monai.apps.DecathlonDataset`, in its order: shuffle, the first int(n * fraction) validate.

    n counts patients, so that no patient is on both sides; where each has one case, that is MONAI's split of the cases.
    At least one patient validates where val_fraction > 0 (MONAI: none for fewer than 1 / fraction cases). With `folds`
    the rule is that of `monai.data.partition_dataset`: after the same shuffle every `folds`-th patient validates, from
    the `fold`-th on. Cases that the data set lists for validation (`CaseSet.held_out`) validate, unless names or folds
    are given.

    Args:
        val_fraction: from 0 to less than 1. Ignored for a side that is given by name, and with folds.
        seed: of the shuffle.
        train_cases, val_cases: names, which override the rule. With one of the two, the other side is all other cases.
            A case in both, or a patient on both sides, is allowed (to overfit on it) with a warning.
        folds: 0, or the number of folds. fold: the one that validates, from 0.

    Returns:
        names of the training cases, names of the validation cases.

    Raises:
        DataError: an unknown or repeated name, a fraction out of range, a fold that does not exist, names beside folds,
            more folds than patients, or nothing left to train on.
    """
    names, patients = case_set.names, case_set.patients
    check_folds(folds, fold, train_cases, val_cases)
    if folds > len(patients):
        of = "cases" if len(patients) == len(names) else f"patients ({len(names)} cases)"
        raise DataError(
            f"--data.folds {folds} must be at most the number of {of}, {len(patients)}: with {len(patients)} each is a "
            "fold of its own"
        )
    if not 0 <= val_fraction < 1:
        raise DataError(f"--data.val_fraction {val_fraction} must be at least 0 and less than 1: 0.2 is usual")
    for option, given in (("--data.train_cases", train_cases), ("--data.val_cases", val_cases)):
        _check_names(given or (), names, option)
    if train_cases is None and val_cases is None and not folds and case_set.held_out:
        log.info("validating the %d cases that the data set lists for it", len(case_set.held_out))
        val_cases = case_set.held_out
    if train_cases is None and val_cases is None:
        order = np.arange(len(patients))
        np.random.RandomState(seed % 2**32).shuffle(order)  # MONAI's generator and its reduction of the seed
        val_length = max(int(len(patients) * val_fraction), int(val_fraction > 0))
        held_out = slice(fold, None, folds) if folds else slice(val_length)
        cases_of = tuple(patients.values())
        train = tuple(name for i in np.delete(order, held_out) for name in cases_of[i])
        val = tuple(name for i in order[held_out] for name in cases_of[i])
    else:
        train = _others(names, val_cases) if train_cases is None else tuple(train_cases)
        val = _others(names, train_cases) if val_cases is None else tuple(val_cases)
    if not train:
        raise DataError(
            f"no case is left to train on: {len(names)} in all, of {len(patients)} patient(s), {len(val)} for "
            "validation. Add cases, set --data.val_fraction to 0, or name a case in both --data.train_cases and "
            "--data.val_cases to overfit on it"
        )
    _warn_if_shared(patients, set(train), set(val))
    return train, val


def _warn_if_shared(patients: Mapping[str, Sequence[str]], train: set[str], val: set[str]) -> None:
    both = [name for names in patients.values() for name in names if name in train & val]
    if both:
        log.warning("%s: both trained on and validated, so this Dice says nothing about new cases", first_few(both))
    shared = [p for p, names in patients.items() if not train.isdisjoint(names) and not val.isdisjoint(names)]
    apart = [patient for patient in shared if not set(patients[patient]) <= train & val and len(patients[patient]) > 1]
    if apart:
        log.warning(
            "patient %s: some time points are trained on and others validated, so this Dice is too high: name all "
            "cases of a patient on one side",
            first_few(apart),
        )


def check_folds(
    folds: int, fold: int | None, train_cases: Sequence[str] | None = None, val_cases: Sequence[str] | None = None
) -> None:
    """Refuse folds that no data set could have. Arguments and errors as in `split_cases`."""
    if folds == 0:
        if fold is not None:
            raise DataError(f"--data.fold {fold} needs --data.folds, the number of folds: 5 is usual")
        return
    if folds < 2:
        raise DataError(f"--data.folds {folds} must be at least 2, or 0 for the split by --data.val_fraction")
    if fold is None or not 0 <= fold < folds:
        given = "without --data.fold" if fold is None else f"with --data.fold {fold}"
        raise DataError(f"--data.folds {folds} {given}: give the fold that validates, 0 to {folds - 1}")
    for option, names in (("--data.train_cases", train_cases), ("--data.val_cases", val_cases)):
        if names is not None:
            raise DataError(f"--data.folds {folds} and {option} are two ways to split: give only one of them")


def _others(names: Sequence[str], given: Sequence[str] | None) -> tuple[str, ...]:
    taken = set(given or ())
    return tuple(name for name in names if name not in taken)


def _check_names(given: Sequence[str], names: Sequence[str], option: str) -> None:
    for name, count in Counter(given).items():
        if name not in names:
            near = nearest(name, names)
            hint = f" Did you mean {near}?" if near else ""
            raise DataError(f"{option}: there is no case {name!r} among {len(names)} ({first_few(names)}).{hint}")
        if count > 1:
            raise DataError(f"{option}: case {name!r} is named {count} times: name it once")
