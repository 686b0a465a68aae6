"""What the kernels are compiled, tuned and measured on.

    MODELS    what the models launch: continuous integration compiles it for every GPU, in default configurations
    MEASURED  the sizes that are tuned and that the benchmarks report; compiled in every configuration before either
    OTHERS    what other users bring, and the options that change a kernel

`python -m benchmarks.aot --every` compiles all three in every configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args
from unittest import mock

import torch
from torch import Tensor

from kernels import adamw, attention, dice_ce, dispatch, instance_norm, layer_norm, up_conv

FIRST, LAST = torch.contiguous_format, torch.channels_last_3d
REGIONS = ((2, 3), (1, 2, 3), (3,))
"""TC, WT and ET in the coding of the Medical Segmentation Decathlon."""
WEIGHT = (1.0, 2.0, 4.0)
"""One for each region of a weighted loss."""
SLOPE = 0.01
_Operands = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _aligned(columns: int) -> int:
    return dispatch.ceil_div(columns, 8) * 8


def _layout(memory_format: torch.memory_format) -> str:
    return "channels_last" if memory_format == LAST else "contiguous"


@dataclass(frozen=True)
class AttentionWorkload:
    """A fused projection as the models pass it, its rows padded to 16 bytes of half precision.

    Without `packed`, queries, keys and values as views into a projection (B, N, 3, H, D).
    """

    op: ClassVar = "attention"
    batch: int
    heads: int
    tokens: int
    features: int
    dtype: torch.dtype = torch.bfloat16
    packed: bool = True

    def __str__(self) -> str:
        uses = "" if self.packed else " views"
        return f"{(self.batch, self.heads, self.tokens, self.features)} {_short(self.dtype)}{uses}"

    @property
    def out_columns(self) -> int:
        """Columns of a packed result."""
        return _aligned(self.heads * self.features)

    def inputs(self, device: torch.device | str) -> list[Tensor]:
        """qkv (B, N, columns), or q, k, v (B, H, N, D); random, with gradients."""
        used = 3 * self.heads * self.features
        columns = _aligned(used) if self.packed else used
        qkv = torch.randn(self.batch, self.tokens, columns, device=device).to(self.dtype)
        tensors = (qkv,) if self.packed else self.split([qkv])
        return [tensor.requires_grad_() for tensor in tensors]

    def split(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """q, k, v (B, H, N, D) of a set of inputs: views if it is packed."""
        if len(tensors) == 3:
            return tuple(tensors)
        heads = tensors[0][..., : 3 * self.heads * self.features].unflatten(-1, (3, self.heads, self.features))
        return heads.permute(2, 0, 3, 1, 4).unbind(0)

    def run(self) -> None:
        """Forward and backward on tensors without storage, for `dispatch.observed`."""
        scale = self.features**-0.5
        if not self.packed:
            q, k, v = self.inputs("meta")
            out, lse = attention.attention_forward(q, k, v, scale)
            attention.attention_backward(q, k, v, out, lse, torch.empty_like(out), scale)
            return
        (qkv,) = self.inputs("meta")
        out, lse = attention.attention_packed_forward(qkv, self.heads, self.features, scale, self.out_columns)
        attention.attention_packed_backward(qkv, out, lse, torch.empty_like(out), self.heads, self.features, scale)


@dataclass(frozen=True)
class InstanceNormWorkload:
    """A feature map, its residual, whether the activation is a PReLU instead of a leaky ReLU, and where y goes.

    `joined`: y and its gradient are the second half of a map of twice the channels, which only `run` knows.
    """

    op: ClassVar = "instance_norm"
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.bfloat16
    memory_format: torch.memory_format = LAST
    residual: Literal["none", "raw", "normalised"] = "none"
    prelu: bool = False
    affine: bool = False
    joined: bool = False

    def __str__(self) -> str:
        uses = ["PReLU"] * self.prelu + ["affine"] * self.affine + ["joined"] * self.joined
        uses += [f"{self.residual} residual"] * (self.residual != "none")
        return " ".join([str(self.shape), _short(self.dtype), _layout(self.memory_format), *uses])

    def inputs(self, device: torch.device | str) -> list[Tensor]:
        """x, then residual, slope, weight and bias where there are any; random, with gradients."""
        maps = [torch.randn(self.shape, device=device, dtype=self.dtype) for _ in range(1 + (self.residual != "none"))]
        tensors = [tensor.to(memory_format=self.memory_format) for tensor in maps]
        if self.prelu:
            tensors.append(torch.full((1,), 0.25, device=device))
        if self.affine:
            tensors += [torch.randn(self.shape[1], device=device) for _ in range(2)]
        return [tensor.requires_grad_() for tensor in tensors]

    def split(self, tensors: tuple[Tensor, ...]) -> _Operands:
        """x, residual, slope, weight and bias of a set of inputs; None for those that it lacks."""
        x, *rest = tensors
        residual = rest.pop(0) if self.residual != "none" else None
        slope = rest.pop(0) if self.prelu else None
        weight, bias = rest if self.affine else (None, None)
        return x, residual, slope, weight, bias

    def run(self) -> None:
        """As `AttentionWorkload.run`."""
        x, residual, slopes, weight, bias = self.split(tuple(self.inputs("meta")))
        slope = None if self.prelu else SLOPE
        normalised = self.residual == "normalised"
        y = torch.cat([x, x], dim=1)[:, x.shape[1] :] if self.joined else torch.empty_like(x)
        stats = instance_norm.instance_norm_write(y, x, weight, bias, 1e-5, slopes, slope, residual, normalised)
        instance_norm.instance_norm_backward(y, x, stats, weight, bias, slopes, slope, residual, normalised)


@dataclass(frozen=True)
class LayerNormWorkload:
    """A float32 residual stream (B, N, D), an update of it and a bias in another dtype, that of the norm too."""

    op: ClassVar = "layer_norm"
    shape: tuple[int, int, int]
    dtype: torch.dtype = torch.bfloat16
    update: bool = True
    stream_bias: bool = False

    def __str__(self) -> str:
        uses = [name for name, is_so in (("no update", not self.update), ("stream bias", self.stream_bias)) if is_so]
        return " ".join([str(self.shape), _short(self.dtype), *uses])

    def inputs(self, device: torch.device | str) -> list[Tensor]:
        """Tokens, update, weight, bias and that of the stream, without what there is not; random, with gradients."""
        tensors = [torch.randn(self.shape, device=device)]
        if self.update:
            tensors.append(torch.randn(self.shape, device=device).to(self.dtype))
        tensors += [torch.randn(self.shape[2], device=device) for _ in range(2)]
        if self.stream_bias:
            tensors.append(torch.randn(self.shape[2], device=device).to(self.dtype))
        return [tensor.requires_grad_() for tensor in tensors]

    @property
    def has_stream(self) -> bool:
        """Whether a stream is written that is not the tokens."""
        return self.update or self.stream_bias

    def split(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        """Tokens, update, weight, bias and that of the stream, of a set of inputs."""
        tokens, *others = tensors
        update = others.pop(0) if self.update else None
        weight, bias, *stream_bias = others
        return tokens, update, weight, bias, stream_bias[0] if stream_bias else None

    def run(self) -> None:
        """As `AttentionWorkload.run`."""
        tokens, update, weight, bias, stream_bias = self.split(self.inputs("meta"))
        stream, y, stats = layer_norm.layer_norm_forward(tokens, update, weight, bias, 1e-5, self.dtype, stream_bias)
        dstream, kept = (torch.empty_like(stream), stream) if self.has_stream else (None, tokens)
        update_dtype = None if update is None else update.dtype
        dy = torch.empty_like(y)
        layer_norm.layer_norm_backward(dstream, dy, kept, stats, weight, bias, stream_bias, update_dtype)


@dataclass(frozen=True)
class DiceCEWorkload:
    """Logits and their label map, the kind of cross-entropy, and the options that change the kernels."""

    op: ClassVar = "dice_ce"
    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.bfloat16
    ce: dice_ce.CrossEntropy = "bce"
    memory_format: torch.memory_format = FIRST
    weighted: bool = False
    squared_pred: bool = False
    batch: bool = False

    def __str__(self) -> str:
        uses = [name for name in ("weighted", "squared_pred", "batch") if getattr(self, name)]
        return " ".join([str(self.shape), _short(self.dtype), self.ce, _layout(self.memory_format), *uses])

    def inputs(self, device: torch.device | str) -> list[Tensor]:
        """Logits, with a gradient, and labels; random."""
        logits = torch.randn(self.shape, device=device, dtype=self.dtype).to(memory_format=self.memory_format)
        labels = torch.randint(0, 4, (self.shape[0], *self.shape[2:]), device=device, dtype=torch.uint8)
        return [logits.requires_grad_(), labels]

    def run(self) -> None:
        """As `AttentionWorkload.run`."""
        logits, labels = self.inputs("meta")
        table = torch.empty(256, dtype=torch.int64, device="meta")
        options = (list(WEIGHT) if self.weighted else None, self.ce, [1.0, 1.0, 1e-5, 1e-5])
        flags = (self.squared_pred, self.batch)
        loss, _, _, saved = dice_ce.dice_ce_forward(logits, labels, table, *options, *flags)
        dice_ce.dice_ce_backward(loss, None, None, logits, labels, table, saved, *options, *flags)


@dataclass(frozen=True)
class UpConvWorkload:
    """A feature map and the weight that doubles it, and whether the result is a half of a wider buffer."""

    op: ClassVar = "up_conv"
    shape: tuple[int, int, int, int, int]
    out_channels: int
    dtype: torch.dtype = torch.bfloat16
    sliced: bool = False
    memory_format: torch.memory_format = LAST

    def __str__(self) -> str:
        uses = [_layout(self.memory_format)] * (self.memory_format != LAST) + ["slice"] * self.sliced
        return " ".join([f"{self.shape} to {self.out_channels}", _short(self.dtype), *uses])

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Of the result."""
        return self.shape[0], self.out_channels, *(2 * size for size in self.shape[2:])

    def inputs(self, device: torch.device | str) -> list[Tensor]:
        """x and weight, random, with gradients; where sliced the destination, a half of a buffer."""
        x = torch.randn(self.shape, device=device, dtype=self.dtype).to(memory_format=LAST)
        weight = torch.randn(self.shape[1], self.out_channels, 2, 2, 2, device=device, dtype=self.dtype)
        tensors = [x.requires_grad_(), weight.to(memory_format=self.memory_format).requires_grad_()]
        return [*tensors, self._half(device)] if self.sliced else tensors

    def _half(self, device: torch.device | str) -> Tensor:
        batch, channels, *space = self.out_shape
        buffer = torch.empty((batch, 2 * channels, *space), dtype=self.dtype, device=device, memory_format=LAST)
        return buffer[:, :channels]

    def run(self) -> None:
        """As `AttentionWorkload.run`."""
        x, weight, *destination = self.inputs("meta")
        y = destination[0] if self.sliced else up_conv.up_conv_forward(x, weight)
        if self.sliced:
            up_conv.up_conv_forward_into(x, weight, y)
        up_conv.up_conv_backward(y, x, weight, True, True)


