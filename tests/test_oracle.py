"""Trajectories of FastSAM beside SAM written straight from the papers, in float64."""

import math

import oracle
import pytest
import torch
from checks import assert_same_bits

from fastsam import FastSAM

STEPS = 12


class Problem:
    """A two-layer network and its loss on a fixed batch, for parameters given as a list: nothing of torch.nn's."""

    SHAPES = ((8, 5), (8,), (3, 8), (3,), ())

    def __init__(self, device):
        generator = torch.Generator().manual_seed(11)
        self.starts = [
            0.7 * torch.randn(shape, dtype=torch.float64, generator=generator).to(device) for shape in self.SHAPES
        ]
        self.inputs = torch.randn(16, 5, dtype=torch.float64, generator=generator).to(device)
        self.targets = torch.randn(16, 3, dtype=torch.float64, generator=generator).to(device)

    def loss(self, params):
        first, bias, second, offset, scale = params
        hidden = torch.tanh(self.inputs.to(first.dtype) @ first.T + bias)
        return ((1 + scale) * (hidden @ second.T + offset) - self.targets.to(first.dtype)).square().mean()

    def gradient(self, weights):
        weights = [w.detach().clone().requires_grad_() for w in weights]
        return torch.autograd.grad(self.loss(weights), weights)


def train_oracle(problem, groups, update, steps=STEPS):
    """SAM as algorithm 1 of the paper has it; ``groups``: a dict of options for each parameter.

    Returns:
        The weights after each step.
    """
    weights, states = list(problem.starts), [None] * len(problem.starts)
    trajectory = []
    for step in range(1, steps + 1):
        g = problem.gradient(weights)
        climbing = [i for i, group in enumerate(groups) if group.get("perturb", True)]
        adaptive = [groups[i].get("adaptive", False) for i in climbing]
        size = oracle.norm([weights[i] for i in climbing], [g[i] for i in climbing], adaptive)
        above = list(weights)
        for i in climbing:
            rho, maximize = groups[i]["rho"], groups[i].get("maximize", False)
            above[i] = oracle.climbed(weights[i], g[i], size, rho, groups[i].get("adaptive", False), maximize)
        g = problem.gradient(above)
        for i, group in enumerate(groups):
            weights[i], states[i] = update(weights[i], g[i], states[i], step, group)
        trajectory.append(list(weights))
    return trajectory


def sgd(w, g, buffer, step, group):
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    return oracle.sgd(w, g, buffer, **{name: group[name] for name in names if name in group})


def adamw(w, g, state, step, group):
    state = state or (torch.zeros_like(w), torch.zeros_like(w), None)
    return oracle.adam(w, g, state, step, lr=group["lr"], weight_decay=0.01, decoupled=True)


def train(problem, backend, base, groups, dtype=torch.float64, steps=STEPS, **options):
    """FastSAM with each parameter in a group of its own; yields the weights after each step."""
    params = [w.to(dtype).requires_grad_() for w in problem.starts]
    params = [p if p.is_leaf else p.detach().requires_grad_() for p in params]
    optimizer = FastSAM(
        [{"params": [p], **group} for p, group in zip(params, groups, strict=True)], base, backend=backend, **options
    )

    def closure():
        optimizer.zero_grad()
        loss = problem.loss(params)
        loss.backward()
        return loss

    for _ in range(steps):
        at = [p.detach().clone() for p in params]
        loss = optimizer.step(closure)
        assert_same_bits(loss.detach(), problem.loss(at))
        yield [p.detach().clone() for p in params]


def assert_same_trajectory(actual, expected, rtol):
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        for i, (w, v) in enumerate(zip(ours, theirs, strict=True)):
            error = float((w.double() - v).abs().max() / v.abs().max())
            assert error <= rtol, f"step {step}, parameter {i}: relative error {error:.2g}"


def far_apart(one, other):
    return max(float((w - v).abs().max()) for w, v in zip(one[-1], other[-1], strict=True))


ALIKE = [{"rho": 0.3, "lr": 0.1}] * 5
MIXED = [
    {"rho": 0.3, "lr": 0.1},
    {"rho": 0.5, "adaptive": True, "lr": 0.05, "momentum": 0.5},
    {"rho": 0.2, "perturb": False, "lr": 0.1},
    {"rho": 0.0, "lr": 0.02, "weight_decay": 0.1},
    {"rho": 0.4, "adaptive": True, "lr": 0.1, "nesterov": True, "momentum": 0.9},
]
CASES = {
    "sam": ALIKE,
    "asam": [{**group, "rho": 0.8, "adaptive": True} for group in ALIKE],
    "momentum": [{**group, "momentum": 0.9, "dampening": 0.3} for group in ALIKE],
    "maximize": [{**group, "maximize": True, "lr": 0.01} for group in ALIKE],
    "asam-maximize": [{**group, "maximize": True, "adaptive": True, "lr": 0.01} for group in ALIKE],
    "groups": MIXED,
    "outside-the-norm": [{**group, "perturb": i > 1} for i, group in enumerate(ALIKE)],
    "inside-the-norm": [{**group, "rho": 0.0 if i < 2 else 0.3} for i, group in enumerate(ALIKE)],
}


