"""GradScaler in stock loops."""

import pytest
import torch
from checks import assert_same_bits
from problem import Problem, Snapshot, assert_same_state, state_of
from registry import every_base, first_or_later
from scaled_loops import SCALE, plain_step, scaled_backward, scaled_step, scaler_for
from torch import nn
from torch.nn.utils import clip_grad_norm_

from fastsam import FastSAM

pytestmark = [pytest.mark.face, pytest.mark.usefixtures("one_thread")]


class Poison:
    """Puts an Inf into the next gradients of a parameter."""

    def __init__(self, param):
        self.armed = False
        param.register_hook(self)

    def __call__(self, grad):
        if not self.armed:
            return None
        grad = grad.clone()
        grad.view(-1)[1] = torch.inf
        return grad


@every_base
@pytest.mark.parametrize("clip", [None, 0.01, 1e6], ids=["no-clip", "clip", "loose-clip"])
def test_scaled_loop_is_unscaled_one(backend, device, base, clip):
    one, two = Problem(device), Problem(device)
    scaled, plain = one.optimizer(backend, base), two.optimizer(backend, base)
    scaler = scaler_for(device)
    for _ in range(4):
        scaled_step(one, scaled, scaler, clip=clip)
        plain_step(two, plain, clip=clip)
        assert not scaled.perturbed
        assert_same_bits(one.weights(), two.weights())
    assert_same_state(state_of(scaled), state_of(plain))
    assert scaler.get_scale() == SCALE


@every_base
def test_scaler_drives_second_phase_itself(backend, device, base):
    """Its contract: step() is called on overflow too, because an overflow must not leave the weights perturbed."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    assert optimizer._step_supports_amp_scaling
    calls = []
    optimizer.register_step_post_hook(lambda o, a, k: calls.append((a, k)))
    scaled_step(problem, optimizer, scaler_for(device))
    assert calls == [((optimizer,), {})]
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


@every_base
@pytest.mark.parametrize("scale", [2.0**40, 2.0**-20], ids=["large", "small"])
def test_perturbation_does_not_depend_on_scale(backend, device, base, scale):
    one, two = Problem(device), Problem(device)
    scaled, plain = one.optimizer(backend, base), two.optimizer(backend, base)
    scaled_backward(one, scaler_for(device, init_scale=scale))
    scaled.first_step()
    two.first_step(plain)
    torch.testing.assert_close(one.weights(), two.weights(), rtol=1e-6, atol=1e-8)


@every_base
def test_unscaling_both_passes_with_update_in_between(backend, device, base):
    one, two = Problem(device), Problem(device)
    scaled, plain = one.optimizer(backend, base), two.optimizer(backend, base)
    scaler = scaler_for(device)
    for _ in range(3):
        scaled.zero_grad()
        scaled_backward(one, scaler)
        scaler.unscale_(scaled)
        scaled.first_step()
        scaler.update()
        scaled_backward(one, scaler)
        scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        plain_step(two, plain)
        assert_same_bits(one.weights(), two.weights())


@every_base
def test_gradients_stay_unscaled_after_unscale(backend, device, base):
    """After unscale_ and a step, ``.grad`` is what was applied, as with torch's own fused optimizers."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    scaler = scaler_for(device)
    problem.first_step(optimizer)
    scaled_backward(problem, scaler)
    scaler.unscale_(optimizer)
    grads = [p.grad.clone() for p in problem.params]
    scaler.step(optimizer)
    assert_same_bits([p.grad for p in problem.params], grads)


