"""A MONAI bundle of a trained network: a folder that MONAI runs on scans, without this program.

    configs/metadata.json     what the network takes and gives
    configs/inference.json    MONAI's transforms, its sliding window, and where everything is
    models/model.pt           the network's state dict
    docs/README.md            how to run it
    scripts/                  code that MONAI lacks

MONAI's own networks get weights under MONAI's names. A network that MONAI lacks comes as code: the files of this
program that define it, on the reference operations, so that they need only PyTorch. A bundle does what
`engine.inference` does: MONAI's Spacing and Orientation, sliding window with z-scored windows, the probabilities back
on the scan's own grid, masks above one half, labels in the coding of the training data.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.export.packages import reference_class, reference_weights
from engine.inference import compose_labels
from engine.network import widths_of
from engine.sliding_window import OVERLAP, SIGMA_SCALE, WINDOWS_AT_ONCE
from engine.trained import TrainedNetwork
from engine.weights_file import write_archive
from kernels import attention, autocast, instance_norm, layer_norm
from models import NETWORKS
from pipelines.basics.atomic import make_subfolder, remove_left_over, temporary_name, write_text
from pipelines.layouts.labels import REGIONS
from pipelines.layouts.names import MODALITIES, SPELLINGS

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
VERSION = "0.1.0"
TITLE = "Brain tumour segmentation"
ROOT = Path(__file__).resolve().parents[2]
SUBFOLDERS = ("configs", "models", "docs", "scripts")
WEIGHTS = Path("models", "model.pt")
FILE_NAMES = {modality: (*spellings, f"{modality}_subtrMeanDivStd") for modality, spellings in SPELLINGS.items()}
"""How the file name of a modality ends, in any release."""
PROJECT = re.compile(r"^(?:from|import) (?:engine|kernels|models|pipelines)\b", re.MULTILINE)
MODELS = re.compile(r"^from (models\.\w+) import ", re.MULTILINE)
OPERATIONS = '''"""Attention and instance norm in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


