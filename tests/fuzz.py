"""Damaged and odd inputs, made by a seeded generator: whatever comes in, what goes out is right, or it is refused.

python tests/fuzz.py                                every target in turn, until Ctrl-C
python tests/fuzz.py nifti weights --seconds 3600   an hour of two of them
python tests/fuzz.py nifti --seed 7 --first 1234 --count 1     one input again

Each target makes an input, gives it to the product and compares what comes back with an oracle. Refusing is done by an
error of the product's own (`ValueError`, of which `DataError` and `CaseError` are kinds); any other exception, and any
difference from the oracle, is a finding. `tests/test_fuzz.py` runs a few seconds of each.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import gzip
import io
import itertools
import json
import logging
import math
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from commands import SMALL
from test_comparison import write_run
from test_trained import CONFIG, content_of

from engine.config import Config, config_from_dict, make_parser, parse_config, to_dict
from engine.network import make_model
from engine.reports.comparison import FinishedRun
from engine.trained import load_trained
from engine.weights_file import write_content
from launch.segment_cases import PredictionRow, write_rows
from pipelines.layouts.cases import survey_cases
from pipelines.scans.nifti import read_grid, read_nifti

READ, REFUSED = "read", "refused"
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 0.5, 3, 2**31, 2**63, 10**40, 1e308, math.nan, math.inf, -math.inf,
    [], [None], [1], [1, 2, 3], [[1]], {}, {"a": 1}, "", " ", "null", "NaN", "auto", "x" * 300, "\x00", "\x1b[31m",
    "$1_2_$", "=1+1", "~", "# x", "M\udcfcller", "../../x", "@x", "%x", "-", "flair",
)  # fmt: skip
ODD_TEXT = (
    "", ",", ";", "\t", "\n", "\r", '"', "'", "\\", "\x00", "\ufeff", "null", "NaN", "=1", "$x_", "x" * 200_000,
    "[", "]", "{", "}", ":", "0", "-1", "1e999", "é",
)  # fmt: skip


def attempt(use: Callable[[], Any]) -> Any:
    """What a call returns, or the ValueError by which it refuses; any other exception goes on."""
    try:
        return use()
    except ValueError as error:
        assert str(error).strip(), "an error that says nothing"
        return error


# NIfTI

UNITS_MM = {0: 1.0, 1: 1e3, 2: 1.0, 3: 1e-3}  # code of xyzt_units: metre, millimetre, micrometre
KINDS = ("uint8", "int16", "float32", ">i2", "float64", "int32")


@cache
def good_nifti(number: int) -> bytes:
    """A small file; of both versions, several types and units, with scaling and with an extension."""
    rng = np.random.default_rng(number)
    kind = nib.Nifti2Image if number % 4 == 3 else nib.Nifti1Image
    dtype = KINDS[number % len(KINDS)]
    shape = (5, 4, 3, 2) if number % 5 == 4 else (5, 4, 3)
    affine = np.array([[-1, 0, 0, 3], [0, -1.5, 0, 9], [0, 0, 2, -4], [0, 0, 0, 1]], float)
    image = kind(rng.integers(0, 100, shape).astype(dtype), affine)
    if dtype.startswith(">"):
        image = kind(np.asarray(image.dataobj), affine, image.header.as_byteswapped(">"))
    if number % 3 == 0:
        image.header.set_slope_inter(0.5, -3)
    if number % 4 == 1:
        image.set_sform(np.diag([1e-3, 1e-3, 1e-3, 1]) @ affine, 1)
        image.header.set_xyzt_units("meter")
    if number % 7 == 0:
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a note"))
    return image.to_bytes()


def fuzz_nifti(rng: random.Random, folder: Path) -> str:
    """A header or a container with a few bytes changed, against nibabel."""
    data = bytearray(good_nifti(rng.randrange(24)))
    is_packed = rng.random() < 0.3
    if rng.random() < 0.9:
        corrupt(rng, data, 0, 352 if rng.random() < 0.9 else len(data))
    if rng.random() < 0.1:
        del data[rng.randrange(len(data)) :]
    if is_packed:
        data = bytearray(gzip.compress(bytes(data), 1, mtime=0))
        if rng.random() < 0.3:
            corrupt(rng, data, 0, len(data))
    path = folder / ("a.nii.gz" if is_packed else "a.nii")
    path.write_bytes(data)
    got = attempt(lambda: read_nifti(path))
    grid = attempt(lambda: read_grid(path))
    if isinstance(got, ValueError):
        assert str(path) in str(got), f"an error that does not name the file: {got}"
        return REFUSED
    array, affine = got
    assert not isinstance(grid, ValueError), f"read whole, but not its grid: {grid}"
    assert grid[0] == array.shape and np.array_equal(grid[1], affine)
    image = nib.load(path)  # what nibabel refuses must be refused here
    with np.errstate(all="ignore"):
        expected = np.asanyarray(image.dataobj)
        scale = np.diag([UNITS_MM.get(int(image.header["xyzt_units"]) & 7, 1.0)] * 3 + [1.0])
        assert array.shape == (expected.shape[:3] + expected.shape[4:] if is_vector(expected.shape) else expected.shape)
        expected = expected.reshape(array.shape).astype(array.dtype)
        is_scaled = (image.dataobj.slope, image.dataobj.inter) != (1, 0)  # in float32: cancels to its last digits
        largest = np.abs(expected[np.isfinite(expected)], dtype="f8").max(initial=abs(float(image.dataobj.inter)))
        np.testing.assert_allclose(array, expected, rtol=1e-6 * is_scaled, atol=1e-6 * largest * is_scaled)
        np.testing.assert_allclose(affine, scale @ image.affine, rtol=1e-12)
    return READ


def is_vector(shape: tuple[int, ...]) -> bool:
    """ITK's vector images have their channels on a fifth axis; they are read as 4D."""
    return len(shape) == 5 and shape[3] == 1 and shape[4] > 1