@pytest.mark.parametrize("groups", CASES.values(), ids=CASES)
def test_sgd(backend, device, groups):
    problem = Problem(device)
    expected = train_oracle(problem, groups, sgd)
    assert_same_trajectory(train(problem, backend, torch.optim.SGD, groups), expected, rtol=1e-12)


@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_adamw(backend, device, adaptive):
    problem = Problem(device)
    groups = [{"rho": 0.2 + 0.1 * i, "lr": 0.01, "adaptive": adaptive} for i in range(5)]
    expected = train_oracle(problem, groups, adamw)
    assert_same_trajectory(train(problem, backend, torch.optim.AdamW, groups, weight_decay=0.01), expected, rtol=1e-12)


@pytest.mark.parametrize("base", [torch.optim.NAdam, torch.optim.RMSprop], ids=lambda base: base.__name__)
def test_bases_that_are_not_fused(backend, device, base):
    """The oracle here is torch.optim's own class, fed with the gradients at the climbed weights."""
    problem = Problem(device)
    weights = [w.clone() for w in problem.starts]
    plain = base(weights, lr=0.01)
    expected = []
    for _ in range(STEPS):
        g = problem.gradient(weights)
        size = oracle.norm(weights, g, [False] * len(g))
        g = problem.gradient([oracle.climbed(w, grad, size, 0.3) for w, grad in zip(weights, g, strict=True)])
        for w, grad in zip(weights, g, strict=True):
            w.grad = grad
        plain.step()
        expected.append([w.clone() for w in weights])
    groups = [{"rho": 0.3, "lr": 0.01}] * 5
    assert_same_trajectory(train(problem, backend, base, groups), expected, rtol=1e-12)


def test_float32(backend, device):
    problem = Problem(device)
    expected = train_oracle(problem, MIXED, sgd)
    actual = train(problem, backend, torch.optim.SGD, MIXED, dtype=torch.float32)
    assert_same_trajectory(actual, expected, rtol=1e-5)


def test_the_cases_differ_from_each_other(device):
    """Else the trajectories above would prove nothing: each option must move the weights."""
    problem = Problem(device)
    runs = {name: train_oracle(problem, groups, sgd) for name, groups in CASES.items()}
    runs["no climb"] = train_oracle(problem, [{**group, "rho": 0.0} for group in ALIKE], sgd)
    names = list(runs)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert far_apart(runs[one], runs[other]) > 1e-3, (one, other)
    assert all(bool(w.isfinite().all()) for run in runs.values() for w in run[-1])


def test_options_change_in_mid_run(backend, device):
    """rho, adaptive, perturb and lr are read anew in every step; rho may be a tensor."""
    problem = Problem(device)
    schedule = [
        {"rho": 0.3},
        {"rho": 0.1, "lr": 0.03},
        {"adaptive": True, "rho": 0.7},
        {"perturb": False},
        {"perturb": True, "rho": 0.0},
        {"adaptive": False, "rho": 0.2},
    ]
    params = [w.clone().requires_grad_() for w in problem.starts]
    rho = torch.tensor(0.3, dtype=torch.float64)
    optimizer = FastSAM([{"params": params[:2]}, {"params": params[2:], "rho": rho}], rho=0.3, lr=0.1, backend=backend)

    def closure():
        optimizer.zero_grad()
        problem.loss(params).backward()

    weights = list(problem.starts)
    group = {"rho": 0.3, "lr": 0.1}
    for step, change in enumerate(schedule):
        group = {**group, **change}
        optimizer.param_groups[0].update(change)
        rho.fill_(0.3 / (step + 1))
        other = {"rho": 0.3 / (step + 1), "lr": 0.1}
        at = Problem(device)
        at.starts = weights
        weights = train_oracle(at, [group, group, other, other, other], sgd, steps=1)[0]
        optimizer.step(closure)
        assert_same_trajectory([[p.detach() for p in params]], [weights], rtol=1e-12)


