"""Data sets described by one JSON file: a Decathlon task, MONAI's datalists, nnU-Net's raw folders.

* A Medical Segmentation Decathlon task: a folder with `dataset.json`. One 4D image per case; "modality" names its last
  axis, "labels" names the label values, "training" lists the cases. Order is the file's: the split depends on it.
* MONAI's datalist: the same lists, "training", "validation" and "testing". "image" is a 4D file or a list of 3D files.
  The rest may be missing: then a file's name says its modality, and the user what the labels mean. The cases under
  "validation" validate.
* nnU-Net's raw folder: `dataset.json` with "channel_names", "labels" and "file_ending"; the files are
  `imagesTr/CASE_0000.nii.gz`, one for each channel, `labelsTr/CASE.nii.gz` and `imagesTs/`, or are listed under
  "dataset". Its first version has a Decathlon `dataset.json` beside such files.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.input_files import read_json
from pipelines.basics.text import brief, first_few
from pipelines.layouts.found import FoundCase, listed_case, require_text, unstated_coding
from pipelines.layouts.labels import Coding, coding_from_dataset_json
from pipelines.layouts.names import case_name_of, modality_named, modality_of, patient_of, stem_of

log = logging.getLogger(__name__)

_LISTS = ("training", "validation", "test", "testing")


def describes_task(content: Any) -> bool:
    """Whether the content of a JSON file is a task or a datalist, not a plain list of records."""
    return isinstance(content, dict) and any(key in content for key in (*_LISTS, "channel_names", "modality"))


def from_task(
    path: Path, asked: Coding | None, with_test: bool, unlabelled_as: Coding | None = None
) -> tuple[Coding, list[FoundCase]]:
    """The cases that a `dataset.json` or a datalist describes, in its order; `with_test` adds those for testing.

    Raises:
        DataError: the file is malformed, a modality or label name is unknown, or it does not say what labels mean.
    """
    info = read_json(path)
    if not describes_task(info):
        raise DataError(
            f"{path}: a Decathlon task has modality {{number: name}}, labels {{value: name}} and training [cases], an "
            "nnU-Net folder channel_names, labels and file_ending; this file is neither. Give a data set of another "
            "kind as a .json or .csv list"
        )
    channels = _channels(path, info)
    if "channel_names" in info and not isinstance(info.get("training"), list):
        found = _nnunet(path, info, channels, with_test)
    else:
        found = _listed(path, info, channels, with_test)
    if not found:
        raise DataError(f"{path} lists no case under 'training': a Decathlon task lists its images and labels there")
    labels = info.get("labels")
    if asked or labels is None:
        remedy = ', or labels {"1": "edema", ...} in the file'
        return asked or unstated_coding(path, found, unlabelled_as, remedy), found
    if not isinstance(labels, dict):
        raise DataError(f"{path}: labels must be {{value: name}}, not {brief(labels)}")
    try:
        return coding_from_dataset_json(labels), found
    except ValueError as error:
        raise DataError(f"{path}: {error} (--data.release)") from error


def _channels(path: Path, info: Mapping[str, Any]) -> dict[str, int]:
    """The channel of each modality, in the order of channels; empty where the file does not say."""
    key = next((key for key in ("modality", "channel_names", "modalities") if info.get(key) is not None), None)
    names = info[key] if key else {}
    if isinstance(names, list):
        names = {str(index): name for index, name in enumerate(names)}
    if not isinstance(names, dict):
        raise DataError(f"{path}: {key} must be {{number: name}}, not {brief(names)}")
    channels: dict[str, int] = {}
    for index, name in names.items():
        modality = modality_named(name) if isinstance(name, str) else None
        number = int(index) if re.fullmatch(r"[0-9]{1,4}", index) else -1
        if modality is None or modality in channels or number < 0 or number in channels.values():
            raise DataError(
                f"{path}: {key} {index[:20]} is {brief(name)}; each must be one of FLAIR, T1w, T1gd, T2w, once, under "
                "the number of its channel"
            )
        channels[modality] = number
    return dict(sorted(channels.items(), key=lambda item: item[1]))


# Listed cases: Decathlon, MONAI's datalists


def _listed(path: Path, info: Mapping[str, Any], channels: Mapping[str, int], with_test: bool) -> list[FoundCase]:
    # Decathlon has one case per patient, and its split is MONAI's, whatever the cases are called.
    is_decathlon = all(isinstance(info.get(key), dict) for key in ("modality", "labels"))
    found = []
    for key in _LISTS if with_test else _LISTS[:2]:
        entries = [] if info.get(key) is None else info[key]
        if not isinstance(entries, list):
            raise DataError(f"{path}: {key} must be a list of cases, not {brief(entries)}")
        for number, entry in enumerate(entries, 1):
            case = _entry(path, f"{path}: entry {number} of {key}", entry, channels)
            if case is not None:
                patient = case.patient or (None if is_decathlon else patient_of(case.name))
                found.append(replace(case, patient=patient, held_out=key == "validation"))
    return _with_unique_names(found)


def _entry(path: Path, where: str, entry: Any, channels: Mapping[str, int]) -> FoundCase | None:
    """A listed case; None for macOS's companion files (`._*`)."""
    if isinstance(entry, str) or (isinstance(entry, list) and entry):
        entry = {"image": entry}
    image = entry.get("image") if isinstance(entry, dict) else None
    images = [image] if isinstance(image, str) and image.strip() else image
    if not isinstance(images, list) or not images:
        raise DataError(f'{where} is {brief(entry)} and must be {{"image": file or files, "label": file}}')
    label = _label_in(path, entry, where)
    paths = [path.parent / require_text(item, f"{where}: image") for item in images]
    if paths[0].name.startswith("._"):
        return None
    strange = next((item for item in paths if stem_of(item) is None), None)
    if strange:
        raise DataError(f"{where}: image {strange.name} is not a .nii or .nii.gz file: convert it, or remove the entry")
    name, patient = _text_in(entry, "name", where) or case_name_of(paths), _text_in(entry, "patient", where)
    files = _by_channel(paths[0], channels) if len(paths) == 1 else {}
    if not files and len(paths) == 1 and len(channels) > 1:
        return listed_case(name, path, dict.fromkeys(channels, paths[0]), label, patient, channels)
    return listed_case(name, path, files or _by_modality(where, paths, channels), label, patient)