ODD_NUMBERS = (0, 1, -1, 2**15 - 1, -(2**15), 2**31 - 1, 2**61, -(2**63), math.nan, math.inf, 1e30, -1.5)


def corrupt(rng: random.Random, data: bytearray, first: int, end: int) -> None:
    """Change a few bytes: a bit, a byte, or a whole number that programs stumble over."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(first, min(end, len(data)))
        way = rng.randrange(4)
        if way == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        else:
            number = rng.choice(ODD_NUMBERS)
            kinds = ["<f4", "<f8"] if isinstance(number, float) else ["<i2", "<i4", "<i8"]
            kind = np.dtype(rng.choice(kinds)).newbyteorder(rng.choice(("<", ">")))
            with np.errstate(all="ignore"):
                new = np.array([number], "f8" if isinstance(number, float) else "i8").astype(kind).tobytes()
            data[at : at + len(new)] = new[: len(data) - at]


# Configuration


@cache
def option_names() -> tuple[str, ...]:
    """Every option, as "train.epochs"."""

    def names(values: dict[str, Any], prefix: str) -> Iterator[str]:
        for name, value in values.items():
            yield f"{prefix}{name}"
            if isinstance(value, dict):
                yield from names(value, f"{prefix}{name}.")

    return tuple(name for name in names(to_dict(Config()), "") if name != "resume")


@cache
def parser() -> Any:
    return make_parser("fuzz")


def fuzz_config(rng: random.Random, folder: Path) -> str:
    """Options with odd values, from YAML or a command line: what is accepted is sound, and the same when read again."""
    chosen = rng.sample(option_names(), rng.choice((1, 1, 2)))
    values = {name: rng.choice(ODD_VALUES) for name in chosen}
    if rng.random() < 0.5:
        args = ["--data.root", "x", *(f"--{name}={value}" for name, value in values.items())]
    else:
        nested: dict[str, Any] = {}
        for name, value in sorted(values.items()):
            *groups, last = name.split(".")
            place = nested
            for group in groups:
                inner = place.setdefault(group, {})
                place = inner if isinstance(inner, dict) else {}
            place[last] = value
        text = yaml.safe_dump(nested, allow_unicode=True)
        if rng.random() < 0.2:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice(ODD_TEXT) + text[at:]
        (folder / "c.yaml").write_text(text, errors="surrogateescape")
        args = ["--config", str(folder / "c.yaml"), "--data.root", "x"]
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            config = attempt(lambda: parse_config(parser(), args)[0])
    except SystemExit as end:
        assert end.code in ((0, 2) if values.get("print_config") is not None else (2,)), f"exit status {end.code}"
        return REFUSED
    if isinstance(config, ValueError):
        return REFUSED
    check_sound(config, Config())
    assert config_from_dict(to_dict(config)) == config, "read again, it is another configuration"
    return READ


def check_sound(config: Any, default: Any, name: str = "") -> None:
    """No number is NaN, infinite or missing, and nothing that always has a value is None."""
    for item in dataclasses.fields(config):
        value, usual = getattr(config, item.name), getattr(default, item.name)
        if dataclasses.is_dataclass(usual):
            check_sound(value, usual, f"{name}{item.name}.")
            continue
        assert value is not None or "None" in str(item.type), f"{name}{item.name} is None"
        for number in value if isinstance(value, list | tuple) else [value]:
            assert not isinstance(number, float) or math.isfinite(number), f"{name}{item.name} is {number}"


# Weights


@cache
def good_weights(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / f"w{suffix}"
        write_content(path, content_of())
        return path.read_bytes()


def fuzz_weights(rng: random.Random, folder: Path) -> str:
    """A weights file with flipped bits, cut short, or with a field of another kind: the same network, or refused."""
    suffix = rng.choice((".pt", ".safetensors"))
    path = folder / f"w{suffix}"
    is_damaged = rng.random() < 0.7
    if is_damaged:
        data = bytearray(good_weights(suffix))
        for _ in range(rng.choice((1, 1, 3))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
    else:
        content = content_of()
        change_a_field(rng, content)
        try:
            write_content(path, content)
        except (TypeError, ValueError, AttributeError, KeyError, RuntimeError):
            return REFUSED  # such a file can't be made by our own writer
    trained = attempt(lambda: load_trained(path))
    if isinstance(trained, ValueError):
        return REFUSED
    if is_damaged:
        torch.manual_seed(0)
        expected = make_model(CONFIG.model, CONFIG.data.crop_size_voxels, 2).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in trained.network.state_dict().items())
        assert trained.modalities == ("t1c", "flair") and trained.coding.release == "brats2018"
        assert to_dict(trained.config)["data"]["spacing_mm"] == to_dict(CONFIG)["data"]["spacing_mm"]
    assert not {"\x1b", "\x00", "$"} & set("".join((*trained.modalities, trained.coding.release)))
    return READ


def change_a_field(rng: random.Random, content: dict[str, Any]) -> None:
    """One value of a nested record, any depth, replaced or taken away."""
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            place = inner
            continue
        if isinstance(place, dict) and rng.random() < 0.2:
            del place[key]
        else:
            place[key] = rng.choice(ODD_VALUES)
        return


# Lists and tables


def spoil(rng: random.Random, text: str) -> bytes:
    """A text with characters put in, taken out or doubled, in some encoding."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(text) + 1)
        way = rng.randrange(3)
        if way == 0:
            text = text[:at] + rng.choice(ODD_TEXT) + text[at:]
        elif way == 1:
            text = text[:at] + text[at + rng.randrange(1, 9) :]
        else:
            text = text[:at] + text[max(0, at - rng.randrange(1, 30)) :]
    return text.encode(rng.choice(("utf-8", "utf-8", "utf-8", "utf-16", "latin-1")), errors="replace")


