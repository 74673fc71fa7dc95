"""Faults of torch.optim's fused optimizers and of other SAMs, each with the test that fails where it is copied.

torch.optim's own for-loop (``foreach=False``) has none of them, and is what these tests compare with.
"""

import copy
import math

import pytest
import torch
from checks import Canaries, assert_same_bits, assert_within, values
from torch import nn

from fastsam import FastSAM


def climb_and_update(optimizer, first, second=None, found_inf=None, grad_scale=None):
    """Two-phase use with given gradients (one for each parameter), as a GradScaler would call it."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for grads, phase in ((first, optimizer.first_step), (first if second is None else second, optimizer.step)):
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        if phase == optimizer.step:
            optimizer.grad_scale, optimizer.found_inf = grad_scale, found_inf
        phase()
    del optimizer.grad_scale, optimizer.found_inf


def for_loop(base, params, **options):
    copies = [p.detach().clone().requires_grad_() for p in params]
    return copies, base(copies, foreach=False, **options)


# ---- torch.optim's fused optimizers ----


@pytest.mark.parametrize(
    "options", [{}, {"dampening": 0.5}, {"nesterov": True}], ids=["plain", "dampening", "nesterov"]
)
def test_an_overflow_on_the_first_step_leaves_no_momentum_behind(backend, device, options):
    """fused SGD leaves the buffer uninitialised there and uses it on the second step."""
    params = [values((1500,), torch.float32, device, i).requires_grad_() for i in range(2)]
    copies, plain = for_loop(torch.optim.SGD, params, lr=0.1, momentum=0.9, **options)
    optimizer = FastSAM(params, rho=0.0, lr=0.1, momentum=0.9, backend=backend, **options)
    overflow = [torch.full_like(p, math.inf) for p in params]
    before = [p.detach().clone() for p in params]
    one = torch.ones((), device=device)
    climb_and_update(optimizer, overflow, found_inf=one, grad_scale=one)
    assert_same_bits([p.detach() for p in params], before)
    for step in range(2):
        grads = [values((1500,), torch.float32, device, 10 * step + i) for i in range(2)]
        starts = [p.detach().clone() for p in copies]
        climb_and_update(optimizer, grads, found_inf=torch.zeros((), device=device))
        for param, grad in zip(copies, grads, strict=True):
            param.grad = grad
        plain.step()
        for param, other, start in zip(params, copies, starts, strict=True):
            assert_within(param.detach(), other.detach(), start)
            assert bool(optimizer.state[param]["momentum_buffer"].isfinite().all())


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam], ids=lambda base: base.__name__)
def test_a_first_gradient_may_arrive_late(backend, device, base):
    """fused SGD raises a TypeError then."""
    options = {"lr": 0.1, "momentum": 0.9} if base is torch.optim.SGD else {"lr": 0.1}
    params = [values((30,), torch.float32, device, i).requires_grad_() for i in range(2)]
    copies, plain = for_loop(base, params, **options)
    optimizer = FastSAM(params, base, rho=0.0, backend=backend, **options)
    for step in range(4):
        grads = [values((30,), torch.float32, device, 10 * step), None]
        if step >= 2:
            grads[1] = values((30,), torch.float32, device, 10 * step + 1)
        starts = [p.detach().clone() for p in params]
        climb_and_update(optimizer, grads)
        for param, grad in zip(copies, grads, strict=True):
            param.grad = grad
        plain.step()
        assert_within([p.detach() for p in params], [c.detach() for c in copies], starts)
        with torch.no_grad():
            for param, one in zip(params, copies, strict=True):
                one.copy_(param)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam], ids=lambda base: base.__name__)
def test_a_strided_parameter_is_updated_whole_and_alone(backend, device, base):
    """The fused ones update half of its elements, and as many cells of its neighbours."""
    canaries = Canaries()
    param = canaries.around(values((40,), torch.float32, device), strides=(2,)).requires_grad_()
    start, grad = param.detach().clone(), values((40,), torch.float32, device, 1)
    (one,), plain = for_loop(base, [param], lr=0.1)
    optimizer = FastSAM([param], base, rho=0.3, lr=0.1, backend=backend)
    climb_and_update(optimizer, [grad])
    one.grad = grad
    plain.step()
    assert_within(param.detach(), one.detach(), start)
    canaries.assert_alive()


def test_a_transposed_gradient_is_read_by_its_strides(backend, device):
    """fused SGD reads it by its memory."""
    param = values((8, 8), torch.float32, device).requires_grad_()
    start, grad = param.detach().clone(), values((8, 8), torch.float32, device, 1).t()
    climb_and_update(FastSAM([param], rho=0.3, lr=0.1, backend=backend), [grad])
    assert_within(param.detach(), start.double() - 0.1 * grad.double(), start)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("size", [8, 16, 32, 64, 4096])
def test_full_vectors_of_low_precision_are_updated(backend, device, dtype, size, momentum):
    """pytorch#191763: fused SGD on the CPU does nothing to them."""
    param = values((size,), dtype, device).requires_grad_()
    start, grad = param.detach().clone(), values((size,), dtype, device, 1)
    climb_and_update(FastSAM([param], rho=0.0, lr=0.5, momentum=momentum, backend=backend), [grad])
    assert_within(param.detach(), start.double() - 0.5 * grad.double(), start)
    assert bool((param.detach() != start).all())


