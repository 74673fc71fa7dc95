"""Steps inside autocast: both passes, scaled loops, restore."""

import pytest
import torch
from checks import assert_same_bits
from problem import Problem
from registry import every_base, low_dtypes
from scaled_loops import SCALE, scaled_step, scaler_for
from torch.nn.utils import clip_grad_norm_

pytestmark = [pytest.mark.face, pytest.mark.usefixtures("one_thread")]


@every_base
@low_dtypes
@pytest.mark.parametrize("use", ["closure", "two-phase"])
def test_both_passes_inside_one_autocast_block(backend, device, base, use, dtype):
    """autocast keeps copies of the weights; were they kept on, the second gradient would be the first again."""
    one, two = Problem(device), Problem(device)
    optimizer, expected = (p.optimizer(backend, base, rho=2.0) for p in (one, two))
    grads, expected_grads = [], []

    def one_block():
        optimizer.zero_grad()
        one.backward()
        grads.append([p.grad.clone() for p in one.params])

    def own_block():
        expected.zero_grad()
        with torch.autocast(device.type, dtype):
            loss = two.loss()
        loss.backward()
        expected_grads.append([p.grad.clone() for p in two.params])

    with torch.autocast(device.type, dtype):
        for _ in range(2):
            if use == "closure":
                optimizer.step(one_block)
            else:
                one_block()
                optimizer.first_step()
                one_block()
                optimizer.second_step()
    for _ in range(2):
        expected.step(own_block)
    first, second, third, _ = grads
    assert not torch.equal(first[0], second[0]), "the perturbation was seen"
    assert not torch.equal(first[0], third[0]), "the update was seen"
    assert_same_bits(grads, expected_grads)
    assert_same_bits(one.weights(), two.weights())


@every_base
@pytest.mark.parametrize("clip", [None, 0.01], ids=["no-clip", "clip"])
def test_scaled_float16_loop_inside_one_autocast_block(backend, device, base, clip):
    """The whole of a float16 step: the second pass sees the perturbed weights, the next step the updated ones."""
    one, two = Problem(device), Problem(device)
    inside, outside = (p.optimizer(backend, base, rho=2.0) for p in (one, two))
    scaler, other = scaler_for(device), scaler_for(device)
    for _ in range(3):
        with torch.autocast(device.type, torch.float16):
            scaled_step(one, inside, scaler, clip=clip)
        outside.zero_grad()
        for phase in (1, 2):
            with torch.autocast(device.type, torch.float16):
                loss = two.loss()
            other.scale(loss).backward()
            if phase == 1:
                outside.first_step()
        if clip is not None:
            other.unscale_(outside)
            clip_grad_norm_(two.params, clip)
        other.step(outside)
        other.update()
        assert_same_bits(one.weights(), two.weights())
    assert scaler.get_scale() == SCALE


@every_base
def test_restore_inside_autocast_block(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base, rho=2.0)
    with torch.autocast(device.type, torch.bfloat16), torch.enable_grad():
        before = problem.loss().detach().clone()
        problem.first_step(optimizer)
        assert not torch.equal(problem.loss().detach(), before)
        optimizer.restore()
        assert_same_bits(problem.loss().detach(), before)
