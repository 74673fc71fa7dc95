"""Every method's trajectory beside its paper's algorithm in float64, on every backend; and what each must keep to."""

import copy
import functools
import io
import math

import internals
import oracle
import pytest
import torch
import triton_interpreter
from checks import assert_same_bits, assert_within
from registry import METHODS, every_method
from torch import nn
from trajectory import (
    STEPS,
    Network,
    assert_same_trajectory,
    closure_for,
    detached,
    follow_oracle,
    optimizer_for,
    train,
)

from fastsam import FastSAM, methods
from fastsam.davda54 import SAM as OldSAM

RATES = [0.05, 0.1, 0.02, 0.1, 0.05]
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.01}


def groups_with(*rhos):
    rhos = rhos * 5 if len(rhos) == 1 else rhos
    return [{"rho": rho, "lr": lr, **MOMENTUM} for rho, lr in zip(rhos, RATES, strict=True)]


ALIKE = groups_with(0.1)
MIXED = groups_with(0.1, 0.2, 0.05, 0.0, 0.1)
PLAIN = groups_with(0.0)


@pytest.fixture
def case(name, backend, device):
    """The method ``name``, if ``backend`` can run it on ``device``."""
    if reason := internals.unavailable(backend, device, METHODS[name].method):
        pytest.skip(reason)
    return METHODS[name]


def a_round(case, backend, device):
    """So many steps that every kind of step of the method is among them, and a first one for the second time."""
    return triton_interpreter.fewer(8, 6 if len(case.passes) > 1 else 3, backend, device)


# ---- trajectories ----

RUNS = {
    "alike": (ALIKE, 1, False),
    "groups": (MIXED, 1, False),
    "other-seed": (MIXED, 2, False),
    "third-seed": (MIXED, 3, False),
    "adamw": (MIXED, 4, True),
}


@functools.cache
def expected_trajectory(name, run, device):
    groups, seed, adamw = RUNS[run]
    return follow_oracle(Network(device, seed), METHODS[name].oracle, groups, adamw=adamw)


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=[pytest.mark.thorough] if "seed" in run else []) for run in RUNS]
)
@every_method
def test_trajectory_is_papers(backend, device, name, case, run):
    groups, seed, adamw = RUNS[run]
    count = triton_interpreter.fewer(STEPS, 3, backend, device)
    actual = train(Network(device, seed), backend, groups, count, method=case.method, adamw=adamw)
    assert_same_trajectory(actual, expected_trajectory(name, run, device), 1e-8 if adamw else 1e-9)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (methods.UnifiedSAM(lam=0), functools.partial(oracle.unified_sam, lam=0)),
        (methods.UnifiedSAM(lam=1), oracle.sam),
        (methods.LESAM(), oracle.lesam()),
        (methods.VaSSO(theta=1.0), oracle.sam),
        (methods.ZSharp(q=0.5), functools.partial(oracle.zsharp, q=0.5)),
        (methods.ESAM(beta=1.0), oracle.sam),
        (methods.WSAM(gamma=0.8 / 1.8, decouple=False), oracle.gradient_norm_penalty),
    ],
    ids=["USAM", "SAM", "LESAM", "VaSSO", "ZSharp", "ESAM", "GNP"],
)
def test_other_options(device, method, expected):
    """At the ends of their ranges methods are other methods."""
    network = Network(device, 22)
    actual = train(network, "reference", ALIKE, 6, method=method)
    assert_same_trajectory(actual, follow_oracle(network, expected, ALIKE, steps=6), 1e-9)


@every_method
def test_one_step_in_float32(backend, device, name, case):
    """Within a few roundings of what float64 makes of the same numbers."""
    network = Network(device, 5)
    network.starts = [w.float().double() for w in network.starts]
    (expected,) = follow_oracle(network, case.oracle, MIXED, steps=1)
    (actual,) = train(network, backend, MIXED, 1, dtype=torch.float32, method=case.method)
    for one, other, first in zip(actual, expected, network.starts, strict=True):
        # The gradients' own rounding is passed through two layers, the ascent, and WSAM's coefficient of 9.
        allowed = 400 * torch.finfo(torch.float32).eps * (other - first).abs().max() + 4e-7 * first.abs()
        assert ((one.double() - other).abs() <= allowed).all()


