"""Whole training steps in torch.compile: what FastSAM does in them is left out of the graphs, and done as ever."""

import pytest
import torch
from checks import assert_same_bits
from problem import Problem
from registry import every_fused_base

from fastsam import methods

STEPS = 4


def closure_step(problem, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = (problem.model(problem.x) - problem.y).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure)


def two_phase_step(problem, optimizer):
    optimizer.zero_grad()
    loss = (problem.model(problem.x) - problem.y).square().mean()
    loss.backward()
    optimizer.first_step(zero_grad=True)
    (problem.model(problem.x) - problem.y).square().mean().backward()
    optimizer.second_step()
    return loss


@pytest.mark.parametrize("step", [closure_step, two_phase_step])
@pytest.mark.parametrize("method", [methods.SAM(), methods.GSAM()], ids=["sam", "gsam"])
@every_fused_base
def test_compiled_steps_are_eager_ones(backend, device, base, method, step):
    """Bit for bit: the graphs are run by PyTorch's own kernels."""

    def train(wrap):
        problem = Problem(device)
        optimizer = problem.optimizer(backend, base, rho=0.5, method=method)
        run = wrap(step)
        losses = []
        for _ in range(STEPS):
            losses.append(run(problem, optimizer).detach())
            assert not optimizer.perturbed
        return losses, problem.weights()

    torch._dynamo.reset()
    eager = train(lambda function: function)
    compiled = train(lambda function: torch.compile(function, backend="eager"))
    assert_same_bits(compiled[0], eager[0])
    assert_same_bits(compiled[1], eager[1])
    assert compiled[0][-1] < compiled[0][0]
