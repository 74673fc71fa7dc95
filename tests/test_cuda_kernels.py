"""The CUDA kernels without a GPU: compiled for the CPU (cuda_on_cpu/), through the suite of every backend."""

import inspect

import cuda_on_cpu
import pytest
import torch
from checks import assert_same_bits

from fastsam.backends import native
from fastsam.backends.native_table import CudaTable
from fastsam.tables.state import StateNames
from fastsam.precision import Precision
from fastsam.tables import BACKUP, MASTER, ROWS, Member, TensorTable

pytest.register_assert_rewrite("test_backends", "test_precision", "test_rounding")
import test_precision  # noqa: E402
import test_rounding  # noqa: E402
from test_backends import *  # noqa: E402, F403
from test_backends import CLIMBS, UPDATES, Scene, assert_whole_step, update  # noqa: E402
from test_precision import trained  # noqa: E402, F401

# By names of their own: some tests of different modules are called the same.
for module in (test_rounding, test_precision):
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_") and {"operations", "trained"} & set(inspect.signature(function).parameters):
            globals()[f"{name}_{module.__name__}"] = function

OPERATORS = ("grad_norm_", "perturb_", "restore_", "restore_and_sgd_", "restore_and_adam_")

pytestmark = [
    pytest.mark.parametrize("device", ["cpu"], indirect=True),
    pytest.mark.parametrize("backend", ["native"], indirect=True),
    pytest.mark.usefixtures("backend", "cuda_kernels"),
]


@pytest.fixture(scope="module")
def operators():
    """The kernels for the CPU, behind the same schemas."""
    cuda_on_cpu.load()
    operators = torch.library.Library("fastsam_on_cpu", "DEF")
    for name in OPERATORS:
        operators.define(str(getattr(torch.ops.fastsam, name).default._schema).removeprefix("fastsam::"))
    yield
    operators._destroy()


@pytest.fixture
def cuda_kernels(operators, monkeypatch):
    """The native backend takes the CPU for a CUDA device."""
    monkeypatch.setattr(native, "_ops", torch.ops.fastsam_on_cpu)
    monkeypatch.setitem(native._tables, "cpu", CudaTable)


# ---- whole steps ----


@pytest.mark.parametrize("count", [480, 481, 4064, 4065, 8129])
def test_more_tensors_than_the_arguments_hold(operations, device, count):
    """With empty tensors on both sides of every boundary; steps are counted for them, too."""
    shapes = [(1 + i % 3,) for i in range(count)]
    for boundary in (0, 480, 4064, 8128, count):
        for i in (boundary - 1, boundary):
            if 0 <= i < count:
                shapes[i] = (0,)
    assert_whole_step(operations, Scene(shapes, torch.float32, device))


def test_launches_without_a_chunk_count_steps(operations, device):
    scene = Scene([(0,)] * 4065 + [(3,)], torch.float32, device)
    scene.begin_climb()
    norm = operations.grad_norm([scene.table], [CLIMBS["sam"]])
    assert float(norm) == pytest.approx(float(scene.grads[-1].norm()), rel=1e-6)
    operations.perturb_(scene.table, norm, [CLIMBS["sam"]])
    scene.give_state(UPDATES["adam"], [0] * 4066)
    update(operations, scene, [UPDATES["adam"]])
    assert scene.table.steps.tolist() == [1.0] * 4066


def test_new_gradients_need_no_upload(operations, device):
    scene = Scene([(5,), (7, 3), (0,)], torch.float32, device)
    scene.begin_climb()
    scene.give_state(UPDATES["sgd-momentum"], [0, 0, 0])

    def step():
        norm = operations.grad_norm([scene.table], [CLIMBS["sam"]])
        operations.perturb_(scene.table, norm, [CLIMBS["sam"]])
        update(operations, scene, [UPDATES["sgd-momentum"]])
        return scene.table.cache["native table"]._copy.uploads

    before = step()
    for seed in (1000, 2000):
        scene.give_grads(seed=seed)
        assert step() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_options_on_the_device_are_read_when_a_kernel_runs(operations, device, dtype):
    rho, lr = (torch.zeros((), dtype=dtype, device=device) for _ in range(2))
    scenes = [Scene([(9,), (2, 2)], torch.float32, device) for _ in range(2)]
    for step in range(2):
        numbers = 0.25 / (1 + step), 0.5 / (1 + step)
        rho.fill_(numbers[0])
        lr.fill_(numbers[1])
        for scene, (group_rho, group_lr) in zip(scenes, [(rho, lr), numbers], strict=True):
            scene.begin_climb()
            climb = [CLIMBS["sam"]._replace(rho=group_rho)]
            operations.perturb_(scene.table, operations.grad_norm([scene.table], climb), climb)
            update(operations, scene, [UPDATES["sgd"]._replace(lr=group_lr)])
    assert_same_bits(scenes[0].params, scenes[1].params)
    assert not torch.equal(scenes[0].params[0], scenes[0].originals[0])