@dataclass(frozen=True)
class AdamWWorkload:
    """Square weights (width, width) of so many layers and their biases, of which the weights may have copies."""

    op: ClassVar = "adamw"
    layers: int
    width: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.layers} layers of {self.width} {_short(self.dtype)}"

    def tensors(self, device: torch.device | str) -> adamw.AdamWTensors:
        """Random parameters and gradients, of `dtype` for the weights; moments of zero."""
        rows = []
        for size in [(self.width, self.width), (self.width,)] * self.layers:
            has_copy = len(size) == 2 and self.dtype != torch.float32
            parameter = torch.randn(size, device=device)
            copy = parameter.to(self.dtype) if has_copy else None
            gradient = torch.randn_like(parameter if copy is None else copy)
            moments = (torch.zeros_like(parameter) for _ in range(2))
            rows.append((parameter, gradient, *moments, torch.zeros((), device=device), copy))
        return adamw.AdamWTensors.of(rows)

    @staticmethod
    def guard(device: torch.device | str) -> adamw.Guard:
        """Before a first step."""
        zeros = (torch.zeros((), device=device) for _ in range(3))
        growth = torch.zeros((), dtype=torch.int32, device=device)
        return adamw.Guard(torch.ones((), device=device), growth, *zeros)

    def options(self) -> adamw.AdamWOptions:
        """Those of the published training, clipped; in fp16 with loss scaling."""
        return adamw.AdamWOptions(1e-4, (0.9, 0.999), 1e-8, 1e-5, 1.0, self.dtype == torch.float16, 2000)

    def run(self) -> None:
        """As `AttentionWorkload.run`."""
        with mock.patch.object(dispatch, "path", lambda *_: "triton"):
            adamw.AdamWStep()(self.tensors("meta"), self.guard("meta"), self.options())


