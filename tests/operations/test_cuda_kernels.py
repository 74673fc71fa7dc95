"""The CUDA kernels without a GPU: compiled for the CPU (cuda_on_cpu/), through the suite of every backend."""

import inspect
from contextlib import nullcontext

import cuda_on_cpu
import pytest
import torch
from checks import Canaries, assert_same_bits
from expected import assert_updated, assert_whole_step
from operations import test_perturb, test_reductions, test_stochastic_rounding, test_update, test_whole_steps
from operations.test_stochastic_rounding import weights_and_steps
from operations.test_whole_steps import threads  # noqa: F401
from scene import (
    ASCENT_COLUMNS,
    ASCENTS,
    CHUNK,
    FORMS,
    STORED,
    UPDATES,
    Scene,
    combination,
    descent_by,
    norm_of,
    update_,
)
from unit import test_native_guards as guards

from fastsam.backends import native, native_table
from fastsam.backends.native_table import CudaTable
from fastsam.precision import Precision
from fastsam.spec import Ascent, AscentOptions, Row, Update
from fastsam.tables import Member, TensorTable

for module in (test_reductions, test_perturb, test_update, test_whole_steps, test_stochastic_rounding):
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if name.startswith("test_"):
            # By a name of its own: some tests of different modules are called the same.
            globals()[f"{name}_{module.__name__.rpartition('_')[2]}"] = function

OPERATORS = ("grad_norm_", "dots_", "perturb_", "restore_", "restore_and_update_")

pytestmark = [
    pytest.mark.parametrize("device", ["cpu"], indirect=True),
    pytest.mark.parametrize("backend", ["native"], indirect=True),
    pytest.mark.usefixtures("backend", "cuda_kernels"),
]


@pytest.fixture(scope="module")
def operators():
    """The kernels for the CPU, behind the same schemas."""
    library = cuda_on_cpu.load()
    operators = torch.library.Library("fastsam_on_cpu", "DEF")
    for name in OPERATORS:
        operators.define(str(getattr(torch.ops.fastsam, name).default._schema).removeprefix("fastsam::"))
    yield library
    operators._destroy()


@pytest.fixture
def cuda_kernels(operators, monkeypatch):
    """The native backend takes the CPU for a CUDA device."""
    monkeypatch.setattr(native, "_ops", torch.ops.fastsam_on_cpu)
    monkeypatch.setattr(native, "_cuda_functions", lambda: operators)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(native, "_view", lambda table: table.attached(CudaTable))
    monkeypatch.setattr(native_table, "gpu_chunk_size", lambda table, smallest: CHUNK)
    return operators


@pytest.fixture
def chunk_size(cuda_kernels):
    """As :func:`cuda_kernels` has it."""
    return CHUNK


# ---- launches ----


def shapes_around(boundaries, count):
    """Small tensors, with empty ones on both sides of every boundary between launches."""
    shapes = [(1 + i % 3,) for i in range(count)]
    for boundary in (0, *boundaries, count):
        for i in (boundary - 1, boundary):
            if 0 <= i < count:
                shapes[i] = (0,)
    return shapes


@pytest.mark.parametrize("count", [480, 481, 4065])
def test_more_tensors_than_the_arguments_hold(operations, device, count):
    """Steps are counted for empty tensors, too."""
    assert_whole_step(operations, Scene(shapes_around((480, 4064, 8128), count), torch.float32, device))


@pytest.mark.parametrize("count", [512, 513])
def test_more_tensors_than_the_arguments_of_methods_hold(operations, device, count):
    scene = Scene(shapes_around((512,), count), torch.float32, device)
    scene.begin_ascent()
    scene.give_rows()
    scene.give_state(UPDATES["adam"], [1] * count)
    descent = descent_by("all", scene)
    dots = operations.dots(scene.table, descent.form, descent.coefficients)
    expected = torch.stack([(g.double() ** 2).sum() for g in scene.grads])
    expected[-1] = 0  # without method state it has no part
    torch.testing.assert_close(dots[:, 0], expected, rtol=1e-12, atol=0)
    before = scene.copy_rows()
    scene.perturb()
    update_(operations, scene, [UPDATES["adam"]], descent=descent)
    assert_updated(scene, [UPDATES["adam"]], before, [1] * count, descent=descent)


def test_launches_without_a_chunk_count_steps(operations, device):
    scene = Scene([(0,)] * 4065 + [(3,)], torch.float32, device)
    scene.begin_ascent()
    norm = operations.grad_norm([scene.table], [ASCENTS["sam"]])
    assert float(norm) == pytest.approx(float(scene.grads[-1].norm()), rel=1e-6)
    operations.perturb_(scene.table, Ascent([ASCENTS["sam"]], norm))
    scene.give_state(UPDATES["adam"], [0] * 4066)
    update_(operations, scene, [UPDATES["adam"]])
    assert torch.stack(scene.table.steps).tolist() == [1.0] * 4066