@pytest.mark.parametrize("length", [0, 3, 64, 301])
@pytest.mark.parametrize("master_offset", range(5))
@pytest.mark.parametrize("offset", [0, 1, 4, 7])
def test_masters_and_parameters_of_any_alignment(operations, device, offset, master_offset, length):
    """Vectors where both can be aligned at one element, as many as that leaves; else one by one."""
    canaries = Canaries()  # noqa: F405
    w, g = test_rounding.weights_and_steps(torch.bfloat16, length)
    param, grad = (canaries.around(t, offset=offset) for t in (w, g))
    param.grad = grad
    exact = w.float() + 2**-12  # below a rounding of w, which so is that of the master
    master = canaries.around(exact, offset=master_offset)
    table = TensorTable(device, torch.bfloat16, [Member(0, param, 0)], Precision(masters=True))
    table.read_grads()
    state = {param: {"fastsam_master": master}}
    table.begin_climb([True], state, [StateNames()])
    operations.perturb_(table, norm_of(1.0, device), [CLIMBS["sam"]])  # noqa: F405
    assert_same_bits([param, master], [(exact + g.float()).bfloat16(), exact])
    table.publish_state(state, table.prepare_state(state, [StateNames()]))
    operations.restore_and_sgd_(table, [UPDATES["sgd"]._replace(lr=0.5, weight_decay=0.0)], None, None)
    expected = exact - g.float() / 2
    assert_same_bits([param, master], [expected.bfloat16(), expected])
    param.view(torch.int16)[::7] ^= 1  # somebody writes to it
    expected = torch.where(torch.arange(length) % 7 == 0, param.float(), expected)
    table.begin_climb([True], state, [StateNames()])
    operations.perturb_(table, norm_of(torch.nan, device), [CLIMBS["sam"]])  # noqa: F405
    assert_same_bits([param, master], [expected.bfloat16(), expected])
    canaries.assert_alive()


# ---- what the operators refuse ----


class Call:
    """The arguments of one operator over two tensors, all of them correct."""

    def __init__(self, name, device, precision=None):
        dtype = torch.float32 if precision is None else torch.bfloat16
        self.name, self.scene = name, Scene([(100,), (40,)], dtype, device, groups=[0, 1])
        if precision is not None:
            members = [Member(i, param, i) for i, param in enumerate(self.scene.params)]
            self.scene.table = TensorTable(device, dtype, members, precision)
            self.scene.table.read_grads()
        self.scene.table.begin_climb([True, True], {}, [StateNames()] * 2)
        options = {"restore_and_sgd_": UPDATES["sgd"], "restore_and_adam_": UPDATES["adamw-amsgrad"]}
        self.scene.give_state(UPDATES["adamw-amsgrad"], [0, 0])
        view = CudaTable(self.scene.table, 64)
        table, packed = view.read(self.scene.table, [options.get(name, CLIMBS["sam"])] * 2)
        names = ("addresses", "tensors", "chunks", "chunk_size", "dtype", "device_addresses", "positions", "masters")
        self.arguments = dict(zip(names, table, strict=True))
        if name != "restore_":
            self.arguments["options"] = packed
        finished = torch.zeros((), dtype=torch.int32)
        if name == "grad_norm_":
            self.arguments |= {"partials": torch.full((3,), 7.0, dtype=torch.float64), "norm": norm_of(7.0, device)}  # noqa: F405
            self.arguments |= {"finished": finished, "first": True, "last": True}
        if name == "perturb_":
            self.arguments["norm"] = norm_of(2.0, device)  # noqa: F405
            self.arguments["steps"] = self.scene.table.steps if self.scene.table.stochastic else None
        if name.startswith("restore_and"):
            self.arguments |= {"steps": torch.zeros(2), "grad_scale": torch.ones(()), "found_inf": torch.zeros(())}
            self.arguments["finished"] = finished

    def run(self):
        getattr(torch.ops.fastsam_on_cpu, self.name)(*self.arguments.values())

    def everything(self):
        """Copies of all that the operator could write to."""
        written = [self.arguments.get(name) for name in ("partials", "norm", "steps")]
        state = [tensor for slot in self.scene.table.state for tensor in slot]
        everything = [*self.scene.params, *self.scene.table.backups, *state, *written]
        return [t.clone() for t in everything if t is not None]


