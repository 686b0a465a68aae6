"""The network that the options describe, and what follows from its entry in the table."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn
from untrained import CROP, WIDTHS, config_of

from engine.export.bundle import write_bundle
from engine.export.packages import find_reference, reference_weights
from engine.network import ModelConfig, make_model, widths_of
from engine.trained import TrainedNetwork
from models import NETWORKS, Network, NetworkName, build_model
from pipelines.layouts.labels import CODINGS


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> TrainedNetwork:
    """A network whose entry has no more than it must."""

    def build(in_channels: int, out_channels: int, img_size: object, feature_size: int) -> nn.Module:
        return nn.Sequential(nn.Conv3d(in_channels, feature_size, 1), nn.Conv3d(feature_size, out_channels, 1))

    entry = Network(build, title="Two layers", colour="#000000", widths={"feature_size": 6}, size_divisor=4)
    monkeypatch.setitem(NETWORKS, "bare", entry)
    config = config_of("unet")
    config.model = ModelConfig("bare")
    network = make_model(config.model, CROP, 2)
    return TrainedNetwork(Path("best.pt"), network, config, ("t1c", "flair"), CODINGS["brats2018"], 7, {}, {})


def test_a_network_is_an_entry_in_the_table(bare: TrainedNetwork) -> None:
    assert widths_of(bare.config.model) == {"feature_size": 6}
    assert make_model(ModelConfig("bare", feature_size=3), (4, 8, 12), 1)(torch.zeros(1, 1, 4, 8, 12)).shape[1] == 3
    with pytest.raises(ValueError, match=r"--data.crop_size_voxels: .*divisible by 4 on every axis; try \(4, 8, 12\)"):
        make_model(ModelConfig("bare"), (4, 8, 13), 1)
    with pytest.raises(ValueError, match="hidden_size 8: bare does not have this option; it takes feature_size"):
        build_model("bare", 1, hidden_size=8)


def test_conversions_that_an_entry_lacks_are_refused(bare: TrainedNetwork, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="monai does not have our bare; .* goes with --model.name unetr_monai or unet"):
        find_reference("bare", "monai")
    with pytest.raises(ValueError, match="no other package has our bare: its weights can't be converted"):
        reference_weights(bare)
    with pytest.raises(ValueError, match="MONAI lacks our bare, and its code can't go into a bundle"):
        write_bundle(tmp_path / "bundle", bare)
    assert not list(tmp_path.iterdir())


def test_the_option_takes_the_names_of_the_table() -> None:
    assert get_args(NetworkName) == tuple(NETWORKS)


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_are_those_given_and_the_published_ones(name: str) -> None:
    assert widths_of(ModelConfig(name)) == NETWORKS[name].widths
    assert widths_of(ModelConfig(name, **WIDTHS[name])) == WIDTHS[name]


def test_widths_that_a_network_does_not_have_are_ignored() -> None:
    network = make_model(ModelConfig("unet", feature_size=2, hidden_size=7, num_heads=3), CROP, 2)
    assert network.state_dict().keys() == make_model(ModelConfig("unet", feature_size=2), CROP, 2).state_dict().keys()


def test_options_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"--data.crop_size_voxels: img_size \(32, 32, 20\)"):
        make_model(ModelConfig(), (32, 32, 20), 2)
    with pytest.raises(ValueError, match="--model: num_heads 9 must be at most hidden_size 8"):
        make_model(ModelConfig(hidden_size=8, num_heads=9), CROP, 2)