@pytest.mark.parametrize("where", ["first", "between", "last", "everywhere", "alone in its group"])
def test_an_empty_tensor_does_not_spoil_the_norm(backend, device, where):
    """pytorch#100701: one at a table boundary gave silently wrong norms."""
    full = [values((size,), torch.float32, device, size).requires_grad_() for size in (3, 70, 1)]
    empty = [torch.zeros(0, device=device, requires_grad=True) for _ in range(4)]
    params = {
        "first": [empty[0], *full],
        "between": [full[0], empty[0], full[1], full[2]],
        "last": [*full, empty[0]],
        "everywhere": [empty[0], full[0], empty[1], full[1], empty[2], full[2], empty[3]],
        "alone in its group": full,
    }[where]
    groups = [{"params": params}] + ([{"params": empty[:1]}] if where == "alone in its group" else [])
    optimizer = FastSAM(groups, rho=0.5, lr=0.1, backend=backend)
    originals = [p.detach().clone() for p in full]
    for param in (*full, *empty):
        param.grad = torch.full_like(param, 2.0)
    optimizer.first_step()
    size = 2 * math.sqrt(74)
    for param, w in zip(full, originals, strict=True):
        assert_within(param.detach(), w.double() + 0.5 * 2 / size, w)


def test_a_large_norm_of_float16_gradients_is_a_number(backend, device):
    """94,868 in float16 is infinity: nothing would climb."""
    param = values((1000,), torch.float16, device).requires_grad_()
    start = param.detach().clone()
    optimizer = FastSAM([param], rho=10.0, lr=0.1, backend=backend)
    param.grad = torch.full_like(param, 3000.0)
    assert param.grad.norm().isinf()
    assert float(param.grad.double().norm()) == pytest.approx(94868, rel=1e-4)
    optimizer.first_step()
    assert_within(param.detach(), start.double() + 10 / math.sqrt(1000), start)
    assert not torch.equal(param.detach(), start)


# ---- the other SAMs ----


