"""Every method's trajectory beside its paper's algorithm in float64, on every backend."""

import copy
import io
import math
from functools import partial
from itertools import islice

import family
import oracle
import pytest
import torch
import triton_interpreter
from checks import assert_same_bits, assert_within
from torch import nn

from fastsam import FastSAM, methods
from fastsam.backends import BackendUnavailable, resolve
from fastsam.davda54 import SAM as OldSAM

STEPS = 20


class Problem:
    """A two-layer network and batches of its own for each step; nothing of torch.nn's."""

    SHAPES = ((8, 5), (8,), (3, 8), (3,), ())

    def __init__(self, device, seed):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(device)

        self.starts = [0.7 * draw(*shape) for shape in self.SHAPES]
        self.inputs, self.targets = draw(STEPS, 16, 5), draw(STEPS, 16, 3)

    def loss(self, params, step, part=slice(None)):
        first, bias, second, offset, scale = params
        inputs, targets = self.inputs[step][part].to(first.dtype), self.targets[step][part].to(first.dtype)
        hidden = torch.tanh(inputs @ first.T + bias)
        return ((1 + scale) * (hidden @ second.T + offset) - targets).square().mean()

    def gradient(self, weights, step, part=slice(None)):
        weights = [w.detach().clone().requires_grad_() for w in weights]
        return list(torch.autograd.grad(self.loss(weights, step, part), weights))

    def params(self, dtype=torch.float64):
        return [w.to(dtype, copy=True).requires_grad_() for w in self.starts]


METHODS = {
    "sam": (methods.SAM(), family.sam),
    "sam-p1.5": (methods.SAM(p=1.5), family.sam_of_p(1.5)),
    "sam-p4": (methods.SAM(p=4), family.sam_of_p(4)),
    "sam-inf": (methods.SAM(p=math.inf), family.sam_of_p(math.inf)),
    "sam-3-steps": (methods.SAM(inner_steps=3), family.sam_in_steps(3)),
    "sam-projected": (methods.SAM(inner_steps=2, inner_lr=0.8), family.sam_in_steps(2, 0.8)),
    "asam": (methods.ASAM(), family.asam),
    "gsam": (methods.GSAM(), family.gsam),
    "wsam": (methods.WSAM(), family.wsam_decoupled),
    "wsam-coupled": (methods.WSAM(decouple=False), family.wsam_coupled),
    "looksam": (methods.LookSAM(), family.looksam()),
    "looksam-k2": (methods.LookSAM(k=2, alpha=0.3), family.looksam(2, 0.3)),
    "friendly": (methods.FriendlySAM(), family.friendly),
    "momentum": (methods.MomentumSAM(), family.momentum_sam),
    "amp": (methods.AMP(), family.amp()),
    "amp-3-steps": (methods.AMP(3, 0.2, 0.3), family.amp(3, 0.2, 0.3)),
    "awp": (methods.AWP(gamma=0.1), partial(family.awp, gamma=0.1)),
}
every_method = pytest.mark.parametrize(("method", "steps"), METHODS.values(), ids=METHODS)

RHOS = {"alike": [0.1] * 5, "groups": [0.1, 0.2, 0.05, 0.0, 0.1]}
LRS = [0.05, 0.1, 0.02, 0.1, 0.05]
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}


def train_oracle(problem, step_of, rhos, *, adamw=False, gradient=None):
    """The weights after each step; ``gradient``: in ``problem.gradient``'s place."""
    weights, states, memory = list(problem.starts), [None] * 5, {}
    trajectory = []
    for step in range(STEPS):
        given = step_of(weights, lambda w, s=step: (gradient or problem.gradient)(w, s), rhos, LRS, memory)
        given, extra = given if isinstance(given, tuple) else (given, [torch.zeros_like(w) for w in weights])
        for i, lr in enumerate(LRS):
            if adamw:
                state = states[i] or (torch.zeros_like(weights[i]), torch.zeros_like(weights[i]), None)
                weights[i], states[i] = oracle.adam(
                    weights[i], given[i], state, step + 1, lr=lr, weight_decay=0.01, decoupled=True
                )
            else:
                weights[i], states[i] = oracle.sgd(weights[i], given[i], states[i], lr=lr, **MOMENTUM)
            weights[i] = weights[i] - extra[i]
        memory["momentum"] = [s[0] if adamw else s for s in states]
        trajectory.append(list(weights))
    return trajectory


