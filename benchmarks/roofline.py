"""Bytes, launches and FLOPs of one training step, counted without a GPU, and its time at a GPU's limits.

    python -m benchmarks.roofline                                    the published UNETR, batch 2, bf16
    python -m benchmarks.roofline --model unet --batch 8 --precision tf32 --json unet.json --plot unet.png

Forward, loss, backward and optimizer step of the engine's own code run on fake tensors, which have sizes and no memory.
Every operation that reaches PyTorch, and every launch of our kernels, is a row: FLOPs of its products, bytes that its
launches read and write, and their number. So a change of the code changes these numbers.

Counted. An operation reads each input once and writes each output once; views are free. A kernel of ours reads or
writes each tensor that it is given once (`kernels.dispatch.observed` shows its launches). A convolution's bias is an
operation of its own, and so is its gradient, as in PyTorch's calls of cuDNN; an operand that is not dense in
channels_last_3d is copied first. Multi-tensor operations count their launches by PyTorch's chunks. The count is of one
GPU, without what DeepSpeed adds over several ranks.

At the roofline an operation takes the longer of bytes over memory bandwidth and FLOPs over the rate of products, both
as measured ceilings (`SHARE` of the data sheet's). The predicted time assumes `EFFICIENCY` of that bandwidth,
`conv_rate` for convolutions and at least `LAUNCH_S` per launch: assumptions, not measurements.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.workloads import REGIONS
from engine.optim import OptimConfig
from engine.precision import LOW_PRECISION, Precision
from engine.ranks.distributed import Ranks
from engine.step import TrainConfig, prepare_training
from kernels import dispatch
from kernels.dice_ce import dice_ce_loss
from models import NETWORKS, build_model
from pipelines.basics.atomic import replacing, write_text

aten = torch.ops.aten
LAST = torch.channels_last_3d
CROP = (128, 128, 64)
MODALITIES = 4


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: dense products with float32 sums in TFLOP/s by precision, memory in GB/s."""

    half: float
    tf32: float
    float32: float
    memory: float

    def products(self, precision: str) -> float:
        """TFLOP/s of products in a precision of `--train.precision`."""
        return {"tf32": self.tf32, "float32": self.float32}.get(precision, self.half)


# NVIDIA's data sheets: A100 80GB SXM, H100 SXM, H200 SXM, HGX B200 (a GPU of eight), and the architecture papers of Ada
# and of RTX Blackwell.
GPUS = {
    "A100": Gpu(312, 156, 19.5, 2039),
    "H100": Gpu(989, 495, 67, 3350),
    "H200": Gpu(989, 495, 67, 4800),
    "B200": Gpu(2250, 1125, 75, 7700),
    "RTX 4090": Gpu(165, 82.6, 82.6, 1008),
    "RTX 5090": Gpu(210, 105, 105, 1792),
}
SHARE = {"products": 0.8, "memory": 0.9}
"""Share of the data sheet that a large product and a large copy reach: 790 TFLOP/s and 3.0 TB/s on an H100."""

EFFICIENCY = {
    "norm": 0.8, "bias": 0.7, "copy": 0.55, "cast": 0.75, "pointwise": 0.75, "layer norm": 0.6, "loss": 0.7,
    "reduction": 0.3, "optimizer": 0.85, "product": 0.6, "attention": 0.4, "convolution": 0.6,
}  # fmt: skip
"""Share of the measured bandwidth that each kind of operation reaches."""
LAUNCH_S = 2.2e-6
"""The least time of a launch on the GPU, in a CUDA graph."""
CONV_RATES = {8: 55e12, 16: 110e12, 32: 205e12, 64: 320e12, 128: 420e12}
"""FLOP/s of cuDNN's 3 x 3 x 3 convolutions in half precision on an H100 by output channels, fitted to MLPerf's 3D UNet
(mlcommons/training_results_v3.1, NVIDIA, 8 x H100: 71 samples/s each) for 32 and more, guessed below that; a weight
gradient has the rate of half as many channels."""


