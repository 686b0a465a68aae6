"""What a command imports before it has anything to do: answers to `--help`, typos and refused options are quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import TRAIN

ROOT = TRAIN.parent.parent
COMPILERS = {"torch._dynamo", "torch._inductor", "sympy"}
USED_LATER = {"nvidia.dali", "monai", "deepspeed", "matplotlib", "tensorboard", "nibabel", "scipy", "onnx"}
NETWORKS = {"torch", "triton"}
REFUSED = {
    "train": ["--train.epochs", "0"],
    "prepare": ["--check"],
    "evaluate": ["--runs", "a", "--on", "nowhere"],
    "predict": ["--runs", "a", "--input", "b"],
    "compare": ["--runs", "a", "b", "--seeds", "2"],
    "convert": ["a", "--output", "b.onnx"],
    "tuned": ["--clear", "steps"],
}
"""Options of each command that are refused without a look at any data."""
RUN = """
import importlib, json, sys
import launch.start
found, name, *lines = sys.argv[1:]
main = importlib.import_module(f"launch.{name}").main
statuses = [main(json.loads(line)) for line in lines]
with open(found, "w") as file:
    json.dump([statuses, sorted(sys.modules)], file)
"""


@pytest.mark.parametrize("name", REFUSED)
def test_help_a_typo_and_a_refusal_import_nothing_that_they_do_not_need(name: str, tmp_path: Path) -> None:
    """Seconds of processor time each: the commands that only read options do without PyTorch as well."""
    lines = [json.dumps(line) for line in (["--help"], ["--tpyo", "1"], REFUSED[name])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    command = [sys.executable, "-c", RUN, str(tmp_path / "found"), name, *lines]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    statuses, modules = json.loads((tmp_path / "found").read_text())
    assert statuses == [0, 2, 2] and "usage" in done.stdout and done.stderr.count("error: ") == 2, done.stderr
    kept_out = COMPILERS | USED_LATER | (NETWORKS if name in ("predict", "evaluate", "tuned") else set())
    assert kept_out & set(modules) == set()


def test_prediction_imports_no_compiler_and_nothing_of_training() -> None:
    code = "import json, sys; import launch.segment_cases; print(json.dumps(sorted(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=300)
    assert not (COMPILERS | {"nvidia.dali", "monai", "deepspeed", "matplotlib", "tensorboard"}) & set(json.loads(found))