Workload = (
    AttentionWorkload | InstanceNormWorkload | LayerNormWorkload | DiceCEWorkload | UpConvWorkload | AdamWWorkload
)
OPS: tuple[str, ...] = tuple(kind.op for kind in get_args(Workload))
"""Operations: `op` is in kernels/<op>.py, and benchmarks/bench_<op>.py measures it."""
LARGE, CROP = (2, 16, 128, 128, 64), (2, 3, 128, 128, 64)
GRID = (2, 512, 8, 8, 4)
"""Tokens of the published UNETR, as a map."""

MODELS: tuple[Workload, ...] = (
    AttentionWorkload(2, 10, 256, 51),
    AttentionWorkload(2, 10, 256, 51, torch.float32),
    AttentionWorkload(2, 12, 512, 64),
    AttentionWorkload(2, 12, 4096, 64),
    AttentionWorkload(1, 8, 4096, 128, torch.float32),
    InstanceNormWorkload(LARGE),
    InstanceNormWorkload(LARGE, residual="normalised"),
    InstanceNormWorkload(LARGE, residual="raw"),
    InstanceNormWorkload(LARGE, torch.float32, FIRST, residual="normalised", affine=True),
    InstanceNormWorkload(CROP, prelu=True),
    InstanceNormWorkload((2, 16, 16, 16, 16), memory_format=FIRST, residual="normalised"),
    InstanceNormWorkload((2, 256, 8, 8, 4), torch.float32, prelu=True),
    InstanceNormWorkload(LARGE, residual="normalised", joined=True),
    LayerNormWorkload((2, 256, 512), stream_bias=True),
    LayerNormWorkload((16, 256, 512), stream_bias=True),
    LayerNormWorkload((2, 512, 768), update=False),
    DiceCEWorkload(CROP),
    DiceCEWorkload(CROP, torch.float32, memory_format=LAST),
    DiceCEWorkload(CROP, ce="multihot"),
    DiceCEWorkload(CROP, torch.float32, ce="argmax"),
    UpConvWorkload(GRID, 128, sliced=True),
    UpConvWorkload((2, 32, 64, 64, 32), 16, sliced=True),
    UpConvWorkload((2, 32, 64, 64, 32), 16, torch.float32),
    AdamWWorkload(4, 256),
    AdamWWorkload(4, 256, torch.float32),
)

