"""The vision transformer within the UNETRs, which test_models.py compares with their references."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from test_models import IMG_SIZE, SMALL, volumes
from torch import Tensor, nn

import models.vit
from benchmarks.roofline import count
from models import build_model
from models.vit import AlignedLinear, PatchEmbedding, TransformerBlock, VisionTransformer

TOLERANCES = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}
"""Largest difference over the largest value expected, of gradients over the largest of all."""
FIRST, LAST = torch.contiguous_format, torch.channels_last_3d


def assert_near(*pairs: tuple[Tensor, Tensor]) -> None:
    largest = max(expected.abs().max() for _, expected in pairs)
    for found, expected in pairs:
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= TOLERANCES[found.dtype] * largest


def make_vit(
    dim: int = 36,
    num_heads: int = 5,
    *,
    layers: tuple[int, ...] = (3, 6, 9, 12),
    bias: bool = False,
    final_norm: bool = False,
    dropout: float = 0.0,
) -> VisionTransformer:
    """Widths of no multiple of eight: 36 features of a token, five heads of seven."""
    torch.manual_seed(0)
    made = VisionTransformer(
        2, IMG_SIZE, dim, num_heads, 24, layers=layers, bias=bias, final_norm=final_norm, position_std=1.0,
        dropout=dropout,
    )  # fmt: skip
    return made.double()


def blocks_of(vit: VisionTransformer) -> Iterator[TransformerBlock]:
    for block in vit.blocks:
        assert isinstance(block, TransformerBlock)
        yield block


def plain_vit(vit: VisionTransformer, x: Tensor) -> list[Tensor]:
    """The transformer as in the papers: convolution, LayerNorm, attention, adds."""
    dropout = vit.dropout
    tokens = F.conv3d(x, vit.patch_embedding.weight, vit.patch_embedding.bias, stride=16).flatten(2).transpose(1, 2)
    tokens = dropout(tokens.contiguous() + vit.position_embedding)  # dropout draws in the order of memory
    extracted = []
    for layer, block in enumerate(blocks_of(vit), start=1):
        heads, features = block.attention.num_heads, block.attention.head_dim
        qkv = block.attention.qkv(nn.LayerNorm.forward(block.norm1, tokens)).unflatten(-1, (3, heads, features))
        attended = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        tokens = tokens + dropout(block.attention.out(attended.transpose(1, 2).flatten(2)))
        tokens = tokens + block.mlp(nn.LayerNorm.forward(block.norm2, tokens))
        if layer in vit.layers:
            extracted.append(tokens)
    if vit.norm is not None:
        extracted[-1] = nn.LayerNorm.forward(vit.norm, extracted[-1])
    return [tokens.transpose(1, 2).unflatten(2, vit.grid) for tokens in extracted]


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_residual_stream_equals_adds_and_norms_written_out(final_norm: bool, dropout: float) -> None:
    """With dropout too, in which a random number that is drawn elsewhere would change all that follow."""
    vit = make_vit(dropout=dropout, bias=True, final_norm=final_norm)
    results = []
    for forward in (vit, lambda x: plain_vit(vit, x)):
        torch.manual_seed(1)
        maps = forward(volumes(dtype=torch.float64))
        total = torch.stack([(i * y.pow(2)).sum() for i, y in enumerate(maps, 1)]).sum()
        results.append((maps, torch.autograd.grad(total, list(vit.parameters()))))
    for found, expected in zip(*results, strict=True):
        assert_near(*zip(found, expected, strict=True))


def test_dropout_acts_only_in_training() -> None:
    torch.manual_seed(0)
    model = build_model("unetr", 2, img_size=IMG_SIZE, dropout=0.5, **SMALL["unetr"])
    x = volumes()
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("name", ["unetr", "unetr_monai"])
def test_attention_reads_one_projection(name: str) -> None:
    model = build_model(name, 2, img_size=IMG_SIZE, **SMALL[name])
    seen: list[Tensor] = []
    attend = models.vit.flash_attention_packed

    def spy(qkv: Tensor, *args: int, **options: int) -> Tensor:
        seen.append(qkv)
        return attend(qkv, *args, **options)

    with mock.patch.object(models.vit, "flash_attention_packed", spy), torch.no_grad():
        model(volumes())
    assert len(seen) == 12 and all(qkv.is_contiguous() for qkv in seen)


@pytest.mark.parametrize("image_format", [FIRST, LAST])
@pytest.mark.parametrize("weight_format", [FIRST, LAST])
def test_the_patch_embedding_is_a_convolution_in_any_memory_format(
    weight_format: torch.memory_format, image_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    embedding = PatchEmbedding(3, 20, bias=True).double().to(memory_format=weight_format)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 48, 32, 16, dtype=torch.float64).to(memory_format=image_format).requires_grad_()
    weight, bias = embedding.weight, embedding.bias
    assert isinstance(bias, Tensor)
    tokens, expected = embedding(x), F.conv3d(x, weight, bias, stride=16).flatten(2).transpose(1, 2)
    assert_near((tokens, expected))
    cotangent = torch.randn_like(expected)
    found = torch.autograd.grad(tokens, (x, weight, bias), cotangent)
    assert_near(*zip(found, torch.autograd.grad(expected, (x, weight, bias), cotangent), strict=True))
    assert found[1].is_contiguous(memory_format=weight_format), "an optimizer would copy the gradient"


@pytest.mark.parametrize("weight_format", [FIRST, LAST])
def test_the_patch_embedding_copies_the_image_once_and_the_weight_never(weight_format: torch.memory_format) -> None:
    embedding = PatchEmbedding(3, 20, bias=False).to(memory_format=weight_format)  # type: ignore[call-overload]
    x = torch.randn(2, 3, 48, 32, 16)
    with torch.autocast("cpu", torch.bfloat16), torch.profiler.profile() as profile:
        embedding(x)
    copies = Counter({event.key: event.count for event in profile.key_averages()})["aten::copy_"]
    assert copies == 2  # the patches, and autocast's copy of the weight in bfloat16


def padded(module: AlignedLinear) -> dict[str, Tensor]:
    """Its parameters with rows and columns of zeros to multiples of eight, as functions of the originals."""
    rows, columns = (-size % module.copy_multiple for size in module.weight.shape)
    found = {"weight": F.pad(module.weight, (0, columns, 0, rows))}
    return found if module.bias is None else {**found, "bias": F.pad(module.bias, (0, rows))}


@pytest.mark.parametrize("pads_bias", [True, False])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dim", "heads"), [(36, 5), (40, 6), (60, 12)])
def test_weights_padded_with_zeros_give_the_same_results(dim: int, heads: int, bias: bool, pads_bias: bool) -> None:
    vit = make_vit(dim, heads, bias=bias)
    x = volumes(dtype=torch.float64)
    copies = {
        f"{name}.{key}": value
        for name, module in vit.named_modules()
        if isinstance(module, AlignedLinear)
        for key, value in padded(module).items()
        if pads_bias or key == "weight"
    }
    assert any(value.shape != vit.get_parameter(name).shape for name, value in copies.items())
    results = []
    for parameters in ({}, copies):
        maps = torch.func.functional_call(vit, parameters, (x,))
        total = torch.stack([y.pow(2).sum() for y in maps]).sum()
        results.append((maps, torch.autograd.grad(total, list(vit.parameters()))))
    for found, expected in zip(*results, strict=True):
        assert_near(*zip(found, expected, strict=True))


def test_the_zeros_of_a_padded_weight_have_a_gradient_of_zero() -> None:
    """So that an optimizer of the copies would leave them as they are."""
    attention = next(blocks_of(make_vit())).attention
    copies = {"qkv.weight": padded(attention.qkv)["weight"], "out.weight": padded(attention.out)["weight"]}
    leaves = {name: value.detach().requires_grad_() for name, value in copies.items()}
    out = torch.func.functional_call(attention, leaves, (torch.randn(2, 6, 36, dtype=torch.float64),))
    gradients = torch.autograd.grad(out.pow(2).sum(), list(leaves.values()))
    for gradient, (rows, columns) in zip(gradients, ((105, 36), (36, 35)), strict=True):
        assert gradient[:rows, :columns].all()
        assert not gradient[rows:].any() and not gradient[:, columns:].any()


def test_the_attention_writes_the_columns_that_a_padded_weight_reads() -> None:
    """Padding them afterwards would be a copy."""
    attention = next(blocks_of(make_vit())).attention
    copies = {"out.weight": padded(attention.out)["weight"]}
    seen: list[Tensor] = []
    attention.out.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs))
    torch.func.functional_call(attention, copies, (torch.randn(2, 6, 36, dtype=torch.float64),))
    assert seen[0].shape == (2, 6, 40)


def test_the_published_widths_are_padded_to_rows_of_sixteen_bytes() -> None:
    with torch.device("meta"):
        attention = models.vit.SelfAttention(512, 10, out_bias=False)
    layers = attention.qkv, attention.out
    assert [layer.weight.shape for layer in layers] == [(1530, 512), (512, 510)]
    assert [padded(layer)["weight"].shape for layer in layers] == [(1536, 512), (512, 512)]


def test_copies_of_the_weights_in_bfloat16_give_the_bits_of_autocast() -> None:
    """Biases that are added to the stream are rounded as those within a product."""
    vit = make_vit(bias=True).float()
    linear = {name for name, module in vit.named_modules() if isinstance(module, nn.Linear | nn.Conv3d)}
    copies = {
        name: weight.detach().bfloat16().requires_grad_()
        for name, weight in vit.named_parameters()
        if name.rpartition(".")[0] in linear
    }
    weights: dict[str, Tensor] = dict(vit.named_parameters())
    results = []
    for parameters in (weights, weights | copies):
        with torch.autocast("cpu", torch.bfloat16):
            maps = torch.func.functional_call(vit, parameters, (volumes(),))
        total = torch.stack([y.pow(2).sum() for y in maps]).sum()
        results.append((*maps, *torch.autograd.grad(total, list(parameters.values()))))
    assert {found.dtype for found in results[1]} == {torch.float32, torch.bfloat16}
    for expected, found in zip(*results, strict=True):
        assert torch.equal(found.float(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_stream_stays_in_float32(dtype: torch.dtype) -> None:
    vit = make_vit().float()
    seen: list[Tensor] = []
    for block in blocks_of(vit):
        block.norm2.register_forward_hook(lambda module, inputs, output: seen.extend(output))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), torch.no_grad():
        maps = vit(volumes())
    assert {stream.dtype for stream in seen[::2]} == {torch.float32} == {y.dtype for y in maps}
    assert {normed.dtype for normed in seen[1::2]} == {dtype}


def test_all_of_a_network_in_bfloat16_runs_in_it() -> None:
    vit = make_vit(final_norm=True)
    expected = vit(volumes(dtype=torch.float64))
    for found, exact in zip(vit.bfloat16()(volumes(dtype=torch.float64).bfloat16()), expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - exact).norm() < 0.1 * exact.norm()


def test_a_compiled_transformer_equals_eager() -> None:
    torch.compiler.reset()
    with mock.patch.object(models.vit, "NUM_LAYERS", 2):
        vit = make_vit(layers=(1, 2), final_norm=True).float()
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert_near(*zip(compiled(volumes()), vit(volumes()), strict=True))


@pytest.mark.parametrize(("name", "block"), [("unetr", 1), ("unetr_monai", 1), ("unetr_monai", 4)])
def test_a_block_adds_no_pass_to_its_kernels_and_products(name: str, block: int) -> None:
    """Neither copies nor fills around attention and norms, nor adds of the stream, nor sums for biases of updates.

    The tokens that enter MONAI's fifth block are a result, to which the bias of its attention can't be added.
    """
    rows = [row for row in count(name, 1, "bf16", (32, 32, 32)) if f"{row.layer}.".startswith(f"vit.blocks.{block}.")]
    launches: Counter[str] = Counter()
    for row in rows:
        launches[row.op] += row.launches
    is_taken = block == 4
    assert launches.pop("add", 0) == is_taken  # the gradient of the result
    assert launches == {
        "layer_norm_forward_kernel": 2, "layer_norm_backward_kernel": 2, "attention_forward_kernel": 1,
        "attention_backward_kernel": 1, "mm": 3 - is_taken + 8, "addmm": 1 + is_taken, "gelu": 1, "gelu_backward": 1,
        "sum": 1 + is_taken,
    }  # fmt: skip


def test_the_first_norm_adds_the_position_embeddings() -> None:
    """All that is left is the sum of their gradient over the batch."""
    rows = [row.op for row in count("unetr_monai", 2, "bf16", (32, 32, 32)) if row.layer == "vit"]
    assert rows == ["sum"]
