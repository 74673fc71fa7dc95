"""first_step, second_step, restore: their order, and what each does."""

import pytest
import torch
from checks import assert_same_bits
from problem import Problem, Snapshot, assert_same_state, state_of
from registry import every_base, first_or_later
from torch import nn

from fastsam import FastSAM

pytestmark = pytest.mark.face


@every_base
def test_two_phases_are_closure_step(backend, device, base):
    one, two, three = (Problem(device) for _ in range(3))
    closed, phased, stepped = (p.optimizer(backend, base) for p in (one, two, three))
    for _ in range(4):
        one.step(closed)
        two.two_phase(phased)
        three.first_step(stepped)
        assert stepped.perturbed
        three.backward()
        assert stepped.step() is None
        assert not stepped.perturbed
        assert_same_bits(two.weights(), one.weights())
        assert_same_bits(three.weights(), one.weights())
    assert_same_state(state_of(phased), state_of(closed))
    assert_same_state(state_of(stepped), state_of(closed))


@pytest.mark.parametrize("zero_grad", [True, False, None], ids=["cleared", "kept", "default"])
def test_first_step_clears_unless_told(backend, device, zero_grad):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.backward()
    grads = [p.grad for p in problem.params]
    copies = [g.clone() for g in grads]
    optimizer.first_step() if zero_grad is None else optimizer.first_step(zero_grad=zero_grad)
    if zero_grad is False:
        assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
        assert_same_bits(grads, copies)
    else:
        assert [p.grad for p in problem.params] == [None] * 4


@pytest.mark.parametrize("zero_grad", [True, False, None], ids=["cleared", "kept", "default"])
def test_second_step_keeps_unless_told(backend, device, zero_grad):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.first_step(optimizer)
    problem.backward()
    grads = [p.grad for p in problem.params]
    copies = [g.clone() for g in grads]
    optimizer.second_step() if zero_grad is None else optimizer.second_step(zero_grad=zero_grad)
    if zero_grad is True:
        assert [p.grad for p in problem.params] == [None] * 4
    else:
        assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
        assert_same_bits(grads, copies)


def test_second_step_goes_through_step(backend, device):
    """So whoever patched ``step`` on the instance, as schedulers and accelerate do, sees the update."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    calls, original = [], optimizer.step
    optimizer.step = lambda *args, **kwargs: calls.append((args, kwargs)) or original(*args, **kwargs)
    problem.two_phase(optimizer)
    assert calls == [((), {})]
    assert not optimizer.perturbed


def test_second_step_goes_through_subclass_step(backend, device):
    class Counting(FastSAM):
        steps = 0

        def step(self, closure=None, **kwargs):
            self.steps += 1
            return super().step(closure, **kwargs)

    problem = Problem(device)
    optimizer = Counting(problem.model.parameters(), lr=0.1, backend=backend)
    problem.two_phase(optimizer)
    problem.step(optimizer)
    assert optimizer.steps == 2


def refusals():
    while_perturbed = "is not possible while the weights are perturbed; call second_step\\(\\) or restore\\(\\) first"
    return {
        "step-without-closure": (
            False,
            lambda o, p: o.step(),
            r"step\(\) needs a closure.*first_step\(\).*second_step\(\)",
        ),
        "second-without-first": (False, lambda o, p: o.second_step(), r"second_step\(\) without first_step\(\)"),
        "first-twice": (True, lambda o, p: o.first_step(), rf"first_step\(\) {while_perturbed}"),
        "closures-while-perturbed": (
            True,
            lambda o, p: o.step(closures=[p.backward]),
            rf"step\(closure\) {while_perturbed}",
        ),
    }


@every_base
@pytest.mark.parametrize("is_done_before", [False, True], ids=["closure", "empty-closure"])
def test_closure_while_perturbed_is_the_second_pass(backend, device, base, is_done_before):
    """Trainers always pass a closure, one that does nothing if the gradients are there."""
    mine, other = Problem(device), Problem(device)
    optimizer, two_phase = mine.optimizer(backend, base), other.optimizer(backend, base)
    for problem, its in ((mine, optimizer), (other, two_phase)):
        problem.backward()
        its.first_step()
    other.backward()
    two_phase.second_step()
    if is_done_before:
        mine.backward()
    optimizer.step((lambda: None) if is_done_before else mine.backward)
    assert not optimizer.perturbed
    assert_same_bits(mine.weights(), other.weights())


@every_base
@pytest.mark.parametrize(("after_first_step", "act", "message"), refusals().values(), ids=refusals())
def test_phases_out_of_order_are_refused(backend, device, base, after_first_step, act, message):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    problem.backward()
    if after_first_step:
        optimizer.first_step(zero_grad=False)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        act(optimizer, problem)
    before.assert_unchanged()


@every_base
@first_or_later
def test_first_step_without_any_gradient_is_refused(backend, device, base, warm):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    if warm:
        problem.step(optimizer)
    optimizer.zero_grad()
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"no parameter has a gradient; call backward\(\)"):
        optimizer.first_step()
    before.assert_unchanged()


@every_base
def test_restore_undoes_perturbation(backend, device, base):
    problem, undisturbed = Problem(device), Problem(device)
    optimizer, other = problem.optimizer(backend, base), undisturbed.optimizer(backend, base)
    for _ in range(2):
        problem.step(optimizer)
        undisturbed.step(other)
        before = Snapshot(optimizer)
        problem.first_step(optimizer)
        assert optimizer.perturbed
        assert not torch.equal(problem.params[0].detach(), before.weights[0])
        assert optimizer.restore() is None
        before.assert_unchanged(grads=False)
        optimizer.restore()
        before.assert_unchanged(grads=False)
    assert_same_bits(problem.weights(), undisturbed.weights())


def test_restore_brings_back_every_bit_pattern(backend, device):
    patterns = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38, float("inf"), float("nan")], device=device)
    patterns = torch.cat(
        [patterns, torch.tensor([0x7FC00001, -0x3FFFFF], dtype=torch.int32, device=device).view(torch.float32)]
    )
    param = nn.Parameter(patterns.clone())
    optimizer = FastSAM([param], lr=0.1, rho=1e3, backend=backend)
    param.grad = torch.ones_like(param)
    optimizer.first_step()
    assert (param.detach() != patterns).sum() > 4
    optimizer.restore()
    assert_same_bits(param.detach(), patterns)


@every_base
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_gradient_that_is_not_finite_does_not_perturb(backend, device, base, adaptive, bad):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base, adaptive=adaptive)
    start = problem.weights()
    problem.backward()
    problem.params[2].grad[0, 0] = bad
    optimizer.first_step()
    assert optimizer.perturbed
    assert_same_bits(problem.weights(), start)
    problem.backward()
    optimizer.second_step()
    assert all(w.isfinite().all() for w in problem.weights())
    assert not torch.equal(problem.params[0].detach(), start[0])