@dataclass
class Operation:
    """An operation of a step.

    Fields:
        layer: name of the module. direction: "forward", "loss", "backward" or "optimizer".
        kind: a key of `EFFICIENCY`. op: PyTorch's name, or the kernel's.
        flops, bytes, launches: of all its launches. width: output channels of a convolution, else 0.
    """

    layer: str
    direction: str
    kind: str
    op: str
    flops: int = 0
    bytes: int = 0
    launches: int = 1
    width: int = 0


KINDS = {
    "cat": "copy", "clone": "copy", "copy_": "copy", "stack": "copy", "_to_copy": "cast", "mm": "product",
    "addmm": "product", "addmm_": "product", "bmm": "product", "native_layer_norm": "layer norm",
    "native_layer_norm_backward": "layer norm",
    "sum": "reduction", "mean": "reduction", "linalg_vector_norm": "reduction",
}  # fmt: skip
"""The kind of each operation of PyTorch; all others are pointwise."""
KERNELS = {
    "attention_": "attention",
    "layer_norm_": "layer norm",
    "norm_": "norm",
    "dice_ce_": "loss",
    "up_conv_": "product",
}
"""The kind of our kernels, by how their names begin."""
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
}


class Counter(TorchDispatchMode):
    """Records every operation below it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[Operation] = []
        self.direction = "forward"
        self.layers: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten.contiguous.default:  # from below autograd it comes undivided: a view, or a copy
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name == "convolution":
            out = _as_cudnn(out)
            self._convolution(args[0], args[1], args[2], out, is_transposed=args[6])
        elif name == "convolution_backward":
            out = (_as_cudnn(out[0]), _as_cudnn(out[1]), out[2])
            self._convolution_backward(args[0], args[1], args[2], args[7], args[10])
        elif name.startswith(("_foreach", "_fused")):
            self._multi_tensor(name, args)
        elif not (name in FREE or _is_view(func) or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(out))):
            self._plain(name, args, kwargs, out)
        return out

    def _add(self, kind: str, op: str, nbytes: int, flops: int = 0, launches: int = 1, width: int = 0) -> None:
        if self.direction == "optimizer":
            kind = "optimizer"
        self.rows.append(Operation(self._layer(), self.direction, kind, op, flops, nbytes, launches, width))

    def _layer(self) -> str:
        if self.direction == "backward":
            node: Any = torch._C._current_autograd_node()  # None, or without a layer in the loss
            return node.metadata.get("layer", "loss") if node is not None else "loss"
        return self.layers[-1] if self.layers else self.direction

    def _plain(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        flops = 2 * math.prod(inputs[-2].shape) * inputs[-1].shape[-1] if KINDS.get(name) == "product" else 0
        nbytes = sum(map(_nbytes, inputs)) + sum(map(_nbytes, outputs))
        if name == "copy_":
            nbytes -= _nbytes(inputs[0])  # is written and not read
        launches = 2 if name == "native_layer_norm_backward" else 1
        self._add(KINDS.get(name, "pointwise"), name, nbytes, flops, launches)

    def _convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, is_transposed: bool) -> None:
        self._dense(x)
        flops = 2 * math.prod((x if is_transposed else y).shape) * math.prod(weight.shape[1:])
        self._add("convolution", "convolution", sum(map(_nbytes, (x, weight, y))), flops, width=y.shape[1])
        if bias is not None:
            self._add("bias", "bias", 2 * _nbytes(y))

    def _convolution_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, transposed: bool, mask: Sequence[bool]
    ) -> None:
        self._dense(dy)
        flops = 2 * math.prod((x if transposed else dy).shape) * math.prod(weight.shape[1:])
        nbytes = sum(map(_nbytes, (dy, x, weight)))
        if mask[0]:
            self._add("convolution", "convolution's input gradient", nbytes, flops, width=x.shape[1])
        if mask[1]:
            self._add("convolution", "convolution's weight gradient", nbytes, flops, width=min(dy.shape[1], 128) // 2)
        if mask[2]:
            self._add("bias", "bias's gradient", _nbytes(dy))

    def _dense(self, x: Tensor) -> None:
        if x.dim() == 5 and not x.is_contiguous(memory_format=LAST):
            self._add("copy", "to channels_last_3d", 2 * _nbytes(x))

    def _multi_tensor(self, name: str, args: Any) -> None:
        lists = [part for part in args if isinstance(part, list) and part and isinstance(part[0], Tensor)]
        written = 3 if name.startswith("_fused_adam") else 0  # parameters and two moments
        nbytes = sum(_nbytes(each) for part in lists for each in part if each.dim())
        nbytes += sum(_nbytes(each) for part in (lists[0], *lists[2 : 1 + written])[:written] for each in part)
        self._add(
            "optimizer", name, nbytes, launches=multi_tensor_launches([each.numel() for each in lists[0]], len(lists))
        )

    def launch(self, launch: dispatch.Launch) -> None:
        """One launch of a kernel of ours."""
        tensors = [leaf for leaf in tree_leaves(dict(launch.args)) if isinstance(leaf, Tensor)]
        kind = next((kind for prefix, kind in KERNELS.items() if launch.name.startswith(prefix)), "pointwise")
        nbytes = launch.nbytes or sum(map(_nbytes, tensors))
        self._add(kind, launch.name, nbytes, _flops(launch))


def _flops(launch: dispatch.Launch) -> int:
    """FLOPs of the products of a kernel of ours."""
    args = launch.args
    # The backward has five products, and computes two of them in both passes.
    attention = {"attention_forward_kernel": 2, "attention_backward_kernel": 7}.get(launch.name, 0)
    if attention:
        return attention * 2 * math.prod(args["q_ptr"].shape) * args["N"]
    is_doubling = launch.name.startswith("up_conv_") and "M" in args
    return 2 * args["M"] * args["C_in"] * 8 * args["C_OUT"] if is_doubling else 0


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _is_view(func: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _as_cudnn(x: Any) -> Any:
    """In cuDNN's layout, channels last; a fake tensor of the CPU has that of its own backend."""
    return x if x is None or x.dim() != 5 else torch.empty_like(x, memory_format=LAST)