@pytest.mark.parametrize("stored", ["float32", "bfloat16-masters"])
@pytest.mark.parametrize("form", [None, "adaptive", "further"])
def test_a_launch_that_fails_leaves_no_table_half_perturbed(operations, device, cuda_kernels, stored, form):
    """What the launch before it has perturbed is restored; a further ascent is left for ``restore_``."""
    count = 5000 if form is None else 600
    scene = Scene([(1 + i % 3,) for i in range(count)], STORED[stored], device)
    scene.begin_ascent()
    if form is None:
        ascent = Ascent([ASCENTS["sam"]], norm_of(1.0, device))
    else:
        if form == "further":
            scene.perturb()
        ascent = combination(ASCENT_COLUMNS, FORMS[form], scene)
    cuda_kernels.fail_after(1)
    with pytest.raises(RuntimeError, match="perturb_ cannot be launched on CUDA: out of memory"):
        operations.perturb_(scene.table, ascent)
    if form == "further":
        operations.restore_(scene.table)
        assert_same_bits(scene.params, [start.to(scene.dtype) for start in scene.starts])
    else:
        assert_same_bits(scene.params, scene.originals)


def test_new_gradients_need_no_upload(operations, device):
    """Nor do first gradients and directions."""
    scene = Scene([(5,), (7, 3), (0,)], torch.float32, device)
    scene.begin_ascent()
    scene.give_rows()
    scene.give_state(UPDATES["sgd-momentum"], [0, 0, 0])

    def step(seed):
        scene.give_grads(seed=seed)
        for row in (Row.FIRST_GRAD, Row.DIRECTION):
            scene.table.set_row(row, scene.place(seed + row))
        norm = operations.grad_norm([scene.table], [ASCENTS["sam"]])
        operations.perturb_(scene.table, Ascent([ASCENTS["sam"]], norm))
        operations.perturb_(scene.table, combination(ASCENT_COLUMNS, FORMS["direction"], scene))
        descent = descent_by("replaces", scene)
        operations.dots(scene.table, descent.form, descent.coefficients)
        update_(operations, scene, [UPDATES["sgd-momentum"]], descent=descent)
        for row in (Row.FIRST_GRAD, Row.DIRECTION):
            scene.table.set_row(row, [None] * 3)
        return scene.table.attached(CudaTable)._copy.uploads

    before = step(0)
    for seed in (1000, 2000):
        assert step(seed) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_options_on_the_device_are_read_when_a_kernel_runs(operations, device, dtype):
    rho, lr = (torch.zeros((), dtype=dtype, device=device) for _ in range(2))
    scenes = [Scene([(9,), (2, 2)], torch.float32, device) for _ in range(2)]
    for step in range(2):
        numbers = 0.25 / (1 + step), 0.5 / (1 + step)
        rho.fill_(numbers[0])
        lr.fill_(numbers[1])
        for scene, (group_rho, group_lr) in zip(scenes, [(rho, lr), numbers], strict=True):
            scene.begin_ascent()
            ascent = [ASCENTS["sam"]._replace(rho=group_rho)]
            operations.perturb_(scene.table, Ascent(ascent, operations.grad_norm([scene.table], ascent)))
            update_(operations, scene, [UPDATES["sgd"]._replace(lr=group_lr)])
    assert_same_bits(scenes[0].params, scenes[1].params)
    assert not torch.equal(scenes[0].params[0], scenes[0].originals[0])


@pytest.mark.parametrize("length", [0, 3, 64, 301])
@pytest.mark.parametrize("master_offset", range(5))
@pytest.mark.parametrize("offset", [0, 1, 4, 7])
def test_masters_and_parameters_of_any_alignment(operations, device, offset, master_offset, length):
    """Vectors where both can be aligned at one element, as many as that leaves; else one by one."""
    canaries = Canaries()
    w, g = weights_and_steps(torch.bfloat16, length)
    param, grad = (canaries.around(t, offset=offset) for t in (w, g))
    param.grad = grad
    exact = w.float() + 2**-12  # below a rounding of w, which so is that of the master
    master = canaries.around(exact, offset=master_offset)
    table = TensorTable(device, torch.bfloat16, [Member(0, param, 0)], Precision(masters=True))
    table.read_grads()
    table.perturbed = [0]
    for row in (Row.MASTER, Row.BACKUP):
        table.set_row(row, [master])
    operations.perturb_(table, Ascent([ASCENTS["sam"]], norm_of(1.0, device)))
    assert_same_bits([param, master], [(exact + g.float()).bfloat16(), exact])
    options = [UPDATES["sgd"]._replace(lr=0.5, weight_decay=0.0)]
    operations.restore_and_update_(table, Update.SGD, options)
    expected = exact - g.float() / 2
    assert_same_bits([param, master], [expected.bfloat16(), expected])
    param.view(torch.int16)[::7] ^= 1  # somebody writes to it
    expected = torch.where(torch.arange(length) % 7 == 0, param.float(), expected)
    operations.perturb_(table, Ascent([ASCENTS["sam"]], norm_of(torch.nan, device)))
    assert_same_bits([param, master], [expected.bfloat16(), expected])
    canaries.assert_alive()


