"""methods.Direction: what its function is given, what it may return, and what is refused before anything is written."""

import internals
import pytest
import torch
from checks import assert_same_bits, assert_within
from problem import Problem, Snapshot, Stop
from registry import PRECISIONS, every_base, every_precision
from torch import nn

from fastsam import FastSAM, methods

pytestmark = pytest.mark.face


@pytest.fixture
def problem(device):
    return Problem(device)


def signs_of_matrices(params, grads):
    return [grad.sign() if param.dim() > 1 else None for param, grad in zip(params, grads, strict=True)]


class Signs(methods.Direction):
    def direction(self, params, grads):
        return signs_of_matrices(params, grads)


def along(weights, directions, rho):
    """``w + rho * d / ||d||``, the norm over all directions that there are."""
    size = torch.sqrt(sum(d.abs().double().square().sum() for d in directions if d is not None))
    return [w if d is None else w + (rho * d / size).to(w.dtype) for w, d in zip(weights, directions, strict=True)]


@pytest.mark.parametrize("method", [methods.Direction(signs_of_matrices), Signs()], ids=["function", "class"])
@every_base
def test_perturbs_along_it_and_restores(problem, backend, base, method):
    optimizer = problem.optimizer(backend, base, method=method, rho=0.3)
    problem.step(optimizer)  # the second one has state
    before = problem.weights()
    optimizer.zero_grad()
    problem.backward()
    expected = along(before, signs_of_matrices(before, [p.grad for p in problem.params]), 0.3)
    optimizer.first_step()
    assert_within(problem.weights(), expected, before)
    for weight, start in zip(problem.weights(), before, strict=True):
        assert torch.equal(weight, start) == (weight.dim() == 1)
    optimizer.restore()
    assert_same_bits(problem.weights(), before)


@every_precision
def test_in_low_precision(backend, device, precision):
    """The directions have the parameters' dtype or another one; masters are left alone."""
    starts = [torch.full((5, 3), 1.0), torch.full((3,), -2.0)]
    params = [nn.Parameter(start.bfloat16().to(device)) for start in starts]
    method = methods.Direction(lambda params, grads: [grads[0], grads[1].float()])
    optimizer = FastSAM(params, rho=4.0, lr=0.1, method=method, backend=backend, **PRECISIONS[precision])
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.first_step()
    for param, start in zip(params, starts, strict=True):
        expected = (start + 4 / 18**0.5).to(device)
        assert_within(param.detach(), expected, start.to(device), stochastic=precision != "masters")
    optimizer.restore()
    assert_same_bits([p.detach() for p in params], [s.bfloat16().to(device) for s in starts])


def test_function_is_given_users_tensors_once_per_ascent(backend, device):
    """Those of the perturbed parameters that have a gradient, complex ones as such, without grad."""
    params = [nn.Parameter(torch.ones(4, device=device, dtype=torch.complex64 if i == 1 else None)) for i in range(5)]
    params[3].requires_grad_(False)
    calls = []

    def own(given, grads):
        calls.append((given, grads, torch.is_grad_enabled()))
        return [None, *(2 * grad for grad in grads[1:])]

    groups = [{"params": params[:2] + params[3:]}, {"params": params[2:3], "perturb": False}]
    optimizer = FastSAM(groups, rho=0.5, lr=0.1, method=methods.Direction(own), backend=backend)
    for step in range(2):
        for param in params[:3]:
            param.grad = (1 + 1j) * torch.ones_like(param) if param.is_complex() else torch.ones_like(param)
        grads = [param.grad for param in params[:2]]
        before = params[1].detach().clone()
        with torch.enable_grad():
            optimizer.first_step()
        assert len(calls) == step + 1
        given, seen, grad_mode = calls[-1]
        assert [id(param) for param in given] == [id(param) for param in params[:2]]
        assert [id(grad) for grad in seen] == [id(grad) for grad in grads]
        assert not grad_mode
        assert_within(params[1].detach(), before + 0.5 * (1 + 1j) / 8**0.5, before)
        optimizer.second_step()


