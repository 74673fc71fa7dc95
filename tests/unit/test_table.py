"""What the table says, when it is rebuilt, and that no write ever goes through a stale address."""

import copy
import gc
import weakref

import oracle
import pytest
import torch
from checks import Canaries, assert_same_bits, assert_within, bits, values
from child import run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fastsam import FastSAM
from fastsam.precision import Precision
from fastsam.spec import Row, StateNames
from fastsam.tables import Member, TensorTable, Wanted
from fastsam.tables.table import CHUNK_OVERHEAD


def make_table(params, groups=None, precision=Precision()):  # noqa: B008
    groups = groups or [0] * len(params)
    dtype = params[0].dtype.to_real() if params[0].is_complex() else params[0].dtype
    return TensorTable(params[0].device, dtype, [Member(i, p, groups[i]) for i, p in enumerate(params)], precision)


def make_params(*shapes, dtype=torch.float32, device="cpu"):
    return [values(shape, dtype, device, i).requires_grad_() for i, shape in enumerate(shapes)]


# ---- chunks ----


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=12), st.integers(1, 40))
def test_chunks_are_a_cut(sizes, chunk_size):
    """Every element is in exactly one chunk, in the tensors' order, and the third column is the work before."""
    chunks = make_table([torch.zeros(size) for size in sizes]).chunks(chunk_size)
    assert (chunks.dtype, chunks.shape[1], chunks.is_contiguous()) == (torch.int64, 3, True)
    covered, work = [], 0
    for tensor, start, before in chunks.tolist():
        length = min(chunk_size, sizes[tensor] - start)
        assert length > 0
        assert before == work
        covered += [(tensor, element) for element in range(start, start + length)]
        work += length + CHUNK_OVERHEAD
    assert covered == [(tensor, element) for tensor, size in enumerate(sizes) for element in range(size)]


def test_addresses_and_sizes():
    params = [p.detach() for p in make_params((3, 4), (), (0,), (5,))]
    params.append(torch.zeros(6)[::2])
    params.append(torch.zeros(3, dtype=torch.complex64))
    table = make_table(params, groups=[0, 0, 1, 1, 1, 0])
    assert table.tensors.tolist() == [[12, 1, 0, 5, 3, 6], [0, 0, 1, 1, 1, 0]]
    addresses = table.addresses[Row.PARAM].tolist()
    for i in (0, 1, 3, 5):
        assert addresses[i] == params[i].data_ptr()
    assert addresses[4] not in (0, params[4].data_ptr()), "a parameter with gaps is reached through scratch"
    assert addresses[2] != 0, "empty is not absent"
    assert not table.addresses[Row.GRAD :].any()


def test_rows_follow_gradients_backups_and_state():
    params = make_params((3,), (4,), (5,))
    table = make_table(params, groups=[0, 0, 1])
    params[0].grad, params[2].grad = torch.ones(3), torch.ones(5)
    assert table.read_grads()
    assert table.present == [0, 2]
    assert table.addresses[Row.GRAD].tolist() == [params[0].grad.data_ptr(), 0, params[2].grad.data_ptr()]
    table.choose_perturbed([True, False], table.present)
    assert table.perturbed == [0]
    assert [address != 0 for address in table.addresses[Row.BACKUP].tolist()] == [True, False, False]
    wanted = Wanted([StateNames(("momentum_buffer",), None), StateNames()], moments=table.present)
    state = {p: {} for p in params}
    assert table.slots.bind(table, state, wanted)
    assert not any(state.values()), "nothing is published yet"
    table.slots.publish(table, state, wanted)
    table.slots.note(table, state, wanted)
    assert [list(state[p]) for p in params] == [["momentum_buffer"], [], []]
    assert table.addresses[Row.STATE].tolist() == [state[params[0]]["momentum_buffer"].data_ptr(), 0, 0]
    assert not table.addresses[Row.STATE_1 :].any()
    assert not table.slots.bind(table, state, wanted), "the steady state"
    assert table.written == [0, 2]


# ---- what has changed ----


def other_memory(param):
    param.data = param.data.clone()


def other_dtype(param):
    param.data = param.data.double()