def optimizer_for(params, backend, method, rhos, *, adamw=False, **options):
    base = (torch.optim.AdamW, {"weight_decay": 0.01}) if adamw else (torch.optim.SGD, MOMENTUM)
    groups = [{"params": [p], "rho": rho, "lr": lr} for p, rho, lr in zip(params, rhos, LRS, strict=True)]
    return FastSAM(groups, base[0], method=method, backend=backend, **base[1], **options)


def closure_for(problem, params, optimizer, step, calls=None, part=slice(None)):
    def closure():
        optimizer.zero_grad()
        loss = problem.loss(params, step, part)
        loss.backward()
        if calls is not None:
            calls.append(step)
        return loss

    return closure


def train(problem, backend, method, rhos, dtype=torch.float64, **options):
    params = problem.params(dtype)
    optimizer = optimizer_for(params, backend, method, rhos, **options)
    for step in range(STEPS):
        optimizer.step(closure_for(problem, params, optimizer, step))
        yield [p.detach().clone() for p in params]


def assert_same_trajectory(actual, expected, rtol):
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for i, (w, v) in enumerate(zip(ours, theirs, strict=True)):
            error = float((w.double() - v).abs().max() / v.abs().max())
            assert error <= rtol, f"step {step}, parameter {i}: relative error {error:.2g}"


def can_run(backend, device, method):
    """Skips what a backend says it cannot run."""
    try:
        resolve(backend, device.type, method.is_combined)
    except BackendUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("rhos", "seed"), [("alike", 1), ("groups", 1), ("groups", 2), ("groups", 3)])
@every_method
def test_as_the_paper_has_it(backend, device, method, steps, rhos, seed):
    can_run(backend, device, method)
    problem = Problem(device, seed)
    expected = train_oracle(problem, steps, RHOS[rhos])
    actual = train(problem, backend, method, RHOS[rhos])
    count = triton_interpreter.fewer(STEPS, 3, backend, device)
    assert_same_trajectory(islice(actual, count), expected[:count], 1e-9)


@every_method
def test_over_adamw(backend, device, method, steps):
    can_run(backend, device, method)
    problem = Problem(device, 4)
    expected = train_oracle(problem, steps, RHOS["groups"], adamw=True)
    actual = train(problem, backend, method, RHOS["groups"], adamw=True)
    count = triton_interpreter.fewer(STEPS, 3, backend, device)
    assert_same_trajectory(islice(actual, count), expected[:count], 1e-8)


@every_method
def test_one_step_in_float32(backend, device, method, steps):
    """Within a few roundings of what float64 makes of the same numbers."""
    can_run(backend, device, method)
    problem = Problem(device, 5)
    problem.starts = [w.float().double() for w in problem.starts]
    rhos = RHOS["groups"]
    start, expected = problem.starts, train_oracle(problem, steps, rhos)[0]
    actual = next(iter(train(problem, backend, method, rhos, torch.float32)))
    for one, other, first in zip(actual, expected, start, strict=True):
        # The gradients' own rounding is passed through two layers, the climb, and WSAM's weight of 9.
        allowed = 400 * torch.finfo(torch.float32).eps * (other - first).abs().max() + 4e-7 * first.abs()
        assert ((one.double() - other).abs() <= allowed).all()


def a_round(method, backend, device):
    """So many steps that every kind of step of the method is among them, and a first one for the second time."""
    return triton_interpreter.fewer(8, 6 if method.counts else 3, backend, device)


# ---- how often the loss is computed ----

PASSES = {"momentum": 1, "sam-3-steps": 4, "sam-projected": 3, "amp-3-steps": 4}


@pytest.mark.parametrize("name", METHODS)
def test_the_closure_is_called_as_often_as_needed_and_the_two_phases_do_the_same(backend, device, name):
    method = METHODS[name][0]
    can_run(backend, device, method)
    problem, rhos = Problem(device, 6), RHOS["groups"]
    one, other = problem.params(), problem.params()
    by_closure = optimizer_for(one, backend, method, rhos)
    by_phases = optimizer_for(other, backend, method, rhos)
    for step in range(a_round(method, backend, device)):
        calls = []
        by_closure.step(closure_for(problem, one, by_closure, step, calls))
        expected = PASSES.get(name, 2)
        if isinstance(method, methods.LookSAM):
            expected = 2 if step % method.k == 0 else 1
        assert len(calls) == expected
        closure = closure_for(problem, other, by_phases, step)
        if isinstance(method, methods.MomentumSAM):
            assert by_phases.first_step() is False
            closure()
            by_phases.step()
        else:
            for climb in range(method.ascents):
                closure()
                needs_another = by_phases.first_step()
                assert needs_another is (expected > 1)
                assert needs_another is by_phases.perturbed
                if needs_another and climb + 1 < method.ascents:
                    with pytest.raises(RuntimeError, match=r"climbs .* times"):
                        by_phases.step()
            if needs_another:
                closure()
            by_phases.step()
        assert not by_phases.perturbed
        assert_same_bits([p.detach() for p in one], [p.detach() for p in other])


