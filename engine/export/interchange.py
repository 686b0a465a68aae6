"""Trained networks to and from other programs' files.

    safetensors         the weights, and everything else of a weights file as metadata; `load_trained` reads it
    torch_export        a `.pt2` archive of `torch.export`: graph and weights, to be run without this program
    onnx                the same for ONNX Runtime and others
    monai               state dict of MONAI's UNETR or UNet
    self_attention_cv   state dict of self-attention-cv's UNETR
    bundle              a MONAI bundle, see `engine.export.bundle`

A graph holds PyTorch's own operations and none of our kernels, which give way to their references where one is traced.
Its batch size is free, the size of the volume is that of the training crops. What a network expects of its input is not
in its graph: `describe` says it, and each file that can hold words carries them. Every graph is run and compared with
the network before its file gets its name. No code from a file is run on the way in.
"""

from __future__ import annotations

import io
import json
import logging
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from engine.archive import Unreadable, read_archive, sealed
from engine.checkpoint import FORMAT, SAFETENSORS_KEY
from engine.config import Config, to_dict
from engine.network import make_model
from engine.trained import Trained, misfit
from models.convert import PACKAGES, StateDict, from_reference, to_reference
from pipelines.basics.atomic import replacing
from pipelines.labels import REGIONS, Coding

OPSET = 20  # the first with GELU as one operation
TOLERANCE = 1e-4
"""Largest difference of a graph's logits from the network's, relative to the largest logit where that is above 1."""
METADATA = "metadata.json"
NESTED = ("state_dict", "model")
"""Where training programs put a network's state dict in their checkpoints."""


def describe(trained: Trained) -> dict[str, Any]:
    """What a network takes and gives, in plain values: what a user of its graph has to do around it."""
    data = trained.config.data
    return {
        "model": trained.config.model.name,
        "modalities": list(trained.modalities),
        "spacing_mm": list(data.spacing_mm),
        "spacing_axes": "R, A, S" if data.spacing_axes == "patient" else "those of the file",
        "orientation": "RAS",
        "crop_size_voxels": list(data.crop_size_voxels),
        "input": (
            "image: float32 (batch, modality, X, Y, Z), a window of crop_size_voxels; from each channel of the window "
            "the mean of its non-zero voxels is subtracted and it is divided by their standard deviation, zeros stay 0"
        ),
        "output": f"logits: float32 (batch, region, X, Y, Z) of the regions {', '.join(REGIONS)}, which overlap",
        "regions": list(REGIONS),
        "threshold": 0.0,
        "release": trained.coding.release,
        "tissues": {str(value): tissue for value, tissue in trained.coding.tissues.items()},
    }


def widths(network: nn.Module) -> dict[str, int]:
    """The widths of one of our networks, by the names of `models.build_model`."""
    parts: Any = network
    if hasattr(network, "downs"):
        return {"feature_size": parts.downs[0].unit0.conv.out_channels}
    block = parts.vit.blocks[0]
    return {
        "feature_size": parts.stem.conv1.out_channels,
        "hidden_size": parts.vit.patch_embedding.out_channels,
        "mlp_dim": block.mlp[0].out_features,
        "num_heads": block.attention.num_heads,
    }


def reference_class(trained: Trained) -> tuple[str, dict[str, Any]]:
    """The reference package's class for a network, and the arguments that make one of the same widths."""
    name, size, width = trained.config.model.name, trained.config.data.crop_size_voxels, widths(trained.network)
    channels = {"in_channels": len(trained.modalities), "out_channels": len(REGIONS)}
    feature_size = width["feature_size"]
    if name == "unet":
        levels = [feature_size * 2**level for level in range(5)]
        more = {"channels": levels, "strides": [2, 2, 2, 2], "num_res_units": 2}
        return "monai.networks.nets.UNet", {"spatial_dims": 3, **channels, **more}
    if name == "unetr_monai":
        return "monai.networks.nets.UNETR", {**channels, "img_size": list(size), **width, "proj_type": "conv"}
    return "self_attention_cv.UnetTr.UNETR", {
        "img_shape": tuple(size),
        "input_dim": len(trained.modalities),
        "output_dim": len(REGIONS),
        "embed_dim": width["hidden_size"],
        "num_heads": width["num_heads"],
        "dim_linear_block": width["mlp_dim"],
        "base_filters": feature_size,
    }


# Files


