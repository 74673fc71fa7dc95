"""GradScaler.unscale_() before the first phase: between both passes the scaler must be updated."""

import pytest
import torch
from checks import assert_same_bits
from problem import Problem
from registry import every_base
from scaled_loops import plain_step, scaled_backward, scaler_for
from torch.nn.utils import clip_grad_norm_

pytestmark = [pytest.mark.face, pytest.mark.usefixtures("one_thread")]


@every_base
@pytest.mark.parametrize("clip", [None, 0.01], ids=["no-clip", "clip"])
def test_scale_that_grows_between_passes(backend, device, base, clip):
    """Clipping the first pass's gradients changes nothing: the perturbation has their direction alone."""
    one, two = Problem(device), Problem(device)
    scaled, plain = one.optimizer(backend, base), two.optimizer(backend, base)
    scaler = scaler_for(device, growth_interval=1)
    for _ in range(3):
        scaled.zero_grad()
        scales = []
        for phase in (scaled.first_step, lambda: scaler.step(scaled)):
            scaled_backward(one, scaler)
            scaler.unscale_(scaled)
            if clip is not None:
                clip_grad_norm_(one.params, clip)
            phase()
            scales.append(scaler.get_scale())
            scaler.update()
        assert scales[1] == 2 * scales[0]
        plain_step(two, plain, clip=clip)
        torch.testing.assert_close(one.weights(), two.weights(), rtol=1e-6, atol=1e-7)


@every_base
def test_unscaling_both_passes_without_update_is_scalers_error(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    scaler = scaler_for(device)
    start = problem.weights()
    scaled_backward(problem, scaler)
    scaler.unscale_(optimizer)
    optimizer.first_step()
    scaled_backward(problem, scaler)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)
    optimizer.restore()
    assert_same_bits(problem.weights(), start)


def test_unscaling_first_pass_alone_without_update_leaves_second_scaled(backend, device):
    """Why the README says to call update(): the scaler takes the second pass's gradients for unscaled, silently."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend, lr=1.0, momentum=0.0)
    scaler = scaler_for(device)
    start = problem.weights()
    scaled_backward(problem, scaler)
    scaler.unscale_(optimizer)
    optimizer.first_step()
    scaled_backward(problem, scaler)
    scaler.step(optimizer)
    for weight, first, param in zip(problem.weights(), start, problem.params, strict=True):
        torch.testing.assert_close(weight, first - param.grad)  # which is 1,024 times the gradient