# ---- passes ----


@every_method
def test_number_of_passes_and_two_phases(backend, device, name, case):
    """The closure is called as often as the method needs; the two phases make the same bits."""
    method, network = case.method, Network(device, 6)
    one, other = network.params(), network.params()
    by_closure = optimizer_for(one, backend, MIXED, method=method)
    by_phases = optimizer_for(other, backend, MIXED, method=method)
    for step in range(a_round(case, backend, device)):
        calls = []
        by_closure.step(closure_for(network, one, by_closure, step, calls))
        passes = case.passes_of(step)
        assert len(calls) == passes
        closure = closure_for(network, other, by_phases, step)
        if case.ascents == 0:
            assert by_phases.first_step() is False
            closure()
        for ascent in range(case.ascents):
            closure()
            needs_another = by_phases.first_step()
            assert needs_another is (passes > 1) is by_phases.perturbed
            if needs_another and ascent + 1 < case.ascents:
                with pytest.raises(RuntimeError, match=r"ascends .* times"):
                    by_phases.step()
            if needs_another and ascent + 1 == case.ascents:
                closure()
        by_phases.step()
        assert not by_phases.perturbed
        assert_same_bits(detached(other), detached(one))


@pytest.mark.parametrize("name", ["looksam"])
def test_step_without_ascent_waits_for_its_update(backend, device, name, case):
    network = Network(device, 7)
    params = network.params()
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    optimizer.step(closure_for(network, params, optimizer, 0))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.first_step()
    closure_for(network, params, optimizer, 1)()
    before = detached(params)
    assert optimizer.first_step() is False
    assert all(p.grad is not None for p in params)
    assert_same_bits(detached(params), before)
    optimizer.restore()
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
        optimizer.step()


# ---- invariants ----


@every_method
def test_rho_zero_is_base(backend, device, name, case):
    network = Network(device, 8)
    params, base_params = network.params(), network.params()
    optimizer = optimizer_for(params, backend, PLAIN, method=case.method)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(base_params, RATES, strict=True)]
    base = torch.optim.SGD(groups, foreach=False, **MOMENTUM)
    for step in range(a_round(case, backend, device)):
        for p, q in zip(params, base_params, strict=True):
            p.data.copy_(q)
            if q in base.state:
                optimizer.state[p]["momentum_buffer"].copy_(base.state[q]["momentum_buffer"])
        before = detached(base_params)
        optimizer.step(closure_for(network, params, optimizer, step))
        closure_for(network, base_params, base, step)()
        base.step()
        assert_within(detached(params), detached(base_params), before)


@pytest.mark.parametrize("name", [name for name, case in METHODS.items() if case.ascents])
def test_nan_in_first_pass_does_not_spread(backend, device, name, case):
    """No perturbation; the second pass runs at the weights, and neither they nor the method's buffers are lost."""
    network = Network(device, 9)
    params = network.params()
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    optimizer.step(closure_for(network, params, optimizer, 0))
    if isinstance(case.method, methods.LookSAM):  # the next step has an ascent, too
        saved = optimizer.state_dict()
        groups = [{**group, "fastsam_step": 0} for group in saved["param_groups"]]
        optimizer.load_state_dict({**saved, "param_groups": groups})
    buffers = [optimizer.state[p][case.state].clone() for p in params] if case.state else []
    before, closure, passes = detached(params), closure_for(network, params, optimizer, 1), []

    def poisoned():
        assert_same_bits(detached(params), before)
        closure()
        if not passes:
            params[0].grad[0, 0] = torch.nan
        passes.append(1)

    if case.ascents > 1:
        poisoned()
        optimizer.first_step()
        assert_same_bits(detached(params), before)
        optimizer.restore()
        return
    optimizer.step(poisoned)
    assert len(passes) == 2
    after = [optimizer.state[p][case.state] for p in params] if case.state else []
    assert all(bool(t.isfinite().all()) for t in [*params, *after])
    if isinstance(case.method, methods.FriendlySAM):
        assert_same_bits(after, buffers)