{parts}


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of (B, H, N, D)."""
    return attention_reference(q, k, v, q.shape[-1] ** -0.5)


def flash_attention_packed(qkv: Tensor, num_heads: int, head_dim: int, out_columns: int) -> Tensor:
    """Softmax attention of a projection (B, N, 3 * num_heads * head_dim) to query, key and value."""
    q, k, v = qkv.unflatten(2, (3, num_heads, head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    return flash_attention(q, k, v).transpose(1, 2).flatten(2)


instance_norm = instance_norm_reference
residual_layer_norm = residual_layer_norm_reference


def instance_norm_into(out: None, x: Tensor, **options: Any) -> Tensor:
    """Instance norm; `out` is None here."""
    return instance_norm(x, **options)


def writes_slices(x: Tensor) -> bool:
    """Whether `instance_norm_into` can write into a part of a map: not here."""
    return False


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A convolution that keeps the size."""
    return F.conv3d(x, weight, bias, padding=weight.shape[2] // 2)


def up_conv(x: Tensor, weight: Tensor) -> Tensor:
    """A transposed convolution of kernel and stride 2."""
    return F.conv_transpose3d(x, weight, stride=2)


def up_conv_into(x: Tensor, weight: Tensor, out: None) -> Tensor:
    """As `up_conv`; `out` is None here."""
    return up_conv(x, weight)
'''
README = """# {title}

Segments brain tumours in {modalities} MRI. Made by glioforge from `{source}`, epoch {epoch}; its code in `scripts/` is
under Apache-2.0. Not a medical device.

In this folder (from elsewhere, give `bundle_root` too):

```sh
pip install "monai[nibabel]>={monai}"
python -c '
from monai.bundle import run
run(config_file="configs/inference.json", dataset_dir="SCANS", output_dir="SEGMENTATIONS")'
```

or, after `pip install fire`, with `python -m monai.bundle run --config_file configs/inference.json --dataset_dir SCANS
--output_dir SEGMENTATIONS`.

`SCANS` holds a folder for each scan, with one NIfTI file for each modality ({files}), or 4D files with the modalities
on the last axis; `channels` in `configs/inference.json` is where each is, counted from 0: {channels}.

Input: {spacing} mm, RAS, not normalised (the bundle prepares it so). Windows of {crop} voxels are z-scored one by one,
over the non-zero voxels of each channel. The network gives logits of {regions}; a voxel whose probability is above one
half belongs to the region. Labels written: {labels}.

Like that of every MONAI bundle, the configuration is code: run only bundles from people you trust.
"""


def write_bundle(folder: Path, trained: TrainedNetwork) -> None:
    """Write a trained network as a MONAI bundle.

    Args:
        folder: a new one, or a bundle that this program wrote: its files are replaced once all new ones are complete,
            and anything else in it stays.
        trained: the network and what belongs to it, on the CPU.

    Raises:
        ValueError: any other folder; a subfolder that is a link out of it; a network that can't be bundled.
        OSError: it can't be written.
    """
    if is_there := os.path.lexists(folder):
        _check_is_bundle(folder)
    remove_left_over(folder.parent)
    partial = temporary_name(folder)
    try:
        _write_files(partial, trained)
        if not is_there:
            partial.rename(folder)
            return
        for file in sorted(path for path in partial.rglob("*") if path.is_file()):
            name = file.relative_to(partial)
            file.replace(make_subfolder(folder, *name.parent.parts) / name.name)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(folder)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_is_bundle(folder: Path) -> None:
    """Refuse a folder that `write_bundle` did not write."""
    metadata = None
    with contextlib.suppress(OSError, ValueError, RecursionError):
        metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    if not isinstance(metadata, dict) or "glioforge" not in metadata:
        raise ValueError(f"{folder} is not a MONAI bundle that this program wrote: choose another --output")
    for name in SUBFOLDERS:
        make_subfolder(folder, name)


def _write_files(folder: Path, trained: TrainedNetwork) -> None:
    for name in SUBFOLDERS:
        (folder / name).mkdir(parents=True)
    network, imports, code = _network(trained)
    weights = trained.network.state_dict() if code else reference_weights(trained)
    write_archive(weights, folder / WEIGHTS)
    for name, values in (("metadata", _metadata(trained)), ("inference", _inference(trained, network, imports))):
        write_text(folder / "configs" / f"{name}.json", json.dumps(values, indent=4) + "\n")
    write_text(folder / "docs" / "README.md", _readme(trained))
    for name, text in _scripts(code).items():
        write_text(folder / "scripts" / f"{name}.py", text)


def _scripts(code: str) -> dict[str, str]:
    """Content of the Python files of `scripts` by module; `code` is the network's, `models.NAME`, or empty."""
    names = {"engine.sliding_window": "sliding_window", "engine.export.bundle_steps": "steps"}
    kernels = ("attention", "autocast", "conv3d", "instance_norm", "layer_norm", "up_conv")
    names |= {f"kernels.{kernel}": "operations" for kernel in kernels}
    files = {"__init__": '"""Code of this bundle that MONAI lacks."""\n'}
    modules = ["engine.sliding_window", "engine.export.bundle_steps", *([code] if code else [])]
    for module in modules:
        source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        modules += [name for name in MODELS.findall(source) if name not in modules]
        names |= {name: name.removeprefix("models.") for name in modules if name not in names}
        for ours, theirs in names.items():
            source = source.replace(f"\nfrom {ours} import ", f"\nfrom scripts.{theirs} import ")
        assert not PROJECT.search(source), PROJECT.search(source)
        files[names[module]] = source
    if code:
        parts = (autocast.product_dtype, autocast._as_operand, autocast.as_operands, attention.attention_reference,
                 instance_norm._is_channels_last, instance_norm._normalise, instance_norm.instance_norm_reference,
                 layer_norm.residual_layer_norm_reference)  # fmt: skip
        files["operations"] = OPERATIONS.format(parts="\n\n".join(inspect.getsource(part) for part in parts).strip())
    return files


def _network(trained: TrainedNetwork) -> tuple[dict[str, Any], list[str], str]:
    """The network as MONAI's configuration makes it, the imports that this takes, and its file where MONAI lacks it.

    Raises:
        ValueError: MONAI lacks it, and its code can't go into a bundle.
    """
    model, size = trained.config.model, trained.config.data.crop_size_voxels
    reference, constants = NETWORKS[model.name].reference, dict(NETWORKS[model.name].bundled_as)
    if reference and reference.package == "monai":
        target, arguments = reference_class(trained, reference)
        return _made_of(target, **arguments), [], ""
    if not constants:
        raise ValueError(f"MONAI lacks our {model.name}, and its code can't go into a bundle: choose another --to")
    code, _, name = constants.pop("_target_").rpartition(".")
    scripts = code.replace("models.", "scripts.")
    given = {argument: f"${constant}" for argument, constant in constants.items()}
    network = _made_of(f"{scripts}.{name}", **given, in_channels=len(trained.modalities), out_channels=len(REGIONS),
                       img_size=list(size), **widths_of(model))  # fmt: skip
    return network, [f"$from {scripts} import {constant}" for constant in constants.values()], code


def _made_of(target: str, **arguments: Any) -> dict[str, Any]:
    """An object in MONAI's configuration."""
    return {"_target_": target, **arguments}


def _label_values(trained: TrainedNetwork) -> list[int]:
    """Labels of core, oedema and enhancing tumour: of voxels that are only in TC, WT or ET."""
    return compose_labels(np.eye(len(REGIONS), dtype=bool), trained.coding).tolist()


def _channels(trained: TrainedNetwork) -> list[int]:
    """Where the modalities are in Decathlon's 4D files."""
    return [MODALITIES.index(modality) for modality in trained.modalities]


def _inference(trained: TrainedNetwork, network: dict[str, Any], imports: list[str]) -> dict[str, Any]:
    data = trained.config.data
    preprocessing = [
        _made_of("LoadImaged", keys="image"),
        _made_of("EnsureChannelFirstd", keys="image"),
        _made_of("scripts.steps.SelectChannelsd"),
        *([_made_of("scripts.steps.AxesInOrderd")] if data.spacing_axes == "patient" else []),
        _made_of("Spacingd", keys="image", pixdim=list(data.spacing_mm), mode="bilinear"),
        _made_of("Orientationd", keys="image", axcodes="RAS", labels=None),
    ]
    postprocessing = [
        _made_of("Activationsd", keys="pred", sigmoid=True),
        _made_of("Invertd", keys="pred", transform="@preprocessing", orig_keys="image", nearest_interp=False),
        _made_of("scripts.steps.RegionsToLabelsd", values=_label_values(trained)),
        _made_of("SaveImaged", keys="pred", output_dir="@output_dir", output_postfix="seg", output_dtype="$torch.uint8",
                 resample=False, separate_folder=False, data_root_dir="@dataset_dir"),
    ]  # fmt: skip
    inferer = _made_of(
        "SlidingWindowInferer", roi_size=list(data.crop_size_voxels), sw_batch_size=WINDOWS_AT_ONCE, overlap=OVERLAP,
        mode="gaussian", sigma_scale=SIGMA_SCALE,
    )  # fmt: skip
    parts = "dataset", "network", "inferer", "postprocessing", "device"
    return {
        "imports": ["$import torch", "$from scripts.steps import find_scans", *imports],
        "bundle_root": ".",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "ckpt_path": "$@bundle_root + '/models/model.pt'",
        "dataset_dir": "$@bundle_root + '/scans'",
        "output_dir": "$@bundle_root + '/eval'",
        "file_names": {modality: list(FILE_NAMES[modality]) for modality in trained.modalities},
        "channels": _channels(trained),
        "datalist": "$find_scans(@dataset_dir, @file_names, @channels)",
        "network_def": network,
        "network": _made_of("scripts.steps.ZScoredWindows", network="$@network_def.to(@device)"),
        "preprocessing": _made_of("Compose", transforms=preprocessing),
        "dataset": _made_of("Dataset", data="@datalist", transform="@preprocessing"),
        "inferer": inferer,
        "postprocessing": _made_of("Compose", transforms=postprocessing),
        "evaluator": _made_of("scripts.steps.Evaluator", **{part: f"@{part}" for part in parts}),
        "run": [  # MONAI finds `scripts` here; in "initialize" it does not yet
            "$@network_def.load_state_dict(torch.load(@ckpt_path, map_location='cpu', weights_only=True))",
            "$@evaluator.run()",
        ],
    }


def _metadata(trained: TrainedNetwork) -> dict[str, Any]:
    description = trained.description()

    def volume(kind: str, channels: Sequence[str]) -> dict[str, Any]:
        return {
            "type": "image",
            "modality": "MR",
            "dtype": "float32",
            "value_range": [],
            "is_patch_data": True,
            "spatial_shape": description["crop_size_voxels"],
            "format": kind,
            "num_channels": len(channels),
            "channel_def": {str(i): channel for i, channel in enumerate(channels)},
        }

    return {
        "schema": SCHEMA,
        "version": VERSION,
        "changelog": {VERSION: f"weights of epoch {trained.epoch}"},
        "monai_version": _plain(version("monai")),
        "pytorch_version": _plain(torch.__version__),
        "numpy_version": _plain(np.__version__),
        "required_packages_version": {"nibabel": "5.3"},
        "name": f"{TITLE}, {trained.config.model.name}",
        "task": "Brain tumour segmentation in MRI",
        "description": (
            f"{trained.config.model.name} that segments {', '.join(REGIONS)} (tumour core, whole tumour, enhancing "
            f"tumour) in {', '.join(trained.modalities)}"
        ),
        "authors": "made by glioforge",
        "copyright": "of whoever trained the network; code in scripts/: Apache-2.0",
        "intended_use": "Research; not for diagnosis",
        "eval_metrics": trained.validation,
        "network_data_format": {
            "inputs": {"image": volume("magnitude", trained.modalities)},
            "outputs": {"pred": volume("classes", REGIONS)},
        },
        "glioforge": description,
    }


def _plain(number: str) -> str:
    return number.split("+")[0]


def _readme(trained: TrainedNetwork) -> str:
    data, (core, oedema, enhancing) = trained.config.data, _label_values(trained)
    files = "; ".join(f"{modality}: ..._{' or _'.join(FILE_NAMES[modality])}" for modality in trained.modalities)
    return README.format(
        title=f"{TITLE}, {trained.config.model.name}",
        modalities=", ".join(trained.modalities),
        source=trained.path.name,
        epoch=trained.epoch,
        monai=_plain(version("monai")),
        files=files,
        channels=_channels(trained),
        spacing=" x ".join(f"{size:g}" for size in data.spacing_mm),
        crop=" x ".join(map(str, data.crop_size_voxels)),
        regions=", ".join(REGIONS),
        labels=f"{core} non-enhancing core, {oedema} oedema, {enhancing} enhancing tumour",
    )