MEASURED: tuple[Workload, ...] = (
    AttentionWorkload(2, 10, 256, 51),  # UNETR of self-attention-cv, 128 x 128 x 64
    AttentionWorkload(16, 10, 256, 51),
    AttentionWorkload(2, 10, 216, 51),  # 96 x 96 x 96
    AttentionWorkload(2, 12, 512, 64),  # UNETR of MONAI, 128 x 128 x 128
    AttentionWorkload(2, 12, 512, 64, torch.float16),
    AttentionWorkload(2, 12, 4096, 64),  # 256 x 256 x 256
    AttentionWorkload(2, 8, 512, 128),
    AttentionWorkload(2, 10, 256, 51, torch.float32),
    InstanceNormWorkload(LARGE),
    InstanceNormWorkload((8, 32, 128, 128, 64)),
    InstanceNormWorkload(LARGE, memory_format=FIRST),
    InstanceNormWorkload(LARGE, residual="normalised"),
    InstanceNormWorkload(LARGE, residual="raw"),
    InstanceNormWorkload(LARGE, torch.float32, FIRST, residual="normalised"),
    InstanceNormWorkload((2, 16, 64, 64, 32), prelu=True),
    InstanceNormWorkload(CROP, prelu=True),
    InstanceNormWorkload((2, 64, 32, 32, 16)),
    InstanceNormWorkload((2, 128, 16, 16, 8), residual="normalised"),
    InstanceNormWorkload((2, 256, 8, 8, 4), prelu=True),
    LayerNormWorkload((2, 256, 512)),
    LayerNormWorkload((16, 256, 512)),
    LayerNormWorkload((2, 512, 768)),
    LayerNormWorkload((2, 256, 512), torch.float32),
    DiceCEWorkload(CROP),
    DiceCEWorkload(CROP, ce="multihot"),
    DiceCEWorkload(CROP, memory_format=LAST),
    DiceCEWorkload(CROP, torch.float32),
    DiceCEWorkload((16, *CROP[1:])),
    DiceCEWorkload((16, *CROP[1:]), ce="multihot"),
    DiceCEWorkload((16, *CROP[1:]), torch.float32, ce="argmax"),
    UpConvWorkload(GRID, 32),  # the doublings of the published UNETR, first the skips'
    UpConvWorkload((2, 32, 16, 16, 8), 32),
    UpConvWorkload((2, 32, 32, 32, 16), 32, sliced=True),
    UpConvWorkload(GRID, 64),
    UpConvWorkload((2, 64, 16, 16, 8), 64, sliced=True),
    UpConvWorkload(GRID, 128, sliced=True),
    UpConvWorkload((2, 128, 16, 16, 8), 64, sliced=True),
    UpConvWorkload((2, 64, 32, 32, 16), 32, sliced=True),
    UpConvWorkload((2, 32, 64, 64, 32), 16, sliced=True),
    UpConvWorkload((2, 32, 64, 64, 32), 16),
    UpConvWorkload((2, 32, 64, 64, 32), 16, torch.float32, sliced=True),
    UpConvWorkload((16, 32, 64, 64, 32), 16, sliced=True),
    UpConvWorkload((2, 768, 8, 8, 8), 128, sliced=True),  # UNETR of MONAI, 128 x 128 x 128
    AdamWWorkload(48, 1024),  # 50 million, as UNETR's
    AdamWWorkload(48, 1024, torch.float16),
    AdamWWorkload(48, 1024, torch.float32),
    AdamWWorkload(96, 128),
)

