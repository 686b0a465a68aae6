"""Lists of cases: a CSV file with a column "name", one per modality, and "label"; or JSON with the same records.

JSON is [{...}, ...], or {"modalities": ["flair", ...], "cases": [{"name": ..., "image": 4D file, "label": ...}, ...]}.
"patient" marks the cases that are time points of one patient. Paths are relative to the list. A list does not say what
its labels mean, so the release must be given if it has any. MONAI's datalists are read by `pipelines.layouts.tasks`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.basics.errors import CaseError, DataError
from pipelines.basics.input_files import read_json, read_text
from pipelines.basics.tables import csv_rows
from pipelines.basics.text import brief, shortened
from pipelines.layouts.found import FoundCase, listed_case, require_text, unstated_coding
from pipelines.layouts.labels import Coding
from pipelines.layouts.names import LABEL_SPELLINGS, MODALITIES, canonical_modalities, modality_named, patient_of
from pipelines.layouts.tasks import describes_task, from_task


def from_list(
    path: Path, asked: Coding | None, with_test: bool = False, unlabelled_as: Coding | None = None
) -> tuple[Coding, list[FoundCase]]:
    """The cases of a .csv or .json list, in its order.

    Raises:
        DataError: no release asked where there are labels, a malformed or empty list, or an unknown column.
    """
    kind = path.suffix.lower()
    if kind not in (".json", ".csv"):
        raise DataError(f"{path}: a list of cases must be .json or .csv; a data set is given by its folder")
    content = read_json(path) if kind == ".json" else None
    if describes_task(content):
        return from_task(path, asked, with_test, unlabelled_as)
    order: Sequence[str] = ()
    if isinstance(content, dict):
        order = _order(path, content.get("modalities"))
        content = content.get("cases")
    listed = content if isinstance(content, list) else []
    numbered = [(f"{path}: entry {number}", record) for number, record in enumerate(listed, 1)]
    records: list[tuple[str, Any]] = numbered if kind == ".json" else list(_read_csv(path))
    if not records:
        raise DataError(f"{path} lists no cases: give records with name, {', '.join(MODALITIES)} and label")
    found = [_record_case(where, record, order, path) for where, record in records]
    return asked or unstated_coding(path, found, unlabelled_as), found


def _order(path: Path, modalities: Any) -> Sequence[str]:
    if modalities is None:
        return MODALITIES
    named = [modalities] if isinstance(modalities, str) else modalities
    if not isinstance(named, list):
        raise DataError(f'{path}: modalities is {brief(modalities)} and must be a list of names, as ["flair", "t1"]')
    try:
        return canonical_modalities([require_text(name, "modalities") for name in named])
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def _read_csv(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Where each row is, and its fields by column.

    Fields are separated by commas, or, as some spreadsheets do, by semicolons or tabs. Empty rows are skipped, and so
    is an unnamed column of row numbers, as pandas writes it.
    """
    text = read_text(path, "save it as CSV UTF-8")
    first = text.lstrip().split("\n", 1)[0]
    rows = csv_rows(path, text, max(",;\t", key=first.count))
    filled = ((f"{path}, line {line}", row) for line, row in rows if any(field.strip() for field in row))
    where, head = next(filled, ("", []))
    columns = [column.strip().lower() for column in head]
    named = [column for column in columns if column and not column.startswith("unnamed: ")]
    if len(set(named)) < len(named):
        raise DataError(f"{where}: columns {', '.join(columns)}: name each once")
    for where, row in filled:
        if any(field.strip() for field in row[len(columns) :]):
            raise DataError(
                f"{where}: {brief(', '.join(row))} has {len(row)} fields, but the first row {len(columns)} columns"
            )
        fields = list(zip(columns, row, strict=False))
        for column, field in fields:
            if column not in named and field.strip() and not field.strip().isdecimal():
                raise DataError(f"{where}: {brief(field)} is in a column without a name: name it in the first row")
        yield where, {column: field for column, field in fields if column in named}


def _record_case(where: str, record: Any, order: Sequence[str], listed_in: Path) -> FoundCase:
    if not isinstance(record, dict):
        raise DataError(f"{where} is {brief(record)} and must be a record with name, {', '.join(MODALITIES)} and label")
    values, twice = _values(where, record)
    name = values.pop("name", None)
    if name is None:
        raise DataError(f"{where}: {brief(dict(record))} has no name: give each case a unique one")
    patient = values.pop("patient", None) or patient_of(name)
    unknown = [key for key in values if key not in ("label", "image", *MODALITIES)]
    if unknown or ("image" in values and not order):
        raise DataError(
            f"{where}: case {name} has {shortened(', '.join(unknown), 200) or 'image'}; columns are name, "
            f'{", ".join(MODALITIES)}, label and patient, or in JSON with "modalities" (the order of the last axis of '
            "a 4D file) name, image and label"
        )
    faults = []
    if twice or len(set(map(Path, values.values()))) < len(values):
        listed = ", ".join(f"{key} {value}" for key, value in [*values.items(), *twice])
        problem = f"{where}: case {name}: {listed}: a file is given twice, or two for one modality"
        faults = [CaseError(listed_in, problem, "Correct the list: one file for each modality")]
    paths = {key: listed_in.parent / value for key, value in values.items()}
    label, channels = paths.pop("label", None), None
    if "image" in paths:
        channels = {modality: i for i, modality in enumerate(order)}
        paths = dict.fromkeys(order, paths["image"])
    return listed_case(name, listed_in, paths, label, patient, channels, faults)


def _values(where: str, record: Mapping[Any, Any]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """What a record says, by canonical key, without empty fields; and what it says more than once."""
    values: dict[str, str] = {}
    twice = []
    for key, value in record.items():
        word = str(key).strip().lower()
        canonical = modality_named(word) or ("label" if word in LABEL_SPELLINGS else word)
        if canonical in ("name", "patient") and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        text = "" if value is None else require_text(value, f"{where}: {brief(key)}")
        if text and canonical in values:
            twice.append((word, text))
        elif text:
            values[canonical] = text
    return values, twice
