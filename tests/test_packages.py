"""Weights to the reference packages and back, and state dicts that are refused."""

from __future__ import annotations

import importlib
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_models import reference_unetr
from untrained import CROP, WIDTHS, image, saved_run

from engine.export.packages import read_state_dict, reference_class
from engine.trained import TrainedNetwork, load_trained
from engine.weights_file import WeightsFile
from launch.convert import main
from models import NETWORKS
from pipelines.layouts.labels import CODINGS

TOLERANCES = {"logits": 1e-4}


def reference_of(trained: TrainedNetwork) -> torch.nn.Module:
    """The reference package's network, made as the command says."""
    reference = NETWORKS[trained.config.model.name].reference
    assert reference is not None
    target, arguments = reference_class(trained, reference)
    module, name = target.rsplit(".", 1)
    kind = (
        reference_unetr()
        if name == "UNETR" and "attention" in module
        else getattr(importlib.import_module(module), name)
    )
    return kind(**arguments).eval()


@pytest.mark.parametrize("name", WIDTHS)
@torch.no_grad()
def test_weights_go_to_the_reference_package_and_come_back(name: str, tmp_path: Path) -> None:
    run, theirs, ours = saved_run(tmp_path, name), tmp_path / "theirs.pth", tmp_path / "ours.pt"
    reference, trained = NETWORKS[name].reference, load_trained(run)
    assert reference is not None
    package = reference.package
    assert main([str(run), "--to", package, "--output", str(theirs)]) == 0
    their_network = reference_of(trained)
    their_network.load_state_dict(torch.load(theirs, weights_only=True))
    close = TOLERANCES["logits"]
    torch.testing.assert_close(their_network(image(1)), trained.network(image(1)), rtol=close, atol=close)
    torch.save({"epoch": torch.tensor(1), "state_dict": torch.load(theirs, weights_only=True)}, theirs)
    options = {"model.name": name, **{f"model.{key}": value for key, value in WIDTHS[name].items()}}
    options |= {"data.crop_size_voxels": list(CROP), "data.spacing_mm": [2, 2, 3], "data.release": "brats2018"}
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    given += ["--data.modalities", "[t1ce,flair]"]
    assert main([str(theirs), "--from", package, "--output", str(ours), *given]) == 0
    back = load_trained(ours)
    assert (back.modalities, back.coding, back.epoch) == (("t1c", "flair"), CODINGS["brats2018"], 0)
    assert (back.config.data.spacing_mm, back.validation) == ((2.0, 2.0, 3.0), {})
    assert torch.equal(back.network(image(1)), trained.network(image(1)))
    assert WeightsFile.read(ours).config["train"]["precision"] == "float32"  # nothing is left open in a file


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --data.modalities"),
        (["--data.modalities", "[flair,t1]"], "give --data.modalities, .* and --data.release"),
        (["--data.modalities", "[flair]", "--model.name", "unet"], "not those of a unet with 1 modalities"),
        (["--data.modalities", "[flair,t1]", "--model.name", "unet"], "'feature_size': 16"),
        (["--data.modalities", "[flair,t1]"], "monai does not have our unetr.*unetr_monai or unet"),
        (["--data.modalities", "[flair,t1]", "--model.name", "unetr_monai"], "not the weights of .*'unetr_monai'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    theirs, output = tmp_path / "theirs.pt", tmp_path / "ours.pt"
    assert main([str(saved_run(tmp_path, "unet")), "--to", "monai", "--output", str(theirs)]) == 0
    if options and "and --data.release" not in message:
        options = [*options, "--data.release", "brats2018", "--data.crop_size_voxels", "[32,32,32]"]
    assert main([str(theirs), "--from", "monai", "--output", str(output), *options]) == 2
    assert re.match(f"(?s)error: .*{message}", capsys.readouterr().err)
    assert not output.exists()


class Intruder:
    """What pickle would turn into a call."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_from_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"weight": Intruder(tmp_path / "was_here")}, tmp_path / "bad.pt")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(Intruder(tmp_path / "was_here"), protocol=2))
    for name in ("bad.pt", "bad.pkl"):
        with pytest.raises(ValueError, match=f"{name} can't be read.* no code from a file is run") as raised:
            read_state_dict(tmp_path / name)
        assert "weights_only" not in str(raised.value)  # PyTorch's own advice is to run the code
    assert not (tmp_path / "was_here").exists()
    torch.save({"weight": 1}, tmp_path / "number.pt")
    with pytest.raises(ValueError, match="holds no state dict"):
        read_state_dict(tmp_path / "number.pt")
    with pytest.raises(ValueError, match="there is no file"):
        read_state_dict(tmp_path / "none.pt")