OTHERS: tuple[Workload, ...] = (
    AttentionWorkload(1, 12, 216, 64),
    AttentionWorkload(2, 10, 216, 51, torch.float32),
    AttentionWorkload(2, 10, 1000, 51),
    AttentionWorkload(2, 8, 512, 96, torch.float16),
    AttentionWorkload(2, 8, 216, 128, torch.float16),
    AttentionWorkload(2, 8, 4096, 128),
    AttentionWorkload(2, 10, 256, 51, packed=False),
    InstanceNormWorkload(LARGE, torch.float16, FIRST, prelu=True, affine=True),
    InstanceNormWorkload(LARGE, torch.float32, residual="raw", prelu=True, affine=True),
    InstanceNormWorkload(LARGE, residual="normalised", prelu=True, affine=True),
    InstanceNormWorkload((1, 48, 33, 31, 17), residual="raw"),
    InstanceNormWorkload((1, 48, 33, 31, 17), torch.float32, FIRST, residual="normalised"),
    InstanceNormWorkload((2, 32, 16, 16, 8), residual="raw", prelu=True, affine=True),
    InstanceNormWorkload((2, 320, 4, 4, 4), torch.float16, FIRST, affine=True),
    InstanceNormWorkload((2, 128, 16, 16, 8), residual="raw", joined=True),
    InstanceNormWorkload((2, 64, 32, 32, 16), torch.float32, residual="raw", joined=True),
    InstanceNormWorkload((1, 48, 33, 31, 17), torch.float16, joined=True),
    LayerNormWorkload((2, 256, 512), update=False),
    LayerNormWorkload((2, 512, 768), stream_bias=True),
    LayerNormWorkload((1, 100, 51), torch.float16, stream_bias=True),
    LayerNormWorkload((2, 300, 2048), stream_bias=True),
    LayerNormWorkload((1, 512, layer_norm.MAX_FEATURES), torch.float32, stream_bias=True),
    LayerNormWorkload((4, 4096, layer_norm.MAX_FEATURES), stream_bias=True),
    *(
        replace(workload, weighted=weighted, squared_pred=squared)
        for workload in (
            DiceCEWorkload(CROP),
            DiceCEWorkload(CROP, ce="multihot"),
            DiceCEWorkload(CROP, torch.float32, ce="argmax"),
        )
        for weighted, squared in ((True, False), (False, True))
    ),
    DiceCEWorkload((16, *CROP[1:]), torch.float16, ce="multihot", batch=True),
    DiceCEWorkload(CROP, ce="argmax", memory_format=LAST, weighted=True),
    DiceCEWorkload((1, 3, 33, 31, 17), ce="multihot"),
    UpConvWorkload((2, 768, 8, 8, 4), 32),
    UpConvWorkload((2, 768, 8, 8, 4), 64, torch.float16),
    UpConvWorkload(GRID, 128, torch.float32, sliced=True, memory_format=FIRST),
    UpConvWorkload((1, 510, 7, 9, 5), 17, torch.float16),
    UpConvWorkload((1, 3, 7, 9, 5), 1, torch.float32, sliced=True),
)


def measured(op: str) -> tuple[Any, ...]:
    """Those of `MEASURED` for one operation."""
    return tuple(workload for workload in MEASURED if workload.op == op)


def launches(workload: Workload) -> list[dispatch.Launch]:
    """Every launch of a workload, forward and backward, not run."""
    found: list[dispatch.Launch] = []
    with dispatch.observed(found.append):
        workload.run()
    return found
