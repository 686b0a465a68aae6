"""Weights files: what is written loads; damaged and crafted ones give one line, and take no memory."""

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
from unittest import mock

import pytest
import torch
from test_trained import CONFIG, content_of

from engine.config import to_dict
from engine.trained import load_trained
from engine.weights_file import (
    FORMAT,
    HASH,
    Unreadable,
    WeightsFile,
    content_hash,
    read_archive,
    read_content,
    write_content,
)
from pipelines.layouts.labels import CODINGS

FLIPS = 400  # of some 32,000 and 18,000 bits; the names of entries in a zip file, say, mean nothing
MIB = 2**20


@pytest.fixture
def little_memory() -> Iterator[None]:
    """No more than 2 GiB on top of what this process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2048 * MIB, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


class Intruder:
    """What pickle would turn into a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def small(**changes: Any) -> dict[str, Any]:
    """The content of a weights file with three small tensors."""
    half = torch.full((3, 2), 0.5, dtype=torch.bfloat16)
    weights = {"a": torch.arange(7.0), "b.weight": half, "c": torch.tensor(1.0)}
    return content_of() | {"weights": weights} | changes


def test_saved_weights_and_settings_load(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    path = tmp_path / "checkpoints" / "best.pt"
    write_content(path, {"weights": model.state_dict(), "epoch": 4, "config": {"lr": 0.1}})
    content = read_content(path)
    assert content["epoch"] == 4 and content["config"] == {"lr": 0.1}
    assert torch.equal(content["weights"]["weight"], model.weight)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best.pt"]


def test_a_failed_write_leaves_the_previous_file_intact(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    write_content(path, {"epoch": 1})
    with pytest.raises(ValueError, match="other values than plain ones"):
        write_content(path, {"epoch": lambda: 2})
    with mock.patch("torch.save", side_effect=pickle.PicklingError), pytest.raises(pickle.PicklingError):
        write_content(path, {"epoch": 2})
    assert read_content(path)["epoch"] == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no checkpoint"),
        (b"not a checkpoint", "can't be read"),
        ({"weights": {}}, "format"),
        ({"format": 3, "weights": Intruder(Path("was_here"))}, "can't be read"),
        ({"format": 3, "weights": {}}, "content is not what was written"),
    ],
)
def test_other_files_are_refused_with_their_path(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as raised:
        read_content(path)
    assert str(path) in str(raised.value)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    return content | {HASH: content_hash(content)}


def is_same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_flipped_bit_is_noticed_or_changes_nothing(ending: str, tmp_path: Path) -> None:
    path, draw = tmp_path / f"best.{ending}", random.Random(0)
    write_content(path, small())
    whole, expected, noticed = path.read_bytes(), read_content(path), 0
    for bit in draw.sample(range(8 * len(whole)), FLIPS):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            assert is_same(read_content(path), expected), bit
        except ValueError as error:
            assert str(path) in str(error), bit
            noticed += 1
    assert noticed > FLIPS / 2


@pytest.mark.parametrize("cut", [0, 1, 2, 30, 1000, -1000, -1])
def test_a_truncated_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    write_content(path, small())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match="best.pt can't be read as a checkpoint.*damaged.*Copy it again"):
        read_content(path)


WRITTEN_BEFORE = "f87701c0fa5480485ac5e75ea92320def1b8768e708d30d0d83d4e47e6bbf8c9"
"""The hash of these values by an earlier version that wrote format 3."""


def test_the_format_has_not_changed() -> None:
    """Other names, types or values would give another hash."""
    coding = CODINGS["decathlon"]
    spans = [[0.25, 1.0]] * 2
    scans = {"spacing_mm": [[1.0, 1.5]] * 3, "occupied": spans, "contrast": spans}
    half = torch.full((3, 2), 0.5, dtype=torch.bfloat16)
    weights = {"a": torch.arange(7.0), "b.weight": half, "c": torch.tensor(1.0)}
    file = WeightsFile(
        weights, {"model": {"name": "unet"}}, 7, {"mean": 0.5, "TC": None}, ("t1c", "flair"), coding, scans
    )
    assert content_hash({"format": FORMAT, **file.content()}) == WRITTEN_BEFORE


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


def test_a_file_without_a_hash_loads_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "best.pt"
    torch.save({"format": 2, **content_of()}, path)
    assert load_trained(path).epoch == 7
    (warning,) = caplog.messages
    assert f"{path} is from an older version whose files have no hash" in warning and "--to safetensors" in warning
    torch.save({**sealed({"format": 3, **content_of()}), "format": 2}, path)  # as a flipped bit makes it
    with pytest.raises(ValueError, match="content is not what was written"):
        load_trained(path)


