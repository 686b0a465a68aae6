"""Which path an operation takes, who decides, and how a kernel gets its configuration."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_paths import needs_kernels, not_interpreted
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import kernels
from benchmarks import workloads
from kernels import dispatch
from kernels.attention import flash_attention
from kernels.dice_ce import dice_ce_loss
from kernels.instance_norm import instance_norm

pytestmark = pytest.mark.kernel


@pytest.fixture(autouse=True)
def auto_before_and_after() -> Iterator[None]:
    with dispatch.using("auto"):
        yield


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As on an H100 with three measurements."""
    measured = {
        "configs": {"a_kernel": {"N256": {"BLOCK": 64, "num_warps": 8}}},
        "torch": {
            "forward": {"attention N512": "EFFICIENT_ATTENTION"},
            "forward + backward": {"attention N4096": "FLASH_ATTENTION"},
        },
    }
    file = tmp_path / "tuned.json"
    file.write_text(json.dumps({"sm_90": measured}))
    monkeypatch.setattr(dispatch, "TUNED_FILE", file)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(dispatch, "_refusal", lambda device: "")
    monkeypatch.setattr(dispatch, "_capability", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H100")
    dispatch.tuned_table.cache_clear()
    yield
    dispatch.tuned_table.cache_clear()


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


def test_pytorch_is_taken_where_it_was_faster_and_the_log_says_where(on_a_gpu: None) -> None:
    said = dispatch.use("auto", "cuda")
    assert said == (
        "kernels: triton (NVIDIA H100, sm_90); PyTorch's own where it was measured faster: "
        "attention N512 (forward), attention N4096 (forward + backward)"
    )
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


class Kernel:
    """A fake kernel that records its grids and arguments."""

    def __init__(self) -> None:
        self.fn = SimpleNamespace(__name__="a_kernel")
        self.launched: list[tuple[Any, dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda **args: self.launched.append((grid, args))


def test_a_tuned_configuration_replaces_the_default(on_a_gpu: None) -> None:
    kernel, x = Kernel(), torch.zeros(1)
    candidates = [{"BLOCK": 128, "num_warps": 4}, {"BLOCK": 64, "num_warps": 8}]
    for key in ("N256", "N512"):
        dispatch.launch(kernel, lambda c: (512 // c["BLOCK"],), {"x_ptr": x}, candidates, key)
    assert [(grid, args["BLOCK"], args["num_warps"]) for grid, args in kernel.launched] == [
        ((8,), 64, 8),
        ((4,), 128, 4),
    ]


def test_a_configuration_tuned_for_an_older_kernel_is_ignored_with_a_warning(on_a_gpu: None) -> None:
    kernel, candidates = Kernel(), [{"BLOCK_S": 128, "num_warps": 4}]
    with pytest.warns(UserWarning, match="'BLOCK': 64.* for a_kernel N256, which is not a candidate: tune again"):
        dispatch.launch(kernel, lambda c: (1,), {"x_ptr": torch.zeros(1)}, candidates, "N256")
    assert kernel.launched[0][1]["BLOCK_S"] == 128


def test_an_observed_launch_does_not_run() -> None:
    kernel = Kernel()
    seen: list[dispatch.Launch] = []
    with dispatch.observed(seen.append):
        dispatch.launch(kernel, lambda c: (1,), {"x_ptr": torch.zeros(1)}, [{"BLOCK": 1}], "key")
    assert [launch.name for launch in seen] == ["a_kernel"] and not kernel.launched


def stale(measured: dict[str, Any]) -> list[str]:
    """Entries of a table that no workload would use: kernels and keys, configurations, operations and keys."""
    candidates: dict[tuple[str, str], list[Any]] = {}
    for workload in workloads.MEASURED:
        for launch in workloads.launches(workload):
            candidates.setdefault((launch.name, launch.key), []).extend(launch.candidates)
    keys = {key for _, key in candidates}
    configs = [
        f"{kernel} {key}"
        for kernel, by_key in measured["configs"].items()
        for key, config in by_key.items()
        if config not in candidates.get((kernel, key), [])
    ]
    won = [op_key for direction in measured["torch"] for op_key in measured["torch"][direction]]
    return configs + [op_key for op_key in won if op_key not in {f"{op} {key}" for op in workloads.OPS for key in keys}]


def test_the_tuned_table_names_existing_kernels_and_configurations() -> None:
    launch = workloads.launches(workloads.measured("attention")[0])[0]
    key, last = launch.key, dict(launch.candidates[-1])
    ours = {"configs": {launch.name: {key: last}}, "torch": {"forward": {f"attention {key}": "MATH"}}}
    assert not stale(ours)
    assert stale({"configs": {launch.name: {key: last | {"num_warps": 3}}}, "torch": {}}) == [f"{launch.name} {key}"]
    assert stale({"configs": {launch.name: {"N7": last}}, "torch": {}}) == [f"{launch.name} N7"]
    assert stale({"configs": {"gone_kernel": {key: last}}, "torch": {}}) == [f"gone_kernel {key}"]
    assert stale({"configs": {}, "torch": {"forward": {"gone N7": "MATH"}}}) == ["gone N7"]
    for measured in dispatch.tuned_table().values():
        assert not stale(measured)


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


def test_gradients_are_ordered_by_the_arguments_of_the_forward() -> None:
    def forward(x: Any, y: Any, option: int) -> None: ...

    dy = torch.ones(1)
    assert dispatch.gradients(forward, y=dy) == (None, dy, None)
