"""Every method in every precision, on every backend: beside its algorithm in float64, given the same gradients."""

import pytest
import torch
import triton_interpreter
from checks import values
from method_cases import groups_with
from registry import METHODS, PRECISIONS, WITH_MASTERS, every_method, low_dtypes
from trained import MASTER
from trajectory import Network, detached, follow_oracle, optimizer_for

# Far enough that rounding does not hide the perturbation; the method alone decides where the fourth one goes.
GROUPS = groups_with(2.0, 4.0, 1.0, 0.0, 2.0)
NEAREST = {"nearest": {}, **PRECISIONS}


class Given(Network):
    """Parameters, and gradients that do not depend on them: each pass of each step always gets the same."""

    def __init__(self, device, dtype):
        super().__init__(device, 5)
        self.device, self.points = device, []
        self.starts = [w.to(dtype).double() for w in self.starts]

    def gradient(self, weights, step=0):
        """Also notes the weights."""
        passes = sum(s == step for s, _ in self.points)
        self.points.append((step, [w.detach().clone() for w in weights]))
        seeds = (1000 * step + 100 * passes + i for i in range(len(weights)))
        return [
            values(w.shape, torch.bfloat16, self.device, seed).double() for w, seed in zip(weights, seeds, strict=True)
        ]


def train(network, backend, dtype, method, adamw, precision, steps):
    """The weights after each step, or their masters."""
    params = network.params(dtype)
    optimizer = optimizer_for(params, backend, GROUPS, method=method, adamw=adamw, **PRECISIONS.get(precision, {}))
    trajectory = []
    for step in range(steps):

        def closure(step=step):
            for param, grad in zip(params, network.gradient(params, step), strict=True):
                param.grad = grad.to(dtype)
            return torch.zeros(())

        optimizer.step(closure)
        has_masters = precision in WITH_MASTERS
        trajectory.append([optimizer.state[p][MASTER].clone() for p in params] if has_masters else detached(params))
    return trajectory


@pytest.mark.parametrize("adamw", [False, True], ids=["sgd", "adamw"])
@pytest.mark.parametrize("precision", NEAREST)
@low_dtypes
@every_method
def test_passes_and_updates(backend, device, name, dtype, precision, adamw):
    paper, ours, case = Given(device, dtype), Given(device, dtype), METHODS[name]
    steps = triton_interpreter.fewer(3, 2, backend, device)
    expected = follow_oracle(paper, case.oracle, GROUPS, adamw=adamw, steps=steps, gradient=paper.gradient)
    actual = train(ours, backend, dtype, case.method, adamw, precision, steps)
    sizes = [torch.stack(points).abs().max() for points in zip(*(w for _, w in paper.points), strict=True)]
    # The weights of an ascent are rounded each time.
    roundings = case.method.ascents if "stochastic" in precision else 0.5 * (1 + case.method.ascents)
    for (step, got), (_, want) in zip(ours.points, paper.points, strict=True):
        carried = 0 if precision in WITH_MASTERS else step
        assert_near(got, want, sizes, (roundings + carried) * torch.finfo(dtype).eps, f"a pass of step {step}")
    for step, (got, want) in enumerate(zip(actual, expected, strict=True)):
        eps = torch.finfo(torch.float32 if precision in WITH_MASTERS else dtype).eps
        assert_near(got, want, sizes, 2 * (step + 1) * eps, f"the update of step {step}")


def assert_near(actual, expected, sizes, rtol, what):
    """``sizes``: what each parameter's error is relative to."""
    for i, (got, want, size) in enumerate(zip(actual, expected, sizes, strict=True)):
        error = float((got.double() - want).abs().max() / size)
        assert error <= rtol, f"{what}, parameter {i}: an error of {error:.2g}, allowed {rtol:.2g}"