def _text_in(entry: Mapping[str, Any], key: str, where: str) -> str | None:
    """What an entry has under a key, None where that is missing or null. Raises DataError where it is not text."""
    value = entry.get(key)
    return None if value is None else require_text(value, f"{where}: {key}")


def _label_in(path: Path, entry: Mapping[str, Any], where: str) -> Path | None:
    label = _text_in(entry, "label", where)
    return path.parent / label if label else None


def _by_modality(where: str, paths: Sequence[Path], channels: Mapping[str, int]) -> dict[str, Path]:
    """The files of a case by modality: as their names say where each says one, else in the order of the channels."""
    names = [modality for path in paths if (modality := modality_of(path))]
    in_order = list(channels) if list(channels.values()) == list(range(len(paths))) else []
    if len(names) < len(paths) and not in_order:
        raise DataError(
            f"{where}: the names of its {len(paths)} images don't say what they are: give their modalities, or those "
            'of a 4D file, in order, as "modality": {"0": "FLAIR", "1": "T1w", ...}'
        )
    if len(names) == len(paths) and set(names) == set(in_order) and names != in_order:
        raise DataError(
            f"{where}: its images are {', '.join(names)} by name, but {', '.join(in_order)} by the list's modalities: "
            "find out which is right, and correct the other"
        )
    names = names if len(names) == len(paths) else in_order
    if len(set(names)) < len(names) or len(set(paths)) < len(paths):
        listed = ", ".join(f"{name} {path.name}" for name, path in zip(names, paths, strict=True))
        raise DataError(f"{where}: {listed}: a file is given twice, or two for one modality: correct the entry")
    return dict(zip(names, paths, strict=True))


