"""Every method in micro-batches, intervals and schedules of rho; random directions; what is refused."""

import math

import oracle
import pytest
import torch
import triton_interpreter
from checks import assert_same_bits, assert_within
from method_cases import ALIKE, MIXED, groups_with
from problem import Problem, Snapshot, Stop
from registry import PRECISIONS, low_dtypes
from torch import nn
from trajectory import (
    STEPS,
    Network,
    assert_same_trajectory,
    closure_for,
    detached,
    follow_oracle,
    optimizer_for,
)

from fastsam import FastSAM, methods
from fastsam.davda54 import SAM as OldSAM

# ---- micro-batches, intervals, ascent closures, rho over time ----


@pytest.mark.parametrize("name", ["sam", "sam-3-steps", "asam", "amp", "awp", "gsam", "wsam-coupled", "stable", "sagm"])
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


@pytest.mark.parametrize("precision", PRECISIONS)
@low_dtypes
@pytest.mark.parametrize("name", ["asam", "gsam", "wsam-coupled", "stable", "sagm"])
def test_one_micro_batch_is_a_step(backend, device, name, case, dtype, precision):
    """But for the roundings of the gradient that the base is given, and of what follows from it."""
    network, weights = Network(device, 14), []
    for whole in (True, False):
        params = network.params(dtype)
        optimizer = optimizer_for(params, backend, ALIKE, method=case.method, **PRECISIONS[precision])
        starts = detached(params)
        for step in range(2):
            closure = closure_for(network, params, optimizer, step)
            optimizer.step(closure) if whole else optimizer.step(closures=[closure])
        weights.append(detached(params))
    for one, other, start in zip(*weights, starts, strict=True):
        assert not torch.equal(one, start)
        size = torch.maximum(start.abs().max(), (one - start).abs().max())
        assert float((one.double() - other.double()).abs().max() / size) <= 3 * torch.finfo(dtype).eps


def test_micro_batch_that_fails_undoes_the_step(backend, device):
    """In its second pass, after another one's gradients have been combined."""
    problem, calls = Problem(device), []
    optimizer = problem.optimizer(backend, method=methods.GSAM())
    problem.step(optimizer)
    snapshot = Snapshot(optimizer)

    def closure():
        calls.append(problem.closure(optimizer)())
        if len(calls) == 4:
            raise Stop

    with pytest.raises(Stop):
        optimizer.step(closures=[closure, closure])
    snapshot.assert_unchanged(grads=False)


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
    for method, reason in {
        methods.LookSAM(): r"LookSAM\(.*\), whose state is made of the step's one gradient at w",
        methods.FriendlySAM(): "FriendlySAM.*one gradient at w",
        methods.WSAM(): "WSAM.*decoupled part.*use decouple=False",
        methods.RandomSAM(): "RandomSAM.*depends on no gradient.*accumulate gradients",
    }.items():
        with pytest.raises(ValueError, match=reason):
            FastSAM(params, method=method, lr=0.1).step(closures=[lambda: None])


def test_method_cannot_be_changed():
    optimizer = FastSAM([torch.zeros(3, requires_grad=True)], method=methods.LookSAM(), lr=0.1)
    with pytest.raises(AttributeError):
        optimizer.method = methods.GSAM()
    with pytest.raises(AttributeError):
        optimizer.method.k = 3
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match="LookSAM"):
        FastSAM([torch.zeros(3, requires_grad=True)], method=methods.GSAM(), lr=0.1).load_state_dict(saved)
