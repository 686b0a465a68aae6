"""A run folder of somebody else: what going on with it would do is refused or said before it is done."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from unittest import mock

import pytest
from test_checkpoint import write

from engine.config import Config, to_portable_dict
from engine.data import DataConfig, PhantomConfig
from engine.step import TrainConfig
from launch.run import changed_options, log_effects_of_resuming, refuse_links, run, written_elsewhere


@pytest.mark.parametrize("name", ["checkpoints", "logs", "tensorboard", "run.log", ".lock", "logs/rank-0001.log"])
def test_a_link_out_of_a_run_folder_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    run_dir, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (run_dir / name).parent.mkdir(parents=True)
    (run_dir / name).symlink_to(outside / "new" if "." in name else outside)
    before = sorted(run_dir.rglob("*"))
    work = mock.patch("launch.run.load_data", side_effect=AssertionError)
    with work, pytest.raises(ValueError, match=f"{name} is a link to {outside}"):
        run(Config(run_dir=run_dir, train=TrainConfig(device="cpu")))
    assert sorted(run_dir.rglob("*")) == before and not list(outside.iterdir())


def test_links_within_a_run_folder_and_a_link_to_it_are_fine(tmp_path: Path) -> None:
    (tmp_path / "run" / "real").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").symlink_to("real")
    (tmp_path / "link").symlink_to("run")
    refuse_links(tmp_path / "link")


def test_options_that_differ_from_the_checkpoints_are_named() -> None:
    was, now = (to_portable_dict(Config(data=DataConfig(val_fraction=share, root=root)))
                for share, root in ((0.2, Path("/a")), (0.3, None)))  # fmt: skip
    del was["optim"]
    assert changed_options(was, now)[:2] == [
        "--data.root is None, and was /a when the checkpoint was written",
        "--data.val_fraction is 0.3, and was 0.2 when the checkpoint was written",
    ]
    assert any(line.startswith("--optim") for line in changed_options(was, now))
    assert changed_options(now, now) == []


def test_what_is_written_elsewhere_is_logged(tmp_path: Path) -> None:
    phantom = PhantomConfig(cases=7)
    lines = written_elsewhere(Config(data=DataConfig(store_dir=Path("/store"), phantom=phantom)))
    assert [line.split()[0] for line in lines] == ["writes", "makes"] and "/store" in lines[0] and "7 synth" in lines[1]
    (line,) = written_elsewhere(Config(data=DataConfig(root=Path("/scans"), download=True)))
    assert line.startswith("downloads 7.1 GB to /scans")
    assert written_elsewhere(Config(data=DataConfig(root=Path("/scans")))) == []


@pytest.mark.parametrize("config", [None, 3, [], {"data": 3}, {"data": {"root": "\x1b[31m"}}])
def test_a_record_of_any_content_is_compared(config: object, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "checkpoints"
    write(folder, 1)
    record = folder / "step-00000001" / "about.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"config": config}))
    with caplog.at_level(logging.INFO):
        log_effects_of_resuming(Config(data=DataConfig(root=Path("/scans")), run_dir=tmp_path))
    assert ("--resume: --data" in caplog.text) == isinstance(config, dict)
    assert all(message.isprintable() for message in caplog.messages)