# Crafted


def repacked(content: Any, change: Any = lambda name, data: data, compression: int = zipfile.ZIP_STORED) -> bytes:
    """What `torch.save` writes, with its parts changed."""
    saved, crafted = io.BytesIO(), io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(crafted, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, change(name, source.read(name)))
    return crafted.getvalue()


@pytest.mark.usefixtures("little_memory")
def test_compressed_parts_are_refused_without_reading_them(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    zeros = torch.zeros(16 * MIB)
    path.write_bytes(repacked({"weights": {"a": zeros}}, compression=zipfile.ZIP_DEFLATED))
    assert path.stat().st_size < MIB
    with pytest.raises(Unreadable, match="compressed or overlap"):
        read_archive(path)


def test_a_tensor_larger_than_its_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "crafted.pt"

    def enlarge(name: str, data: bytes) -> bytes:
        return data.replace(b"K@", b"M\xff\x3f") if name.endswith("data.pkl") else data  # 64 elements to 16,383

    path.write_bytes(repacked({"a": torch.zeros(64)}, enlarge))
    with pytest.raises(Unreadable, match="damaged"):
        read_archive(path)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("kind", ["expanded", "sparse", "meta", "no tensor", "number", "values"])
def test_few_bytes_that_expand_to_many_are_refused(kind: str, tmp_path: Path) -> None:
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
        read_content(path)


def test_recursive_and_non_plain_values_are_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (circle, deep, {1, 2}, b"bytes", 1j, torch.zeros(1), {(1, 2): 3}, 10**10_000):
        with pytest.raises(Unreadable, match="it holds"):
            content_hash({"value": value})


def test_no_code_is_run_whatever_the_container(tmp_path: Path) -> None:
    content = {"format": 3, "weights": Intruder(tmp_path / "was_here")}
    torch.save(content, tmp_path / "zip.pt")
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(content))
    for path in tmp_path.glob("*.pt"):
        with pytest.raises(ValueError, match="no code from a file is run"):
            read_content(path)
    assert not (tmp_path / "was_here").exists()


# Each field

HOSTILE: list[Any] = [None, True, -1, float("nan"), 10**30, "$__import__('os')", "\x1b[31mred", [], ["a"], [[1]] * 3,
                      {}, {"a": "b"}, {"$x": 1}]  # fmt: skip
FINE: dict[str, list[Any]] = {"validation": [{}], "scans": [{}]}


@pytest.mark.parametrize("field", sorted(content_of()))
def test_the_error_for_a_field_of_another_type_is_one_line(field: str, tmp_path: Path) -> None:
    path, content = tmp_path / "odd.pt", content_of()
    for value in [each for each in HOSTILE if each not in FINE.get(field, [])]:
        crafted = {"format": 3, **content, field: value}
        torch.save(crafted if field == "weights" else sealed(crafted), path)
        with pytest.raises(ValueError, match="odd.pt") as raised:
            load_trained(path)
        text = str(raised.value)
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
def test_the_error_for_contradicting_values_is_one_line(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    write_content(path, content_of(**changes))
    with pytest.raises(ValueError, match="odd.pt was written by another version of this program") as raised:
        load_trained(path)
    assert str(raised.value).isprintable()


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
def test_sizes_in_a_file_are_not_trusted_before_the_weights_fit(
    group: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path, config = tmp_path / "huge.pt", to_dict(CONFIG)
    write_content(path, content_of(config=config | {group: config[group] | changes}))
    with pytest.raises(ValueError, match="huge.pt") as raised:
        load_trained(path)
    assert "allocate" not in str(raised.value)


def test_weights_that_are_not_real_floats_are_refused(tmp_path: Path) -> None:
    weights = content_of()["weights"]
    weights["head.bias"] = weights["head.bias"].to(torch.complex64)
    write_content(tmp_path / "odd.pt", content_of(weights=weights))
    with pytest.raises(ValueError, match="odd.pt holds the weights of another network"):
        load_trained(tmp_path / "odd.pt")


def test_safetensors_with_odd_metadata_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    write_content(path, small(), {"model": "unetr"})
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    for record in ("null", "[]", "[" * 100_000, '{"format": 3}', '{"format": 3, "sha256": ""}', "{"):
        header["__metadata__"]["glioforge"] = record
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + size :])
        with pytest.raises(ValueError, match="odd.safetensors"):
            read_content(path)