@pytest.mark.parametrize("name", ["momentum"])
def test_nan_in_momentum_does_not_perturb(backend, device, name, case):
    network = Network(device, 9)
    params = network.params()
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    optimizer.step(closure_for(network, params, optimizer, 0))
    before = detached(params)
    optimizer.state[params[0]]["momentum_buffer"][0, 0] = torch.nan
    optimizer.first_step()
    assert_same_bits(detached(params), before)
    optimizer.restore()


@every_method
def test_exception_undoes_step(backend, device, name, case):
    network = Network(device, 10)
    params, others = network.params(), network.params()
    optimizer = optimizer_for(params, backend, MIXED, method=case.method)
    undisturbed = optimizer_for(others, backend, MIXED, method=case.method)
    for step in range(a_round(case, backend, device)):
        before = detached(params)
        for allowed in range(case.passes_of(step)):
            calls = []
            closure = closure_for(network, params, optimizer, step, calls)

            def failing(closure=closure, calls=calls, allowed=allowed):
                if len(calls) == allowed:
                    raise ValueError("out of luck")
                return closure()

            with pytest.raises(ValueError, match="out of luck"):
                optimizer.step(failing)
            assert not optimizer.perturbed
            assert_same_bits(detached(params), before)
        optimizer.step(closure_for(network, params, optimizer, step))
        undisturbed.step(closure_for(network, others, undisturbed, step))
        assert_same_bits(detached(params), detached(others))


