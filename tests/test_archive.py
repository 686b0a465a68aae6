"""Damaged and crafted files: noticed or harmless, one line each, and never more memory than the file has bytes."""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trained import CONFIG, content_of

from engine.archive import HASH, Unreadable, content_hash, read_archive, sealed
from engine.checkpoint import load_weights, save_weights
from engine.config import to_dict
from engine.export.interchange import read_state_dict, save_safetensors
from engine.trained import load_trained

FLIPS = 400  # of some 32,000 and 18,000 bits; the names of entries in a zip file, say, mean nothing
MIB = 2**20


def small(**changes: Any) -> dict[str, Any]:
    """The content of a weights file with three small tensors."""
    half = torch.full((3, 2), 0.5, dtype=torch.bfloat16)
    weights = {"a": torch.arange(7.0), "b.weight": half, "c": torch.tensor(1.0)}
    return content_of() | {"weights": weights} | changes


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(ending: str, tmp_path: Path) -> None:
    path, draw = tmp_path / f"best.{ending}", random.Random(0)
    save_weights(path, small()) if ending == "pt" else save_safetensors(path, small(), {"model": "unetr"})
    whole, expected, noticed = path.read_bytes(), load_weights(path), 0
    for bit in draw.sample(range(8 * len(whole)), FLIPS):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert is_same(load_weights(path), expected), bit
        except ValueError as error:
            assert str(path) in str(error), bit
            noticed += 1
    assert noticed > FLIPS / 2


@pytest.mark.parametrize("cut", [0, 1, 2, 30, 1000, -1000, -1])
def test_a_file_that_was_cut_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_weights(path, small())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="best.pt can't be read as a checkpoint.*damaged.*Copy it again"):
        load_weights(path)


def test_each_tensor_and_each_value_counts_in_the_hash() -> None:
    expected = content_hash(small())
    assert content_hash(sealed(small())) == expected
    assert content_hash(json.loads(json.dumps(small(weights={})))) == content_hash(small(weights={}))
    other = [small(epoch=8), small(config={}), small(more=1)]
    for name, value in (("a", torch.zeros(7)), ("c", torch.ones(1)), ("c", torch.ones((), dtype=torch.int32))):
        changed = small()
        changed["weights"][name] = value
        other.append(changed)
    assert expected not in {content_hash(content) for content in other}


def test_a_file_of_before_the_hash_is_read_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "best.pt"
    torch.save({"format": 2, **content_of()}, path)
    assert load_trained(path).epoch == 7
    (warning,) = caplog.messages
    assert f"{path} is of a version whose files have no hash" in warning and "--to safetensors" in warning
    torch.save({**sealed({"format": 3, **content_of()}), "format": 2}, path)  # as a flipped bit makes it
    with pytest.raises(ValueError, match="content is not what was written"):
        load_trained(path)


# Crafted


@pytest.fixture
def little_memory() -> Iterator[None]:
    """No more than 2 GiB on top of what this process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2048 * MIB, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def repacked(content: Any, change: Any = lambda name, data: data, compression: int = zipfile.ZIP_STORED) -> bytes:
    """What `torch.save` writes, with its parts changed."""
    saved, crafted = io.BytesIO(), io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(crafted, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return crafted.getvalue()


@pytest.mark.usefixtures("little_memory")
def test_parts_that_inflate_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    zeros = torch.zeros(16 * MIB)
    path.write_bytes(repacked({"weights": {"a": zeros}}, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < MIB
    for read in (load_weights, read_state_dict):
        with pytest.raises(ValueError, match="bomb.pt.*compressed or overlap"):
            read(path)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("kind", ["expanded", "sparse", "meta", "no tensor", "number", "values"])
def test_a_few_bytes_that_stand_for_many_are_refused(kind: str, tmp_path: Path) -> None:
    many: list[Any] = [0] * 100
    for _ in range(10):
        many = [many] * 100
    crafted: dict[str, dict[str, Any]] = {
        "expanded": {"weights": {"a": torch.zeros(1).expand(2**40)}},
        "sparse": {"weights": {"a": torch.sparse_coo_tensor(torch.zeros(1, 1), torch.zeros(1), (2**40,))}},
        "meta": {"weights": {"a": torch.empty(2**40, device="meta")}},
        "no tensor": {"weights": {"a": 1}},
        "number": {"weights": {1: torch.zeros(1)}},
        "values": {"weights": {}, "scans": many},
    }
    path = tmp_path / "crafted.pt"
    torch.save({"format": 3, HASH: "", **crafted[kind]}, path)
    with pytest.raises(ValueError, match="crafted.pt can't be read.*(no dense|not dense|longer than|damaged)"):
        load_weights(path)


def test_values_within_themselves_and_of_other_kinds_are_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (circle, deep, {1, 2}, b"bytes", 1j, torch.zeros(1), {(1, 2): 3}, 10**10_000):
        with pytest.raises(Unreadable, match="it holds"):
            content_hash({"value": value})


def test_a_tensor_that_is_larger_than_its_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "crafted.pt"

    def enlarge(name: str, data: bytes) -> bytes:
        return data.replace(b"K@", b"M\xff\x3f") if name.endswith("data.pkl") else data  # 64 elements to 16,383

    path.write_bytes(repacked({"a": torch.zeros(64)}, enlarge))
    with pytest.raises(Unreadable, match="damaged"):
        read_archive(path)


class Intruder:
    """What pickle would turn into a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_no_code_is_run_whatever_the_container(tmp_path: Path) -> None:
    content = {"format": 3, "weights": Intruder(tmp_path / "was_here")}
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(content))
    for path in tmp_path.glob("*.pt"):
        with pytest.raises(ValueError, match="no code from a file is run"):
            load_weights(path)
    assert not (tmp_path / "was_here").exists()


