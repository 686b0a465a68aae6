"""The pictures of a comparison; networks that predict have random weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from commands import SMALL
from finished_runs import read_run, settings, write_run
from matplotlib.figure import Figure
from test_trained import content_of

from engine.config import config_from_dict, to_dict
from engine.data import load_data
from engine.network import make_model
from engine.reports import comparison_pictures
from engine.reports.comparison import FinishedRun, make_rows
from engine.weights_file import write_content
from models import NETWORKS


def colours(path: Path) -> set[tuple[int, int, int]]:
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    return {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()}


def rgb(code: str) -> tuple[int, int, int]:
    return int(code[1:3], 16), int(code[3:5], 16), int(code[5:], 16)


def test_curves_show_every_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [read_run(tmp_path / m, settings("demo", model_name=m)) for m in ("unet", "unetr_monai")]
    comparison_pictures.draw_curves(make_rows(runs), tmp_path / "curves.png")
    found = colours(tmp_path / "curves.png")
    assert {rgb(NETWORKS[m].colour) for m in ("unet", "unetr_monai")} <= found
    assert rgb(NETWORKS["unetr"].colour) not in found
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    comparison_pictures.draw_curves(make_rows(runs), tmp_path / "curves.png")
    low, high = figures[0].axes[0].get_ylim()
    assert low == 0 and high > max(run.history[0]["loss"] or 0.0 for run in runs)


@pytest.mark.filterwarnings("error")
def test_a_run_that_was_never_validated_is_in_the_curves_too(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", settings("demo", model_name="unet"))
    (run_dir / "log.csv").write_text("epoch,loss,val_mean\n1,0.5,\n2,0.4,\n")
    comparison_pictures.draw_curves(make_rows([FinishedRun.read(run_dir)]), tmp_path / "curves.png")
    assert rgb(NETWORKS["unet"].colour) in colours(tmp_path / "curves.png")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("validation", ["center_crop", "full_volume"])
def test_models_predict_the_same_case_and_a_picture_shows_them(
    validation: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIOFORGE_CACHE", str(cache))
    runs = []
    for name in ("unet", "unetr"):
        small = {group: dict(values) for group, values in SMALL.items()}
        small["data"]["val_fraction"] = 0.4
        small["model"] |= {"feature_size": 2, "hidden_size": 8, "mlp_dim": 8}
        small["model"]["name"], small["train"]["validation"] = name, validation
        config = config_from_dict(small)
        data = load_data(config.data)
        run_dir = write_run(tmp_path / name, config)
        trained = {
            "weights": make_model(config.model, config.data.crop_size_voxels, 4).state_dict(),
            "modalities": list(data.store.modalities),
        }
        content = content_of(data.store.coding, **trained, config=to_dict(config))
        write_content(run_dir / "checkpoints" / "best.pt", content)
        runs.append(replace(FinishedRun.read(run_dir), cases=data.val, example=data.val[1]))
    store = tmp_path / "store"  # not the cache, for which there may be no place
    predictions = comparison_pictures.predict_example(make_rows(runs), torch.device("cpu"), store)
    assert len(list(store.glob("*.image.npy"))) == 1  # no case is prepared that is not shown
    assert predictions.name == data.val[1] and list(predictions.by_model) == ["unet", "unetr"]
    shape = (32, 32, 16) if validation == "center_crop" else data.store.shape(data.store.index(data.val[1]))
    assert predictions.truth_RXYZ.shape == (3, *shape) and predictions.truth_RXYZ.any()
    one, other = (masks for masks, _ in predictions.by_model.values())
    assert not np.array_equal(one, other)  # each by its own network
    for masks, counts in predictions.by_model.values():
        assert counts.predicted == tuple(masks.sum((1, 2, 3))) and counts.name == data.val[1]
        core, whole, enhancing = masks  # as a file would have them: random weights give masks that overlap otherwise
        assert not (enhancing & ~core).any() and not (core & ~whole).any()
        assert counts.intersection == tuple((masks & predictions.truth_RXYZ).sum((1, 2, 3)))
    comparison_pictures.draw_predictions(predictions, tmp_path / "predictions.png")
    height, width, _ = np.shape(matplotlib.image.imread(tmp_path / "predictions.png"))
    assert height > width  # three rows of three
