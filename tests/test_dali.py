"""The steps of the DALI pipelines, each beside MONAI's or the formula in float64, and when DALI is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import monai.transforms as mt
import numpy as np
import pytest
import torch
from nvidia.dali import fn

from pipelines.loading.dali import build_pipeline, jitter, z_score

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
TOLERANCES = {"z-score": 1e-5, "constant": 1e-6, "MONAI": 1e-3}  # MONAI's sums are in float32

LATE = ("nvidia.dali", "monai", "nibabel", "scipy", "torch._dynamo")  # libraries that are imported when they are used


def numpy_z_score(image: np.ndarray) -> np.ndarray:
    out = image.astype(np.float64)
    for c in range(image.shape[-1]):
        voxels = image[..., c][image[..., c] != 0].astype(np.float64)
        if voxels.size:
            out[..., c][image[..., c] != 0] = (voxels - voxels.mean()) / (voxels.std() or 1.0)
    return out


def run_z_score(image: np.ndarray) -> np.ndarray:
    def define(device: str) -> Any:
        return z_score(fn.external_source(lambda: image[None], layout="DHWC"))

    return np.array(build_pipeline(define, CPU).run()[0].as_array())[0]


def test_z_score_leaves_empty_channels_and_only_centres_constant_ones() -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((20, 18, 10, 4), np.float32)
    image[4:15, 3:12, :, 1] = 0.1
    image[..., 2] = rng.normal(0, 1, image.shape[:3])
    image[7, 7, 7, 3] = 5.0
    out = run_z_score(image)
    np.testing.assert_allclose(out, numpy_z_score(image), atol=TOLERANCES["z-score"])
    assert not out[..., 0].any()
    assert np.abs(out[..., 1]).max() < TOLERANCES["constant"]
    assert np.abs(out[..., 3]).max() < TOLERANCES["constant"]


@pytest.mark.parametrize(
    ("mean", "std"), [(5000.0, 1.0), (30000.0, 20.0), (-0.3, 1.0), (1e-6, 1e-7)], ids=["offset", "int16", "z", "small"]
)
def test_z_score_is_sound_in_float32_and_equals_monai(mean: float, std: float) -> None:
    rng = np.random.default_rng(1)
    image = rng.normal(mean, std, (48, 40, 24, 2)).astype(np.float32)
    image[rng.random(image.shape) < 0.7] = 0
    out = run_z_score(image)
    monai = np.asarray(mt.NormalizeIntensity(nonzero=True, channel_wise=True)(image.transpose(3, 0, 1, 2).copy()))
    scale = np.ptp(out)
    # The voxels themselves are rounded to mean * 2^-24: no float32 result can be nearer than that.
    floor = TOLERANCES["constant"] + abs(mean) / std * 2.0**-23 / scale
    assert np.abs(out - numpy_z_score(image)).max() / scale < floor
    assert np.abs(out - monai.transpose(1, 2, 3, 0)).max() / scale < TOLERANCES["MONAI"]
    assert not out[image == 0].any()


def test_jitter_moves_zeros_too() -> None:
    image = np.array([0.0, 2.0], np.float32).reshape(2, 1, 1, 1)

    def define(device: str) -> Any:
        voxels = fn.external_source(lambda: image[None], layout="DHWC")
        return jitter(voxels, fn.external_source(lambda: np.array([0.1], np.float32)), -0.05)

    out = build_pipeline(define, CPU).run()[0].as_array().ravel()
    np.testing.assert_allclose(out, [-0.05, 2.15], rtol=TOLERANCES["constant"])


def test_importing_the_loaders_and_commands_imports_no_dali_monai_nibabel_or_dynamo() -> None:
    names = "pipelines.loading.loaders, pipelines.loading.raw_loader, engine.config, engine.data, launch.prepare"
    script = f"import sys, {names}; print([name for name in {LATE} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