def _by_channel(image: Path, channels: Mapping[str, int]) -> dict[str, Path]:
    """The files that a listed image means in nnU-Net's first version, `CASE_0000.nii.gz` and so on; else empty."""
    if os.path.lexists(image):
        return {}
    stem = stem_of(image) or ""
    end = image.name[len(stem) :]
    files = {modality: image.with_name(f"{stem}_{i:04d}{end}") for modality, i in channels.items()}
    return files if any(map(os.path.lexists, files.values())) else {}


def _with_unique_names(found: list[FoundCase]) -> list[FoundCase]:
    """Prefix the folder's name where files of several cases have one name (`a/image.nii.gz`, `b/image.nii.gz`)."""
    counts = Counter(case.name for case in found)
    renamed = list(found)
    for i, case in enumerate(found):
        if counts[case.name] > 1:
            name = f"{next(iter(case.files.values())).parent.name}_{case.name}"
            renamed[i] = replace(case, name=name, patient=case.patient or patient_of(name))
    return renamed if len({case.name for case in renamed}) == len(found) else found


# nnU-Net


def _nnunet(path: Path, info: Mapping[str, Any], channels: Mapping[str, int], with_test: bool) -> list[FoundCase]:
    ending = info.get("file_ending", ".nii.gz")
    if ending not in (".nii", ".nii.gz"):
        raise DataError(f"{path}: file_ending is {brief(ending)}, must be .nii.gz or .nii: convert the files")
    if info.get("dataset") is not None:
        found = list(_nnunet_listed(path, info["dataset"], channels))
    else:
        found = _nnunet_folder(path, "imagesTr", "labelsTr", ending, channels)
    if with_test:
        found += _nnunet_folder(path, "imagesTs", None, ending, channels)
    return found


def _nnunet_listed(path: Path, dataset: Any, channels: Mapping[str, int]) -> Iterator[FoundCase]:
    if not isinstance(dataset, dict):
        raise DataError(f"{path}: dataset is {brief(dataset)} and must be {{case: {{images, label}}}}")
    for name, entry in dataset.items():
        where = f"{path}: case {brief(name)} of dataset"
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or len(images) != len(channels):
            raise DataError(f"{where} is {brief(entry)} and must have images, {len(channels)} files, and label, a file")
        paths = [path.parent / require_text(item, f"{where}: images") for item in images]
        files = dict(zip(channels, paths, strict=True))
        yield listed_case(name, path, files, _label_in(path, entry, where), patient_of(name))


def _nnunet_folder(
    path: Path, images: str, labels: str | None, ending: str, channels: Mapping[str, int]
) -> list[FoundCase]:
    """The cases of an nnU-Net folder, sorted by name."""
    modality_in = {number: modality for modality, number in channels.items()}
    files: dict[str, dict[str, Path]] = {}
    unused = []
    for image in _names_in(path.parent / images, ending):
        match = re.fullmatch(r"(.+)_([0-9]{4})", image)
        if match and int(match[2]) in modality_in:
            files.setdefault(match[1], {})[modality_in[int(match[2])]] = path.parent / images / f"{image}{ending}"
        else:
            unused.append(image)
    if unused:
        log.warning(
            "%s: %d files are not used, as no channel of %s has their number: %s", path.parent / images, len(unused),
            path.name, first_few(unused),
        )  # fmt: skip
    found = []
    labelled = set(_names_in(path.parent / labels, ending)) if labels else set()
    for name in sorted({*files, *labelled}):
        label = path.parent / str(labels) / f"{name}{ending}" if name in labelled else None
        problem = f"case {name} has a label but no image in {images}/{name}_0000{ending} or the like"
        no_image = CaseError(path.parent / str(labels), problem, "Add its images, or move the label away")
        faults = [] if name in files else [no_image]
        found.append(listed_case(name, path, files.get(name, {}), label, patient_of(name), faults=faults))
    return found


def _names_in(folder: Path, ending: str) -> list[str]:
    """The names of the files in a folder, sorted, without their ending; none where there is no folder."""
    try:
        listed = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{folder} can't be read ({error.strerror}): change its permissions") from error
    return [name[: -len(ending)] for name in listed if name.endswith(ending) and not name.startswith(".")]
