"""Eigenvalues, trace and density against the full Hessian; products by both ways against each other."""

import importlib
import math

import pytest
import torch
from checks import assert_same_bits
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F

from fastsam import sharpness
from fastsam.sharpness import vectors
from fastsam.sharpness.objective import Objective
from fastsam.sharpness.products import HessianProducts


def net(dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        data = [(torch.randn(n, 4, dtype=dtype), torch.randint(3, (n,))) for n in (8, 5)]
    return model, data


def full_hessian(model, data):
    """The Hessian of the mean loss, ``(n, n)``."""
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def loss(flat):
        parts = flat.split([shape.numel() for shape in shapes.values()])
        params = {name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}
        return F.cross_entropy(functional_call(model, params, (x,)), y)

    return hessian(loss)(torch.cat([p.detach().flatten() for p in model.parameters()]))


@pytest.fixture(scope="module")
def problem():
    model, data = net()
    return model, data, full_hessian(model, data)


HVP = ("autograd", "finite_difference")


@pytest.mark.parametrize("hvp", HVP)
@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_eigenvalues_are_the_full_hessians(problem, by, hvp):
    model, data, full = problem
    values, columns = torch.linalg.eigh(full)
    order = (values if by == "value" else values.abs()).argsort(descending=True)[:3]
    found = sharpness.hessian_eigenvalues(model, F.cross_entropy, data, 3, by=by, hvp=hvp, eigenvectors=True)
    torch.testing.assert_close(found.values, values[order], rtol=1e-6, atol=1e-9)
    assert (found.residuals < 1e-6).all()
    assert found.products > 3
    for mine, exact in zip(found.vectors, columns.T[order], strict=True):
        assert abs(vectors.flatten(mine) @ exact) == pytest.approx(1, abs=1e-6)
        assert [v.shape for v in mine] == [p.shape for p in model.parameters()]


@pytest.mark.parametrize("k", [38, 43])
def test_many_eigenvalues(problem, k):
    model, data, full = problem
    found = sharpness.hessian_eigenvalues(model, F.cross_entropy, data, k)
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(full).flip(0)[:k], rtol=1e-6, atol=1e-9)
    assert found.vectors == []


@pytest.mark.parametrize("hvp", HVP)
@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_trace_within_its_error(problem, method, hvp):
    model, data, full = problem
    found = sharpness.hessian_trace(model, F.cross_entropy, data, samples=30, method=method, hvp=hvp)
    assert abs(found.value - full.trace().item()) < 3 * found.standard_error
    assert 0 < found.standard_error < 0.5 * found.value
    assert float(found) == found.value


def test_density_has_the_spectrums_moments(problem):
    model, data, full = problem
    found = sharpness.spectral_density(model, F.cross_entropy, data, runs=25, steps=12)
    values, n = torch.linalg.eigvalsh(full), len(full)
    for power in (0, 1, 2):
        samples = (found.weights * found.nodes**power).sum(1)
        error = samples.std() / len(samples) ** 0.5
        assert abs(samples.mean() - values.pow(power).sum() / n) <= 3 * error + 1e-9
    width = found.grid[1] - found.grid[0]
    assert found.density.sum() * width == pytest.approx(1, abs=0.02)
    assert found.nodes.max() == pytest.approx(values.max().item(), rel=1e-3)
    narrow = sharpness.spectral_density(model, F.cross_entropy, data, runs=1, steps=500, sigma=0.01)
    assert narrow.sigma == 0.01
    assert narrow.nodes.shape[1] <= n


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 5e-3)], ids=str)
def test_differences_are_derivatives(dtype, tolerance):
    model, data = net(dtype)
    generator = torch.Generator().manual_seed(0)
    exact, by_differences = (HessianProducts(Objective(model, F.cross_entropy, data), hvp) for hvp in HVP)
    for length in (1e-3, 1.0, 1e3):
        vector = vectors.scaled(vectors.normal(exact.params, generator), length)
        with exact.computing(), by_differences.computing():
            expected, found = exact._times(vector), by_differences._times(vector)
        difference = vectors.norm(vectors.combined(found, 1, expected, -1))
        assert difference < tolerance * vectors.norm(expected)
    with by_differences.computing():
        assert vectors.norm(by_differences._times([torch.zeros_like(p) for p in exact.params])) == 0


def test_displacement_is_the_stored_one():
    """In float32 beside large weights, w + h v is rounded: dividing by 2h would be wrong by what was lost."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1e3)
    data = [(torch.ones(1, 1), torch.zeros(1, 1))]
    vector = torch.tensor([1e-9], dtype=torch.float64)
    with (products := HessianProducts(Objective(model, F.mse_loss, data), "finite_difference")).computing():
        assert (products._flat(vector) / vector).item() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("hvp", HVP)
def test_linear_and_unused_parameters(hvp):
    """Parameters in which the loss is linear, and those that it does not depend on, have zero rows."""
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(3, 1)])
    x = torch.ones(4, 2)
    found = sharpness.hessian_eigenvalues(model, None, lambda: model[0](x).mean(), 7, hvp=hvp)
    assert found.values.abs().max() < 1e-3


@pytest.mark.parametrize("hvp", HVP)
def test_model_is_as_before(problem, hvp):
    model, data = net(torch.float32)
    model.insert(1, nn.BatchNorm1d(5))
    F.cross_entropy(model(data[0][0]), data[0][1]).backward()
    grads = [p.grad for p in model.parameters()]
    everything = [*model.parameters(), *model.buffers(), *grads]
    before = [t.detach().clone() for t in everything]
    state = torch.get_rng_state()
    arguments = model, F.cross_entropy, data
    sharpness.hessian_eigenvalues(*arguments, 2, hvp=hvp, train=True)
    sharpness.hessian_trace(*arguments, samples=6, hvp=hvp, train=True)
    sharpness.spectral_density(*arguments, runs=1, steps=3, hvp=hvp, train=True)
    assert_same_bits([t.detach() for t in everything], before)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"k": 0}, "k must be a whole number >= 1"),
        ({"k": 44}, "k must be at most the number of parameters, 43, got 44"),
        ({"by": "size"}, "by must be 'value' or 'magnitude', got 'size'"),
        ({"hvp": "magic"}, "hvp must be 'autograd' or 'finite_difference', got 'magic'"),
        ({"loss_fn": lambda output, target: output.sum() * math.nan}, "the loss at w is nan: it has no Hessian"),
    ],
)
def test_refusals(problem, options, reason):
    model, data, _ = problem
    with pytest.raises(ValueError, match=reason):
        sharpness.hessian_eigenvalues(**{"model": model, "loss_fn": F.cross_entropy, "data": data, **options})


def test_missing_library_says_what_to_install(problem, monkeypatch):
    model, data, _ = problem
    real = importlib.import_module

    def without(name, *args):
        if name.partition(".")[0] in ("scipy", "hessian_eigenthings"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    for function in (sharpness.hessian_eigenvalues, sharpness.hessian_trace, sharpness.spectral_density):
        with pytest.raises(ModuleNotFoundError, match=r"No module named .*; pip install hessian-eigenthings scipy"):
            function(model, F.cross_entropy, data)