@every_base
@first_or_later
def test_overflow_in_first_pass_does_not_perturb(backend, device, base, warm):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    scaler, poison = scaler_for(device), Poison(problem.params[2])
    if warm:
        scaled_step(problem, optimizer, scaler)
    start = problem.weights()
    optimizer.zero_grad()
    poison.armed = True
    scaled_backward(problem, scaler)
    optimizer.first_step()
    poison.armed = False
    assert_same_bits(problem.weights(), start, "at w")
    scaled_backward(problem, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(w.isfinite().all() for w in problem.weights())
    assert all((w != s).any() for w, s in zip(problem.weights(), start, strict=True)), "but updated"
    assert scaler.get_scale() == SCALE


@every_base
@pytest.mark.parametrize("unscale", [False, True], ids=["step", "unscale-step"])
@pytest.mark.parametrize("warm", [0, 1, 3], ids=["first", "second", "later"])
def test_overflow_in_second_pass_changes_nothing(backend, device, base, unscale, warm):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    scaler, poison = scaler_for(device), Poison(problem.params[2])
    for _ in range(warm):
        scaled_step(problem, optimizer, scaler)
    weights, state, scale = problem.weights(), state_of(optimizer), scaler.get_scale()
    optimizer.zero_grad()
    scaled_backward(problem, scaler)
    optimizer.first_step()
    poison.armed = True
    scaled_backward(problem, scaler)
    poison.armed = False
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert not optimizer.perturbed
    assert scaler.get_scale() == scale / 2
    assert_same_bits(problem.weights(), weights)
    if warm:
        assert_same_state(state_of(optimizer), state)
    # What a first step has allocated must not be what the next one takes for a past: it is as if there had been none.
    undisturbed = Problem(device)
    expected = undisturbed.optimizer(backend, base)
    other = scaler_for(device)
    for _ in range(warm):
        scaled_step(undisturbed, expected, other)
    for _ in range(2):
        scaled_step(problem, optimizer, scaler)
        scaled_step(undisturbed, expected, other)
    assert_same_bits(problem.weights(), undisturbed.weights())
    assert_same_state(state_of(optimizer), state_of(expected))


@pytest.mark.parametrize(
    "options", [{}, {"dampening": 0.5}, {"nesterov": True}], ids=["plain", "dampening", "nesterov"]
)
def test_overflow_in_first_step_leaves_state_that_base_takes_for_none(backend, device, options):
    """Torch's fused SGD leaves its buffer uninitialised there and uses it on the second step."""
    mine, theirs = Problem(device), Problem(device)
    options = {"lr": 0.1, "momentum": 0.9, **options}
    optimizer = FastSAM(mine.params, rho=torch.tensor(0.0), backend=backend, **options)
    base = torch.optim.SGD(theirs.params, foreach=False, **options)
    scaler, poison = scaler_for(device), Poison(mine.params[2])
    optimizer.zero_grad()
    scaled_backward(mine, scaler)
    optimizer.first_step()
    poison.armed = True
    scaled_backward(mine, scaler)
    poison.armed = False
    scaler.step(optimizer)
    scaler.update()
    base_again = torch.optim.SGD(mine.params, foreach=False, **options)
    base_again.load_state_dict(optimizer.state_dict())
    if "dampening" in options:  # a first buffer is taken whole; where that makes no difference, zeros will do
        assert not any(base_again.state.values())
    for _ in range(3):
        mine.step(optimizer)
        theirs.plain_step(base)
    torch.testing.assert_close(mine.weights(), theirs.weights(), rtol=1e-6, atol=1e-7)


@every_base
@pytest.mark.parametrize(
    ("hand_over", "message"),
    [
        (lambda s, o, c: s.step(o, c), r"GradScaler.step\(optimizer, closure\) is not supported.*first_step\(\)"),
        (lambda s, o, c: s.step(o, closure=c), "Closure use is not currently supported"),  # the scaler's own words
    ],
    ids=["positional", "keyword"],
)
def test_scaler_that_is_handed_closure_is_refused(backend, device, base, hand_over, message):
    problem, undisturbed = Problem(device), Problem(device)
    optimizer, other = problem.optimizer(backend, base), undisturbed.optimizer(backend, base)
    scaler = scaler_for(device)
    scaled_step(problem, optimizer, scaler)
    scaled_step(undisturbed, other, scaler_for(device))
    scaled_backward(problem, scaler)
    before, called = Snapshot(optimizer), []
    with pytest.raises(RuntimeError, match=message):
        hand_over(scaler, optimizer, lambda: called.append(1))
    assert called == []
    before.assert_unchanged()
    # Neither a scale nor a found_inf is left behind for the steps that follow: with a scaler of its own, or none.
    scaled_step(problem, optimizer, scaler_for(device))
    problem.step(optimizer)
    scaled_step(undisturbed, other, scaler_for(device))
    undisturbed.step(other)
    assert_same_bits(problem.weights(), undisturbed.weights())


@every_base
def test_scaler_without_first_step_is_refused(backend, device, base):
    problem, undisturbed = Problem(device), Problem(device)
    optimizer, other = problem.optimizer(backend, base), undisturbed.optimizer(backend, base)
    scaler = scaler_for(device)
    scaled_backward(problem, scaler)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"first_step\(\)"):
        scaler.step(optimizer)
    before.assert_unchanged()
    problem.two_phase(optimizer)
    undisturbed.two_phase(other)
    assert_same_bits(problem.weights(), undisturbed.weights())


