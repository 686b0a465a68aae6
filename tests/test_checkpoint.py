"""Weights files: what they hold, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from engine.checkpoint import load_state, load_weights, save_weights
from engine.distributed import Ranks


def test_weights_and_settings_come_back(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    save_weights(tmp_path / "checkpoints" / "best.pt", model, {"epoch": 4, "config": {"lr": 0.1}})
    content = load_weights(tmp_path / "checkpoints" / "best.pt")
    assert content["epoch"] == 4 and content["config"] == {"lr": 0.1}
    assert torch.equal(content["weights"]["weight"], model.weight)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["best.pt"]


def test_a_failed_write_leaves_the_previous_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    save_weights(path, torch.nn.Linear(3, 2), {"epoch": 1})
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_weights(path, torch.nn.Linear(3, 2), {"epoch": lambda: 2})
    assert load_weights(path)["epoch"] == 1


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no checkpoint"),
        (b"not a checkpoint", "can't be read"),
        ({"weights": {}}, "format"),
        ({"format": 1, "weights": Evil()}, "can't be read"),
    ],
)
def test_other_files_are_refused_with_their_path(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message) as raised:
        load_weights(path)
    assert str(path) in str(raised.value)


def test_resuming_where_nothing_was_saved_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint in"):
        load_state(None, tmp_path, Ranks(0, 1, 0, torch.device("cpu")), 0)


def test_a_checkpoint_of_other_ranks_is_refused_where_states_are_sharded(tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "ranks.json").write_text('{"world_size": 2, "zero_stage": 1}')
    with pytest.raises(ValueError, match=r"saved by 2 rank\(s\) at ZeRO stage 1"):
        load_state(None, tmp_path, Ranks(0, 1, 0, torch.device("cpu")), 1)