def test_two_phases_are_the_closure(backend, device):
    """Bit for bit; also when the second phase is ``step()``, as GradScaler calls it."""
    problem = Problem(device)
    runs = []
    for way in ("closure", "second_step", "step"):
        params = [w.float().requires_grad_() for w in problem.starts]
        optimizer = FastSAM(params, rho=0.3, lr=0.1, momentum=0.9, backend=backend)

        def backward(optimizer=optimizer, params=params):
            optimizer.zero_grad()
            problem.loss(params).backward()

        for _ in range(3):
            if way == "closure":
                optimizer.step(backward)
                continue
            backward()
            optimizer.first_step()
            assert optimizer.perturbed
            backward()
            optimizer.second_step() if way == "second_step" else optimizer.step()
            assert not optimizer.perturbed
        runs.append([p.detach() for p in params])
    assert_same_bits(runs[1], runs[0])
    assert_same_bits(runs[2], runs[0])


def test_an_ascent_closure_gives_the_first_gradient(backend, device):
    problem, half = Problem(device), Problem(device)
    half.inputs, half.targets = half.inputs[:8], half.targets[:8]
    params = [w.clone().requires_grad_() for w in problem.starts]
    optimizer = FastSAM(params, rho=0.3, lr=0.1, backend=backend)

    def on(some):
        def closure():
            optimizer.zero_grad()
            loss = some.loss(params)
            loss.backward()
            return float(loss.detach())

        return closure

    weights = list(problem.starts)
    for _ in range(5):
        expected_loss = float(half.loss(weights))
        assert optimizer.step(on(problem), ascent_closure=on(half)) == pytest.approx(expected_loss, rel=1e-12)
        g = half.gradient(weights)
        size = oracle.norm(weights, g, [False] * 5)
        g = problem.gradient([oracle.climbed(w, grad, size, 0.3) for w, grad in zip(weights, g, strict=True)])
        weights = [oracle.sgd(w, grad, None, lr=0.1)[0] for w, grad in zip(weights, g, strict=True)]
        assert_same_trajectory([[p.detach() for p in params]], [weights], rtol=1e-12)


def test_the_climb_has_length_rho(backend, device):
    """``||e||`` = rho, uphill: what the method is about, whatever the gradient's size."""
    problem = Problem(device)
    for size in (1e-6, 1.0, 1e6):
        params = [w.clone().requires_grad_() for w in problem.starts]
        optimizer = FastSAM(params, rho=0.25, lr=0.1, backend=backend)
        (size * problem.loss(params)).backward()
        g = torch.cat([p.grad.flatten() for p in params])
        optimizer.first_step()
        e = torch.cat([(p.detach() - w).flatten() for p, w in zip(params, problem.starts, strict=True)])
        assert float(e.norm()) == pytest.approx(0.25, rel=1e-5)
        assert float(e @ g) == pytest.approx(0.25 * float(g.norm()), rel=1e-5)
        optimizer.restore()
        assert_same_bits([p.detach() for p in params], problem.starts)


def test_a_nan_in_the_first_pass_makes_it_a_plain_step(backend, device):
    """The second pass runs at the weights themselves, and its gradient is used."""
    problem = Problem(device)
    params = [w.float().requires_grad_() for w in problem.starts]
    starts = [p.detach().clone() for p in params]
    optimizer = FastSAM(params, rho=0.3, lr=0.1, backend=backend)
    passes = []

    def closure():
        passes.append([p.detach().clone() for p in params])
        optimizer.zero_grad()
        problem.loss(params).backward()
        if len(passes) == 1:
            params[2].grad[1, 1] = math.nan

    optimizer.step(closure)
    assert_same_bits(passes[1], starts)
    g = problem.gradient([w.double() for w in starts])
    assert_same_trajectory(
        [[p.detach() for p in params]],
        [[w.double() - 0.1 * grad for w, grad in zip(starts, g, strict=True)]],
        rtol=1e-6,
    )


def test_the_norm_is_over_every_dtype(backend, device):
    """float32, float64 and bfloat16 parameters share one norm."""
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


@pytest.mark.gpu
def test_the_norm_is_over_every_device():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    params = [torch.ones(4, device=device, requires_grad=True) for device in ("cpu", "cuda", "cpu")]
    optimizer = FastSAM(params, rho=0.5, lr=0.1)
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    optimizer.first_step()
    for param in params:
        torch.testing.assert_close(param.detach().cpu(), torch.full((4,), 1 + 0.5 * 2 / math.sqrt(48)))
    optimizer.restore()
    assert all(bool((p == 1).all()) for p in params)