# Each field

HOSTILE: list[Any] = [None, True, -1, float("nan"), 10**30, "$__import__('os')", "\x1b[31mred", [], ["a"], [[1]] * 3,
                      {}, {"a": "b"}, {"$x": 1}]  # fmt: skip
FINE: dict[str, list[Any]] = {"validation": [{}], "scans": [{}]}


@pytest.mark.parametrize("field", sorted(content_of()))
def test_a_field_of_another_kind_is_one_line(field: str, tmp_path: Path) -> None:
    path, content = tmp_path / "odd.pt", content_of()
    for value in [each for each in HOSTILE if each not in FINE.get(field, [])]:
        crafted = {"format": 3, **content, field: value}
        torch.save(crafted if field == "weights" else sealed(crafted), path)
        with pytest.raises(ValueError, match="odd.pt") as told:
            load_trained(path)
        text = str(told.value)
        assert text.isprintable() and len(text) < 900, (field, value)


@pytest.mark.parametrize(
    "changes",
    [
        {"tissues": {"1": "oedema", "4": "enhancing", "2": "$x"}},
        {"tissues": {1: "oedema"}},
        {"tissues": {0: "oedema", 4: "enhancing"}},
        {"tissues": {300: "oedema", 4: "enhancing", 1: "necrosis"}},
        {"release": "brats2018\x1b[2J"},
        {"regions": [[1, 4], [1, 2], [4]]},
        {"regions": [[1, 4], [1, 2, 4], []]},
        {"regions": [[1, 4], [1, 2, 4, 9], [4]]},
        {"modalities": ["t1c", "t1c"]},
        {"modalities": ["t1c", "$flair"]},
        {"scans": {"spacing_mm": [[1, 1]] * 3, "occupied": [[0, 1]], "contrast": [[0, 1]] * 2}},
        {"scans": {"spacing_mm": [[1, "x"]] * 3, "occupied": [[0, 1]] * 2, "contrast": [[0, 1]] * 2}},
        {"scans": {"occupied": [[0, 1]] * 2}},
        {"validation": {"mean": float("nan")}},
        {"validation": {"mean": {"$x": 1}}},
    ],
)
def test_values_that_contradict_each_other_are_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    save_weights(path, content_of(**changes))
    with pytest.raises(ValueError, match="odd.pt was written by another version of this program") as told:
        load_trained(path)
    assert str(told.value).isprintable()


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("group", "changes"),
    [
        ("model", {"feature_size": 10**6}),
        ("model", {"feature_size": 10**30}),
        ("model", {"hidden_size": 10**9, "num_heads": 2}),
        ("model", {"mlp_dim": 2**40}),
        ("model", {"num_heads": 10**12}),
        ("model", {"hidden_size": 0, "num_heads": 0}),
        ("data", {"crop_size_voxels": [2**20, 2**20, 2**20]}),
        ("data", {"crop_size_voxels": [2**40, 2**40, 2**40]}),
        ("data", {"spacing_mm": ["x", 1, 1]}),
    ],
)
def test_sizes_are_not_believed_before_the_weights_fit(group: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path, config = tmp_path / "huge.pt", to_dict(CONFIG)
    save_weights(path, content_of(config=config | {group: config[group] | changes}))
    with pytest.raises(ValueError, match="huge.pt") as told:
        load_trained(path)
    assert "allocate" not in str(told.value)


def test_weights_that_are_no_floats_are_refused(tmp_path: Path) -> None:
    weights = content_of()["weights"]
    weights["head.bias"] = weights["head.bias"].to(torch.complex64)
    save_weights(tmp_path / "odd.pt", content_of(weights=weights))
    with pytest.raises(ValueError, match="odd.pt holds the weights of another network"):
        load_trained(tmp_path / "odd.pt")


def test_safetensors_with_odd_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_safetensors(path, small(), {"model": "unetr"})
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for record in ("null", "[]", "[" * 100_000, '{"format": 3}', '{"format": 3, "sha256": ""}', "{"):
        header["__metadata__"]["glioforge"] = record
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
        with pytest.raises(ValueError, match="odd.safetensors"):
            load_weights(path)
