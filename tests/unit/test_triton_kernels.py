"""What is Triton's alone: launches, uploads, options read on the device, graphs."""

import math
import weakref

import pytest
import torch
from checks import assert_same_bits
from triton_tables import ASCENT, PRECISIONS, SGD, bind, copy_of, counts, give_grads, make_table, uploads, whole_step

from fastsam.precision import Precision
from fastsam.runtime import streams
from fastsam.spec import StateNames, Update


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
    return lambda on: monkeypatch.setattr(streams, "is_capturing", lambda device: on)


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