LISTS: dict[str, Any] = {
    "list.json": [
        {"name": "one", "flair": "a.nii", "t1c": "b.nii", "label": "c.nii"},
        {"name": "two", "flair": "d.nii"},
    ],
    "4d.json": {"modalities": ["flair", "t1c"], "cases": [{"name": "one", "image": "a.nii", "label": "c.nii"}]},
    "dataset.json": {
        "name": "BRATS", "modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "edema",
        "2": "non-enhancing tumor", "3": "enhancing tumour"}, "numTraining": 1, "test": ["./d.nii"],
        "training": [{"image": "./a.nii", "label": "./c.nii"}],
    },
    "nnunet/dataset.json": {
        "channel_names": {"0": "FLAIR", "1": "T1w"}, "labels": {"background": 0, "edema": 1, "non-enhancing tumor": 2,
        "enhancing tumor": 3}, "numTraining": 1, "file_ending": ".nii.gz",
    },
    "datalist.json": {
        "training": [{"image": ["x_flair.nii", "x_t1c.nii"], "label": "c.nii", "fold": 0}], "testing": [],
    },
}  # fmt: skip
CSV = 'name,patient,flair,t1c,label\none,p,a.nii,b.nii,c.nii\n"two",q,d.nii,b.nii,\n'


def fuzz_lists(rng: random.Random, folder: Path) -> str:
    """A list of cases, in every form, with a value or some characters changed: found, or named as faulty."""
    for name in ("a.nii", "b.nii", "c.nii", "d.nii", "x_flair.nii", "x_t1c.nii"):
        (folder / name).touch()
    name = rng.choice((*LISTS, "list.csv", "list.csv"))
    if name.endswith(".csv"):
        data = spoil(rng, CSV)
    else:
        content = {"": json.loads(json.dumps(LISTS[name]))}
        if rng.random() < 0.7:
            change_a_field(rng, content)
            data = json.dumps(content.get("")).encode()
        else:
            data = spoil(rng, json.dumps(content[""]))
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    root = path.parent if path.name == "dataset.json" else path
    release = rng.choice((None, "brats2018"))
    found = attempt(lambda: survey_cases(root, release, labelled=rng.random() < 0.5))
    if isinstance(found, ValueError):
        assert str(folder) in str(found), f"an error that does not name the file: {found}"
        return REFUSED
    for case in found.usable.cases:
        assert isinstance(case.name, str) and case.name
        assert all(isinstance(image, Path) and image.is_file() for image in case.images)
        assert case.label is None or case.label.is_file()
    return READ