def transposed(param):
    param.data = param.data.t()


def other_shape(param):
    param.data = param.data.reshape(2, 8)


def moved_by_an_element(param):
    memory = torch.zeros(17)
    memory[1:] = param.detach().flatten()
    param.data = memory[1:].view(4, 4)


def resized(param):
    param.data.resize_(5, 5)


def shared(param):
    param.share_memory_()


CHANGES = [other_memory, other_dtype, transposed, other_shape, moved_by_an_element, resized, shared]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed(change):
    params = make_params((4, 4), (4, 4), (4, 4))
    table = make_table(params)
    assert table.changed() == []
    change(params[1])
    assert table.changed() == [1]
    assert not table.read_grads()
    assert all(g is None for g in table.grads)


def test_unchanged():
    """What a training loop does to parameters all the time."""
    params = make_params((4, 4), (0,), ())
    table = make_table(params)
    for param in params:
        param.grad = torch.ones_like(param)
        param.requires_grad_(False).requires_grad_()
        param.data = param.data
        param.data = param.data.view(param.shape)
        with torch.no_grad():
            param.mul_(2)
    with torch.autocast("cpu"), torch.inference_mode():
        assert table.changed() == []
    assert table.changed() == []
    assert table.read_grads()


@pytest.mark.parametrize("count", [3, 700], ids=["few", "many"])
def test_one_of_many_has_changed(count):
    params = make_params(*[(2,)] * count)
    for at in (0, count // 2, count - 1):
        table = make_table(params)
        other_memory(params[at])
        assert table.changed() == [at]


def test_half_then_bfloat16_in_the_same_memory():
    """``module.half().bfloat16()`` can end where it began."""
    memory = torch.zeros(16)
    param = nn.Parameter(memory.view(torch.bfloat16)[:16])
    table = make_table([param])
    param.data = memory.view(torch.float16)[:16]
    assert param.data_ptr() == memory.data_ptr()
    assert table.changed() == [0]


# ---- gradients ----


def ordinary(shape, seed):
    return values(shape, torch.float32, seed=seed)


def transposed_grad(shape, seed):
    return values(shape[::-1], torch.float32, seed=seed).t()


def expanded_grad(shape, seed):
    return values((*shape[:1], 1), torch.float32, seed=seed).expand(shape)


def grad_with_gaps(shape, seed):
    return values((*shape, 2), torch.float32, seed=seed)[..., 0]


def grad_of_other_dtype(shape, seed):
    return values(shape, torch.float64, seed=seed)


@pytest.mark.parametrize("first", [ordinary, transposed_grad], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "then", [ordinary, transposed_grad, expanded_grad, grad_with_gaps], ids=lambda make: make.__name__
)
def test_gradients_change_their_layout(backend, first, then):
    """Square ones: their shape says nothing."""
    param = values((6, 6), torch.float32).requires_grad_()
    optimizer = FastSAM([param], rho=torch.tensor(0.0), lr=0.1, backend=backend)
    w = param.detach().clone()
    for step, make in enumerate([first, first, then, then, first]):
        grad = make((6, 6), step)
        step_with(optimizer, [param], [grad])
        start, w = w, w.double() - 0.1 * grad.double()
        assert_within(param.detach(), w, start)
        w = param.detach().clone()


def step_with(optimizer, params, grads):
    """A step whose two passes both have ``grads``."""

    def closure():
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    optimizer.step(closure)


def test_a_gradient_turned_where_it_lies(backend):
    """``g.t()`` has the address, the shape and the dtype of ``g``."""
    param = values((6, 6), torch.float32).requires_grad_()
    optimizer = FastSAM([param], rho=torch.tensor(0.0), lr=0.1, backend=backend)
    grad = values((6, 6), torch.float32, seed=1)
    for turned in (grad, grad.t(), grad, grad.t()):
        start = param.detach().clone()
        step_with(optimizer, [param], [turned])
        assert turned.data_ptr() == grad.data_ptr()
        assert_within(param.detach(), start.double() - 0.1 * turned.double(), start)


def test_after_a_bad_gradient_training_goes_on(backend):
    """The gradients are not the usual ones once, an error says so, and then they are again."""
    params = make_params((3,), (4,))
    optimizer = FastSAM(params, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    good = [torch.ones(3), torch.ones(4)]
    step_with(optimizer, params, good)
    before = [p.detach().clone() for p in params]
    params[0].grad, params[1].grad = good[0], good[1].to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 1 \(shape \(4,\)\): sparse"):
        optimizer.first_step()
    assert not optimizer.perturbed
    assert_same_bits([p.detach() for p in params], before)
    step_with(optimizer, params, good)
    assert all(bool((p.detach() != w).all()) for p, w in zip(params, before, strict=True))


def test_gradients_are_let_go(backend):
    """Held by the table, they would double the memory of the next backward."""
    params = make_params((30,), (6, 6))
    optimizer = FastSAM(params, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(3):
        grads = [torch.ones(30), torch.ones(6, 6)]
        watched = [weakref.ref(g) for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        del grads, grad
        optimizer.first_step()
        gc.collect()
        assert [ref() for ref in watched] == [None, None]
        grads = [torch.ones(30), torch.ones(6, 6)]
        watched = [weakref.ref(g) for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        del grads, grad
        optimizer.second_step(zero_grad=True)
        gc.collect()
        assert [ref() for ref in watched] == [None, None]


# ---- nothing stale is written to ----


BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
}
every_base = pytest.mark.parametrize(("base", "options"), BASES.values(), ids=BASES)


class Beside:
    """FastSAM with rho = 0 and, beside it, torch.optim on float64 copies: whether it still trains what it should."""

    def __init__(self, backend, base, options, *shapes):
        self.params = make_params(*shapes)
        self.fast = FastSAM(self.params, base, rho=torch.tensor(0.0), backend=backend, **options)
        self.copies = [p.detach().double().requires_grad_() for p in self.params]
        self.torch = base(self.copies, foreach=False, **options)
        self.count = 0

    def step(self):
        self.count += 1
        grads = [values(p.shape, p.dtype, p.device, 50 * self.count + i) for i, p in enumerate(self.params)]
        step_with(self.fast, self.params, grads)
        for one, grad in zip(self.copies, grads, strict=True):
            one.grad = grad.double()
        self.torch.step()
        for param, one in zip(self.params, self.copies, strict=True):
            # In float32 rounding errors add up over the steps, and one that was cast keeps them.
            torch.testing.assert_close(param.detach().double(), one.detach(), rtol=4e-6, atol=4e-6)
            for name, expected in self.torch.state[one].items():
                ours = self.fast.state[param][name].double()
                torch.testing.assert_close(ours, expected.double(), rtol=2e-5, atol=2e-5)


@every_base
@pytest.mark.parametrize("change", CHANGES[:3] + CHANGES[4:5] + CHANGES[6:], ids=lambda change: change.__name__)
def test_a_parameter_that_moves_between_steps(backend, base, options, change):
    both = Beside(backend, base, options, (4, 4), (4, 4), (3,))
    for _ in range(2):
        both.step()
    moved = both.params[1]
    old = moved.detach()
    if change is not shared:  # which is the same memory for all that look at it
        change(moved)
        if change is transposed:
            old = old.clone()
            both.copies[1].data = both.copies[1].data.t()
            for optimizer, param in ((both.fast, moved), (both.torch, both.copies[1])):
                for entry in optimizer.state[param].values():
                    entry.copy_(entry.clone().t() if entry.dim() else entry)
        else:
            old.fill_(7.0)
    else:
        change(moved)
    kept = old.clone()
    for _ in range(3):
        both.step()
    if change is not shared and change is not transposed:
        assert_same_bits(old, kept, "where the parameter was")


@every_base
def test_a_cast_in_place(backend, base, options):
    """half().bfloat16(): other numbers at, possibly, the same address."""
    model = nn.Linear(64, 64, bias=False)
    optimizer = FastSAM(model.parameters(), base, rho=0.01, backend=backend, **options)
    for cast in (model.float, model.half, model.bfloat16, model.double, model.bfloat16, model.float):
        cast()
        for _ in range(2):
            before = model.weight.detach().clone()
            step_with(optimizer, [model.weight], [torch.ones_like(model.weight)])
            assert bool((model.weight.detach() < before).all()), model.weight.dtype
            assert bool(model.weight.isfinite().all())


def test_moved_between_the_passes(backend):
    """Then only ``restore`` is left: it brings the weights back where they are now, and leaves the old memory alone."""
    params = make_params((4, 4), (5,))
    originals = [p.detach().clone() for p in params]
    optimizer = FastSAM(params, rho=0.5, lr=0.1, backend=backend)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.first_step()
    old = params[0].detach()
    params[0].data = params[0].data.double()
    old.fill_(7.0)
    for param in params:
        param.grad = torch.ones_like(param)
    here = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \(4, 4\)\) was moved.*restore\(\)"):
        optimizer.second_step()
    assert optimizer.perturbed
    assert_same_bits([p.detach() for p in params], here)
    optimizer.restore()
    assert not optimizer.perturbed
    assert_same_bits(params[0].detach(), originals[0].double())
    assert_same_bits(params[1].detach(), originals[1])
    assert bool((old == 7).all())
    step_with(optimizer, params, [torch.ones_like(p) for p in params])


@every_base
@pytest.mark.parametrize("way", ["replaced", "made anew", "loaded twice", "cast and loaded", "other memory"])
def test_state_that_is_replaced(backend, base, options, way):
    """By any means, also by a tensor that Python puts where the old one was; the old one is not written to any more."""
    both = Beside(backend, base, options, (40,), (6, 6))
    for _ in range(3):
        both.step()
    name = "momentum_buffer" if base is torch.optim.SGD else "exp_avg"
    param, one = both.params[0], both.copies[0]
    old = both.fast.state[param][name].detach()
    if way == "replaced":
        both.fast.state[param][name] = torch.full_like(old, 0.5)
    elif way == "made anew":
        replace_at_the_same_identity(both.fast.state[param], name, 0.5)
    elif way == "loaded twice":
        for number in (9.0, 0.5):
            saved = copy.deepcopy(both.fast.state_dict())
            saved["state"][0][name].fill_(number)
            both.fast.load_state_dict(saved)
            del saved
    elif way == "cast and loaded":
        saved = copy.deepcopy(both.fast.state_dict())
        saved["state"][0][name] = torch.full((40,), 0.5, dtype=torch.float64)
        both.fast.load_state_dict(saved)
    else:
        both.fast.state[param][name].set_(torch.full((40,), 0.5))
    both.torch.state[one][name].fill_(0.5)
    assert both.fast.state[param][name].data_ptr() != old.data_ptr()
    old.fill_(7.0)
    for _ in range(3):
        both.step()
    assert bool((old == 7).all()), "written to state that was replaced"


def replace_at_the_same_identity(entries, name, number):
    """Frees a state tensor and goes on making others until one has its identity, if Python can be brought to it."""
    identity, shape = id(entries[name]), entries[name].shape
    del entries[name]
    others = []
    for _ in range(100):
        others.append(torch.full(shape, number))
        if id(others[-1]) == identity:
            break
    entries[name] = others[-1]


def test_state_whose_memory_moves(backend):
    """``share_memory_()`` keeps the tensor and replaces its memory: the Hogwild recipe calls it on optimizer state."""
    # In a process of its own: what writes to the old address may bring any other test down.
    program = f"""
import torch
from fastsam import FastSAM
param = torch.zeros(40, requires_grad=True)
optimizer = FastSAM([param], torch.optim.Adam, rho=0.0, lr=0.1, backend={backend!r})
def closure():
    param.grad = torch.ones(40)
for step in range(4):
    optimizer.step(closure)
    for tensor in optimizer.state[param].values():
        tensor.share_memory_()
torch.testing.assert_close(optimizer.state[param]["exp_avg"], torch.full((40,), 1 - 0.9**4))
torch.testing.assert_close(param.detach(), torch.full((40,), -0.4))
"""
    done = run_python(program)
    assert done.returncode == 0, done.stdout


@every_base
@pytest.mark.parametrize("layout", ["transposed", "gaps", "other dtype"])
def test_loaded_state_of_another_layout(backend, base, options, layout):
    both = Beside(backend, base, options, (6, 6), (5,))
    for _ in range(2):
        both.step()
    for name, tensor in both.fast.state[both.params[0]].items():
        if tensor.dim() == 0:
            continue
        if layout == "transposed":
            other = tensor.t().clone().t()
        elif layout == "gaps":
            other = torch.zeros(6, 12)[:, ::2].copy_(tensor)
        else:
            other = tensor.double()
        both.fast.state[both.params[0]][name] = other
    for _ in range(3):
        both.step()


@every_base
@pytest.mark.parametrize("shape", [(5, 6), (36,), (), (6, 7)], ids=str)
def test_state_of_another_shape_is_refused(backend, base, options, shape):
    params = make_params((3,), (6, 6))
    optimizer = FastSAM(params, base, rho=0.1, backend=backend, **options)
    grads = [torch.ones_like(p) for p in params]
    step_with(optimizer, params, grads)
    name = "momentum_buffer" if base is torch.optim.SGD else "exp_avg"
    optimizer.state[params[1]][name] = torch.zeros(shape)
    before = copy.deepcopy([[p.detach() for p in params], [list(s.values()) for s in optimizer.state.values()]])
    with pytest.raises(RuntimeError, match=rf"parameter 1 \(shape \(6, 6\)\): its state '{name}' has shape"):
        step_with(optimizer, params, grads)
    assert not optimizer.perturbed
    assert_same_bits([p.detach() for p in params], before[0])
    assert_same_bits([list(s.values()) for s in optimizer.state.values()], before[1])


@every_base
def test_parameters_change_places(backend, base, options):
    """Groups are lists that users may edit: state goes with its parameter."""
    both = Beside(backend, base, options, (4,), (4,), (4,))
    both.step()
    group = both.fast.param_groups[0]["params"]
    group[0], group[2] = group[2], group[0]
    both.step()
    dropped = group.pop(1)
    del both.torch.param_groups[0]["params"][1], both.params[1], both.copies[1]
    kept = dropped.detach().clone()
    both.step()
    assert_same_bits(dropped.detach(), kept)


def test_a_parameter_replaced_by_another(backend):
    """The old one is not trained any more, whatever it has in memory and gradient."""
    params = make_params((4,), (5,))
    optimizer = FastSAM(params, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    step_with(optimizer, params, [torch.ones(4), torch.ones(5)])
    kept = params[0].detach().clone()
    new = values((4,), torch.float32, seed=9).requires_grad_()
    optimizer.param_groups[0]["params"][0] = new
    before = new.detach().clone()
    step_with(optimizer, [new, params[1]], [torch.ones(4), torch.ones(5)])
    assert_same_bits(params[0].detach(), kept)
    assert_within(new.detach(), before.double() - 0.1, before)


# ---- neighbours ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@every_base
def test_neighbours_in_one_buffer(backend, device, dtype, base, options):
    """Parameters that are views of one buffer, with gaps and padding between their elements, perturbed and updated."""
    canaries = Canaries()
    params = [
        canaries.around(values((37,), dtype, device, 1), offset=1),
        canaries.around(values((5, 6), dtype, device, 2), strides=(17, 2)),
        canaries.around(values((4, 3), dtype, device, 3), strides=(1, 9), offset=3),
        canaries.around(values((), dtype, device, 4), offset=1),
        canaries.around(values((2, 3, 4, 5), dtype, device, 5).to(memory_format=torch.channels_last)),
    ]
    params = [p.requires_grad_() for p in params]
    originals = [p.detach().clone() for p in params]
    optimizer = FastSAM(params, base, rho=0.5, backend=backend, **options)
    addresses = [p.data_ptr() for p in params]
    for step in range(3):
        for i, param in enumerate(params):
            param.grad = values(param.shape, dtype, device, 10 * step + i)
        before = [p.detach().clone() for p in params]
        optimizer.first_step()
        canaries.assert_alive()
        assert all(not torch.equal(p.detach(), w) for p, w in zip(params, before, strict=True))
        optimizer.restore()
        canaries.assert_alive()
        assert_same_bits([p.detach() for p in params], before)
        step_with(optimizer, params, [values(p.shape, dtype, device, 10 * step + i) for i, p in enumerate(params)])
        canaries.assert_alive()
    assert [p.data_ptr() for p in params] == addresses
    assert all(not torch.equal(p.detach(), w) for p, w in zip(params, originals, strict=True))


def test_an_ascent_with_gaps_in_memory(backend, device):
    canaries = Canaries()
    param = canaries.around(values((5, 6), torch.float64, device), strides=(17, 2)).requires_grad_()
    w, g = param.detach().clone(), values((5, 6), torch.float64, device, 1)
    optimizer = FastSAM([param], rho=0.5, lr=0.1, adaptive=True, backend=backend)
    param.grad = g.clone()
    optimizer.first_step()
    assert_within(param.detach(), oracle.perturbed(w, g, oracle.norm([w], [g], [True]), 0.5, True), w)
    second = values((5, 6), torch.float64, device, 2)
    param.grad = second.clone()
    optimizer.second_step()
    assert_within(param.detach(), w - 0.1 * second, w)
    canaries.assert_alive()


# ---- the steady state ----


@every_base
def test_nothing_is_rebuilt_or_moved(backend, base, options):
    """With gradients that alternate between two sets of tensors, as autograd's do."""
    params = make_params((300,), (40, 40), (), (0,))
    optimizer = FastSAM([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}], base, backend=backend, **options)
    grads = [[values(p.shape, p.dtype, seed=i + 10 * s) for i, p in enumerate(params)] for s in range(2)]

    def addresses():
        tables = list(optimizer._engine.tables)
        state = [t for entries in optimizer.state.values() for t in entries.values()]
        backups = [b for table in tables for b in table.backups if b is not None]
        memory = [t.data_ptr() for t in (*params, *state, *backups)]
        rows = [table.addresses.data_ptr() for table in tables]
        return list(map(id, tables)), memory, rows

    for step in range(6):
        step_with(optimizer, params, grads[step % 2])
        if step == 1:
            steady = addresses()
    assert addresses() == steady
    optimizer.param_groups[0]["lr"] = 0.02
    step_with(optimizer, params, grads[0])
    assert addresses() == steady


@pytest.mark.parametrize("device", ["cpu"], indirect=True)
@pytest.mark.parametrize("backend", ["native"], indirect=True)
def test_nothing_is_allocated(backend):
    """A native step in the steady state: no tensor memory at all, but for a few scalars."""
    params = make_params((50000,), (300, 300), (17,))
    optimizer = FastSAM(params, torch.optim.AdamW, lr=0.01, backend=backend)
    grads = [[values(p.shape, p.dtype, seed=i + 10 * s) for i, p in enumerate(params)] for s in range(2)]
    for step in range(4):
        step_with(optimizer, params, grads[step % 2])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for step in range(4):
            step_with(optimizer, params, grads[step % 2])
    allocated = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
    assert sum(allocated) < 4096, allocated
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.empty(5000)
    assert sum(max(0, event.cpu_memory_usage) for event in profile.events()) >= 20000  # it would have been seen


@every_base
def test_state_is_born_late(backend, base, options):
    """A parameter whose first gradient comes after many steps; who has state already keeps it where it is."""
    both = Beside(backend, base, options, (40,), (6, 6))
    early, late = both.params
    frozen, other = late.detach().clone(), both.copies[1]

    def step(present):
        grads = [values(p.shape, p.dtype, seed=i) if present[i] else None for i, p in enumerate(both.params)]
        step_with(both.fast, both.params, grads)
        for one, grad in zip(both.copies, grads, strict=True):
            one.grad = None if grad is None else grad.double()
        both.torch.step()

    for _ in range(3):
        step([True, False])
    assert late not in both.fast.state
    assert_same_bits(late.detach(), frozen)
    addresses = {name: t.data_ptr() for name, t in both.fast.state[early].items() if t.dim()}
    step([True, True])
    assert {name: t.data_ptr() for name, t in both.fast.state[early].items() if t.dim()} == addresses
    step([False, True])
    torch.testing.assert_close(late.detach().double(), other.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(early.detach().double(), both.copies[0].detach(), rtol=1e-6, atol=1e-6)
    if base is torch.optim.Adam:
        assert [float(both.fast.state[p]["step"]) for p in (early, late)] == [4.0, 2.0]


def test_pytorch_sees_the_writes(backend, device):
    """Version counters move with every ascent, restore and update: autograd then refuses a graph over old values."""
    canaries = Canaries()
    with_gaps = canaries.around(values((3, 4), torch.float32, device), strides=(9, 2))
    params = [values((30,), torch.float32, device).requires_grad_(), with_gaps.requires_grad_()]
    optimizer = FastSAM(params, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    grads = [torch.ones_like(p) for p in params]
    step_with(optimizer, params, grads)
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    buffers = [optimizer.state[p]["momentum_buffer"] for p in params]

    def versions(tensors):
        return [t._version for t in tensors]

    seen = versions(params)
    for write in (lambda: optimizer.first_step(zero_grad=False), optimizer.restore):
        write()
        assert all(now > before for now, before in zip(versions(params), seen, strict=True))
        seen = versions(params)
    optimizer.first_step(zero_grad=False)
    seen, state = versions(params), versions(buffers)
    product = params[0].square().sum()
    optimizer.second_step()
    assert all(now > before for now, before in zip(versions(params), seen, strict=True))
    assert all(now > before for now, before in zip(versions(buffers), state, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    assert bits(params[0]).numel() == 30


# ---- precision ----


def test_tables_are_cut_by_precision():
    """Positions count over all groups; what has nothing to round shares a table whatever its group says."""
    low = {"dtype": torch.bfloat16}
    groups = [
        {"params": make_params((2,), (3,), **low)},
        {"params": [*make_params((4,), **low), *make_params((5,))], "rounding": "stochastic"},
        {"params": [*make_params((6,)), *make_params((7,), **low)], "master_weights": True},
        {"params": make_params((8,), **low), "rounding": "stochastic", "rounding_seed": 3},
    ]
    optimizer = FastSAM(groups, lr=0.1, backend="reference")
    for p in (p for group in groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    optimizer.first_step()
    tables = {(t.dtype, t.stochastic, t.has_masters): t.positions for t in optimizer._engine.tables}
    assert tables == {
        (torch.bfloat16, False, False): [0, 1],
        (torch.bfloat16, True, False): [2, 6],
        (torch.float32, False, False): [3, 4],
        (torch.bfloat16, False, True): [5],
    }


def test_masters_are_backups_and_get_into_the_state_with_the_update():
    params = make_params((6, 5), (3,), dtype=torch.bfloat16)
    params[0] = params[0].detach().t().requires_grad_()
    table = make_table(params, groups=[0, 1], precision=Precision(masters=True))
    for p in params:
        p.grad = torch.ones_like(p)
    state, names = {}, [StateNames(("momentum_buffer",))] * 2
    table.read_grads()
    table.choose_perturbed([True, False], table.present)
    table.slots.bind(table, state, Wanted(names, masters=table.perturbed))
    assert state == {}
    assert table.masters[1] is None
    assert_same_bits(table.masters[0], params[0].detach().float())
    assert table.masters[0].stride() == params[0].stride()
    assert (
        table.addresses[Row.BACKUP].tolist() == table.addresses[Row.MASTER].tolist() == [table.masters[0].data_ptr(), 0]
    )
    state |= {p: {} for p in params}
    wanted = Wanted(names, masters=table.perturbed, moments=table.present)
    table.slots.bind(table, state, wanted)
    table.slots.publish(table, state, wanted)
    for p, master, buffer in zip(params, table.masters, table.state[0], strict=True):
        assert state[p]["fastsam_master"].data_ptr() == master.data_ptr()
        assert buffer.dtype == torch.float32
    assert table.addresses[Row.MASTER].tolist() == [m.data_ptr() for m in table.masters]
    assert table.addresses[Row.BACKUP].tolist() == [table.masters[0].data_ptr(), 0], "the other was not perturbed"