@every_base
def test_disabled_scaler_changes_nothing(backend, device, base):
    one, two = Problem(device), Problem(device)
    scaled, plain = one.optimizer(backend, base), two.optimizer(backend, base)
    scaler = scaler_for(device, enabled=False)
    for _ in range(2):
        scaled_step(one, scaled, scaler, clip=0.1)
        plain_step(two, plain, clip=0.1)
    assert_same_bits(one.weights(), two.weights())
    one.step(scaled)
    scaler.step(scaled, one.closure(scaled))


@every_base
def test_no_gradient_in_second_pass_under_scaler(backend, device, base):
    """found_inf is then the number 0, the sum of nothing."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    scaler = scaler_for(device)
    scaled_step(problem, optimizer, scaler)
    before = Snapshot(optimizer)
    optimizer.zero_grad()
    scaled_backward(problem, scaler)
    optimizer.first_step()
    scaler.step(optimizer)
    before.assert_unchanged(grads=False)


def test_two_optimizers_under_one_scaler(backend, device):
    one, two, three, four = (Problem(device, seed) for seed in (1, 2, 1, 2))
    mine = one.optimizer(backend), two.optimizer(backend, "rmsprop")
    alone = three.optimizer(backend), four.optimizer(backend, "rmsprop")
    scaler = scaler_for(device)
    for _ in range(3):
        for problem, optimizer in zip((one, two), mine, strict=True):
            optimizer.zero_grad()
            scaled_backward(problem, scaler)
            optimizer.first_step()
            scaled_backward(problem, scaler)
        for optimizer in mine:
            scaler.step(optimizer)
        scaler.update()
        plain_step(three, alone[0])
        plain_step(four, alone[1])
    assert_same_bits(one.weights() + two.weights(), three.weights() + four.weights())


@every_base
@pytest.mark.parametrize("clip", [None, 0.1], ids=["no-clip", "clip"])
@pytest.mark.parametrize("warm", [0, 2], ids=["first", "later"])
def test_overflow_in_both_passes_is_skipped_alike(backend, device, base, warm, clip):
    """As a scale too large does it: no perturbation, no update; the scale backs off and nothing is left of it."""
    problem, undisturbed = Problem(device), Problem(device)
    optimizer, expected = problem.optimizer(backend, base), undisturbed.optimizer(backend, base)
    scaler, other = scaler_for(device), scaler_for(device)
    scaler.scale(problem.y)  # a scaler makes its scale when it is first used
    for each in (problem, undisturbed):
        each.y += 1000.0  # far enough for 2^125 to overflow
    for _ in range(warm):
        scaled_step(problem, optimizer, scaler, clip=clip)
        scaled_step(undisturbed, expected, other, clip=clip)
    weights, state = problem.weights(), state_of(optimizer)
    scaler.update(2.0**127)
    for overflows in (1, 2, 3):
        optimizer.zero_grad()
        scaled_backward(problem, scaler)
        assert not all(p.grad.isfinite().all() for p in problem.params)
        optimizer.first_step()
        assert optimizer.perturbed
        assert_same_bits(problem.weights(), weights, "at w")
        scaled_backward(problem, scaler)
        if clip is not None:
            scaler.unscale_(optimizer)
            clip_grad_norm_(problem.params, clip)
        scaler.step(optimizer)
        scaler.update()
        assert not optimizer.perturbed
        assert_same_bits(problem.weights(), weights)
        if warm:
            assert_same_state(state_of(optimizer), state)
        assert scaler.get_scale() == 2.0 ** (127 - overflows)
    scaler.update(SCALE)
    for _ in range(2):
        scaled_step(problem, optimizer, scaler, clip=clip)
        scaled_step(undisturbed, expected, other, clip=clip)
    assert_same_bits(problem.weights(), undisturbed.weights())
    assert_same_state(state_of(optimizer), state_of(expected))


@every_base
def test_batch_norm_and_overflow(backend, device, base):
    """Statistics move in the first pass, whatever becomes of it, and never in the second."""
    problem = Problem(device)
    norm = nn.BatchNorm1d(3).to(device)
    problem.model.append(norm)
    optimizer = problem.optimizer(backend, base, model=problem.model)
    scaler = scaler_for(device, init_scale=2.0**127)
    for seen in (1, 2):
        optimizer.zero_grad()
        scaled_backward(problem, scaler)
        statistics = [b.clone() for b in norm.buffers()]
        optimizer.first_step()
        scaled_backward(problem, scaler)
        scaler.step(optimizer)
        scaler.update()
        assert_same_bits(list(norm.buffers()), statistics)
        assert int(norm.num_batches_tracked) == seen
    assert scaler.get_scale() == 2.0**125
