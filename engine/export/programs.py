"""Trained networks as programs that run without this one: a `.pt2` archive of `torch.export`, and ONNX.

A program is the network's graph of PyTorch's own operations, and its weights. It has none of our kernels: tracing takes
their references. Its batch size is free; the size of the volume is that of the training crops. The graph does not show
what input the network expects, so each file carries the network's description. Every program is run and compared with
the network before its file gets its name.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.trained import TrainedNetwork
from pipelines.basics.atomic import replacing

OPSET = 20  # the first with GELU as one operation
TOLERANCE = 1e-4
"""Largest difference of a program's logits from the network's, relative to the largest logit where that is above 1."""
METADATA = "metadata.json"
"""Extra file of a `.pt2` archive: the network's description."""


def trace(trained: TrainedNetwork) -> torch.export.ExportedProgram:
    """The program of a network: (batch, C, X, Y, Z) to logits, X, Y and Z as in training."""
    image = torch.zeros(2, len(trained.modalities), *trained.config.data.crop_size_voxels)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch about itself
        program = torch.export.export(trained.network, (image,), dynamic_shapes=_free_batch())
        return program.run_decompositions({})  # autocast, switched off around each operation, leaves the graph


def _free_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch")},)


def save_torch_export(path: Path, trained: TrainedNetwork, program: torch.export.ExportedProgram) -> float:
    """Write a program as a `.pt2` archive, after reading it back and running it.

    Returns:
        the largest difference of its logits from the network's.

    Raises:
        ValueError: that is too large.
        OSError: it can't be written.
    """
    file = io.BytesIO()  # torch's own writing ends the process when the disk is full
    torch.export.save(program, file, extra_files={METADATA: json.dumps(trained.description(), indent=2)})
    file.seek(0)
    difference = _compare(trained, torch.export.load(file).module())
    _write(path, file.getbuffer())
    return difference


def save_onnx(path: Path, trained: TrainedNetwork, program: torch.export.ExportedProgram) -> float:
    """Write a program as ONNX, after running it in ONNX Runtime on the CPU; otherwise as `save_torch_export`.

    Raises:
        ValueError: also where a package that this needs is not installed.
    """
    try:
        import onnxruntime  # type: ignore[import-untyped]
        import onnxscript  # noqa: F401  # torch.onnx.export needs it
    except ImportError as error:
        raise ValueError(f"ONNX needs a package that is not installed ({error}): pip install -e '.[export]'") from error
    with _quiet():
        model = torch.onnx.export(
            program,
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=_free_batch(),
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.instance_norm.default: _instance_norm_in_onnx},
            verbose=False,
        )
    assert model is not None
    model.model.metadata_props.update(trained.metadata())
    content = model.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = _compare(trained, lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0]))
    _write(path, content)
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings and log lines of torch's ONNX exporter about itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _write(path: Path, content: bytes | memoryview) -> None:
    with replacing(path, "wb", sync=True) as file:
        file.write(content)


def _instance_norm_in_onnx(
    x_BCXYZ: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, use_input_stats: bool, momentum: float,
    eps: float, cudnn_enabled: bool,
) -> Any:  # fmt: skip
    """Instance norm by means along one axis after another; arguments as `torch.ops.aten.instance_norm`.

    ONNX Runtime's own sums the voxels of a channel one by one, in float32: of a million, most of them the same
    background, logits were wrong by up to 6e-4 of the largest (onnxruntime 1.32 on a CPU, UNETR at 128 x 128 x 64).
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


@torch.no_grad()
def _compare(trained: TrainedNetwork, run: Any) -> float:
    """Run a program on noise in a background of zeros, as a batch of one (it was traced with two).

    Returns:
        the largest difference from the network's logits; one above `TOLERANCE` raises ValueError.
    """
    size = trained.config.data.crop_size_voxels
    image = torch.randn(1, len(trained.modalities), *size, generator=torch.Generator().manual_seed(0))
    image[..., : size[2] // 2] = 0  # summing equal voxels shows rounding errors
    expected = trained.network(image)
    difference = float((run(image) - expected).abs().max())
    largest = max(1.0, float(expected.abs().max()))
    if not difference <= TOLERANCE * largest:
        raise ValueError(
            f"the exported program's logits differ by up to {difference:.1e} from the network's, which reach "
            f"{largest:.1f}; the limit is {TOLERANCE} of that. Nothing was written: try other versions of torch and "
            "onnxruntime"
        )
    return difference
