"""What is Triton's alone: launches, uploads, options read on the device, graphs, and what the compiler makes of it."""

import json
import math
import os
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from checks import assert_same_bits, values
from child import run_python
from golden import GOLDEN, LOW

from fastsam import FastSAM
from fastsam.backends import Request, device_table, load
from fastsam.backends.rounding import round_stochastically
from fastsam.precision import Precision
from fastsam.spec import AdamOptions, Ascent, AscentForm, AscentOptions, Row, SGDOptions, StateNames, Update
from fastsam.tables import Member, TensorTable, Wanted

COMPILE = Path(__file__).parents[2] / "tools" / "compile_kernels.py"
SGD = SGDOptions(0.1, 0.9, 0.0, 0.0, False, False)
ASCENT = AscentOptions(0.05, False, False)


@pytest.fixture
def triton_gpu(runnable, device):
    """The backend's module."""
    return load(runnable("triton"), device.type)


PARTIALS_BLOCK = 1024  # kernels/reduce.py

PRECISIONS = {
    "nearest": Precision(),
    "stochastic": Precision(stochastic=True),
    "masters": Precision(masters=True),
    "stochastic masters": Precision(stochastic=True, masters=True),
}


def make_table(shapes, dtype, device, groups=None, precision=Precision()):  # noqa: B008 (a NamedTuple does not change)
    """A table whose parameters have gradients and are to be perturbed, over SGD's state."""
    params = [values(shape, dtype, device, i) for i, shape in enumerate(shapes)]
    groups = groups or [0] * len(params)
    members = [Member(i, p, g) for i, (p, g) in enumerate(zip(params, groups, strict=True))]
    table = TensorTable(device, dtype, members, precision)
    give_grads(table)
    names = [StateNames(("momentum_buffer",), "step")] * (max(groups) + 1)
    table.choose_perturbed([True] * (max(groups) + 1), table.present)
    bind(table, {param: {} for param in params}, names)
    return table


def bind(table, state, names):
    """Puts ``state``, completed, into the table."""
    everything = range(len(table.params))
    wanted = Wanted(names, masters=everything, moments=everything)
    table.slots.bind(table, state, wanted)
    table.slots.publish(table, state, wanted)
    table.slots.note(table, state, wanted)


def give_grads(table, seed=100):
    """New gradients at new addresses."""
    grads = [values(p.shape, table.dtype, table.device, seed + i) for i, p in enumerate(table.params)]
    for param, grad in zip(table.params, grads, strict=True):
        param.grad = grad
    table.read_grads()


def whole_step(triton_gpu, table, ascent=ASCENT, sgd=SGD):
    groups = max(table.groups) + 1
    norm = triton_gpu.grad_norm([table], [ascent] * groups)
    triton_gpu.perturb_(table, Ascent([ascent] * groups, norm))
    triton_gpu.restore_and_update_(table, Update.SGD, [sgd] * groups)


def copy_of(table):
    return table.attached(load("triton", table.device.type)._View).copy


def counts(table):
    """The steps that the parameters have had."""
    return [float(step) for step in table.steps]


def uploads(table):
    return copy_of(table).uploads


@pytest.fixture
def launches(monkeypatch, triton_gpu):
    """The names of the kernels that were launched, in their order."""
    names = []
    launch = triton_gpu.kernels.Kernel.launch

    def recorded(kernel, *arguments):
        names.append(kernel.name)
        launch(kernel, *arguments)

    monkeypatch.setattr(triton_gpu.kernels.Kernel, "launch", recorded)
    return names


# ---- launches and uploads ----


def test_a_step_is_three_launches_for_all_tensors_and_groups(triton_gpu, device, launches):
    table = make_table([(5,), (7, 3), (), (0,), (300,)] * 3, torch.float32, device, groups=[0, 1, 2, 0, 1] * 3)
    whole_step(triton_gpu, table)
    assert launches == ["grad_norm_kernel", "perturb_kernel", "restore_and_update_kernel"]


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_a_steady_step_uploads_nothing(triton_gpu, device, precision):
    table = make_table([(5,), (7, 3)], torch.bfloat16, device, precision=precision)
    whole_step(triton_gpu, table)
    assert uploads(table) == 4  # the chunks with the positions, the addresses, the ascent's options, SGD's
    before = uploads(table)
    for _ in range(3):
        table.read_grads()
        whole_step(triton_gpu, table)
    assert uploads(table) == before