def check_output(output: Path, weights: Path, overwrite: bool, source: Path) -> None:
    """Check that a file, or the folder of a bundle, may be written, and make the folder that it is in.

    Args:
        output: the file or folder. weights: the file of weights that is written: `output`, or one in that folder.
        overwrite: whether `output` may exist already. source: the file that is read.

    Raises:
        ValueError: it exists and must not be overwritten.
    """
    if os.path.lexists(output) and not overwrite:
        raise ValueError(f"{output} is there already: choose another --output, or give --overwrite")
    if weights.is_dir():
        raise ValueError(f"{weights} is a folder, and a file is to be written: choose another --output")
    if weights.exists() and weights.samefile(source):
        raise ValueError(f"{weights} is the very file that is read, and would be lost: choose another --output")
    if weights.exists() and any(folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file()
                                for folder in weights.resolve().parents):  # fmt: skip
        raise ValueError(
            f"{weights} is a run's own file, which evaluation or --resume may need: choose another --output"
        )
    output.parent.mkdir(parents=True, exist_ok=True)


def read_state_dict(path: Path) -> StateDict:
    """A state dict of another program: a `.safetensors` file, or one of `torch.save`, without running code from it.

    Raises:
        ValueError: no such file, one that can't be read so, or one that holds no state dict.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}: give the file of a state dict")
    try:
        content: Any = load_file(path) if path.suffix == ".safetensors" else read_archive(path)
    except (SafetensorError, Unreadable) as error:
        raise ValueError(
            f"{path} can't be read: {error}; save the state dict alone: torch.save(model.state_dict(), ...)"
        ) from error
    for name in NESTED:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict, names and tensors alone; save one by model.state_dict()")
    return dict(content)


# Weights


def import_weights(
    state_dict: StateDict, package: str, config: Config, modalities: tuple[str, ...], coding: Coding
) -> dict[str, Any]:
    """The content of a weights file, as `engine.checkpoint.save_weights` takes it, from another package's weights.

    Args:
        state_dict: of the package's model.
        package: "monai" or "self_attention_cv".
        config: model, spacing and crop; the rest is kept as it is.
        modalities, coding: what the channels are, and what label values to write.

    Raises:
        ValueError: a model that the package does not have, or weights that are not those of `config`.
    """
    name = config.model.name
    check_package(name, package)
    network = make_model(config.model, config.data.crop_size_voxels, len(modalities))
    weights = from_reference(name, state_dict, widths(network).get("num_heads", 0))
    fault = misfit(network, weights)
    if fault:
        raise ValueError(
            f"the weights are not those of a {name} with {len(modalities)} modalities, {widths(network)} and crops of "
            f"{tuple(config.data.crop_size_voxels)}: set --model, --data.modalities and --data.crop_size_voxels as the "
            f"network was built ({fault})"
        )
    return {
        "weights": weights,
        "config": to_dict(config),
        "epoch": 0,
        "validation": {},
        "modalities": list(modalities),
        "release": coding.release,
        "tissues": dict(coding.tissues),
        "regions": [list(values) for values in coding.regions],
        "scans": {},
    }


def check_package(name: str, package: str) -> None:
    """Refuse a package that does not have the model of this name."""
    if PACKAGES[name] != package:
        fitting = " or ".join(model for model, owner in PACKAGES.items() if owner == package)
        raise ValueError(
            f"{package} does not have our {name}, {PACKAGES[name]} does; {package} goes with --model.name {fitting}"
        )


def reference_weights(trained: Trained, package: str) -> StateDict:
    """The state dict of a package's model that computes the same.

    Raises:
        ValueError: the package does not have that model.
    """
    name = trained.config.model.name
    check_package(name, package)
    heads = widths(trained.network).get("num_heads", 0)
    return {key: value.contiguous() for key, value in to_reference(name, trained.network.state_dict(), heads).items()}


def save_safetensors(path: Path, content: dict[str, Any], description: dict[str, Any]) -> None:
    """Write weights, and the rest of a weights file as metadata.

    Args:
        path: the file. content: of a weights file, as `load_weights` gives it. description: from `describe`.

    Raises:
        OSError: it can't be written.
    """
    content = sealed({**content, "format": FORMAT})
    rest = {name: value for name, value in content.items() if name != "weights"}
    weights = {name: value.contiguous() for name, value in content["weights"].items()}
    # Not save_file, whose files nobody else may read, whatever the umask says.
    _write(path, to_safetensors(weights, {SAFETENSORS_KEY: json.dumps(rest), **_strings(description)}))


def _strings(description: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in description.items()}


# Graphs


def trace(trained: Trained) -> torch.export.ExportedProgram:
    """The graph of a network in PyTorch's own operations: (batch, C, X, Y, Z) to logits, X, Y and Z as in training."""
    image = torch.zeros(2, len(trained.modalities), *trained.config.data.crop_size_voxels)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        program = torch.export.export(trained.network, (image,), dynamic_shapes=_free_batch())
        return program.run_decompositions({})  # autocast, switched off around each operation, leaves the graph


