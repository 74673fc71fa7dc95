"""What an exception, or an operator that fails, leaves behind: the step is made, or it is not."""

import itertools

import internals
import pytest
import torch
from checks import assert_same_bits
from problem import (
    Operators,
    Problem,
    Snapshot,
    Stop,
    TwoDtypes,
    WideGradients,
    assert_same_state,
    patched,
    raises,
    state_of,
)
from registry import BASES, by_default, every_base, every_fused_base, first_or_later
from torch.utils._python_dispatch import TorchDispatchMode


@every_base
@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("call", [1, 2], ids=["pass-1", "pass-2"])
@first_or_later
def test_closure_that_raises_changes_nothing(backend, device, base, kind, call, warm):
    problem = TwoDtypes(device)
    optimizer = problem.optimizer(backend, base)
    if warm:
        problem.step(optimizer)
    before, error, calls = Snapshot(optimizer), kind("enough"), []

    def closure():
        calls.append(1)
        problem.closure(optimizer)()
        if len(calls) == call:
            raise error

    with pytest.raises(kind) as caught:
        optimizer.step(closure)
    assert caught.value is error
    before.assert_unchanged(grads=False)
    # And nothing is left behind: training goes on as if the failed step had never been tried.
    other = TwoDtypes(device)
    expected = other.optimizer(backend, base)
    for _ in range(1 + warm):
        other.step(expected)
    problem.step(optimizer)
    assert_same_bits(problem.weights(), other.weights())
    assert_same_state(state_of(optimizer), state_of(expected))


def test_ascent_closure_that_raises_changes_nothing(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    before, error = Snapshot(optimizer), Stop()

    def ascent():
        problem.backward()
        raise error

    with pytest.raises(Stop) as caught:
        optimizer.step(problem.backward, ascent_closure=ascent)
    assert caught.value is error
    before.assert_unchanged(grads=False)


OPERATIONS = {"grad_norm": 0, "perturb_-1": 0, "perturb_-2": 1}


@every_base
@pytest.mark.parametrize(("operation", "after"), OPERATIONS.items(), ids=OPERATIONS)
def test_operation_of_perturbation_that_fails_changes_nothing(
    backend, device, operations, monkeypatch, base, operation, after
):
    """Of two tables the first is perturbed when the second one's operation fails."""
    problem = TwoDtypes(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    before, calls = Snapshot(optimizer), []
    name = operation.split("-")[0]
    original = getattr(operations, name)

    def fail(*args):
        calls.append(1)
        if len(calls) > after:
            raise Stop
        return original(*args)

    for run in (lambda: problem.step(optimizer), lambda: problem.first_step(optimizer)):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(operations, name, fail)
            with pytest.raises(Stop):
                run()
        assert len(calls) == after + 1
        before.assert_unchanged(grads=False)


@every_fused_base
def test_update_that_fails_leaves_no_perturbed_weights(backend, device, operations, monkeypatch, base):
    problem = TwoDtypes(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    before = Snapshot(optimizer)

    def fail(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patched(patch, internals.update_operations(operations), lambda run: fail)
        with pytest.raises(Stop):
            problem.step(optimizer)
    before.assert_unchanged(grads=False)


@every_base
def test_base_that_fails_leaves_no_perturbed_weights(backend, device, monkeypatch, base):
    """Whatever the base does: here, options that it has lost."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    lr = optimizer.param_groups[0].pop("lr")
    before = Snapshot(optimizer)
    with pytest.raises(KeyError, match="lr"):
        problem.step(optimizer)
    before.assert_unchanged(grads=False)
    optimizer.param_groups[0]["lr"] = lr
    problem.step(optimizer)


class FailAt(TorchDispatchMode):
    """The ``nth`` operator that is run while ``armed`` fails, as any that allocates may."""

    def __init__(self, nth):
        super().__init__()
        self.nth, self.count, self.armed, self.failed = nth, 0, True, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.armed:
            self.count += 1
            if self.count == self.nth:
                self.failed = str(func)
                raise torch.OutOfMemoryError(self.failed)
        return func(*args, **(kwargs or {}))


EVERY_STEP = list(itertools.product(internals.BACKENDS, BASES, [False, True]))
# In Triton's interpreter a first step takes half a minute: each of its operators fails in a step of its own.
QUICK = [case for case in EVERY_STEP if case[0] != "triton" or case[2]]


@pytest.mark.parametrize(("backend", "base", "warm"), by_default(EVERY_STEP, QUICK), indirect=["backend"])
def test_any_failing_operator_before_update_changes_nothing(backend, device, operations, monkeypatch, base, warm):
    """Every single operator of PyTorch's outside the closures, allocations among them, fails in its turn."""
    assert_nothing_changes_before_update(TwoDtypes, backend, device, operations, monkeypatch, base, warm)


@every_fused_base
@first_or_later
@pytest.mark.parametrize("backend", ["foreach"], indirect=True)  # which wide gradients have, whatever is asked for
def test_any_failing_operator_with_wide_gradients(backend, device, operations, monkeypatch, base, warm):
    assert_nothing_changes_before_update(WideGradients, backend, device, operations, monkeypatch, base, warm)


def assert_nothing_changes_before_update(make_problem, backend, device, operations, monkeypatch, base, warm):
    began = []
    starts = [internals.publish_state, internals.base_step, *internals.update_operations(operations)]
    patched(monkeypatch, starts, lambda run: lambda *a: (began.append(1), run(*a))[1])
    problem, failed = None, []
    for nth in range(1, 1000):
        if problem is None or not warm:  # a first step is one only once
            problem = make_problem(device)
            optimizer = problem.optimizer(backend, base)
            for _ in range(warm):
                problem.step(optimizer)
            before = Snapshot(optimizer)
            began.clear()
        mode = FailAt(nth)

        def closure(problem=problem, optimizer=optimizer, mode=mode):
            mode.armed = False
            loss = problem.closure(optimizer)()
            mode.armed = True
            return loss

        with mode:
            raised = raises(torch.OutOfMemoryError, optimizer.step, closure)
        if began:
            break
        assert raised
        before.assert_unchanged(grads=False)
        failed.append(mode.failed)
    assert any("perturb" in name or "copy_" in name for name in failed)
    # Backups, and where the base is fused a state.
    allocations = [name for name in failed if "empty" in name or "zeros" in name]
    assert warm or len(allocations) >= (2 if base == "rmsprop" else 4)


@every_fused_base
def test_all_state_is_allocated_before_any_is_put_in_place(backend, device, operations, monkeypatch, base):
    """Of two tables the second must not run out of memory when the first one's state is there already."""
    problem, ran = TwoDtypes(device), Operators()
    optimizer = problem.optimizer(backend, base)
    positions = {}

    def noting(what):
        return lambda run: lambda *a: (positions.setdefault(what, len(ran.names)), run(*a))[1]

    patched(monkeypatch, [internals.publish_state], noting("state"))
    patched(monkeypatch, internals.update_operations(operations), noting("update"))
    problem.first_step(optimizer)
    problem.backward()
    with ran:
        optimizer.second_step()
    first, last = positions["state"], positions["update"]
    assert any("resize_" in name for name in ran.names[:first])
    allocations = ("empty", "zeros", "full", "clone", "_to_copy", "resize_")
    assert [name for name in ran.names[first:last] if any(word in name for word in allocations)] == []