def test_new_gradients_and_new_options_are_one_upload_each(triton_gpu, device):
    table = make_table([(5,), (7, 3)], torch.float32, device)
    whole_step(triton_gpu, table)
    before = uploads(table)
    kept = [p.grad for p in table.params]
    give_grads(table, seed=200)
    assert all(p.grad.data_ptr() != g.data_ptr() for p, g in zip(table.params, kept, strict=True))
    whole_step(triton_gpu, table)
    assert uploads(table) == before + 1
    whole_step(triton_gpu, table, ASCENT._replace(rho=0.1))
    assert uploads(table) == before + 2
    whole_step(triton_gpu, table, ASCENT._replace(rho=0.1), SGD._replace(lr=0.01))
    assert uploads(table) == before + 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_options_on_the_device_are_read_there(triton_gpu, device, dtype):
    """A schedule that writes to its tensor needs no upload, and gives the same bits as the number."""
    rho, lr = (torch.zeros((), dtype=dtype, device=device) for _ in range(2))
    by_tensor, by_number = (make_table([(5,), (7, 3)], torch.float32, device) for _ in range(2))
    for step in range(3):
        rho.fill_(0.5 + step)
        lr.fill_(0.25 / (1 + step))
        whole_step(triton_gpu, by_tensor, ASCENT._replace(rho=rho), SGD._replace(lr=lr))
        whole_step(triton_gpu, by_number, ASCENT._replace(rho=float(rho)), SGD._replace(lr=float(lr)))
        assert_same_bits(by_tensor.params, by_number.params, f"step {step}")
    assert uploads(by_tensor) == 4  # the chunks, the addresses, the ascent's options, SGD's: once each


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64], ids=str)
def test_options_in_other_dtypes(triton_gpu, device, dtype):
    by_tensor, by_number = (make_table([(5,)], torch.float32, device) for _ in range(2))
    for number in (1.0, 2.0):
        lr = torch.tensor(number, dtype=dtype, device=device)
        whole_step(triton_gpu, by_tensor, sgd=SGD._replace(lr=lr))
        whole_step(triton_gpu, by_number, sgd=SGD._replace(lr=number))
    assert_same_bits(by_tensor.params, by_number.params)


def test_a_tensor_that_an_option_was_once_is_not_written(triton_gpu, device):
    table = make_table([(5,)], torch.float32, device)
    first = torch.tensor(0.5, dtype=torch.float64, device=device)
    for lr in (first, torch.tensor(2, device=device)):
        whole_step(triton_gpu, table, sgd=SGD._replace(lr=lr))
    assert float(first) == 0.5


def test_a_table_that_is_let_go_is_gone(triton_gpu, device):
    """At once, not when Python next looks for rings: its backups are as large as the model."""
    table = make_table([(5,)], torch.float32, device)
    whole_step(triton_gpu, table)
    backup = weakref.ref(table.backups[0])
    del table
    assert backup() is None


# ---- what must survive an interruption ----


def cut_off(triton_gpu, monkeypatch, after):
    """Ctrl-C when ``after`` kernels have been launched."""
    launched = []
    launch = triton_gpu.kernels.Kernel.launch

    def interrupted(*arguments):
        if len(launched) == after:
            raise KeyboardInterrupt
        launched.append(1)
        launch(*arguments)

    monkeypatch.setattr(triton_gpu.kernels.Kernel, "launch", interrupted)