def test_a_step_without_a_climb_waits_for_its_update(backend, device):
    can_run(backend, device, methods.LookSAM())
    problem = Problem(device, 7)
    params = problem.params()
    optimizer = optimizer_for(params, backend, methods.LookSAM(), RHOS["alike"])
    optimizer.step(closure_for(problem, params, optimizer, 0))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.first_step()
    closure_for(problem, params, optimizer, 1)()
    before = [p.detach().clone() for p in params]
    assert optimizer.first_step() is False
    assert all(p.grad is not None for p in params)
    assert_same_bits([p.detach() for p in params], before)
    optimizer.restore()
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
        optimizer.step()


# ---- what must always hold ----


@every_method
def test_rho_0_is_the_base(backend, device, method, steps):
    can_run(backend, device, method)
    problem = Problem(device, 8)
    params, base_params = problem.params(), problem.params()
    optimizer = optimizer_for(params, backend, method, [0.0] * 5)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(base_params, LRS, strict=True)]
    base = torch.optim.SGD(groups, foreach=False, **MOMENTUM)
    for step in range(a_round(method, backend, device)):
        with torch.no_grad():
            for p, q in zip(params, base_params, strict=True):
                p.copy_(q)
        for p, q in zip(params, base_params, strict=True):
            if q in base.state:
                optimizer.state[p]["momentum_buffer"].copy_(base.state[q]["momentum_buffer"])
        before = [q.detach().clone() for q in base_params]
        optimizer.step(closure_for(problem, params, optimizer, step))
        closure_for(problem, base_params, base, step)()
        base.step()
        assert_within([p.detach() for p in params], [q.detach() for q in base_params], before)


@every_method
def test_a_nan_in_the_climb_loses_nothing(backend, device, method, steps):
    can_run(backend, device, method)
    problem = Problem(device, 9)
    params = problem.params()
    optimizer = optimizer_for(params, backend, method, RHOS["alike"])
    optimizer.step(closure_for(problem, params, optimizer, 0))
    if isinstance(method, methods.LookSAM):
        optimizer.load_state_dict({**(saved := optimizer.state_dict()), "param_groups": [
            {**group, "fastsam_step": 0} for group in saved["param_groups"]
        ]})  # fmt: skip
    kept = {p: optimizer.state[p][method.kept].clone() for p in params} if method.kept else {}
    if isinstance(method, methods.MomentumSAM):
        before = [p.detach().clone() for p in params]
        momentum = optimizer.state[params[0]]["momentum_buffer"]
        good = momentum[0, 0].clone()
        momentum[0, 0] = torch.nan
        optimizer.first_step()
        assert_same_bits([p.detach() for p in params], before)
        momentum[0, 0] = good
        optimizer.restore()
        return
    closure = closure_for(problem, params, optimizer, 1)
    passes = []

    def poisoned():
        loss = closure()
        if not passes:
            params[0].grad[0, 0] = torch.nan
        else:
            at_start = [p.detach().clone() for p in params]
            assert_same_bits(at_start, before)
        passes.append(loss)
        return loss

    before = [p.detach().clone() for p in params]
    if method.ascents == 1:
        optimizer.step(poisoned)
        assert all(torch.isfinite(p).all() for p in params)
        for p, tensor in kept.items():
            assert torch.isfinite(optimizer.state[p][method.kept]).all()
            if isinstance(method, methods.FriendlySAM):
                assert_same_bits(optimizer.state[p][method.kept], tensor)
    else:
        closure()
        params[0].grad[0, 0] = torch.nan
        optimizer.first_step()
        assert_same_bits([p.detach() for p in params], before)
        optimizer.restore()