def test_addresses_stay(backend, device):
    """``p.data = old_p`` gives the parameter other memory in every step: views of it train no more."""
    model = nn.Linear(6, 4).to(device)
    addresses = [p.data_ptr() for p in model.parameters()]
    view = model.weight.detach()
    optimizer = FastSAM(model.parameters(), rho=0.1, lr=0.1, backend=backend)
    for _ in range(2):
        climb_and_update(optimizer, [torch.ones_like(p) for p in model.parameters()])
        assert [p.data_ptr() for p in model.parameters()] == addresses
        assert_same_bits(view, model.weight.detach())


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad], ids=lambda b: b.__name__)
def test_who_has_no_second_gradient_comes_back(backend, device, base):
    """Elsewhere it stays perturbed: there the restore goes by the second pass's gradients."""
    params = [values((40,), torch.float32, device, i).requires_grad_() for i in range(3)]
    starts = [p.detach().clone() for p in params]
    optimizer = FastSAM(params, base, rho=0.5, lr=0.1, backend=backend)
    climb_and_update(
        optimizer,
        [torch.ones(40, device=device), torch.ones(40, device=device), None],
        [torch.ones(40, device=device), None, torch.ones(40, device=device)],
    )
    assert_same_bits(params[1].detach(), starts[1])
    assert params[1] not in optimizer.state or not optimizer.state[params[1]] or base is torch.optim.Adagrad
    assert bool((params[0].detach() < starts[0]).all())
    assert bool((params[2].detach() < starts[2]).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.RMSprop], ids=lambda base: base.__name__)
def test_one_bad_gradient_leaves_nothing_in_the_weights(backend, device, base, adaptive, bad):
    """Restoring by subtraction leaves NaN: (w + NaN) - NaN."""
    params = [values((40,), torch.float32, device, i).requires_grad_() for i in range(2)]
    starts = [p.detach().clone() for p in params]
    optimizer = FastSAM(params, base, rho=0.5, adaptive=adaptive, lr=0.1, backend=backend)
    grads = [torch.ones(40, device=device) for _ in range(2)]
    spoiled = [grads[0], grads[1].clone().index_fill_(0, torch.tensor([3], device=device), bad)]
    climb_and_update(optimizer, spoiled, grads)
    assert all(bool(p.isfinite().all()) for p in params)
    assert all(bool((p.detach() < w).all()) for p, w in zip(params, starts, strict=True))


def test_the_way_back_is_exact(backend, device):
    """By subtraction 0.2 to 1% of the weights come back changed."""
    params = [values((4000,), torch.float32, device, i).requires_grad_() for i in range(2)]
    starts = [p.detach().clone() for p in params]
    optimizer = FastSAM(params, rho=0.5, lr=0.1, backend=backend)
    for param in params:
        param.grad = values((4000,), torch.float32, device, 9)
    step = 0.5 * params[0].grad / math.sqrt(2 * float(params[0].grad.double().square().sum()))
    assert bool(((starts[0] + step) - step != starts[0]).any()), "subtraction would do on these numbers"
    optimizer.first_step()
    assert all(bool((p.detach() != w).any()) for p, w in zip(params, starts, strict=True))
    optimizer.restore()
    assert_same_bits([p.detach() for p in params], starts)


BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.1}),
}


class Scaled:
    """A training loop with ``torch.amp.GradScaler`` over a FastSAM, and the same without one."""

    def __init__(self, backend, device, base, options, scale=1024.0):
        self.scaler = torch.amp.GradScaler(device.type, init_scale=scale, enabled=scale != 1.0)
        self.param = values((30,), torch.float32, device).requires_grad_()
        self.optimizer = FastSAM([self.param], base, rho=0.5, backend=backend, **options)

    def backward(self, bad=None):
        self.optimizer.zero_grad()
        loss = self.param.square().sum()
        self.scaler.scale(loss if bad is None else loss * bad).backward()

    def step(self, bad=None, unscale_first=False):
        self.backward()
        if unscale_first:
            self.scaler.unscale_(self.optimizer)
        self.optimizer.first_step()
        if unscale_first:
            self.scaler.update()
        self.backward(bad)
        self.scaler.step(self.optimizer)
        self.scaler.update()