def multi_tensor_launches(sizes: Sequence[int], depth: int) -> int:
    """Launches of a multi-tensor operation over tensors of these sizes (ATen/native/cuda/MultiTensorApply.cuh).

    A launch takes at most 320 chunks of 65,536 elements, and a number of tensors that depends on `depth`, the lists.
    """
    most_tensors = (110, 64, 48, 36, 30)[min(depth, 5) - 1]
    launches = chunks = tensors = 0
    for size in sizes:
        tensors += 1
        left = max(1, math.ceil(size / 65536))
        while left:
            taken = min(left, 320 - chunks)
            chunks, left = chunks + taken, left - taken
            if chunks == 320 or (not left and tensors == most_tensors):
                launches, chunks, tensors = launches + 1, 0, int(left > 0)
    return launches + (chunks > 0)


def count(model: str, batch: int, precision: str, crop: Sequence[int] = CROP) -> list[Operation]:
    """The operations of one step.

    Args:
        model: a name of `models.NETWORKS`, at its published size. batch: crops. precision: of `--train.precision`.
        crop: (X, Y, Z), voxels.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.multiple(dispatch, _refusal=lambda device: "", _way=lambda *_: "triton"),
    ):
        network = build_model(model, MODALITIES, len(REGIONS), crop)
        _channels_last(network)
        # On the CPU, whose autocast lowers the same operations as CUDA's in these networks.
        one_rank = Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
        train = TrainConfig(precision=precision)  # type: ignore[arg-type]
        network, copies, optimizer = prepare_training(network, train, OptimConfig(), one_rank)
        low = LOW_PRECISION.get(precision)
        dtype = torch.bfloat16 if low == torch.bfloat16 else torch.float32
        image = torch.empty((batch, MODALITIES, *crop), dtype=dtype, memory_format=LAST)  # as the pipeline makes it
        labels = torch.empty((batch, *crop), dtype=torch.uint8)
        counter = Counter()
        _name_layers(network, counter)

        def take_pass() -> None:
            counter.direction = "forward"
            with copies.applied():
                logits = network(image)
            counter.direction = "loss"
            loss = dice_ce_loss(logits, labels, REGIONS, ce="bce", check_labels=False).loss
            counter.direction = "backward"
            loss.backward()
            counter.direction = "optimizer"
            optimizer.step()

        with dispatch.observed(counter.launch):
            take_pass()  # the first one makes moments, copies and tables
            counter.rows.clear()
            optimizer.zero_grad()
            with counter:
                take_pass()
    return counter.rows


def _channels_last(network: nn.Module) -> None:
    """As `Module.to(memory_format=...)`, which fake parameters do not support."""
    for module in network.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.dim() == 5:
                setattr(module, name, nn.Parameter(weight.detach().contiguous(memory_format=LAST)))


def _name_layers(network: nn.Module, counter: Counter) -> None:
    """Tell the counter the module of each operation, in the backward too."""
    seen: set[Any] = set()

    def tag(output: Any, name: str) -> None:
        waiting: list[Any] = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            node.metadata["layer"] = name
            waiting += [following for following, _ in node.next_functions]

    for name, module in network.named_modules():
        name = name or "network"

        def enter(_: Any, inputs: Any, name: str = name) -> None:
            tag(inputs, counter.layers[-1] if counter.layers else name)  # operations of its caller
            counter.layers.append(name)

        def leave(_: Any, inputs: Any, output: Any, name: str = name) -> None:
            counter.layers.pop()
            tag(output, name)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)


def totals(rows: Iterable[Operation]) -> dict[str, int]:
    """Sums of bytes, launches and FLOPs."""
    rows = list(rows)
    return {name: sum(getattr(row, name) for row in rows) for name in ("bytes", "launches", "flops")}


def roofline_s(row: Operation, gpu: Gpu, precision: str) -> float:
    """Seconds of an operation at the measured ceilings of a GPU."""
    products = gpu.products(precision) * 1e12 * SHARE["products"]
    return max(row.bytes / (gpu.memory * 1e9 * SHARE["memory"]), row.flops / products)


def predicted_s(row: Operation, gpu: Gpu, precision: str) -> float:
    """Seconds of an operation in a CUDA graph, by the assumptions at the head of this file."""
    memory = row.bytes / (gpu.memory * 1e9 * SHARE["memory"] * EFFICIENCY[row.kind])
    rate = conv_rate(row.width, gpu, precision) if row.width else math.inf
    products = row.flops / rate if row.width else roofline_s(row, gpu, precision) / EFFICIENCY[row.kind]
    return max(memory, products, LAUNCH_S * row.launches)


def conv_rate(width: int, gpu: Gpu, precision: str) -> float:
    """FLOP/s of a convolution by output channels: the H100's in half precision, scaled by the data sheets."""
    known = max((size for size in CONV_RATES if size <= width), default=min(CONV_RATES))
    return CONV_RATES[known] * gpu.products(precision) / GPUS["H100"].half