TABLE = {
    "addresses of another dtype": ("addresses", torch.Tensor.int),
    "addresses of fewer tensors": ("addresses", lambda t: t[:, :1].contiguous()),
    "tensors of another dtype": ("tensors", torch.Tensor.int),
    "a negative size": ("tensors", lambda t: t * torch.tensor([[-1], [1]])),
    "another size": ("tensors", lambda t: t + torch.tensor([[64], [0]])),
    "a parameter without address": ("addresses", lambda t: t * (torch.arange(ROWS) != 0)[:, None]),
    "no tensors": ("tensors", lambda t: t[:, :0]),
    "chunks of another dtype": ("chunks", torch.Tensor.int),
    "chunks of three columns": ("chunks", lambda t: t[:, :3].contiguous()),
    "fewer chunks": ("chunks", lambda t: t[:-1]),
    "chunks of size 0": ("chunk_size", lambda _: 0),
    "chunks larger than they were cut": ("chunk_size", lambda _: 128),
    "chunks too large to count in": ("chunk_size", lambda _: 2**31),
    "integers": ("dtype", lambda _: torch.int32),
    "no addresses on the device": ("device_addresses", lambda _: None),
    "fewer addresses on the device": ("device_addresses", lambda t: t[:-1]),
    "addresses on the device of another dtype": ("device_addresses", torch.Tensor.double),
}
OPTIONS = {
    "options of another dtype": ("options", torch.Tensor.double),
    "options with a word less": ("options", lambda t: t[:-1]),
    "a group without options": ("options", lambda t: t[: len(t) // 2]),
    "no options": ("options", lambda t: t[:0]),
}
NORM = {
    "norm of another dtype": ("norm", torch.Tensor.float),
    "norm of two elements": ("norm", lambda t: torch.stack([t, t])),
}
COUNT = {
    "nothing to count by": ("finished", lambda _: None),
    "a count of another dtype": ("finished", torch.Tensor.long),
}
STEPS = {
    "steps of another dtype": ("steps", torch.Tensor.double),
    "too few steps": ("steps", lambda t: t[:1]),
    "grad_scale of another dtype": ("grad_scale", torch.Tensor.double),
    "found_inf of two elements": ("found_inf", lambda t: torch.stack([t, t])),
}
PARTIALS = {
    "too few partials": ("partials", lambda t: t[:2]),
    "partials of another dtype": ("partials", torch.Tensor.float),
}
STOCHASTIC = {
    "positions of another dtype": ("positions", torch.Tensor.int),
    "too few positions": ("positions", lambda t: t[:1]),
    "nothing to round in float32": ("dtype", lambda _: torch.float32),
}
STOCHASTIC_CLIMB = {
    "no steps": ("steps", lambda _: None),
    **{name: change for name, change in STEPS.items() if change[0] == "steps"},
}
MASTERS = {
    "backups that are not the masters": ("addresses", lambda t: t + 64 * (torch.arange(ROWS) == BACKUP)[:, None]),
    "no masters in float32": ("dtype", lambda _: torch.float32),
}


def without(*rows):
    return lambda t: t * torch.tensor([row not in rows for row in range(ROWS)])[:, None]


MOMENTS = {"no second moment": ("addresses", lambda t: t * (torch.arange(ROWS) != 4)[:, None])}

REFUSED = [(operator, name, TABLE[name]) for operator in OPERATORS for name in TABLE]
REFUSED += [(operator, name, OPTIONS[name]) for operator in OPERATORS if operator != "restore_" for name in OPTIONS]
REFUSED += [(operator, name, NORM[name]) for operator in OPERATORS[:2] for name in NORM]
REFUSED += [(operator, name, COUNT[name]) for operator in (OPERATORS[0], *OPERATORS[3:]) for name in COUNT]
REFUSED += [(operator, name, STEPS[name]) for operator in OPERATORS[3:] for name in STEPS]
REFUSED += [("grad_norm_", name, PARTIALS[name]) for name in PARTIALS]
REFUSED += [("restore_and_adam_", name, MOMENTS[name]) for name in MOMENTS]


REFUSED = [(operator, None, name, case) for operator, name, case in REFUSED]
for precision in (Precision(True, False), Precision(True, True)):
    REFUSED += [(operator, precision, name, STOCHASTIC[name]) for operator in OPERATORS for name in STOCHASTIC]
    REFUSED += [("perturb_", precision, name, STOCHASTIC_CLIMB[name]) for name in STOCHASTIC_CLIMB]
REFUSED += [(operator, Precision(False, True), name, MASTERS[name]) for operator in OPERATORS for name in MASTERS]
REFUSED += [
    (operator, Precision(False, True), "no masters", ("addresses", without(BACKUP, MASTER)))
    for operator in OPERATORS[3:]
]


@pytest.mark.parametrize("precision", [None, (True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_correct_call_is_accepted(device, operator, precision):
    call = Call(operator, device, precision and Precision(*precision))
    before = call.everything()
    for param in call.scene.params:
        param.add_(1)
    call.run()
    assert not all(map(torch.equal, call.everything(), before)) or operator == "restore_"


@pytest.mark.parametrize(
    ("operator", "precision", "argument", "change"),
    [(o, p, *case) for o, p, _, case in REFUSED],
    ids=[f"{o}-{p and tuple(p)}-{name}" for o, p, name, _ in REFUSED],
)
def test_what_is_no_table_is_refused(device, operator, precision, argument, change):
    call = Call(operator, device, precision)
    call.arguments[argument] = change(call.arguments[argument])
    before = call.everything()
    with pytest.raises(RuntimeError, match="fastsam"):
        call.run()
    assert_same_bits(call.everything(), before)
