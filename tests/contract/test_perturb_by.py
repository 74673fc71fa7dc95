"""perturb_by(tensors): given tensors are added, and the weights come back bit for bit, on every backend."""

import copy

import pytest
import torch
from checks import assert_same_bits
from problem import Problem, Stop
from registry import every_base
from torch import nn

from fastsam import FastSAM, engine, methods
from fastsam.backends import BackendUnavailable

pytestmark = pytest.mark.face


@pytest.fixture
def problem(device):
    return Problem(device)


def directions_for(params):
    return [torch.randn_like(p) for p in params]


@pytest.mark.parametrize("method", [methods.SAM(), methods.LookSAM(), methods.RandomSAM()], ids=str)
@every_base
def test_adds_and_restores(problem, backend, base, method):
    optimizer = problem.optimizer(backend, base, method=method)
    problem.step(optimizer)
    before = [p.detach().clone() for p in problem.params]
    pointers = [p.data_ptr() for p in problem.params]
    grads = [None if p.grad is None else p.grad.clone() for p in problem.params]
    state = [copy.deepcopy(dict(optimizer.state[p])) for p in problem.params]
    directions = directions_for(problem.params)
    given = [d.clone() for d in directions]
    with optimizer.perturb_by(directions):
        assert optimizer.perturbed
        for p, b, d in zip(problem.params, before, directions, strict=True):
            torch.testing.assert_close(p, b + d, rtol=1e-6, atol=1e-7)
    assert not optimizer.perturbed
    assert_same_bits(problem.params, before)
    assert_same_bits(directions, given)
    assert [p.data_ptr() for p in problem.params] == pointers
    for p, g in zip(problem.params, grads, strict=True):
        assert (p.grad is None) == (g is None)
        assert g is None or torch.equal(p.grad, g)
    for p, entries in zip(problem.params, state, strict=True):
        torch.testing.assert_close(dict(optimizer.state[p]), entries, rtol=0, atol=0)
    problem.step(optimizer)


def test_needs_no_gradient_and_leaves_out_what_is_none(problem, backend):
    optimizer = FastSAM([{"params": problem.params, "perturb": False}], rho=0.0, lr=0.1, backend=backend)
    before = [p.detach().clone() for p in problem.params]
    directions = [None if p.dim() == 1 else torch.ones_like(p) for p in problem.params]
    versions = [p._version for p in problem.params]
    with optimizer.perturb_by(iter(directions)):
        moved = [not torch.equal(p, b) for p, b in zip(problem.params, before, strict=True)]
        assert moved == [d is not None for d in directions]
        assert [p._version > v for p, v in zip(problem.params, versions, strict=True)] == moved
        assert all(p.grad is None for p in problem.params)
        problem.backward()
    assert_same_bits(problem.params, before)
    assert all(p.grad is not None for p in problem.params), "gradients of the block stay"


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_exception_restores(problem, backend, error):
    optimizer = problem.optimizer(backend)
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(error), optimizer.perturb_by(directions_for(problem.params)):
        raise error
    assert_same_bits(problem.params, before)
    assert not optimizer.perturbed
    problem.step(optimizer)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 3e38])
def test_non_finite_displacement_comes_back(problem, backend, value):
    optimizer = problem.optimizer(backend)
    before = [p.detach().clone() for p in problem.params]
    with optimizer.perturb_by([torch.full_like(p, value) for p in problem.params]):
        assert not torch.equal(problem.params[0], before[0])
    assert_same_bits(problem.params, before)


@pytest.mark.parametrize("precision", [{"rounding": "stochastic"}, {"master_weights": True}], ids=str)
def test_half_precision(device, backend, precision):
    weight = nn.Parameter(torch.randn(300, device=device).bfloat16())
    optimizer = FastSAM([weight], rho=0.1, lr=0.1, momentum=0.9, backend=backend, **precision)
    before = weight.detach().clone()
    with optimizer.perturb_by([torch.full((300,), 0.5, device=device, dtype=torch.bfloat16)]):
        torch.testing.assert_close(weight.float(), before.float() + 0.5, rtol=2**-7, atol=1e-3)
    assert_same_bits([weight], [before])


