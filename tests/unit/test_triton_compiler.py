"""What Triton's compiler makes of the kernels, and where they cannot run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton_interpreter
from checks import values
from child import run_python
from triton.language.semantic import TritonSemantic

from fastsam import FastSAM
from fastsam.backends import Request, load

COMPILE = Path(__file__).parents[2] / "tools" / "compile_kernels.py"


# ---- where it cannot run ----


def test_without_triton_it_says_so():
    code = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "fastsam"]:
    del sys.modules[name]
sys.modules["triton"] = sys.modules["fastsam._C"] = None
from fastsam.backends import BackendUnavailable, load, resolve
try:
    load("triton", "cuda")
except BackendUnavailable as reason:
    assert "pip install" in str(reason), reason
assert resolve("auto", "cuda").__name__ == "fastsam.backends.foreach"
"""
    done = run_python(code)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("interpreted", "device_type", "words"),
    [(False, "cpu", "TRITON_INTERPRET=1"), (True, "cuda", "unset it"), (False, "mps", "'mps'")],
    ids=["cpu", "gpu-interpreted", "mps"],
)
def test_where_it_cannot_run_it_says_why(triton_gpu, monkeypatch, interpreted, device_type, words):
    monkeypatch.setattr(triton_gpu.kernels, "interpreted", interpreted)
    assert words in triton_gpu.unsupported_reason(Request(device_type))


@pytest.mark.parametrize("fault", ["no compiler", "too old"])
def test_auto_passes_over_machines_that_it_cannot_compile_for(triton_gpu, monkeypatch, fault):
    from triton.runtime import driver

    class Fake:
        def get_current_target(self):
            if fault == "no compiler":
                raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    driver.set_active(Fake())
    monkeypatch.setattr(triton_gpu.kernels, "interpreted", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0) if index == 0 else (7, 0))
    triton_gpu.find_gpu_obstacle.cache_clear()
    try:
        reason = triton_gpu.unsupported_reason(Request("cuda"))
    finally:
        driver._active = None
        triton_gpu.find_gpu_obstacle.cache_clear()
    assert {"no compiler": "needs a C compiler", "too old": "GPU 1 has 7.0"}[fault] in reason


def test_gradients_of_another_dtype_are_not_its_work(triton_gpu):
    assert "dtype" in triton_gpu.unsupported_reason(Request("cpu", own_grad_dtype=False))


def test_an_old_triton_is_refused(triton_gpu, monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.3.1")
    assert "triton 3.3.1 is older than 3.4" in triton_gpu.find_obstacle()


# ---- what the compiler makes of it ----


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_compiled_kernels_read_and_write_sixteen_bytes_at_a_time(tmp_path, target):
    pytest.importorskip("triton")
    if not COMPILE.exists():
        pytest.skip("the tests run without the checkout, against an installed wheel")
    command = [sys.executable, COMPILE, "--out", tmp_path, "--targets", target, "--dtypes", "bfloat16", "--jobs", "1"]
    kernels = ["perturb by norm", "update NONE FIRST_GRAD decoupled"]
    done = subprocess.run([*command, "-k", f"^({'|'.join(kernels)}) "], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert {entry["kernel"] for entry in report} == {*kernels}
    for entry in report:
        assert entry["spills"] == 0
        assert entry["wide_found"] >= entry["wide_needed"] > 0
        assert (tmp_path / entry["file"]).stat().st_size > 0


@pytest.mark.slow
def test_the_tool_compiles_what_is_launched_and_finds_it_wide(tmp_path):
    """Under a driver that only names its GPU: the same code from the launcher's path and from the tool's."""
    if not COMPILE.exists():
        pytest.skip("the tests run without the checkout, against an installed wheel")
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(COMPILE.parent)!r})
import compile_kernels, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from fastsam.backends import triton_kernels as kernels
from fastsam.spec import Update

class Utils:
    def load_binary(self, *arguments):
        return 1, 2, 32, 0, 1024
    def unload_module(self, module):
        pass
    def get_device_properties(self, device):
        return {{"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}}

class Driver:
    utils, target = Utils(), GPUTarget("cuda", 90, 32)
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = lambda self: self.target

driver.set_active(Driver())
kind = kernels.Kind(torch.float32)
for kernel in (kernels.norm(kind), kernels.update(kind, Update.NONE, None)):
    launched = kernel.prepare(torch.device("cpu"))
    source = compile_kernels.source_of(kernel, Driver.target)
    tool = triton.compile(source, target=Driver.target, options=kernel.options)
    assert launched.asm["ptx"] == tool.asm["ptx"]
labels = [label for label, _ in compile_kernels.every_kernel("sm_90", "bfloat16", "nearest")]
job = "sm_90", "bfloat16", "nearest", True, labels.index("perturb by norm")
entry = compile_kernels.compile_job(job, pathlib.Path({str(tmp_path)!r}))
assert entry["wide_needed"] > 0
assert not compile_kernels.faults(entry), entry
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- on a GPU: what an interpreter cannot show ----


@pytest.mark.gpu
def test_a_changed_number_compiles_nothing():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    gpu = load("triton", "cuda")
    weight = torch.nn.Parameter(values((1000,), torch.float32, "cuda"))
    weight.grad = torch.ones_like(weight)
    optimizer = FastSAM([weight], lr=0.1, momentum=0.9, backend="triton")

    def step():
        optimizer.first_step(zero_grad=False)
        optimizer.second_step()

    step()
    before = gpu.kernels.update.cache_info().misses
    for number in (1.0, 0.5, 1, 0.0, 16):
        optimizer.param_groups[0].update(lr=number * 0.01, rho=number, weight_decay=number / 100)
        step()
    assert gpu.kernels.update.cache_info().misses == before


def test_the_tests_change_no_compiler(monkeypatch):
    """Their changes to Triton's interpreter would reuse the constants of one compiled kernel in the next one."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = {name: vars(TritonSemantic)[name] for name in ("scalar_constant", "binary_op_type_checking_impl")}
    triton_interpreter.set_up()
    assert {name: vars(TritonSemantic)[name] for name in before} == before
