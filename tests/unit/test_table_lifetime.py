"""Tables over several steps: memory that moves, state that is replaced, neighbours, what is rebuilt or allocated."""

import copy

import oracle
import pytest
import torch
from beside import (
    CHANGES,
    Beside,
    every_base,
    make_params,
    shared,
    step_with,
    transposed,
)
from checks import Canaries, assert_same_bits, assert_within, bits, values
from child import run_python
from torch import nn

from fastsam import FastSAM


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