def test_a_norm_that_was_cut_off_disturbs_nothing_after_it(triton_gpu, device, monkeypatch):
    """The programs of all tables count themselves: half of them have, when the second table's launch does not come."""
    tables = [make_table([(5,), (7, 3)], dtype, device) for dtype in (torch.float32, torch.float64)]
    triton_gpu.grad_norm(tables, [ASCENT])
    with monkeypatch.context() as patch:
        cut_off(triton_gpu, patch, after=1)
        with pytest.raises(KeyboardInterrupt):
            triton_gpu.grad_norm(tables, [ASCENT])
    for table in tables:
        triton_gpu.restore_and_update_(table, Update.SGD, [SGD])
        assert counts(table) == [1, 1]
        give_grads(table, seed=300)
    for _ in range(2):
        norm = float(triton_gpu.grad_norm(tables, [ASCENT]))
        expected = math.hypot(*(float(p.grad.double().norm()) for table in tables for p in table.params))
        assert norm == pytest.approx(expected, rel=1e-12)


def test_options_whose_upload_was_cut_off_are_sent_again(triton_gpu, device, monkeypatch):
    cut, other = (make_table([(5,), (7, 3)], torch.float32, device) for _ in range(2))
    whole_step(triton_gpu, cut)
    whole_step(triton_gpu, other)
    copy = copy_of(cut)
    write = copy._uploads.write

    def interrupted(*arguments):
        write(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(copy._uploads, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            copy.read(cut, [SGD._replace(lr=0.7)])
    whole_step(triton_gpu, cut)
    whole_step(triton_gpu, other)
    assert_same_bits(cut.params, other.params)


# ---- what a CUDA graph would see ----


@pytest.fixture
def capture(monkeypatch, triton_gpu):
    """A function that makes the backend believe that what follows is captured, or no longer."""

    def pretend(on):
        for module in (device_table, triton_gpu):
            monkeypatch.setattr(module, "is_capturing", lambda device: on)

    return pretend


def test_a_captured_step_has_uploads_of_its_own(triton_gpu, device, capture):
    """A replay reads what lay there at the capture, whatever steps come in between."""
    table, other = (make_table([(5,), (7, 3)], torch.float32, device) for _ in range(2))
    for each in (table, other):
        whole_step(triton_gpu, each)
        give_grads(each, seed=200)
    capture(True)
    whole_step(triton_gpu, table)
    capture(False)
    whole_step(triton_gpu, other)
    assert_same_bits(table.params, other.params)
    captured = [(copy, copy.clone()) for copy in copy_of(table)._uploads._in_graphs.values()]
    assert len(captured) == 1, "the gradients' addresses, for all three operations"
    for seed in (300, 400):
        give_grads(table, seed=seed)
        whole_step(triton_gpu, table, ASCENT._replace(rho=0.2), SGD._replace(lr=0.3))
    for copy, copied in captured:
        assert_same_bits(copy, copied)


@pytest.mark.parametrize("kept", ["state", "masters"])
def test_a_graph_keeps_what_it_was_captured_with(triton_gpu, device, capture, kept):
    def read(table):
        return {"state": table.state[0], "masters": table.masters}[kept][0]

    table = make_table([(5,)], torch.bfloat16, device, precision=Precision(masters=True))
    whole_step(triton_gpu, table)
    capture(True)
    whole_step(triton_gpu, table)
    old = weakref.ref(read(table))
    give_other_state(table)
    assert read(table) is not old()
    assert old() is not None


def give_other_state(table):
    names = [StateNames(("momentum_buffer",), "step")]
    bind(table, {param: {"momentum_buffer": torch.ones_like(param)} for param in table.params}, names)


@pytest.mark.parametrize("what", ["new", "state"])
def test_what_cannot_be_captured_is_refused(triton_gpu, device, capture, what):
    table = make_table([(5,), (7, 3)], torch.float32, device)
    if what != "new":
        whole_step(triton_gpu, table)
    if what == "state":
        give_other_state(table)
    capture(True)
    words = {"new": "not seen these parameters", "state": "not where they were"}[what]
    steps = counts(table)
    with pytest.raises(RuntimeError, match=words) as caught:
        triton_gpu.restore_and_update_(table, Update.SGD, [SGD])
    assert "run a step outside the capture first" in str(caught.value)
    assert counts(table) == steps
    capture(False)
    whole_step(triton_gpu, table)


# ---- numbers ----


def test_more_partials_than_are_added_at_a_time(triton_gpu, device, monkeypatch):
    monkeypatch.setattr(triton_gpu, "CHUNK_SIZE", 16)
    table = make_table([(16 * PARTIALS_BLOCK + 1,)], torch.float32, device)
    norm = float(triton_gpu.grad_norm([table], [ASCENT]))
    assert len(copy_of(table).chunks) == PARTIALS_BLOCK + 1
    assert norm == pytest.approx(float(table.params[0].grad.double().norm()), rel=1e-12)


@pytest.mark.parametrize("kind", ["ties", "anything"])
def test_bfloat16_is_rounded_to_nearest_even(triton_gpu, device, kind):
    """``w - lr * g`` with lr = -1 is one addition in float32, and one rounding."""
    w = bfloat16_from_bits(torch.arange(0, 2**16, 5))
    w = w[w.isfinite() & (w.abs() > 2.0**-100) & (w.abs() < 2.0**120)]
    if kind == "ties":
        # Half the distance to the next number, away from zero and towards it.
        g = (torch.exp2(w.abs().float().log2().floor() - 8) * torch.tensor([1, -1]).repeat(len(w))[: len(w)]).bfloat16()
    else:
        g = bfloat16_from_bits(torch.randint(0, 2**16, (len(w),)))
    table = make_table([w.shape], torch.bfloat16, device)
    table.params[0].copy_(w)
    table.params[0].grad.copy_(g)
    table.choose_perturbed([False], [])
    triton_gpu.restore_and_update_(table, Update.SGD, [SGDOptions(-1.0, 0.0, 0.0, 0.0, False, False)])
    expected = (w.float() + g.float()).bfloat16()
    actual = table.params[0].cpu()
    assert actual[expected.isnan()].isnan().all()
    assert_same_bits(actual[~expected.isnan()], expected[~expected.isnan()])


def bfloat16_from_bits(bits):
    return (bits.to(torch.int32) << 16).view(torch.float32).bfloat16()


@pytest.mark.parametrize(("key", "number"), GOLDEN.items(), ids=str)
def test_golden_numbers(triton_gpu, device, key, number):
    """Also of elements that no tensor here has."""
    from rounding_kernel import random_bits_kernel

    seed, step, position, operation, element = key
    count = 16
    bits = torch.empty(count, dtype=torch.int64, device=device)
    cells = zip(
        (seed, position, step, element - element % count),
        (torch.float64, torch.int64, torch.float32, torch.int64),
        strict=True,
    )
    arguments = [torch.tensor([cell], dtype=dtype, device=device) for cell, dtype in cells]
    random_bits_kernel[(1,)](bits, *arguments, DRAW=operation, COUNT=count)
    assert int(bits[element % count]) == number


@LOW
def test_any_float32_is_rounded_as_in_plain_pytorch(triton_gpu, device, dtype):
    from rounding_kernel import stochastic_rounding_kernel

    words = torch.randint(0, 2**32, (2, 100_000))
    # Any bits; and what float16 rounds to subnormal numbers and to its largest.
    value = (words[0] - 2**31).to(torch.int32).view(torch.float32)
    value = torch.cat([value, torch.randn(len(value)) * 2.0**-16, 65504 + torch.randn(len(value)) * 8]).to(device)
    random = torch.cat([words[1]] * 3).to(device)
    actual = torch.empty(value.shape, dtype=dtype, device=device)
    stochastic_rounding_kernel[(1,)](actual, value, random, len(value), BLOCK=2048)
    expected = round_stochastically(value, random, dtype)
    assert_same_bits(actual.isnan(), value.isnan())
    assert_same_bits(actual[~value.isnan()], expected[~value.isnan()])


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)
def test_small_bfloat16_are_what_they_are(triton_gpu, device, precision):
    """``w - lr * g`` with g = 0 is w; the interpreter's own cast knows no subnormal numbers.

    A NaN stays one; which one, processors decide.
    """
    magnitudes = torch.arange(200)
    w = bfloat16_from_bits(torch.cat([magnitudes, 0x8000 + magnitudes]))
    table = make_table([w.shape], torch.bfloat16, device, precision=precision)
    param = table.params[0]
    param.copy_(w)
    param.grad.zero_()
    whole_step(triton_gpu, table)
    assert_same_bits(param.cpu(), w)


def test_steps_beyond_float32_powers(triton_gpu, device):
    """After a million steps the bias corrections are 1."""
    options = AdamOptions(0.1, 0.9, 0.999, 1e-8, 0.0, False, False, False)
    table = make_table([(3,)], torch.float32, device)
    table.choose_perturbed([False], [])
    param = table.params[0]
    state = {param: {"exp_avg": torch.ones_like(param), "exp_avg_sq": torch.ones_like(param)}}
    state[param]["step"] = torch.tensor(1e6)
    bind(table, state, [StateNames(("exp_avg", "exp_avg_sq"), "step")])
    param.grad.fill_(1.0)
    before = param.clone()
    triton_gpu.restore_and_update_(table, Update.ADAM, [options])
    assert torch.allclose(param, before - 0.1, rtol=1e-6)
    assert float(table.steps[0]) == 1e6 + 1


@pytest.mark.parametrize(("precision", "units"), [("float64", 0), ("float32", 4096)])
def test_powers_are_those_of_whole_numbers(triton_gpu, device, precision, units):
    """Rounded as a fraction is; for float32, off by no more than what float32 cannot see."""
    import triton.language as tl
    from power_kernel import power_kernel

    bases = [0.0, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999, 1 - 1e-7, 1 - 2.0**-53]
    cases = [(base, step) for base in bases for step in (1, 2, 3, 7, 64, 1000, 4097)]
    base, step = (torch.tensor(column, dtype=torch.float64, device=device) for column in zip(*cases, strict=True))
    powers = torch.full_like(base, math.nan)
    power_kernel[(len(cases),)](powers, base, step, DTYPE=getattr(tl, precision))
    for (one, exponent), actual in zip(cases, powers.tolist(), strict=True):
        expected = float(Fraction(one) ** exponent)
        # Smaller errors than this are lost in 1 - power.
        allowed = max(units * math.ulp(expected), 2.0**-63 if expected < 2.0**-11 else 0.0)
        assert abs(actual - expected) <= allowed, (one, exponent)


def test_programs_share_the_chunks_of_a_norm(triton_gpu, device, monkeypatch):
    """Where there are more chunks than the norm has programs."""
    monkeypatch.setattr(triton_gpu, "CHUNK_SIZE", 16)
    monkeypatch.setattr(triton_gpu.kernels, "NORM_PROGRAMS", 5)
    tables = [make_table([(16 * 7 + 1,), (40,)], dtype, device) for dtype in (torch.float32, torch.float64)]
    norm = float(triton_gpu.grad_norm(tables, [ASCENT]))
    expected = math.hypot(*(float(p.grad.double().norm()) for table in tables for p in table.params))
    assert norm == pytest.approx(expected, rel=1e-12)


def test_dots_of_several_chunks_are_added_by_tensor(triton_gpu, device, monkeypatch):
    monkeypatch.setattr(triton_gpu, "CHUNK_SIZE", 16)
    table = make_table([(16 * 3 + 1,), (0,), (16,)], torch.float32, device)
    for _ in range(2):
        dots = triton_gpu.dots(table, AscentForm(y=Row.PARAM), None).cpu()
        pairs = [(p.grad.double().flatten().cpu(), p.double().flatten().cpu()) for p in table.params]
        expected = torch.stack([torch.stack([x @ x, x @ y, y @ y]) for x, y in pairs])
        torch.testing.assert_close(dots, expected, rtol=1e-12, atol=0)


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
    done = subprocess.run([*command, "--kernels", *kernels], capture_output=True, text=True)
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
