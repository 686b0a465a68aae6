"""Which path an operation takes, who decides, and how a kernel gets its configuration."""

from __future__ import annotations

import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_gpu import FakeGpu
from kernel_paths import needs_kernels, not_interpreted
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from kernels import dispatch
from kernels.attention import flash_attention, flash_attention_packed
from kernels.dice_ce import dice_ce_loss
from kernels.instance_norm import instance_norm, instance_norm_into
from kernels.layer_norm import residual_layer_norm
from kernels.up_conv import up_conv, up_conv_into

pytestmark = pytest.mark.kernel
FORWARD, BOTH = dispatch.DIRECTIONS


@pytest.fixture(autouse=True)
def auto_before_and_after() -> Iterator[None]:
    with dispatch.using("auto"):
        yield


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on an H100 with two measurements."""
    monkeypatch.setenv("GLIOFORGE_CACHE", str(tmp_path))
    FakeGpu(monkeypatch)
    cpu = torch.device("cpu")
    for key, direction, way in (("N512", FORWARD, "EFFICIENT_ATTENTION"), ("N4096", BOTH, "FLASH_ATTENTION")):
        dispatch._choices.own[dispatch._identity_of_way("attention", key, direction, cpu)] = way


@not_interpreted
def test_a_cpu_takes_pytorch_and_says_why() -> None:
    why = "Triton kernels need an NVIDIA GPU, the tensors are on cpu"
    assert dispatch.use("auto", "cpu") == f"kernels: PyTorch's own ({why})"
    assert dispatch.path("attention", torch.zeros(1), "N256") == "reference"
    assert dispatch.path("instance_norm", torch.zeros(1), "float32") == "torch"
    assert dispatch.path("instance_norm", torch.zeros(1, device="meta"), "float32") == "reference"
    dispatch.use("reference", "cpu")
    assert dispatch.path("instance_norm", torch.zeros(1), "float32") == "reference"


@not_interpreted
def test_triton_on_a_cpu_is_refused_at_once_and_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kernels 'triton': Triton kernels need an NVIDIA GPU.*'auto'"):
        dispatch.use("triton", "cpu")
    monkeypatch.setattr(dispatch, "_mode", "triton")
    with pytest.raises(ValueError, match="the tensors are on cpu.*move the tensors"):
        dispatch.path("attention", torch.zeros(1), "N256")


def test_using_restores_the_mode_from_before_also_after_an_error() -> None:
    x = torch.zeros(1, dtype=torch.float16)
    paths = [dispatch.path("instance_norm", x, "")]
    with dispatch.using("reference", "cpu") as line:
        assert line == "kernels: reference (asked for)"
        with pytest.raises(ValueError, match="kernels 'cuda'"), dispatch.using("cuda", "cpu"):  # type: ignore[arg-type]
            raise AssertionError
        assert dispatch.path("instance_norm", x, "") == "reference"
        with pytest.raises(KeyError), dispatch.using("auto", "cpu"):
            paths.append(dispatch.path("instance_norm", x, ""))
            raise KeyError
        assert dispatch.path("instance_norm", x, "") == "reference"
    paths.append(dispatch.path("instance_norm", x, ""))
    assert paths == 3 * ["triton" if dispatch.INTERPRETED else "torch"]


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels 'cuda' must be one of auto, triton, reference"):
        dispatch.use("cuda")  # type: ignore[arg-type]


def test_float64_and_the_reference_mode_never_run_a_kernel(on_a_gpu: None) -> None:
    assert dispatch.path("attention", torch.zeros(1, dtype=torch.float64), "N256") == "reference"
    assert dispatch.path("attention", torch.zeros(1, dtype=torch.bfloat16), "N256") == "triton"
    assert dispatch.use("reference", "cuda") == "kernels: reference (asked for)"
    assert dispatch.path("attention", torch.zeros(1), "N256") == "reference"


def test_pytorch_is_taken_where_it_was_measured_faster(on_a_gpu: None) -> None:
    assert dispatch.use("auto", "cuda") == "kernels: triton (NVIDIA H100, sm_90)"
    q = torch.zeros(1, requires_grad=True)
    assert dispatch.path("attention", q, "N4096") == "torch"
    assert dispatch.path("attention", q, "N256") == "triton"
    dispatch.use("triton", "cuda")
    assert dispatch.path("attention", q, "N4096") == "triton"


def test_training_goes_by_forward_and_backward_and_inference_by_the_forward(on_a_gpu: None) -> None:
    q = torch.zeros(1, requires_grad=True)
    assert [dispatch.path("attention", q, key) for key in ("N512", "N4096")] == ["triton", "torch"]
    assert [dispatch.path("attention", q.detach(), key) for key in ("N512", "N4096")] == ["torch", "triton"]
    with torch.no_grad():
        assert [dispatch.path("attention", q, key) for key in ("N512", "N4096")] == ["torch", "triton"]


def test_the_fastest_backend_comes_first_also_when_compiled(on_a_gpu: None) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(dispatch.sdpa_backends("attention", q, "N4096"), set_priority=True):
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = (torch.randn(1, 2, 8, 4, requires_grad=True) for _ in range(3))
    backends = dispatch.sdpa_backends("attention", q, "N4096")
    assert backends[0] == SDPBackend.FLASH_ATTENTION and len(set(backends)) == 4
    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v))


def test_each_device_has_its_own_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(dispatch, "_capability", cache(dispatch._capability.__wrapped__))  # forgets these devices
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capabilities[device.index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device.index}")
    first, second = (torch.device("cuda", index) for index in capabilities)
    assert dispatch._refusal(first) == ""
    assert dispatch._refusal(second) == "GPU 1 is older than compute capability 8.0"
    assert (dispatch._capability(first), dispatch._capability(second)) == ("sm_90", "sm_75")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert dispatch._refusal(first) == "Triton kernels need an NVIDIA GPU, the tensors are on GPU 0"


def test_an_observed_launch_does_not_run(on_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeGpu(monkeypatch)
    seen: list[dispatch.Launch] = []
    with dispatch.observed(seen.append):
        dispatch.launch(kernel, lambda c: (1,), {"x_ptr": torch.zeros(1)}, [{"BLOCK": 1}], "key")
    assert [launch.name for launch in seen] == ["a_kernel"] and not kernel.ran


def test_forcing_a_path_ends_with_its_block(on_a_gpu: None) -> None:
    q = torch.zeros(1)
    with dispatch.forced("torch", "MATH"):
        assert dispatch.path("attention", q, "N256") == "torch"
        assert dispatch.sdpa_backends("attention", q, "N256") == [SDPBackend.MATH]
    assert dispatch.path("attention", q, "N256") == "triton"


@not_interpreted
def test_the_interpreter_runs_kernels_on_a_cpu_but_not_in_bfloat16() -> None:
    code = (
        "import torch; from kernels import dispatch; print(dispatch.use('auto', 'cpu'));"
        "print(*(dispatch.path('attention', torch.zeros(1, dtype=t), '') for t in (torch.float32, torch.bfloat16)))"
    )
    env = {"TRITON_INTERPRET": "1", "PATH": "/usr/bin"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "interpreted on the CPU" in done.stdout and done.stdout.split("\n")[1] == "triton reference", done.stderr


MODULES = [file.name for file in pkgutil.iter_modules(kernels.__path__)]


def run_python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return done.stdout


@not_interpreted
def test_importing_kernels_and_models_imports_no_compiler() -> None:
    """`torch._dynamo` takes a second of processor time and brings sympy and inductor."""
    code = f"""if True:
        import sys
        import models, {", ".join(f"kernels.{name}" for name in MODULES)}
        print(sorted({{"torch._dynamo", "torch._inductor", "sympy"}} & set(sys.modules)))
    """
    assert run_python(code) == "[]\n"


@not_interpreted
def test_the_folder_works_under_any_name(tmp_path: Path) -> None:
    shutil.copytree(Path(dispatch.__file__).parent, tmp_path / "glioforge_kernels")
    code = f"""if True:
        import sys
        from importlib import import_module
        for name in {MODULES}:
            import_module("glioforge_kernels." + name)
        import torch
        from glioforge_kernels.instance_norm import instance_norm
        assert instance_norm(torch.randn(1, 2, 4, 4, 4)).shape == (1, 2, 4, 4, 4)
        print([name for name in sys.modules if name.split(".")[0] == "kernels"])
    """
    assert run_python(code, PYTHONPATH=str(tmp_path)) == "[]\n"


@not_interpreted
def test_a_function_is_compiled_for_each_shape_and_the_users_limit_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    limit, compiled = torch._dynamo.config.recompile_limit, []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    sizes = range(2, limit + 6)
    for _ in range(2):
        for size in sizes:
            x = torch.ones(size)
            assert dispatch.compiled(double, x.shape)(x).sum() == 2 * size
    assert len(compiled) == len(sizes) and torch._dynamo.config.recompile_limit == limit


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_constants_of_compilation_are_marked_as_torch_marks_them() -> None:
    def ours() -> None: ...

    def torchs() -> None: ...

    assert vars(dispatch.constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(torchs)) != {}


def test_a_key_is_made_once_for_a_shape() -> None:
    made = []

    @dispatch.once_per_shape
    def key(shape: torch.Size, dtype: torch.dtype) -> str:
        made.append(shape)
        return f"{tuple(shape)} {dtype}"

    keys = [key(torch.zeros(size).shape, torch.float32) for size in (2, 3, 2)]
    assert keys[0] == keys[2] == "(2,) torch.float32" and len(made) == 2


def test_operations_can_be_traced_with_symbolic_sizes() -> None:
    x, labels = torch.randn(2, 3, 4, 5, 6), torch.zeros(2, 4, 5, 6, dtype=torch.uint8)
    loss = partial(dice_ce_loss, regions=((1,), (2,), (3,)), check_labels=False)
    for function, args in ((instance_norm, (x,)), (loss, (x, labels)), (flash_attention, 3 * (x[0],))):
        traced = make_fx(lambda *args, function=function: function(*args), tracing_mode="symbolic")(*args)
        torch.testing.assert_close(traced(*args), function(*args))


EAGER = {
    "instance_norm": lambda x: instance_norm(x),
    "flash_attention": lambda x: flash_attention(x[0], x[0], x[0]),
    "dice_ce_loss": lambda x: dice_ce_loss(x, torch.zeros(x[:, 0].shape, dtype=torch.uint8), ((1,), (2,), (3,))).loss,
}


@pytest.mark.parametrize("name", EAGER)
def test_only_traced_calls_pay_for_an_operator(name: str) -> None:
    needs_kernels("cpu")
    x = torch.randn(2, 3, 4, 5, 6, requires_grad=True)
    eager = EAGER[name](x)
    assert _first_node(eager).startswith("Eager")
    with FlopCounterMode(display=False):  # any dispatch mode: it must see what is called
        traced = EAGER[name](x)
    assert _first_node(traced).startswith("GeneratedBackwardFor_glioforge")
    assert torch.equal(eager, traced)


def _first_node(y: torch.Tensor) -> str:
    assert y.grad_fn is not None
    return y.grad_fn.name()


def _wide(channels: int) -> torch.Tensor:
    return torch.randn(1, channels, 4, 4, 4).contiguous(memory_format=torch.channels_last_3d)


COMPARED = {
    "attention": lambda: flash_attention(*3 * (torch.randn(1, 2, 16, 8),)),
    "attention on a fused projection": lambda: flash_attention_packed(torch.randn(1, 16, 48), 2, 8),
    "instance_norm": lambda: instance_norm(_wide(4)),
    "instance_norm into a slice": lambda: instance_norm_into(_wide(8)[:, :4], _wide(4)),
    "layer_norm": lambda: residual_layer_norm(
        torch.randn(1, 4, 8), None, torch.ones(8), torch.zeros(8), 1e-5, torch.float32
    ),
    "dice_ce": lambda: dice_ce_loss(_wide(2), torch.zeros(1, 4, 4, 4, dtype=torch.uint8), [[1], [2]]),
    "up_conv": lambda: up_conv(_wide(4), torch.randn(4, 2, 2, 2, 2)),
    "up_conv into a slice": lambda: up_conv_into(_wide(4), torch.randn(4, 2, 2, 2, 2), torch.empty_like(_doubled())),
}


def _doubled() -> torch.Tensor:
    return torch.empty(1, 2, 8, 8, 8).contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("name", COMPARED)
def test_every_operation_is_compared_with_pytorchs_own_way(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: set[tuple[str, str]] = set()
    chosen: set[tuple[str, str]] = set()

    def compare(op: str, key: str, function: Any, args: Any, of_pytorch: Any) -> None:
        assert callable(function) and of_pytorch
        compared.add((op, key))

    def path(op: str, x: Any, key: str) -> str:
        chosen.add((op, key))
        return "reference"

    monkeypatch.setattr(dispatch, "compare", compare)
    monkeypatch.setattr(dispatch, "path", path)
    COMPARED[name]()
    assert {op for op, _ in compared} == {name.split()[0]} and compared <= chosen


def test_gradients_are_ordered_by_the_arguments_of_the_forward() -> None:
    def forward(x: Any, y: Any, option: int) -> None: ...

    dy = torch.ones(1)
    assert dispatch.gradients(forward, y=dy) == (None, dy, None)