@pytest.mark.parametrize(
    ("directions", "error", "reason"),
    [
        (lambda g: g[1:], ValueError, "direction must have 4 entries, one per parameter, got 3"),
        (lambda g: [*g, None], ValueError, "direction must have 4 entries, one per parameter, got 5"),
        (lambda g: iter(g), TypeError, "direction must be a sequence of tensors, got list_iterator"),
        (lambda g: [*g[:2], g[2].T, g[3]], ValueError, r"parameter 2 \(shape \(3, 6\)\) has shape \(6, 3\)"),
        (lambda g: [g[0], g[1].to("meta"), *g[2:]], ValueError, r"parameter 1 .* is on meta"),
        (lambda g: [*g[:3], g[3].cfloat()], ValueError, r"parameter 3 .* has dtype torch\.complex64"),
        (lambda g: [*g[:3], 1.0], TypeError, r"parameter 3 .* must be a tensor or None, got float"),
    ],
    ids=["few", "many", "iterator", "shape", "device", "dtype", "kind"],
)
@every_base
def test_refuses_what_does_not_fit(problem, backend, base, directions, error, reason):
    """By the parameter's index; nothing has changed then, and the next step is possible."""
    given = {"directions": lambda grads: grads}
    method = methods.Direction(lambda params, grads: given["directions"](grads))
    optimizer = problem.optimizer(backend, base, method=method)
    problem.step(optimizer)
    optimizer.zero_grad()
    problem.backward()
    snapshot, given["directions"] = Snapshot(optimizer), directions
    with pytest.raises(error, match=reason):
        optimizer.first_step()
    snapshot.assert_unchanged()
    with pytest.raises(error, match=reason):
        problem.step(optimizer)
    snapshot.assert_unchanged(grads=False)
    given["directions"] = lambda grads: grads
    problem.step(optimizer)


def test_function_that_raises_changes_nothing(problem, backend):
    def fails(params, grads):
        raise Stop

    optimizer = problem.optimizer(backend, method=methods.Direction(fails))
    snapshot = Snapshot(optimizer)
    with pytest.raises(Stop):
        problem.step(optimizer)
    snapshot.assert_unchanged(grads=False)


@pytest.mark.parametrize("value", [None, 0.0, torch.nan], ids=["none", "zero", "nan"])
def test_no_direction_is_no_perturbation(problem, backend, value):
    """The second pass is at w; a direction that is not finite does not spread."""
    method = methods.Direction(lambda params, grads: [None if value is None else g * value for g in grads])
    optimizer = problem.optimizer(backend, method=method)
    other = Problem(problem.x.device)
    base = other.optimizer(backend, rho=0)
    for _ in range(2):
        problem.step(optimizer)
        other.step(base)
    assert_same_bits(problem.weights(), other.weights())


def test_directions_end_with_step(problem, backend):
    """They are in neither state nor checkpoints, and the function's own tensors are not written to."""
    kept = [torch.ones_like(param) for param in problem.params]
    optimizer = problem.optimizer(backend, method=methods.Direction(lambda params, grads: kept))
    problem.first_step(optimizer)
    problem.backward()
    optimizer.step()
    assert all(bool((tensor == 1).all()) for tensor in kept)
    assert all(set(entries) <= {"momentum_buffer"} for entries in optimizer.state.values())
    assert all(set(entries) <= {"momentum_buffer"} for entries in optimizer.state_dict()["state"].values())
    assert not any(tensor is not None for tensor in internals.directions(optimizer))


def test_constructor():
    with pytest.raises(TypeError, match="Direction needs fn"):
        methods.Direction()
    with pytest.raises(TypeError, match=r"fn must be a function of \(params, grads\), got int"):
        methods.Direction(3)