def predicted_step_s(model: str, batch: int, precision: str, device: str, crop: Sequence[int] = CROP) -> float | None:
    """Seconds of a step on a GPU by its full name, such as "NVIDIA H100 80GB HBM3"; None if its data sheet is not here.

    Other arguments as `count`.
    """
    known = next((name for name in GPUS if name in device), None)
    if known is None:
        return None
    return sum(predicted_s(row, GPUS[known], precision) for row in count(model, batch, precision, crop))


def grouped(rows: Iterable[Operation], gpu: Gpu, precision: str) -> list[dict[str, Any]]:
    """Sums by layer, direction and kind, the longest predicted time first."""
    groups: dict[tuple[str, str, str], dict[str, Any]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        group = groups[row.layer, row.direction, row.kind]
        for name in ("flops", "bytes", "launches"):
            group[name] += getattr(row, name)
        group["roofline_s"] += roofline_s(row, gpu, precision)
        group["predicted_s"] += predicted_s(row, gpu, precision)
    named = [dict(zip(("layer", "direction", "kind"), key)) | dict(group) for key, group in groups.items()]
    return sorted(named, key=lambda group: -group["predicted_s"])


def report(rows: list[Operation], precision: str, batch: int, gpu: str, most: int) -> None:
    """Print where the time goes on one GPU, and the totals on all."""
    console = Console(width=None if Console().is_terminal else 140)
    table = Table(title=f"counted; times on {gpu} at the roofline and predicted, not measured")
    for column in ("layer", "direction", "kind", "GFLOP", "MB", "launches", "roofline us", "predicted us"):
        table.add_column(column, justify="left" if column in ("layer", "direction", "kind") else "right")
    for group in grouped(rows, GPUS[gpu], precision)[:most]:
        numbers = (group["flops"] / 1e9, group["bytes"] / 1e6, group["launches"])
        times = (1e6 * group["roofline_s"], 1e6 * group["predicted_s"])
        table.add_row(group["layer"], group["direction"], group["kind"], *(f"{n:,.0f}" for n in (*numbers, *times)))
    console.print(table)
    total = totals(rows)
    console.print(
        f"total: {total['flops'] / 1e9:,.0f} GFLOP, {total['bytes'] / 1e9:.2f} GB, {total['launches']} launches"
    )
    for name, sheet in GPUS.items():
        floor, guess = (sum(each(row, sheet, precision) for row in rows) for each in (roofline_s, predicted_s))
        console.print(f"{name:9} {batch / floor:6.0f} samples/s at the roofline, {batch / guess:6.0f} predicted")


def draw(rows: list[Operation], precision: str, gpu: str, title: str, path: Path) -> None:
    """Bars of the predicted time by kind and direction, with the roofline's part dark."""
    from matplotlib.figure import Figure

    groups: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for row in rows:
        both = groups[row.kind, row.direction]
        both[0] += 1e3 * roofline_s(row, GPUS[gpu], precision)
        both[1] += 1e3 * predicted_s(row, GPUS[gpu], precision)
    named = sorted(groups.items(), key=lambda item: item[1][1])
    names = [f"{kind}, {direction}" for (kind, direction), _ in named]
    figure = Figure(figsize=(7, 0.28 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(names, [times[1] for _, times in named], color="#56b4e9", label="predicted")
    axes.barh(names, [times[0] for _, times in named], color="#0072b2", label="at the roofline")
    axes.set(xlabel=f"ms of a step on {gpu}, computed and not measured", title=title)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    with replacing(path, "wb") as file:
        figure.savefig(file, dpi=160)


def main() -> None:
    """Count, print, and write the files asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=NETWORKS, default="unetr")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--precision", choices=get_args(Precision), default="bf16")
    parser.add_argument("--gpu", choices=list(GPUS), default="H100", help="GPU of the times in table and plot")
    parser.add_argument("--rows", type=int, default=30, help="rows of the table")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    rows = count(options.model, options.batch, options.precision)
    report(rows, options.precision, options.batch, options.gpu, options.rows)
    title = f"{options.model}, batch {options.batch}, {options.precision}"
    if options.json:
        content = {"counted": title, "crop": CROP, "total": totals(rows), "rows": [asdict(row) for row in rows]}
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    if options.plot:
        draw(rows, options.precision, options.gpu, title, options.plot)


if __name__ == "__main__":
    main()