def fuzz_tables(rng: random.Random, folder: Path) -> str:
    """A file of a finished run, or the table of predictions, with some characters changed."""
    if rng.random() < 0.3:
        table = folder / "predictions.csv"
        rows = io.StringIO()
        writer = csv.DictWriter(rows, PredictionRow.__dataclass_fields__)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(PredictionRow(f"case{i}", 1.5)) for i in range(3))
        table.write_bytes(spoil(rng, rows.getvalue()))
        return REFUSED if isinstance(attempt(lambda: write_rows(table, [PredictionRow("case1")])), ValueError) else READ
    run_dir = write_run(folder / "run", config_from_dict(SMALL))
    path = rng.choice(sorted(path for path in run_dir.rglob("*") if path.is_file() and path.stat().st_size))
    path.write_bytes(spoil(rng, path.read_text()))
    run = attempt(lambda: FinishedRun.read(run_dir))
    return REFUSED if isinstance(run, ValueError) else READ


TARGETS: dict[str, Callable[[random.Random, Path], str]] = {
    "nifti": fuzz_nifti,
    "config": fuzz_config,
    "weights": fuzz_weights,
    "lists": fuzz_lists,
    "tables": fuzz_tables,
}


def run_one(target: str, seed: int, number: int) -> str:
    """Make one input and try it; raises what is found."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return TARGETS[target](random.Random(f"{target} {seed} {number}"), folder)
    finally:
        shutil.rmtree(folder)


def main() -> int:
    """Run until the time or the count is over; prints each finding with the command that repeats it."""
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("targets", nargs="*", metavar="target", help=f"of {', '.join(TARGETS)}; none: all")
    about.add_argument("--seed", type=int, default=0)
    about.add_argument("--first", type=int, default=0, help="Number of the first input.")
    about.add_argument("--count", type=int, help="Inputs for each target.")
    about.add_argument("--seconds", type=float, default=math.inf)
    options = about.parse_args()
    unknown = set(options.targets) - set(TARGETS)
    if unknown:
        about.error(f"no target {', '.join(sorted(unknown))}: choose of {', '.join(TARGETS)}")
    logging.disable(logging.CRITICAL)
    started, outcomes, kinds = time.monotonic(), Counter[tuple[str, str]](), Counter[str]()
    first = options.first
    numbers = itertools.count(first) if options.count is None else range(first, first + options.count)
    with contextlib.suppress(KeyboardInterrupt):
        for number in numbers:
            if time.monotonic() - started > options.seconds:
                break
            for target in options.targets or TARGETS:
                try:
                    outcomes[target, run_one(target, options.seed, number)] += 1
                except Exception as error:
                    outcomes[target, "FOUND"] += 1
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    kind = f"{target}: {type(error).__name__} at {where.filename}:{where.lineno}"
                    kinds[kind] += 1
                    if kinds[kind] == 1:
                        again = f"python tests/fuzz.py {target} --seed {options.seed} --first {number} --count 1"
                        print(f"{kind}\n  {' '.join(str(error).split())[:400]}\n  {again}", flush=True)
    for (target, outcome), count in sorted(outcomes.items()):
        print(f"{target}: {count} {outcome}")
    for kind, count in kinds.most_common():
        print(f"{count} x {kind}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