def _free_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


def save_torch_export(path: Path, trained: Trained, program: torch.export.ExportedProgram) -> float:
    """Write the graph as a `.pt2` archive, its description as the extra file `metadata.json`; then read and run it.

    Returns:
        the largest difference of its logits from the network's.

    Raises:
        ValueError: it is too large.
        OSError: it can't be written.
    """
    file = io.BytesIO()  # a full disk would end the process within torch, which writes by itself
    torch.export.save(program, file, extra_files={METADATA: json.dumps(describe(trained), indent=2)})
    file.seek(0)
    module = torch.export.load(file).module()
    difference = _compare(trained, lambda image: module(image))
    _write(path, file.getbuffer())
    return difference


def save_onnx(path: Path, trained: Trained, program: torch.export.ExportedProgram) -> float:
    """Write the graph as ONNX, its description as the file's metadata; then run it in ONNX Runtime on the CPU.

    Returns:
        the largest difference of its logits from the network's.

    Raises:
        ValueError: it is too large, or a package that this needs is not installed.
        OSError: it can't be written.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401  # torch.onnx.export needs it
    except ImportError as error:
        raise ValueError(f"ONNX needs a package that is not installed ({error}): pip install -e '.[export]'") from error
    for chatty in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=_free_batch(),
            opset_version=OPSET,
            custom_translation_table=IN_ONNX,
            verbose=False,
        )
    assert graph is not None
    graph.model.metadata_props.update(_strings(describe(trained)))
    content = graph.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = _compare(trained, lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]))
    _write(path, content)
    return difference


def _write(path: Path, content: bytes | memoryview) -> None:
    with replacing(path, "wb", sync=True) as file:
        file.write(content)


def _instance_norm_in_onnx(
    x_BCXYZ: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, use_input_stats: bool, momentum: float,
    eps: float, cudnn_enabled: bool,
) -> Any:  # fmt: skip
    """Instance norm by means along one axis after another; arguments as `torch.ops.aten.instance_norm`.

    ONNX Runtime's own sums the voxels of a channel one by one, in float32: of a million, most of them the same
    background, logits came out up to 6e-4 of the largest wrong (onnxruntime 1.32 on a CPU, UNETR at 128 x 128 x 64).
    """
    import onnxscript

    op: Any = onnxscript.opset20

    def mean(x: Any) -> Any:
        for axis in (4, 3, 2):
            x = op.ReduceMean(x, op.Constant(value_ints=[axis]), keepdims=1)
        return x

    def by_channel(parameter: Any) -> Any:
        return op.Unsqueeze(parameter, op.Constant(value_ints=[1, 2, 3]))

    centred = op.Sub(x_BCXYZ, mean(x_BCXYZ))
    variance = mean(op.Mul(centred, centred))
    y = op.Div(centred, op.Sqrt(op.Add(variance, op.Constant(value_float=eps))))
    y = y if weight is None else op.Mul(y, by_channel(weight))
    return y if bias is None else op.Add(y, by_channel(bias))


IN_ONNX: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.instance_norm.default: _instance_norm_in_onnx}
"""Operations that go to ONNX in another way than torch's own."""


@torch.no_grad()
def _compare(trained: Trained, run: Any) -> float:
    """Run a graph on noise in a background of zeros, as a batch of one, which is not the batch that it was traced with.

    Returns:
        the largest difference from the network's logits.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    size = trained.config.data.crop_size_voxels
    image = torch.randn(1, len(trained.modalities), *size, generator=torch.Generator().manual_seed(0))
    image[..., : size[2] // 2] = 0  # sums over equal voxels show how exact they are
    expected = trained.network(image)
    difference = float((run(image) - expected).abs().max())
    largest = max(1.0, float(expected.abs().max()))
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"the graph's logits differ by up to {difference:.1e} from the network's, which reach {largest:.1f}; the "
            f"limit is {TOLERANCE} of that. Nothing was written: other versions of torch and onnxruntime may do better"
        )
    return difference