@pytest.mark.parametrize("unscale_first", [False, True], ids=["only before the update", "twice"])
@pytest.mark.parametrize(("base", "options"), BASES.values(), ids=BASES)
def test_the_loss_scale_does_not_reach_the_weights(backend, device, base, options, unscale_first):
    """Elsewhere the update is 1,024 times too large where only the first pass is unscaled."""
    scaled = Scaled(backend, device, base, options)
    plain = Scaled(backend, device, base, options, scale=1.0)
    for _ in range(3):
        scaled.step(unscale_first=unscale_first)
        plain.step()
        # A scale that is a power of two changes no bit but those of e, whose 1e-12 it makes smaller.
        torch.testing.assert_close(scaled.param.detach(), plain.param.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("when", ["first step", "later"])
@pytest.mark.parametrize(("base", "options"), BASES.values(), ids=BASES)
def test_an_overflow_does_not_leave_the_weights_climbed(backend, device, base, options, when):
    """A scaler does not call ``step()`` then, unless the optimizer says that it wants to be called."""
    scaled = Scaled(backend, device, base, options)
    if when == "later":
        scaled.step()
    before, state = scaled.param.detach().clone(), copy.deepcopy(dict(scaled.optimizer.state))
    scaled.step(bad=math.inf)
    assert not scaled.optimizer.perturbed
    assert_same_bits(scaled.param.detach(), before)
    for entries in state.values():
        for name, value in entries.items():
            now = scaled.optimizer.state[scaled.param][name]
            assert_same_bits(now, value, name) if isinstance(value, torch.Tensor) else None
    assert scaled.scaler.get_scale() == 512.0
    scaled.step()
    assert not torch.equal(scaled.param.detach(), before)


def test_both_passes_in_one_autocast_block(backend, device):
    """The second pass must see the climbed weights, not the cached copies of those before."""
    model = nn.Linear(32, 32, bias=False).to(device)
    inputs = torch.randn(8, 32, device=device)
    optimizer = FastSAM(model.parameters(), rho=5.0, lr=0.1, backend=backend)
    grads = []
    with torch.autocast(device.type, dtype=torch.bfloat16):

        def closure():
            optimizer.zero_grad()
            model(inputs).float().square().mean().backward()
            grads.append(model.weight.grad.clone())

        optimizer.step(closure)
        assert not torch.equal(grads[0], grads[1])
        climbed = grads[1]
        optimizer.step(closure)
        assert not torch.equal(grads[2], climbed), "the third pass runs at the updated weights"


def test_the_learning_rate_is_read_anew(backend, device):
    """composer#3259: a wrapper with its own copy of the groups trains with a stale one."""
    param = values((20,), torch.float32, device).requires_grad_()
    optimizer = FastSAM([param], rho=0.0, lr=0.1, backend=backend)
    grad = torch.ones(20, device=device)
    for lr in (0.1, 0.5, 0.001):
        optimizer.param_groups[0]["lr"] = lr
        start = param.detach().clone()
        climb_and_update(optimizer, [grad])
        assert_within(param.detach(), start.double() - lr, start)
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = 0.25
    optimizer.load_state_dict(saved)
    start = param.detach().clone()
    climb_and_update(optimizer, [grad])
    assert_within(param.detach(), start.double() - 0.25, start)


def test_the_second_pass_does_not_add_to_the_first_gradient(backend, device):
    """Whatever the closure forgets: between the passes gradients are None, never zeros."""
    params = [values((5,), torch.float32, device, i).requires_grad_() for i in range(2)]
    starts = [p.detach().clone() for p in params]
    optimizer = FastSAM(params, rho=0.0, lr=0.1, momentum=0.9, backend=backend)
    passes = []

    def closure():
        passes.append([p.grad for p in params])
        (2 * params[0].sum()).backward()
        if len(passes) == 1:
            params[1].sum().backward()

    optimizer.step(closure)
    assert passes[1] == [None, None]
    assert_within(params[0].detach(), starts[0].double() - 0.2, starts[0])
    assert_same_bits(params[1].detach(), starts[1])
    assert params[1] not in optimizer.state
