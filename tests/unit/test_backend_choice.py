"""Which backend runs: a named one or none, the fastest by default, and what is logged of those left out."""

import logging
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from internals import MODULES, TRITON_MODULE, UPDATE_OPERATIONS, Request, foreach, load, native, resolve
from problem import Problem
from torch import nn

from fastsam import BackendUnavailable, FastSAM


def make_params():
    return [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(4))]


def test_named_backend_is_one_that_runs(backend, device, monkeypatch):
    calls = []
    for name, module in MODULES.items():
        for operation in ("grad_norm", "perturb_", UPDATE_OPERATIONS[0]):
            original = getattr(module, operation)
            monkeypatch.setattr(module, operation, lambda *a, name=name, run=original: (calls.append(name), run(*a))[1])
    problem = Problem(device)
    problem.step(problem.optimizer(backend))
    assert calls == [backend] * 3


@pytest.mark.parametrize("name", ["cuda", "Native", "", None, 3], ids=repr)
def test_unknown_backends_are_refused(name):
    with pytest.raises(
        ValueError, match="backend must be 'auto' or one of 'reference', 'foreach', 'native', 'triton', got"
    ):
        FastSAM(make_params(), lr=0.1, backend=name)
    with pytest.raises(ValueError, match="backend must be"):
        FastSAM([{"params": []}], lr=0.1, backend=name)


@pytest.fixture
def fresh_choice():
    """Choices are remembered; a test that changes what can run must not leave its own behind."""
    resolve.cache_clear()
    yield
    resolve.cache_clear()


def cannot_run(module, monkeypatch, reason):
    monkeypatch.setattr(module, "unsupported_reason", lambda request: reason)


@pytest.mark.parametrize("name", MODULES)
def test_named_backend_that_cannot_run_raises_its_reason(name, monkeypatch, fresh_choice):
    cannot_run(MODULES[name], monkeypatch, "not today")
    for act in (
        lambda: FastSAM(make_params(), lr=0.1, backend=name),
        lambda: load(name, "cpu"),
        lambda: resolve(name, "cpu"),
    ):
        with pytest.raises(BackendUnavailable, match="not today"):
            act()


def test_backend_whose_module_is_missing_says_so(monkeypatch, fresh_choice):
    monkeypatch.setitem(sys.modules, TRITON_MODULE, None)
    with pytest.raises(BackendUnavailable, match="'triton' is not part of this installation"):
        load("triton", "cpu")


def test_load_asks_for_device_it_is_given(monkeypatch):
    asked = []
    stub = types.ModuleType(TRITON_MODULE)
    stub.unsupported_reason = lambda request: asked.append(request.device_type) or ""
    monkeypatch.setitem(sys.modules, TRITON_MODULE, stub)
    assert load("triton", "xpu") is stub
    assert asked == ["xpu"]


def test_auto_takes_fastest_that_can_run(monkeypatch, fresh_choice, caplog):
    caplog.set_level(logging.DEBUG, "fastsam")
    monkeypatch.setattr(native, "unsupported_reason", lambda request: "")
    assert resolve("auto", "cpu") is native
    assert not caplog.records


def test_auto_logs_what_it_skips_and_why_once(monkeypatch, fresh_choice, caplog):
    caplog.set_level(logging.DEBUG, "fastsam")
    cannot_run(native, monkeypatch, "not today")
    problem = Problem("cpu")
    problem.step(problem.optimizer("auto"))
    problem.step(problem.optimizer("auto"))
    assert resolve("auto", "cpu") is foreach
    (record,) = caplog.records
    assert record.name == "fastsam"
    assert record.levelno == logging.WARNING
    assert record.getMessage() == "backend 'native' skipped on cpu: not today"


def test_missing_extension_is_warning_that_says_what_to_do(monkeypatch, fresh_choice, caplog):
    monkeypatch.setattr(native, "_missing", "No module named 'fastsam._C'")
    problem = Problem("cpu")
    problem.step(problem.optimizer("auto"))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert "fastsam._C" in message
    assert "several times slower" in message
    assert "pip install" in message
    with pytest.raises(BackendUnavailable, match="several times slower"):
        resolve("native", "cpu")


def test_on_other_devices_foreach_is_enough_and_says_nothing_loud(fresh_choice, caplog):
    caplog.set_level(logging.WARNING, "fastsam")
    assert resolve("auto", "mps") is foreach
    assert not caplog.records


@pytest.mark.parametrize("broken", [(), ("native",), ("native", "triton")], ids=["none", "native", "native-triton"])
def test_auto_on_gpus_prefers_what_is_compiled_then_triton_then_foreach(monkeypatch, fresh_choice, caplog, broken):
    """On ROCm, too, whose devices PyTorch calls by the same name."""
    caplog.set_level(logging.INFO, "fastsam")
    order = {"native": types.ModuleType(native.__name__), "triton": types.ModuleType(TRITON_MODULE), "foreach": foreach}
    for stub in (order["native"], order["triton"]):
        stub.unsupported_reason = lambda request: ""
        monkeypatch.setitem(sys.modules, stub.__name__, stub)
    for name in broken:
        cannot_run(order[name], monkeypatch, "not here")
    assert resolve("auto", "cuda") is list(order.values())[len(broken)]
    assert [r.getMessage() for r in caplog.records] == [f"backend {n!r} skipped on cuda: not here" for n in broken]


def test_no_backend_at_all(monkeypatch, fresh_choice):
    for module in MODULES.values():
        cannot_run(module, monkeypatch, "nothing works")
    with pytest.raises(BackendUnavailable, match="no backend can run on 'cpu'"):
        FastSAM(make_params(), lr=0.1)


def test_native_backend_asks_every_gpu_of_the_machine(monkeypatch, fresh_choice, tmp_path):
    """One that is too old for the compiled kernels is named, whichever is current."""
    asked = []

    class Functions:
        @staticmethod
        def fastsam_cuda_obstacle():
            return b"no kernel image is available" if asked[-1] == 1 else None

    monkeypatch.setattr(native, "_missing", "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "cuda_library", lambda: tmp_path)
    monkeypatch.setattr(native, "_cuda_functions", Functions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "device", lambda index: (asked.append(index), nullcontext())[1])
    native._load_cuda.cache_clear()
    try:
        reason = native.unsupported_reason(Request("cuda"))
    finally:
        native._load_cuda.cache_clear()
    assert reason == "the CUDA kernels cannot run on GPU 1 (no kernel image is available)"
    assert asked == [0, 1]


def test_native_backend_names_device_it_has_no_kernels_for(monkeypatch):
    monkeypatch.setattr(native, "_missing", "")
    if not hasattr(torch.ops.fastsam, "perturb_"):
        pytest.skip("the extension is not compiled")
    assert "no kernels for 'xla'" in native.unsupported_reason(Request("xla"))
