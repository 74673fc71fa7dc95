"""A small network of plain tensors, trained by FastSAM and by the oracle, and how their trajectories are compared."""

import oracle
import torch

from fastsam import FastSAM

STEPS = 12
SGD_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


class Network:
    """Two layers with a batch of their own for each step; nothing of torch.nn's."""

    SHAPES = ((8, 5), (8,), (3, 8), (3,), ())

    def __init__(self, device, seed=1):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(device)

        self.starts = [0.7 * draw(*shape) for shape in self.SHAPES]
        self.inputs, self.targets = draw(STEPS, 16, 5), draw(STEPS, 16, 3)

    def loss(self, params, step=0, part=slice(None)):
        first, bias, second, offset, scale = params
        inputs, targets = self.inputs[step][part].to(first.dtype), self.targets[step][part].to(first.dtype)
        hidden = torch.tanh(inputs @ first.T + bias)
        return ((1 + scale) * (hidden @ second.T + offset) - targets).square().mean()

    def gradient(self, weights, step=0, part=slice(None)):
        weights = [w.detach().clone().requires_grad_() for w in weights]
        return list(torch.autograd.grad(self.loss(weights, step, part), weights))

    def params(self, dtype=torch.float64):
        return [w.to(dtype, copy=True).requires_grad_() for w in self.starts]


def follow_oracle(network, method, groups, *, adamw=False, steps=STEPS, gradient=None):
    """The weights after each step; ``groups``: the options of each tensor; ``gradient``: for the network's."""
    gradient = gradient or network.gradient
    weights, states, memory = list(network.starts), [None] * len(groups), {}
    trajectory = []
    for step in range(steps):
        given = method(weights, lambda w, step=step: gradient(w, step), groups, memory)
        given, extra = given if isinstance(given, tuple) else (given, [0.0] * len(weights))
        for i, group in enumerate(groups):
            if adamw:
                state = states[i] or (torch.zeros_like(weights[i]), torch.zeros_like(weights[i]), None)
                options = {"lr": group["lr"], "weight_decay": 0.01, "decoupled": True}
                weights[i], states[i] = oracle.adam(weights[i], given[i], state, step + 1, **options)
            else:
                options = {name: group[name] for name in SGD_OPTIONS if name in group}
                weights[i], states[i] = oracle.sgd(weights[i], given[i], states[i], **options)
            weights[i] = weights[i] - extra[i]
        memory["momentum"] = [s[0] if adamw else s for s in states]
        trajectory.append(list(weights))
    return trajectory


def optimizer_for(params, backend, groups, *, adamw=False, **options):
    """FastSAM with each parameter in a group of its own."""
    if adamw:
        names = ("rho", "lr", "adaptive", "perturb")
        groups = [{name: group[name] for name in names if name in group} for group in groups]
        options["weight_decay"] = 0.01
    base = torch.optim.AdamW if adamw else torch.optim.SGD
    groups = [{"params": [p], **group} for p, group in zip(params, groups, strict=True)]
    return FastSAM(groups, base, backend=backend, **options)


def closure_for(network, params, optimizer, step=0, calls=None, part=slice(None)):
    def closure():
        optimizer.zero_grad()
        loss = network.loss(params, step, part)
        loss.backward()
        if calls is not None:
            calls.append(step)
        return loss

    return closure


def train(network, backend, groups, steps, *, dtype=torch.float64, **options):
    """The weights after each step of FastSAM."""
    params = network.params(dtype)
    optimizer = optimizer_for(params, backend, groups, **options)
    trajectory = []
    for step in range(steps):
        optimizer.step(closure_for(network, params, optimizer, step))
        trajectory.append(detached(params))
    return trajectory


def detached(params):
    return [p.detach().clone() for p in params]


def assert_same_trajectory(actual, expected, rtol):
    """As far as ``actual`` goes; relative to the largest element of each tensor."""
    assert 0 < len(actual) <= len(expected)
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=False)):
        for i, (w, v) in enumerate(zip(ours, theirs, strict=True)):
            error = float((w.double() - v).abs().max() / v.abs().max())
            assert error <= rtol, f"step {step}, parameter {i}: relative error {error:.2g}"