def test_strided_parameter(device, backend):
    weight = nn.Parameter(torch.randn(6, 8, device=device)[:, ::2])
    optimizer = FastSAM([weight], lr=0.1, backend=backend)
    before = weight.detach().clone()
    with optimizer.perturb_by([torch.ones(6, 4, device=device)]):
        torch.testing.assert_close(weight.detach(), before + 1)
    assert torch.equal(weight, before)


def test_no_step_within_the_block(problem):
    optimizer = problem.optimizer("auto", method=methods.SAM(inner_steps=2))
    before = [p.detach().clone() for p in problem.params]
    problem.backward()
    with optimizer.perturb_by(directions_for(problem.params)):
        for call in (optimizer.step, optimizer.first_step, lambda: problem.step(optimizer), optimizer.second_step):
            with pytest.raises(RuntimeError, match=r"within perturb_by\(\)"):
                call()
        with pytest.raises(RuntimeError, match="perturb_by"), optimizer.perturb_by(directions_for(problem.params)):
            pass
        with pytest.raises(RuntimeError, match="perturbed"):
            optimizer.state_dict()
    assert_same_bits(problem.params, before)


@pytest.mark.parametrize(
    ("tensors", "error", "reason"),
    [
        (lambda p: [torch.ones_like(q) for q in p[1:]], ValueError, "must have 4 entries, one per parameter, got 3"),
        (lambda p: [torch.ones(7), *map(torch.ones_like, p[1:])], ValueError, r"parameter 0 .*has shape \(7,\)"),
        (lambda p: [1.0, *map(torch.ones_like, p[1:])], TypeError, "parameter 0 .*must be a tensor or None, got float"),
        (lambda p: [torch.ones_like(p[0], device="meta"), *p[1:]], ValueError, "parameter 0 .*is on meta"),
        (lambda p: [torch.ones_like(p[0], dtype=torch.cfloat), *p[1:]], ValueError, "has dtype torch.complex64"),
    ],
    ids=["count", "shape", "kind", "device", "dtype"],
)
def test_refuses_what_does_not_fit(problem, tensors, error, reason):
    optimizer = problem.optimizer("auto")
    before = [p.detach().clone() for p in problem.params]
    with pytest.raises(error, match=reason), optimizer.perturb_by(tensors(problem.params)):
        pass
    assert_same_bits(problem.params, before)
    assert not optimizer.perturbed
    problem.step(optimizer)


def test_block_that_no_backend_can_run_is_not_entered(problem, monkeypatch):
    """As after the parameters were moved to a device that the named backend does not know."""
    optimizer = problem.optimizer("reference")

    def refuse(*_):
        raise BackendUnavailable("not here")

    with monkeypatch.context() as patched:
        patched.setattr(engine, "operations", refuse)
        with pytest.raises(BackendUnavailable), optimizer.perturb_by(directions_for(problem.params)):
            pass
    assert not optimizer.perturbed
    problem.step(optimizer)


def test_running_statistics_are_preserved(device):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(device)
    optimizer = FastSAM(model.parameters(), model=model, lr=0.1)
    mean = model[1].running_mean.clone()
    with optimizer.perturb_by([torch.ones_like(p) for p in model.parameters()]):
        model(torch.randn(5, 3, device=device))
        assert not torch.equal(model[1].running_mean, mean)
    assert torch.equal(model[1].running_mean, mean)


def test_frozen_parameters_have_an_entry_too(backend, device):
    """And so has a parameter whose group came by the base, without FastSAM's options."""
    w, frozen, late = (nn.Parameter(torch.ones(3, device=device), requires_grad=i != 1) for i in range(3))
    optimizer = FastSAM([w, frozen], lr=0.1, backend=backend)
    optimizer.base_optimizer.add_param_group({"params": [late]})
    one, two = torch.ones(3, device=device), torch.full((3,), 2.0, device=device)
    with optimizer.perturb_by([one, None, two]):
        assert [float(param[0].detach()) for param in (w, frozen, late)] == [2.0, 1.0, 3.0]
    assert all(torch.equal(param, one) for param in (w, frozen, late))
    with pytest.raises(ValueError, match="parameter 1, which is frozen, must be None"):
        optimizer.perturb_by([one, one, two]).__enter__()
    with pytest.raises(ValueError, match="3 entries, one per parameter, got 2"):
        optimizer.perturb_by([one, two]).__enter__()