@every_method
def test_checkpoint_and_copy_resume_bit_for_bit(backend, device, name, case):
    network = Network(device, 11)
    params = network.params()
    optimizer = optimizer_for(params, backend, MIXED, method=case.method)
    for step in range(2):
        optimizer.step(closure_for(network, params, optimizer, step))
    file = io.BytesIO()
    torch.save({"weights": detached(params), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [w.clone().requires_grad_() for w in saved["weights"]]
    other = optimizer_for(resumed, backend, groups_with(0.3), method=case.method)
    other.load_state_dict(saved["optimizer"])
    copied = copy.deepcopy(optimizer)
    copies = [p for group in copied.param_groups for p in group["params"]]
    for step in range(2, a_round(case, backend, device)):
        for some, theirs in ((optimizer, params), (other, resumed), (copied, copies)):
            some.step(closure_for(network, theirs, some, step))
        assert_same_bits(detached(params), detached(resumed))
        assert_same_bits(detached(params), detached(copies))


@every_method
def test_overflow_in_second_pass_changes_nothing(backend, device, name, case):
    network = Network(device, 19)
    params = network.params(torch.float32)
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    optimizer.step(closure_for(network, params, optimizer, 0))
    before = detached(params)
    state = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in params}
    closure = closure_for(network, params, optimizer, 1)
    for _ in range(case.ascents):
        closure()
        optimizer.first_step()
    if case.ascents == 0:
        optimizer.first_step()
    closure()
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.ones((), device=device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert_same_bits(detached(params), before)
    for p in params:
        for key, value in state[p].items():
            assert_same_bits(optimizer.state[p][key], value, key)


@pytest.mark.parametrize("name", ["gsam", "wsam-coupled", "looksam", "friendly", "asam", "amp-3-steps"])
def test_unfused_base(device, name):
    """RMSprop, beside the same gradients given to it alone."""
    network = Network(device, 12)
    params, weights = network.params(), network.params()
    groups = [{"params": [p], "rho": group["rho"]} for p, group in zip(params, MIXED, strict=True)]
    optimizer = FastSAM(groups, torch.optim.RMSprop, method=METHODS[name].method, lr=0.01, foreach=False)
    base = torch.optim.RMSprop(weights, lr=0.01, foreach=False)
    memory = {}
    for step in range(8):
        optimizer.step(closure_for(network, params, optimizer, step))
        gradient = lambda w, step=step: network.gradient(w, step)  # noqa: E731
        given = METHODS[name].oracle(detached(weights), gradient, MIXED, memory)
        for w, g in zip(weights, given, strict=True):
            w.grad = g
        base.step()
        assert_same_trajectory([detached(params)], [detached(weights)], 1e-9)


@pytest.mark.parametrize("name", ["gsam", "looksam", "friendly"])
def test_first_gradients_are_adopted_not_copied(backend, device, name, case):
    network = Network(device, 13)
    params = network.params()
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    closure_for(network, params, optimizer, 0)()
    addresses = [p.grad.data_ptr() for p in params]
    optimizer.first_step(zero_grad=False)
    assert all(p.grad is None for p in params)
    assert [t.data_ptr() for t in internals.first_gradients(optimizer)] == addresses
    optimizer.restore()
    assert not any(t is not None for t in internals.first_gradients(optimizer))
    # A view of a larger tensor (DDP's bucket) still belongs to another.
    bucket = torch.zeros(100, dtype=torch.float64, device=device)
    closure_for(network, params, optimizer, 0)()
    params[1].grad = bucket[8:16].copy_(params[1].grad)
    optimizer.first_step()
    bucket.fill_(torch.nan)
    closure_for(network, params, optimizer, 0)()
    optimizer.second_step()
    assert all(torch.isfinite(p).all() for p in params)


# ---- micro-batches, intervals, ascent closures, rho over time ----


@pytest.mark.parametrize("name", ["sam", "sam-3-steps", "asam", "amp", "awp"])
def test_micro_batches(backend, device, name, case):
    """mSAM, Behdin et al. (arXiv:2302.09693): the average of the micro-batches' SAM gradients."""
    network = Network(device, 14)
    parts = [slice(0, 4), slice(4, 8), slice(8, 16)]

    def averaged(weights, gradient, groups, memory):
        step = memory["step"] = memory.get("step", -1) + 1
        each = [
            case.oracle(weights, lambda w, part=part: network.gradient(w, step, part), groups, memory) for part in parts
        ]
        return [sum(gs) / len(parts) for gs in zip(*each, strict=True)]

    params = network.params()
    optimizer = optimizer_for(params, backend, MIXED, method=case.method)
    actual = []
    for step in range(triton_interpreter.fewer(8, 3, backend, device)):
        calls = []
        closures = [closure_for(network, params, optimizer, step, calls, part) for part in parts]
        losses = optimizer.step(closures=closures)
        assert len(losses) == len(parts)
        assert len(calls) == len(parts) * case.passes_of(step)
        actual.append(detached(params))
    assert_same_trajectory(actual, follow_oracle(network, averaged, MIXED, steps=8), 1e-9)


@pytest.mark.parametrize("name", ["sam", "gsam", "asam", "friendly"])
def test_interval(backend, device, name, case):
    """Composer's SAM: an interval of k perturbs in steps 0, k, 2k."""
    network = Network(device, 15)
    params = network.params()
    optimizer = optimizer_for(params, backend, MIXED, method=case.method, interval=3)
    actual = []
    for step in range(triton_interpreter.fewer(STEPS, 4, backend, device)):
        calls = []
        optimizer.step(closure_for(network, params, optimizer, step, calls))
        assert len(calls) == (2 if step % 3 == 0 else 1)
        actual.append(detached(params))
    assert_same_trajectory(actual, follow_oracle(network, oracle.at_intervals(case.oracle, 3), MIXED), 1e-9)


@pytest.mark.parametrize("name", ["sam", "gsam", "sam-3-steps"])
def test_ascent_over_whole_data_set(backend, device, name, case):
    """n-SAM: every ascent by the full gradient; the descent and the update by the batch's."""
    network, passes = Network(device, 16), []

    def gradient(weights, step):
        passes.append(step)
        if len(passes) % case.passes_of(step) == 0:
            return network.gradient(weights, step)
        return [sum(gs) / 3 for gs in zip(*(network.gradient(weights, s) for s in range(3)), strict=True)]

    params = network.params()
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)

    def whole():
        optimizer.zero_grad()
        for step in range(3):
            (network.loss(params, step) / 3).backward()

    actual = []
    for step in range(triton_interpreter.fewer(8, 3, backend, device)):
        optimizer.step(closure_for(network, params, optimizer, step), ascent_closure=whole)
        actual.append(detached(params))
    assert_same_trajectory(actual, follow_oracle(network, case.oracle, ALIKE, steps=8, gradient=gradient), 1e-9)


def test_rho_follows_function_of_step(backend, device):
    network = Network(device, 17)
    schedule = lambda step: 0.02 * (step + 1)  # noqa: E731

    def scheduled(weights, gradient, groups, memory):
        step = memory["step"] = memory.get("step", -1) + 1
        return oracle.sam(weights, gradient, [{**group, "rho": schedule(step)} for group in groups], memory)

    count = triton_interpreter.fewer(12, 9, backend, device)
    expected = follow_oracle(network, scheduled, ALIKE, steps=count)
    params = network.params()
    optimizer = optimizer_for(params, backend, groups_with(schedule))
    for step in range(count):
        if step == 7:  # the number of the step is in the state_dict, the function is not
            saved = optimizer.state_dict()
            assert saved["param_groups"][0]["rho"] == pytest.approx(0.16)
            optimizer = optimizer_for(params, backend, groups_with(schedule))
            optimizer.load_state_dict(saved)
        optimizer.step(closure_for(network, params, optimizer, step))
        assert_same_trajectory([detached(params)], [expected[step]], 1e-9)


def test_rho_follows_learning_rate(device):
    """GSAM, algorithm 1."""
    network = Network(device, 18)
    params = network.params()
    rho = methods.RhoByLR(rho_max=0.2, lr_max=0.1, rho_min=0.02, lr_min=0.01)
    optimizer = FastSAM(params, torch.optim.SGD, rho=rho, lr=0.1, method=methods.GSAM(), backend="reference")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    weights = list(network.starts)
    for step in range(6):
        lr = optimizer.param_groups[0]["lr"]
        radius = 0.02 + (0.2 - 0.02) * (lr - 0.01) / (0.1 - 0.01)
        optimizer.step(closure_for(network, params, optimizer, step))
        scheduler.step()
        g = oracle.gsam(weights, lambda w, step=step: network.gradient(w, step), [{"rho": radius}] * 5, {})
        weights = [w - lr * x for w, x in zip(weights, g, strict=True)]
        assert_same_trajectory([detached(params)], [weights], 1e-9)


# ---- random directions, norm layers ----


def test_random_directions(backend, device):
    """Average-direction SAM (Wen et al., arXiv:2211.05729): a gaussian direction of length rho, another each step."""
    method = methods.RandomSAM(seed=3)
    if reason := internals.unavailable(backend, device, method):
        pytest.skip(reason)
    weights = [torch.randn(40, 30, dtype=torch.float64, device=device), torch.randn(50, dtype=torch.float64).to(device)]

    def run():
        params = [w.clone().requires_grad_() for w in weights]
        optimizer = FastSAM(params, rho=0.5, lr=0.1, method=method, backend=backend)
        perturbations = []
        for _ in range(3):
            before = detached(params)
            assert optimizer.first_step() is False
            at = detached(params)
            perturbations.append(torch.cat([(a - b).flatten() for a, b in zip(at, before, strict=True)]))
            for p in params:
                p.grad = p.detach() ** 2  # a gradient that depends on where it is computed
            optimizer.step()
            assert_within(detached(params), [b - 0.1 * a**2 for a, b in zip(at, before, strict=True)], before)
        return perturbations

    first, second, _ = perturbations = run()
    assert_same_bits(run(), perturbations)
    assert all(float(e.norm()) == pytest.approx(0.5) for e in perturbations)
    unit = first / first.norm() * math.sqrt(len(first))
    assert abs(float(unit.mean())) < 0.1
    assert float(unit.pow(4).mean()) == pytest.approx(3, rel=0.2)  # a gaussian's
    assert abs(float(torch.dot(first, second))) < 0.1 * 0.25


def test_norm_layers_only(backend, device):
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 2)).to(device)
    groups = methods.norm_layers_only(model)
    assert groups[0]["params"] == [model[1].weight, model[1].bias]
    assert methods.norm_layers_only(model, bias=False)[0]["params"] == [model[1].weight]
    optimizer = FastSAM(groups, rho=0.5, lr=0.1, backend=backend)
    before = detached(model.parameters())
    model(torch.ones(3, 4, device=device)).square().sum().backward()
    optimizer.first_step()
    moved = [not torch.equal(p.detach(), b) for p, b in zip(model.parameters(), before, strict=True)]
    assert moved == [any(p is q for q in model[1].parameters()) for p in model.parameters()]
    optimizer.restore()
    assert methods.norm_layers_only(model, (nn.Linear,), bias=False)[0]["params"] == [model[0].weight, model[3].weight]
    with pytest.raises(ValueError, match="no normalisation layer"):
        methods.norm_layers_only(nn.Linear(2, 2))