@pytest.mark.parametrize("length", [3, 64, 301])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_gradient_that_is_aligned_otherwise(operations, device, dtype, length):
    """A view of DDP's bucket, say: one by one."""
    param, grad = torch.rand(length).to(dtype), torch.rand(length + 3).to(dtype)[3:]
    param.grad = grad
    backup, original = torch.full_like(param, torch.nan), param.clone()
    table = TensorTable(device, dtype, [Member(0, param, 0)])
    table.read_grads()
    table.perturbed = [0]
    table.set_row(Row.BACKUP, [backup])
    operations.perturb_(table, Ascent([AscentOptions(1.0, False, False)], norm_of(1.0, device)))
    assert_same_bits([param, backup], [(original.float() + grad.float()).to(dtype), original])


# ---- what the operators refuse ----


class Call(guards.Call):
    """The arguments as CUDA takes them."""

    def __init__(self, use, mode="nearest"):
        super().__init__(use, mode)
        given = self.arguments
        given["chunks"] = torch.tensor([[0, 0, 64, 0], [0, 64, 36, 0], [1, 0, 40, 1]])
        given["device_addresses"] = given["addresses"].clone()
        if "options" in given:
            numbers = given["options"].contiguous().view(torch.int64)
            given["options"] = torch.stack([numbers, torch.zeros_like(numbers)], -1).flatten()
        if "finished" in given:
            given["finished"] = torch.tensor([[0, 0], [2, 1]], dtype=torch.int32)

    def run(self):
        getattr(torch.ops.fastsam_on_cpu, self.name)(*self.arguments.values())


replaced, cases = guards.replaced, guards.cases
TABLE = {name: spoil for name, spoil in guards.TABLE.items() if "a chunk" not in name} | {
    "chunks of three columns": replaced("chunks", lambda t: t[:, :3].contiguous()),
    "fewer chunks": replaced("chunks", lambda t: t[:-1]),
    "chunks too large to count in": replaced("chunk_size", lambda _: 2**31),
    "no tensors": replaced("tensors", lambda t: t[:, :0]),
    "no addresses on the device": replaced("device_addresses", lambda _: None),
    "fewer addresses on the device": replaced("device_addresses", lambda t: t[:-1]),
    "addresses on the device of another dtype": replaced("device_addresses", torch.Tensor.double),
}
OPTIONS = {
    "options of another dtype": replaced("options", torch.Tensor.double),
    "options with a word less": replaced("options", lambda t: t[:-1]),
    "options between two words": replaced("options", lambda t: torch.cat([t[:1], t])[1:]),
    "a group without options": replaced("options", lambda t: t[: len(t) // 2]),
    "no options": replaced("options", lambda t: t[:0]),
}
COUNTERS = {
    "nothing to count by": replaced("finished", lambda _: None),
    "counters of another dtype": replaced("finished", torch.Tensor.long),
    "no counters": replaced("finished", lambda t: t[:0]),
}
MOMENTS = {name: spoil for name, spoil in guards.MOMENTS.items() if "largest" not in name}
CASES = [
    *cases(guards.ONE_OF_EACH, TABLE),
    *cases(guards.OPTIONS_OF, OPTIONS),
    *cases((*guards.REDUCTIONS, *guards.UPDATES), COUNTERS),
    *cases(("norm", "perturb"), guards.NORM),
    *cases(guards.REDUCTIONS, guards.PARTIALS),
    *cases(guards.REDUCTIONS[1:], guards.RESULT),
    *cases([use for use in guards.FORMS if use != "dots of a descent"], guards.COEFFICIENTS),
    *cases(guards.FORMS, guards.Y),
    *cases(("dots", "perturb by a form"), guards.X_AND_MAP),
    *cases(("dots of a descent", "sgd by a form", "no update"), guards.NO_PERTURBATION),
    *cases(["perturb"], guards.NORM_AND_FORM),
    *cases(guards.UPDATES, guards.SCALARS),
    *cases(["adam"], MOMENTS),
    *cases(["no update"], {"nowhere to leave the decoupled part": guards.without_first_grad}),
    *cases((*guards.PERTURBS, *guards.FUSED), {"no step": guards.MOMENTS["no step"]}, "stochastic"),
    *cases(guards.ONE_OF_EACH, guards.MASTERS, "masters"),
    *cases(guards.FUSED, {"no master": guards.without_master}, "masters"),
    *cases(guards.ONE_OF_EACH, guards.STOCHASTIC, "stochastic"),
]


@pytest.mark.parametrize("mode", guards.MODES)
@pytest.mark.parametrize("use", guards.OPERATORS)
def test_a_correct_call_is_accepted(use, mode):
    call = Call(use, mode)
    before = call.everything()
    call.run()
    assert not all(map(torch.equal, call.everything(), before))


@pytest.mark.parametrize(
    ("use", "mode", "spoil"), [(u, m, spoil) for u, m, _, spoil in CASES], ids=["-".join(c[:3]) for c in CASES]
)
def test_what_is_no_table_is_refused(use, mode, spoil):
    guards.assert_refused(Call(use, mode), spoil)
