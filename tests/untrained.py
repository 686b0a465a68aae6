"""Untrained networks, saved as a run saves them; shared by the files that convert them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from test_trained import content_of

from engine.config import Config, to_dict
from engine.data import DataConfig
from engine.network import ModelConfig, make_model
from engine.weights_file import write_content

CROP = (32, 32, 32)  # at 16 the UNet normalises two voxels, and float32 itself is 4e-4 off
WIDTHS: dict[str, dict[str, int]] = {
    "unetr": {"feature_size": 4, "hidden_size": 10, "mlp_dim": 8, "num_heads": 3},
    "unetr_monai": {"feature_size": 4, "hidden_size": 12, "mlp_dim": 8, "num_heads": 3},
    "unet": {"feature_size": 4},
}


def config_of(name: Any) -> Config:
    data = DataConfig(crop_size_voxels=CROP, spacing_mm=(2.0, 2.0, 3.0))
    return Config(data=data, model=ModelConfig(name=name, **WIDTHS[name]))


def saved_run(folder: Path, name: str) -> Path:
    """A run's folder with the weights of a network that nobody trained, on (t1c, flair)."""
    config = config_of(name)
    torch.manual_seed(0)
    weights = make_model(config.model, config.data.crop_size_voxels, 2).state_dict()
    write_content(folder / name / "checkpoints" / "best.pt", content_of(weights=weights, config=to_dict(config)))
    return folder / name


def image(batch: int) -> torch.Tensor:
    return torch.randn(batch, 2, *CROP, generator=torch.Generator().manual_seed(1))


def content_of_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