# ---- refused ----

OUT_OF_RANGE = {
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
    "theta": lambda: methods.VaSSO(theta=0),
    "lam": lambda: methods.UnifiedSAM(lam=1.5),
    "sigma": lambda: methods.LESAM(sigma=0),
    "decay": lambda: methods.LESAM(total_steps=10, decay=2),
    "total_steps": lambda: methods.LESAM(total_steps=0),
    "beta": lambda: methods.ESAM(beta=0),
    "q": lambda: methods.ZSharp(q=1),
}


@pytest.mark.parametrize(("option", "make"), OUT_OF_RANGE.items(), ids=OUT_OF_RANGE)
def test_option_out_of_range(option, make):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        make()


@pytest.mark.parametrize(
    ("base", "options", "error", "message"),
    [
        (torch.optim.SGD, {"method": methods.MomentumSAM()}, ValueError, "momentum"),
        (torch.optim.RMSprop, {"method": methods.MomentumSAM(), "momentum": 0.9}, ValueError, "RMSprop"),
        (torch.optim.SGD, {"method": methods.ASAM(), "adaptive": True}, ValueError, "adaptive"),
        (torch.optim.SGD, {"method": methods.GSAM}, TypeError, r"methods\.GSAM\(\)"),
        (torch.optim.SGD, {"method": "gsam"}, TypeError, "method"),
        (torch.optim.SGD, {"interval": 0}, ValueError, "interval"),
        (torch.optim.SGD, {"interval": 2, "method": methods.RandomSAM()}, ValueError, "interval=2"),
    ],
    ids=["no-momentum", "other-momentum", "adaptive", "class", "text", "interval", "interval-saves-nothing"],
)
def test_options_that_exclude_each_other(base, options, error, message):
    with pytest.raises(error, match=message):
        FastSAM([torch.zeros(3, requires_grad=True)], base, lr=0.1, **options)


def test_davda54_has_no_method():
    with pytest.raises(ValueError, match="method is FastSAM's"):
        OldSAM([torch.zeros(3, requires_grad=True)], torch.optim.SGD, method=methods.GSAM(), lr=0.1)


def test_closures_that_are_refused():
    params = [torch.zeros(3, requires_grad=True)]
    optimizer = FastSAM(params, lr=0.1)
    with pytest.raises(ValueError, match="closures is empty"):
        optimizer.step(closures=[])
    with pytest.raises(ValueError, match="closures"):
        optimizer.step(lambda: None, closures=[lambda: None])
    with pytest.raises(ValueError, match="GSAM"):
        FastSAM(params, method=methods.GSAM(), lr=0.1).step(closures=[lambda: None])


def test_method_cannot_be_changed():
    optimizer = FastSAM([torch.zeros(3, requires_grad=True)], method=methods.LookSAM(), lr=0.1)
    with pytest.raises(AttributeError):
        optimizer.method = methods.GSAM()
    with pytest.raises(AttributeError):
        optimizer.method.k = 3
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="LookSAM"):
        FastSAM([torch.zeros(3, requires_grad=True)], method=methods.GSAM(), lr=0.1).load_state_dict(saved)