@every_method
def test_an_exception_undoes_the_step(backend, device, method, steps):
    can_run(backend, device, method)
    problem = Problem(device, 10)
    params, others = problem.params(), problem.params()
    optimizer = optimizer_for(params, backend, method, RHOS["groups"])
    undisturbed = optimizer_for(others, backend, method, RHOS["groups"])
    for step in range(a_round(method, backend, device)):
        before = [p.detach().clone() for p in params]
        for allowed in range(method.ascents + 1):
            calls = []
            closure = closure_for(problem, params, optimizer, step, calls)

            def failing(closure=closure, calls=calls, allowed=allowed):
                if len(calls) == allowed:
                    raise ValueError("out of luck")
                return closure()

            one_pass = isinstance(method, methods.MomentumSAM) or not method.climbs(step)
            if one_pass and allowed:
                continue  # it would not fail
            with pytest.raises(ValueError, match="out of luck"):
                optimizer.step(failing)
            assert not optimizer.perturbed
            assert_same_bits([p.detach() for p in params], before)
        optimizer.step(closure_for(problem, params, optimizer, step))
        undisturbed.step(closure_for(problem, others, undisturbed, step))
        assert_same_bits([p.detach() for p in params], [p.detach() for p in others])


@every_method
def test_a_run_resumes_in_its_midst_bit_for_bit(backend, device, method, steps):
    can_run(backend, device, method)
    problem = Problem(device, 11)
    params = problem.params()
    optimizer = optimizer_for(params, backend, method, RHOS["groups"])
    for step in range(2):
        optimizer.step(closure_for(problem, params, optimizer, step))
    file = io.BytesIO()
    torch.save({"weights": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [w.clone().requires_grad_() for w in saved["weights"]]
    other = optimizer_for(resumed, backend, method, [0.3] * 5)
    other.load_state_dict(saved["optimizer"])
    copied = copy.deepcopy(optimizer)
    copies = [p for group in copied.param_groups for p in group["params"]]
    for step in range(2, a_round(method, backend, device)):
        for some, theirs in ((optimizer, params), (other, resumed), (copied, copies)):
            some.step(closure_for(problem, theirs, some, step))
        assert_same_bits([p.detach() for p in params], [p.detach() for p in resumed])
        assert_same_bits([p.detach() for p in params], [p.detach() for p in copies])


@pytest.mark.parametrize("name", ["gsam", "wsam-coupled", "looksam", "friendly", "asam", "amp-3-steps"])
def test_over_a_base_that_is_not_fused(device, name):
    """RMSprop, beside the same gradients handed to it alone."""
    method, step_of = METHODS[name]
    problem, rhos = Problem(device, 12), RHOS["groups"]
    params, weights = problem.params(), problem.params()
    groups = [{"params": [p], "rho": rho} for p, rho in zip(params, rhos, strict=True)]
    optimizer = FastSAM(groups, torch.optim.RMSprop, method=method, lr=0.01, foreach=False)
    base = torch.optim.RMSprop(weights, lr=0.01, foreach=False)
    memory = {}
    for step in range(8):
        optimizer.step(closure_for(problem, params, optimizer, step))
        at = [w.detach().clone() for w in weights]
        given = step_of(at, lambda w, s=step: problem.gradient(w, s), rhos, LRS, memory)
        for w, g in zip(weights, given, strict=True):
            w.grad = g
        base.step()
        assert_same_trajectory([[p.detach() for p in params]], [[w.detach() for w in weights]], 1e-9)


@pytest.mark.parametrize("name", ["gsam", "looksam", "friendly"])
def test_the_first_gradient_is_taken_not_copied(backend, device, name):
    method = METHODS[name][0]
    can_run(backend, device, method)
    problem = Problem(device, 13)
    params = problem.params()
    optimizer = optimizer_for(params, backend, method, RHOS["alike"])
    closure_for(problem, params, optimizer, 0)()
    addresses = [p.grad.data_ptr() for p in params]
    optimizer.first_step(zero_grad=False)
    assert all(p.grad is None for p in params)
    taken = [tensor for table in optimizer._tables for tensor in table.taken]
    assert [t.data_ptr() for t in taken] == addresses
    optimizer.restore()
    assert all(t is None for table in optimizer._tables for t in table.taken)
    # A view of a larger tensor (DDP's bucket) is still another's.
    bucket = torch.zeros(100, dtype=torch.float64, device=device)
    closure_for(problem, params, optimizer, 0)()
    params[1].grad = bucket[8:16].copy_(params[1].grad)
    optimizer.first_step()
    bucket.fill_(torch.nan)
    closure_for(problem, params, optimizer, 0)()
    optimizer.second_step()
    assert all(torch.isfinite(p).all() for p in params)


# ---- averages of micro-batches, intervals, other closures ----


@pytest.mark.parametrize("name", ["sam", "sam-3-steps", "asam", "amp", "awp"])
def test_micro_batches_climb_by_themselves(backend, device, name):
    """mSAM: Behdin et al. (arXiv:2302.09693): the average of the micro-batches' SAM gradients."""
    method, step_of = METHODS[name]
    can_run(backend, device, method)
    problem, rhos = Problem(device, 14), RHOS["groups"]
    parts = [slice(0, 4), slice(4, 8), slice(8, 16)]

    def averaged(weights, gradient, rhos, lrs, memory):
        step = memory["step"] = memory.get("step", -1) + 1
        each = [
            step_of(weights, lambda w, part=part: problem.gradient(w, step, part), rhos, lrs, memory) for part in parts
        ]
        return [sum(gs) / len(parts) for gs in zip(*each, strict=True)]

    expected = train_oracle(problem, averaged, rhos)
    params = problem.params()
    optimizer = optimizer_for(params, backend, method, rhos)
    actual = []
    for step in range(triton_interpreter.fewer(STEPS, 4, backend, device)):
        calls = []
        closures = [closure_for(problem, params, optimizer, step, calls, part) for part in parts]
        losses = optimizer.step(closures=closures)
        assert len(losses) == len(parts)
        assert len(calls) == len(parts) * (method.ascents + 1)
        actual.append([p.detach().clone() for p in params])
    assert_same_trajectory(actual, expected[: len(actual)], 1e-9)


@pytest.mark.parametrize("name", ["sam", "gsam", "asam", "friendly"])
def test_intervals(backend, device, name):
    """Composer's SAM: `interval` k climbs in steps 0, k, 2k."""
    method, step_of = METHODS[name]
    can_run(backend, device, method)
    problem, rhos = Problem(device, 15), RHOS["groups"]
    expected = train_oracle(problem, family.at_intervals(step_of, 3), rhos)
    params = problem.params()
    optimizer = optimizer_for(params, backend, method, rhos, interval=3)
    actual = []
    for step in range(triton_interpreter.fewer(STEPS, 4, backend, device)):
        calls = []
        optimizer.step(closure_for(problem, params, optimizer, step, calls))
        assert len(calls) == (2 if step % 3 == 0 else 1)
        actual.append([p.detach().clone() for p in params])
    assert_same_trajectory(actual, expected[: len(actual)], 1e-9)


@pytest.mark.parametrize("name", ["sam", "gsam", "sam-3-steps"])
def test_the_ascent_may_see_the_whole_data_set(backend, device, name):
    """n-SAM: every ascent by the full gradient, the descent by the batch's; the update by the batch's alone."""
    method, step_of = METHODS[name]
    can_run(backend, device, method)
    problem, rhos = Problem(device, 16), RHOS["alike"]
    passes = []

    def gradient(weights, step):
        passes.append(step)
        if len(passes) % (method.ascents + 1) == 0:
            return problem.gradient(weights, step)
        return [sum(gs) / 3 for gs in zip(*(problem.gradient(weights, s) for s in range(3)), strict=True)]

    expected = train_oracle(problem, step_of, rhos, gradient=gradient)
    params = problem.params()
    optimizer = optimizer_for(params, backend, method, rhos)

    def whole():
        optimizer.zero_grad()
        for step in range(3):
            (problem.loss(params, step) / 3).backward()

    actual = []
    for step in range(triton_interpreter.fewer(STEPS, 4, backend, device)):
        optimizer.step(closure_for(problem, params, optimizer, step), ascent_closure=whole)
        actual.append([p.detach().clone() for p in params])
    assert_same_trajectory(actual, expected[: len(actual)], 1e-9)


# ---- rho over time ----


def test_rho_follows_a_function_of_the_step(backend, device):
    problem = Problem(device, 17)
    schedule = lambda step: 0.02 * (step + 1)  # noqa: E731

    def scheduled(weights, gradient, rhos, lrs, memory):
        step = memory["step"] = memory.get("step", -1) + 1
        return family.sam(weights, gradient, [schedule(step)] * 5, lrs, memory)

    expected = train_oracle(problem, scheduled, RHOS["alike"])
    params = problem.params()
    optimizer = optimizer_for(params, backend, methods.SAM(), [schedule] * 5)
    for step in range(STEPS):
        if step == 7:  # the number of the step is in the state_dict, the function is not
            saved = optimizer.state_dict()
            assert saved["param_groups"][0]["rho"] == pytest.approx(0.16)
            optimizer = optimizer_for(params, backend, methods.SAM(), [schedule] * 5)
            optimizer.load_state_dict(saved)
        optimizer.step(closure_for(problem, params, optimizer, step))
        assert_same_trajectory([[p.detach() for p in params]], [expected[step]], 1e-9)


def test_rho_follows_the_learning_rate(backend, device):
    """GSAM, algorithm 1."""
    problem = Problem(device, 18)
    params = problem.params()
    rho = methods.RhoByLR(rho_max=0.2, lr_max=0.1, rho_min=0.02, lr_min=0.01)
    optimizer = FastSAM(params, torch.optim.SGD, rho=rho, lr=0.1, method=methods.GSAM(), backend="reference")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    weights = list(problem.starts)
    for step in range(6):
        lr = optimizer.param_groups[0]["lr"]
        radius = 0.02 + (0.2 - 0.02) * (lr - 0.01) / (0.1 - 0.01)
        optimizer.step(closure_for(problem, params, optimizer, step))
        scheduler.step()
        g = family.gsam(weights, lambda w, s=step: problem.gradient(w, s), [radius] * 5, [lr] * 5, {})
        weights = [w - lr * x for w, x in zip(weights, g, strict=True)]
        assert_same_trajectory([[p.detach() for p in params]], [weights], 1e-9)


# ---- random directions, norm layers ----


def test_random_directions(backend, device):
    """Average-direction SAM (Wen et al., arXiv:2211.05729): a gaussian direction of length rho, another each step."""
    method = methods.RandomSAM(seed=3)
    can_run(backend, device, method)
    torch.manual_seed(1)
    weights = [torch.randn(40, 30, dtype=torch.float64, device=device), torch.randn(50, dtype=torch.float64).to(device)]

    def run(**options):
        params = [w.clone().requires_grad_() for w in weights]
        optimizer = FastSAM(params, rho=0.5, lr=0.1, method=method, backend=backend, **options)
        climbs = []
        for _ in range(3):
            before = [p.detach().clone() for p in params]
            assert optimizer.first_step() is False
            at = [p.detach().clone() for p in params]
            climbs.append(torch.cat([(a - b).flatten() for a, b in zip(at, before, strict=True)]))
            for p in params:
                p.grad = p.detach() ** 2  # a gradient that depends on where it is taken
            optimizer.step()
            expected = [b - 0.1 * a**2 for a, b in zip(at, before, strict=True)]
            assert_within([p.detach() for p in params], expected, before)
        return climbs, optimizer

    climbs, _ = run()
    again, _ = run()
    assert_same_bits(climbs, again)
    assert all(float(e.norm()) == pytest.approx(0.5) for e in climbs)
    unit = climbs[0] / climbs[0].norm() * math.sqrt(len(climbs[0]))
    assert abs(float(unit.mean())) < 0.1
    assert float(unit.pow(4).mean()) == pytest.approx(3, rel=0.2)  # a gaussian's
    assert abs(float(torch.dot(climbs[0], climbs[1]))) < 0.1 * 0.25


def test_only_norm_layers_climb(backend, device):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).to(device)
    groups = methods.norm_layers_only(model)
    assert groups[0]["params"] == [model[1].weight]
    optimizer = FastSAM(groups, rho=0.5, lr=0.1, backend=backend)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.ones(3, 4, device=device)).square().sum().backward()
    optimizer.first_step()
    moved = [not torch.equal(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [p is model[1].weight for p in model.parameters()]
    optimizer.restore()
    assert methods.norm_layers_only(model, (nn.Linear,))[0]["params"] == [model[0].weight, model[3].weight]
    with pytest.raises(ValueError, match="no normalisation layer"):
        methods.norm_layers_only(nn.Linear(2, 2))


# ---- mixed precision ----


@every_method
def test_an_overflow_in_the_second_pass_changes_nothing(backend, device, method, steps):
    can_run(backend, device, method)
    problem = Problem(device, 19)
    params = problem.params(torch.float32)
    optimizer = optimizer_for(params, backend, method, RHOS["alike"])
    optimizer.step(closure_for(problem, params, optimizer, 0))
    before = [p.detach().clone() for p in params]
    state = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in params}
    closure = closure_for(problem, params, optimizer, 1)
    if isinstance(method, methods.MomentumSAM):
        optimizer.first_step()
    else:
        for _ in range(method.ascents):
            closure()
            optimizer.first_step()
    closure()
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.ones((), device=device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert_same_bits([p.detach() for p in params], before)
    for p in params:
        for name, value in state[p].items():
            assert_same_bits(optimizer.state[p][name], value, name)


# ---- bad input ----

BAD_METHODS = {
    "p": lambda: methods.SAM(p=1),
    "inner_steps": lambda: methods.SAM(inner_steps=0),
    "inner_lr": lambda: methods.SAM(inner_steps=2, inner_lr=0),
    "eta": lambda: methods.ASAM(eta=-1),
    "alpha": lambda: methods.GSAM(alpha=-0.1),
    "gamma": lambda: methods.WSAM(gamma=1),
    "k": lambda: methods.LookSAM(k=0),
    "lmbda": lambda: methods.FriendlySAM(lmbda=1.5),
    "eps": lambda: methods.AMP(eps=-1),
    "seed": lambda: methods.RandomSAM(seed=-1),
    "rho_max": lambda: methods.RhoByLR(-1, 0.1),
}


@pytest.mark.parametrize(("option", "make"), BAD_METHODS.items(), ids=BAD_METHODS)
def test_an_option_out_of_range_names_itself(option, make):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        make()


def test_what_does_not_go_together():
    params = [torch.zeros(3, requires_grad=True)]
    with pytest.raises(ValueError, match="momentum"):
        FastSAM(params, method=methods.MomentumSAM(), lr=0.1)
    with pytest.raises(ValueError, match="RMSprop"):
        FastSAM(params, torch.optim.RMSprop, method=methods.MomentumSAM(), momentum=0.9)
    with pytest.raises(ValueError, match="decouple=False"):
        FastSAM(params, torch.optim.RMSprop, method=methods.WSAM())
    with pytest.raises(ValueError, match="adaptive"):
        FastSAM(params, method=methods.ASAM(), adaptive=True, lr=0.1)
    with pytest.raises(ValueError, match="master_weights"):
        FastSAM(params, method=methods.GSAM(), master_weights=True, lr=0.1)
    with pytest.raises(ValueError, match="rounding"):
        FastSAM(params, method=methods.AMP(), rounding="stochastic", lr=0.1)
    with pytest.raises(TypeError, match=r"methods\.GSAM\(\)"):
        FastSAM(params, method=methods.GSAM, lr=0.1)
    with pytest.raises(TypeError, match="method"):
        FastSAM(params, method="gsam", lr=0.1)
    with pytest.raises(ValueError, match="interval"):
        FastSAM(params, interval=0, lr=0.1)
    with pytest.raises(ValueError, match="interval=2"):
        FastSAM(params, interval=2, method=methods.RandomSAM(), lr=0.1)
    with pytest.raises(ValueError, match="method is FastSAM's"):
        OldSAM(params, torch.optim.SGD, method=methods.GSAM(), lr=0.1)


def test_closures_that_cannot_be():
    params = [torch.zeros(3, requires_grad=True)]
    optimizer = FastSAM(params, lr=0.1)
    with pytest.raises(ValueError, match="closures is empty"):
        optimizer.step(closures=[])
    with pytest.raises(ValueError, match="closures"):
        optimizer.step(lambda: None, closures=[lambda: None])
    with pytest.raises(ValueError, match="GSAM"):
        FastSAM(params, method=methods.GSAM(), lr=0.1).step(closures=[lambda: None])


def test_a_method_cannot_be_changed():
    optimizer = FastSAM([torch.zeros(3, requires_grad=True)], method=methods.LookSAM(), lr=0.1)
    with pytest.raises(AttributeError):
        optimizer.method = methods.GSAM()
    with pytest.raises(AttributeError):
        optimizer.method.k = 3
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="LookSAM"):
        FastSAM([torch.zeros(3, requires_grad=True)], method=methods.GSAM(), lr=0.1).load_state_dict(saved)
