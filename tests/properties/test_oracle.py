"""Plain SAM with every option of a group beside SAM written from the papers, in float64."""

import functools
import math

import oracle
import pytest
import torch
import triton_interpreter
from checks import assert_same_bits
from trajectory import STEPS, Network, assert_same_trajectory, closure_for, detached, follow_oracle, train

from fastsam import FastSAM

ALIKE = [{"rho": 0.3, "lr": 0.1}] * 5
CASES = {
    "sam": ALIKE,
    "asam": [{**group, "rho": 0.8, "adaptive": True} for group in ALIKE],
    "momentum": [{**group, "momentum": 0.9, "dampening": 0.3} for group in ALIKE],
    "maximize": [{**group, "maximize": True, "lr": 0.01} for group in ALIKE],
    "asam-maximize": [{**group, "maximize": True, "adaptive": True, "lr": 0.01} for group in ALIKE],
    "groups": [
        {"rho": 0.3, "lr": 0.1},
        {"rho": 0.5, "adaptive": True, "lr": 0.05, "momentum": 0.5},
        {"rho": 0.2, "perturb": False, "lr": 0.1},
        {"rho": 0.0, "lr": 0.02, "weight_decay": 0.1},
        {"rho": 0.4, "adaptive": True, "lr": 0.1, "nesterov": True, "momentum": 0.9},
    ],
    "outside-the-norm": [{**group, "perturb": i > 1} for i, group in enumerate(ALIKE)],
    "inside-the-norm": [{**group, "rho": 0.0 if i < 2 else 0.3} for i, group in enumerate(ALIKE)],
    "adamw": [{"rho": 0.2 + 0.1 * i, "lr": 0.01} for i in range(5)],
    "adamw-asam": [{"rho": 0.2 + 0.1 * i, "lr": 0.01, "adaptive": True} for i in range(5)],
}


@functools.cache
def expected_trajectory(case, device):
    return follow_oracle(Network(device, 11), oracle.sam, CASES[case], adamw="adamw" in case)


@pytest.mark.parametrize("case", CASES)
def test_trajectory_is_papers(backend, device, case):
    count = triton_interpreter.fewer(STEPS, 3, backend, device)
    actual = train(Network(device, 11), backend, CASES[case], count, adamw="adamw" in case)
    assert_same_trajectory(actual, expected_trajectory(case, device), rtol=1e-12)


def test_trajectory_in_float32(backend, device):
    count = triton_interpreter.fewer(STEPS, 3, backend, device)
    actual = train(Network(device, 11), backend, CASES["groups"], count, dtype=torch.float32)
    assert_same_trajectory(actual, expected_trajectory("groups", device), rtol=1e-5)


def test_cases_differ_from_each_other(device):
    """Else the trajectories would prove nothing: each option must move the weights."""
    runs = {name: expected_trajectory(name, device) for name in CASES}
    runs["base"] = follow_oracle(Network(device, 11), oracle.sam, [{"rho": 0.0, "lr": 0.1}] * 5)
    names = list(runs)
    for i, one in enumerate(names):
        for other in names[:i]:
            pairs = zip(runs[one][-1], runs[other][-1], strict=True)
            assert max(float((w - v).abs().max()) for w, v in pairs) > 1e-3, (one, other)
    assert all(bool(w.isfinite().all()) for run in runs.values() for w in run[-1])


@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.RMSprop], ids=lambda base: base.__name__)
def test_unfused_base(backend, device, base):
    """The oracle is torch.optim's own class, given the gradients at the perturbed weights."""
    network = Network(device, 11)
    params, weights = network.params(), detached(network.params())
    optimizer, plain = FastSAM(params, base, rho=0.3, lr=0.01, backend=backend), base(weights, lr=0.01)
    for step in range(triton_interpreter.fewer(STEPS, 3, backend, device)):
        given = oracle.sam(weights, lambda w, step=step: network.gradient(w, step), ALIKE, {})
        for w, grad in zip(weights, given, strict=True):
            w.grad = grad
        plain.step()
        optimizer.step(closure_for(network, params, optimizer, step))
        assert_same_trajectory([detached(params)], [weights], rtol=1e-12)


