"""The command that converts: what it writes, replaces and leaves alone."""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import save_file
from untrained import content_of_files, saved_run

from engine.export.bundle import WEIGHTS, write_bundle
from engine.trained import load_trained
from engine.weights_file import WeightsFile, write_content
from launch.convert import ENDINGS, main

FILE_LIMIT = 20_000  # bytes; the networks here have more


def test_safetensors_hold_all_that_a_weights_file_does(tmp_path: Path) -> None:
    run, path = saved_run(tmp_path, "unetr"), tmp_path / "model.safetensors"
    assert main([str(run), "--to", "safetensors", "--output", str(path)]) == 0
    before, after = load_trained(run), load_trained(path)
    for name in ("config", "modalities", "coding", "epoch", "validation", "scans"):
        assert getattr(after, name) == getattr(before, name)
    weights = before.network.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in after.network.state_dict().items())
    for broken, content in (("cut", path.read_bytes()[:5000]), ("empty", b"")):
        (tmp_path / f"{broken}.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=rf"{broken}.safetensors can't be read"):
            load_trained(tmp_path / f"{broken}.safetensors")
    save_file({"weight": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of this program's format"):
        load_trained(tmp_path / "foreign.safetensors")


def test_the_error_for_an_unwritable_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = saved_run(tmp_path, "unet")
    assert main([str(run), "--to", "safetensors", "--output", "/proc/model.safetensors"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "/proc/model.safetensors" in error and error.count("\n") == 1


def test_a_stopped_conversion_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, path = saved_run(tmp_path, "unet"), tmp_path / "out" / "model.safetensors"
    stop = mock.Mock(side_effect=lambda *_: signal.raise_signal(signal.SIGTERM))
    with mock.patch.object(WeightsFile, "write", stop):
        assert main([str(run), "--to", "safetensors", "--output", str(path)]) == 75
    assert "stopped by SIGTERM; nothing was written" in capsys.readouterr().err
    assert not any(path.parent.iterdir())


def test_a_file_is_replaced_only_on_request_and_only_by_a_complete_one(tmp_path: Path, capsys: Any) -> None:
    run, path = saved_run(tmp_path, "unet"), tmp_path / "model.safetensors"
    path.write_text("first")
    convert = [str(run), "--to", "safetensors", "--output", str(path)]
    assert main(convert) == 2 and "already exists: " in capsys.readouterr().err
    with mock.patch("os.fsync", side_effect=OSError(28, "No space left on device")):
        assert main([*convert, "--overwrite"]) == 2
    assert path.read_text() == "first" and sorted(os.listdir(tmp_path)) == ["model.safetensors", "unet"]
    assert main([*convert, "--overwrite"]) == 0 and load_trained(path).epoch == 7
    other = tmp_path / "checkpoints" / "model.safetensors"  # a folder of that name which is no run's
    other.parent.mkdir()
    other.write_text("first")
    assert main([*convert[:-1], str(other), "--overwrite"]) == 0 and load_trained(other).epoch == 7


def test_the_source_and_the_files_of_a_run_are_never_replaced(tmp_path: Path, capsys: Any) -> None:
    run = saved_run(tmp_path, "unet")
    best = run / "checkpoints" / "best.pt"
    (run / "config.yaml").touch()
    shutil.copy(best, best.with_name("last.pt"))
    shutil.copy(best, tmp_path / "copy.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "copy.pt")
    write_content(tmp_path / "bundle" / WEIGHTS, torch.load(best, weights_only=True))
    before = content_of_files(tmp_path)
    for source, output in ((best, best), (run, best.with_name("last.pt")), ("link.pt", "copy.pt"), (run, "folder")):
        (tmp_path / "folder").mkdir(exist_ok=True)
        for target in ("--to", "--from"):
            asked = ["--output", str(tmp_path / output), "--overwrite", "--data.modalities", "[t1c,flair]"]
            main([str(tmp_path / source), target, "monai", *asked])
    main([str(tmp_path / "bundle" / WEIGHTS), "--to", "bundle", "--output", str(tmp_path / "bundle"), "--overwrite"])
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 9 and all("choose another --output" in line or "must end in" in line for line in errors)
    assert content_of_files(tmp_path) == before


def test_on_a_full_disk_the_error_is_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    """In a process of its own, which a library must not end."""
    runs, calls = {name: saved_run(tmp_path, name) for name in ("unet", "unetr")}, []
    endings = {target: ending for target, (ending, *_) in ENDINGS.items() if target != "onnx"}
    for target, ending in endings.items():  # ONNX is written as torch_export is
        run, output = runs["unetr" if target == "self_attention_cv" else "unet"], tmp_path / f"old-{target}{ending}"
        if target == "bundle":
            write_bundle(output, load_trained(run))
        else:
            output.write_bytes(b"old")
        calls.append([str(run), "--to", target, "--output", str(output), "--overwrite"])
    before = content_of_files(tmp_path)
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({FILE_LIMIT}, {FILE_LIMIT}))\n"
        f"from launch.convert import main\nprint([main(arguments) for arguments in {calls}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{[2] * len(endings)}\n", done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    for line, call in zip(lines, calls, strict=True):
        assert line.startswith("error: ") and "File too large" in line and call[4] in line
    assert content_of_files(tmp_path) == before


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    run = saved_run(tmp_path, "unet")
    before = os.umask(0o022)
    try:
        for target in ("safetensors", "monai"):
            output = tmp_path / f"model{ENDINGS[target][0]}"
            assert main([str(run), "--to", target, "--output", str(output)]) == 0
            assert stat.S_IMODE(output.stat().st_mode) == 0o644
    finally:
        os.umask(before)


def test_packages_are_imported_only_when_they_are_used() -> None:
    heavy = {"deepspeed", "matplotlib", "monai", "nibabel", "nvidia.dali", "onnx", "onnxruntime", "onnxscript",
             "safetensors", "torch._dynamo"}  # fmt: skip
    code = f"import sys, launch.convert, engine.checkpoint\nprint(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx", "--output", "model.pt"], "--output model.pt must end in .onnx"),
        (["--output", "model.pt"], "give either --to .* or --from"),
        (["--to", "monai", "--from", "monai", "--output", "model.pt"], "give either --to"),
        (["--to", "monai", "--output", "model.pt"], "not a run with weights"),
    ],
)
def test_the_error_for_a_nonsensical_command_line_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([str(tmp_path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: .*{message}", line)
