"""A network as a run left it, and files that are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import Config, to_dict
from engine.data import DataConfig
from engine.network import ModelConfig, make_model
from engine.step import TrainConfig
from engine.trained import NOT_DESCRIPTIVE, load_trained
from engine.weights_file import write_content
from pipelines.decathlon import TASK
from pipelines.layouts.labels import CODINGS, Coding, tutorial_coding

CONFIG = Config(
    data=DataConfig(crop_size_voxels=(16, 16, 16), spacing_mm=(2.0, 2.0, 3.0)),
    model=ModelConfig(name="unetr", feature_size=2, hidden_size=8, mlp_dim=8, num_heads=2),
    train=TrainConfig(precision="fp16"),
)


def content_of(coding: Coding = CODINGS["brats2018"], **changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    content = {
        "weights": make_model(CONFIG.model, CONFIG.data.crop_size_voxels, 2).state_dict(),
        "config": to_dict(CONFIG),
        "epoch": 7,
        "validation": {"mean": 0.5},
        "modalities": ["t1c", "flair"],
        "release": coding.release,
        "tissues": dict(coding.tissues),
        "regions": [list(values) for values in coding.regions],
        "scans": {},
    }
    return content | changes


@pytest.mark.parametrize("tutorial", [False, True])
@pytest.mark.filterwarnings("ignore:regions 'tutorial'")
def test_a_saved_network_loads_with_everything_that_belongs_to_it(tutorial: bool, tmp_path: Path) -> None:
    coding = tutorial_coding(CODINGS["decathlon"]) if tutorial else CODINGS["brats2018"]
    write_content(tmp_path / "run" / "checkpoints" / "last.pt", content_of(coding))
    trained = load_trained(tmp_path / "run")
    assert trained.config == CONFIG and trained.coding == coding
    assert (trained.modalities, trained.epoch, trained.validation) == (("t1c", "flair"), 7, {"mean": 0.5})
    torch.manual_seed(0)
    network, image = make_model(CONFIG.model, CONFIG.data.crop_size_voxels, 2).eval(), torch.randn(1, 2, 16, 16, 16)
    assert torch.equal(trained.network(image), network(image))


def test_imported_weights_whose_precision_is_open_are_used_in_float32(tmp_path: Path) -> None:
    config = to_dict(dataclasses.replace(CONFIG, train=TrainConfig()))
    write_content(tmp_path / "weights.pt", content_of(config=config))
    assert load_trained(tmp_path / "weights.pt").config.train.precision == "float32"


def test_a_run_gives_its_best_weights_and_a_file_its_own(tmp_path: Path) -> None:
    for name, epoch in (("last", 9), ("best", 4)):
        write_content(tmp_path / "checkpoints" / f"{name}.pt", content_of(epoch=epoch))
    assert load_trained(tmp_path).epoch == 4
    assert load_trained(tmp_path / "checkpoints" / "last.pt").epoch == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": to_dict(CONFIG) | {"engine": "warp"}}, "another version.*engine"),
        ({"config": to_dict(CONFIG) | {"model": {"name": "unet"}}}, "another network than its configuration"),
        ({"modalities": ["t1c"]}, "another network than its configuration"),
        ({"tissues": None, "release": None}, "another version"),
        (
            {"config": to_dict(CONFIG) | {"model": {"name": "swin"}}},
            "another version.*model.name swin must be one of unetr",
        ),
        ({"config": 1}, "another version"),
        ({"tissues": ["oedema"]}, "another version"),
        ({"modalities": 2}, "another version"),
        ({"weights": None}, "another version.*no 'weights'"),
        ({"regions": [[1], [2]]}, "another version.*regions are .*, must be the labels of TC, WT, ET"),
        ({"weights": {"head.bias": torch.zeros(3)}}, r"unetr: \d+ tensors are missing \("),
        ({"moments": {}}, "state to resume training from.*take best.pt"),
        ({"format": 4}, "newer version of this program; this one reads format 3"),
        ({"format": 1}, "not a checkpoint of this program's format 3"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    content = {key: value for key, value in content_of(**changes).items() if value is not None}
    write_content(tmp_path / "odd.pt", content)
    with pytest.raises(ValueError, match=rf"(?i)odd.pt.*{message}") as raised:
        load_trained(tmp_path / "odd.pt")
    assert len(str(raised.value)) < 600 and "\n" not in str(raised.value)


def test_weights_with_nan_are_refused(tmp_path: Path) -> None:
    weights = content_of()["weights"]
    weights["head.bias"][1] = torch.nan
    write_content(tmp_path / "odd.pt", content_of(weights=weights))
    with pytest.raises(ValueError, match=r"odd.pt: 1 of its tensors hold NaN or Inf \(head.bias\).*train again"):
        load_trained(tmp_path / "odd.pt")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run with weights"):
        load_trained(tmp_path)


def test_only_options_about_the_network_and_its_scans_are_used(tmp_path: Path) -> None:
    config = to_dict(CONFIG) | {"run_dir": "/elsewhere", "resume": "/elsewhere", "kernels": "triton"}
    config["data"] |= {
        "root": "/scans",
        "download": True,
        "store_dir": "/elsewhere",
        "workers": 999,
        "val_cases": ["a"],
    }
    config["train"] |= {"deepspeed": "/elsewhere/ds.json", "epochs": 7, "precision": "bf16"}
    write_content(tmp_path / "best.pt", content_of(config=config))
    taken = load_trained(tmp_path / "best.pt").config
    assert (taken.data.root, taken.data.val_cases, taken.train.precision) == (Path("/scans") / TASK, ["a"], "bf16")
    assert not taken.data.download and taken.data.workers is None
    assert paths_of(taken) == [Path("/scans") / TASK]


def paths_of(config: Any) -> list[Path]:
    """Each path that a configuration names, in any group."""
    values = [getattr(config, item.name) for item in dataclasses.fields(config)]
    return [path for value in values if isinstance(value, Path) or dataclasses.is_dataclass(value)
            for path in ([value] if isinstance(value, Path) else paths_of(value))]  # fmt: skip


def test_every_data_option_is_classified() -> None:
    """A new one must be put on one side or the other."""
    describing = {"root", "release", "regions", "modalities", "val_fraction", "split_seed", "train_cases", "val_cases",
                  "folds", "fold", "spacing_mm", "spacing_axes", "crop_size_voxels", "crops_per_case",
                  "foreground_prob", "pad", "skip_faulty", "phantom"}  # fmt: skip
    assert {item.name for item in dataclasses.fields(DataConfig)} == describing | set(NOT_DESCRIPTIVE)


@pytest.mark.parametrize("coding", CODINGS.values(), ids=str)
def test_the_coding_of_each_release_comes_back(coding: Coding, tmp_path: Path) -> None:
    write_content(tmp_path / "best.pt", content_of(coding))
    assert load_trained(tmp_path / "best.pt").coding == coding