def test_options_may_change_between_steps(backend, device):
    """rho, adaptive, perturb and lr are read anew in every step; rho may be a tensor."""
    network = Network(device, 11)
    changes = [
        {"rho": 0.3},
        {"rho": 0.1, "lr": 0.03},
        {"adaptive": True, "rho": 0.7},
        {"perturb": False},
        {"perturb": True, "rho": 0.0},
        {"adaptive": False, "rho": 0.2},
    ]
    params, rho = network.params(), torch.tensor(0.3, dtype=torch.float64)
    optimizer = FastSAM([{"params": params[:2]}, {"params": params[2:], "rho": rho}], rho=0.3, lr=0.1, backend=backend)
    group, at = {"rho": 0.3, "lr": 0.1}, Network(device, 11)
    for step, change in enumerate(changes):
        group |= change
        optimizer.param_groups[0].update(change)
        rho.fill_(0.3 / (step + 1))
        other = {"rho": 0.3 / (step + 1), "lr": 0.1}
        (at.starts,) = follow_oracle(at, oracle.sam, [group, group, other, other, other], steps=1)
        optimizer.step(closure_for(network, params, optimizer))
        assert_same_trajectory([detached(params)], [at.starts], rtol=1e-12)


def test_ascent_closure_and_its_loss(backend, device):
    """A part of the batch gives the first gradient; the step returns its loss."""
    network, half = Network(device, 11), slice(0, 8)
    params = network.params()
    optimizer, weights = FastSAM(params, rho=0.3, lr=0.1, backend=backend), list(network.starts)
    for step in range(3):
        ascent, descent = (closure_for(network, params, optimizer, step, part=part) for part in (half, slice(None)))
        expected_loss = float(network.loss(weights, step, half))
        loss = optimizer.step(descent, ascent_closure=ascent)
        assert float(loss.detach()) == pytest.approx(expected_loss, rel=1e-12)
        above = oracle.sam_weights(weights, network.gradient(weights, step, half), ALIKE)
        weights = [w - 0.1 * g for w, g in zip(weights, network.gradient(above, step), strict=True)]
        assert_same_trajectory([detached(params)], [weights], rtol=1e-12)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6], ids=str)
def test_perturbation_has_length_rho_along_gradient(backend, device, size):
    """Whatever the gradient's size; and what it changed comes back."""
    network = Network(device, 11)
    params = network.params()
    optimizer = FastSAM(params, rho=0.25, lr=0.1, backend=backend)
    (size * network.loss(params)).backward()
    g = torch.cat([p.grad.flatten() for p in params])
    optimizer.first_step()
    e = torch.cat([(p.detach() - w).flatten() for p, w in zip(params, network.starts, strict=True)])
    assert float(e.norm()) == pytest.approx(0.25, rel=1e-5)
    assert float(e @ g) == pytest.approx(0.25 * float(g.norm()), rel=1e-5)
    optimizer.restore()
    assert_same_bits(detached(params), network.starts)


def test_nan_in_first_pass_makes_it_plain_step(backend, device):
    """The second pass runs at the weights themselves, and its gradient is used."""
    network = Network(device, 11)
    params = network.params(torch.float32)
    starts, passes = detached(params), []
    optimizer = FastSAM(params, rho=0.3, lr=0.1, backend=backend)
    closure = closure_for(network, params, optimizer)

    def poisoned():
        passes.append(detached(params))
        closure()
        if len(passes) == 1:
            params[2].grad[1, 1] = math.nan

    optimizer.step(poisoned)
    assert_same_bits(passes[1], starts)
    g = network.gradient([w.double() for w in starts])
    expected = [w.double() - 0.1 * grad for w, grad in zip(starts, g, strict=True)]
    assert_same_trajectory([detached(params)], [expected], rtol=1e-6)


def test_one_norm_over_every_dtype(backend, device):
    dtypes = [torch.float32, torch.float64, torch.bfloat16]
    params = [torch.ones(4, dtype=dtype, device=device, requires_grad=True) for dtype in dtypes]
    optimizer = FastSAM(params, rho=0.5, lr=0.1, backend=backend)
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, float(2**i))
    optimizer.first_step()
    size = math.sqrt(4 * (1 + 4 + 16))
    for i, param in enumerate(params):
        expected = torch.full((4,), 1 + 0.5 * 2**i / (size + 1e-12), dtype=torch.float64, device=device)
        torch.testing.assert_close(param.detach().double(), expected, rtol=torch.finfo(param.dtype).eps, atol=0)
    optimizer.restore()
    assert all(bool((p == 1).all()) for p in params)
