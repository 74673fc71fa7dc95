"""What a Ctrl-C leaves behind: the step is made, or it is not."""

import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import internals
import pytest
import torch
import triton_interpreter
from checks import assert_same_bits
from problem import Problem, Snapshot, Stop, TwoDtypes, assert_same_state, patched, raises, state_of
from registry import every_base, first_or_later

import fastsam

PACKAGE = str(Path(fastsam.__file__).parent)
TORCH_OPTIM = str(Path(torch.optim.__file__).parent)
MOMENTS = ["before", "in-forward", "in-backward", "after"]


@every_base
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", [1, 2], ids=["pass-1", "pass-2"])
def test_ctrl_c_in_closure_changes_nothing(backend, device, interruptible, base, moment, call):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    before, calls = Snapshot(optimizer), []

    def ctrl_c(at):
        if at == moment and len(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)

    problem.model[1].register_forward_hook(lambda *_: ctrl_c("in-forward"))
    problem.model[1].register_full_backward_hook(lambda *_: ctrl_c("in-backward"))

    def closure():
        calls.append(1)
        ctrl_c("before")
        problem.closure(optimizer)()
        ctrl_c("after")

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert len(calls) == call
    before.assert_unchanged(grads=False)


@every_base
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_during_update_waits_for_its_end(backend, device, operations, interruptible, monkeypatch, base, when):
    problem, undisturbed = TwoDtypes(device), TwoDtypes(device)
    optimizer, other = problem.optimizer(backend, base), undisturbed.optimizer(backend, base)
    undisturbed.step(other)
    ran = []

    def interrupted(run):
        def wrapper(*args, **kwargs):
            if when == "before":
                signal.raise_signal(signal.SIGINT)
            run(*args, **kwargs)
            if when == "after":
                signal.raise_signal(signal.SIGINT)
            ran.append(1)

        return wrapper

    with monkeypatch.context() as patch:
        if base == "rmsprop":
            patched(patch, [internals.base_step], interrupted)
        patched(patch, internals.update_operations(operations), interrupted)
        with pytest.raises(KeyboardInterrupt):
            problem.step(optimizer)
    assert len(ran) == (3 if base == "rmsprop" else 2), "to its end"
    assert not optimizer.perturbed
    assert_same_bits(problem.weights(), undisturbed.weights())
    assert_same_state(state_of(optimizer), state_of(other))


def test_ctrl_c_during_first_step_can_be_restored(backend, device, operations, interruptible, monkeypatch):
    problem = TwoDtypes(device)
    optimizer = problem.optimizer(backend)
    before, perturb = Snapshot(optimizer), operations.perturb_

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        perturb(*args)

    with monkeypatch.context() as patch:
        patch.setattr(operations, "perturb_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            problem.first_step(optimizer)
    optimizer.restore()
    before.assert_unchanged(grads=False)


@contextmanager
def ctrl_c_at_line(nth, files=(PACKAGE, TORCH_OPTIM)):
    """SIGINT when the ``nth`` line of the code under ``files`` is about to run; gives the count of those run."""
    count = [0]

    def trace(frame, event, arg):
        if not frame.f_code.co_filename.startswith(files):
            return None
        if event == "line":
            count[0] += 1
            if count[0] == nth:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(previous)


@every_base
@first_or_later
def test_ctrl_c_anywhere_is_all_or_nothing(backend, device, interruptible, base, warm):
    """A real SIGINT at one line after the other: afterwards the step has been made, or it has not."""
    made = TwoDtypes(device)
    after = made.optimizer(backend, base)
    for _ in range(1 + warm):
        made.step(after)
    outcomes, nth, problem = {"nothing": 0, "all": 0}, 1, None
    while True:
        if problem is None or not warm:  # a first step is one only once
            problem = TwoDtypes(device)
            optimizer = problem.optimizer(backend, base)
            for _ in range(warm):
                problem.step(optimizer)
            before = Snapshot(optimizer)
        with ctrl_c_at_line(nth) as count:
            interrupted = raises(KeyboardInterrupt, problem.step, optimizer)
        if count[0] < nth:
            break
        assert interrupted, f"at line {nth}"
        assert not optimizer.perturbed, f"at line {nth}"
        if torch.equal(problem.params[0].detach(), before.weights[0]):
            outcomes["nothing"] += 1
            before.assert_unchanged(grads=False)
        else:
            outcomes["all"] += 1
            assert_same_bits(problem.weights(), made.weights(), f"at line {nth}")
            assert_same_state(state_of(optimizer), state_of(after))
            problem = None
        nth += triton_interpreter.fewer(19, 251, backend, device)  # every line would take minutes
    assert outcomes["nothing"] > triton_interpreter.fewer(10, 2, backend, device)
    assert outcomes["all"] > 0


CONDUCTORS = tuple(f"{PACKAGE}/{name}" for name in ("engine.py", "optimizer.py", "phases.py", "runtime/grad_mode.py"))


def test_steps_go_on_after_ctrl_c_at_every_line(device):
    """No flag and no mode stays as it was within the step."""
    problem = TwoDtypes(device)
    optimizer = problem.optimizer("auto")
    problem.step(optimizer)
    nth, lines = 1, 1
    while nth <= lines:
        with ctrl_c_at_line(nth, CONDUCTORS):
            interrupted = raises(KeyboardInterrupt, problem.step, optimizer)
        assert torch.is_grad_enabled(), f"at line {nth}"
        assert not optimizer.perturbed, f"at line {nth}"
        with ctrl_c_at_line(0, CONDUCTORS) as count:
            problem.step(optimizer)
        lines = count[0]
        assert interrupted, f"at line {nth}"
        nth += 1
    assert lines > 100


@pytest.mark.parametrize(
    "files",
    [(PACKAGE,), tuple(f"{PACKAGE}/{name}" for name in internals.WORK_FILES)],
    ids=["anywhere", "in-the-work-itself"],
)
def test_ctrl_c_while_exception_is_undone(backend, device, interruptible, files):
    """Of an impatient user's two, the second does not stop the undoing; between two lines of Python it may at worst
    leave a perturbation, which restore() ends.
    """
    problem = TwoDtypes(device)
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    before, calls, perturbations = Snapshot(optimizer), [], 0

    def closure():
        calls.append(1)
        problem.closure(optimizer)()
        if len(calls) == 2:
            raise Stop

    with ctrl_c_at_line(0, files) as count, pytest.raises(Stop):
        optimizer.step(closure)
    for nth in range(count[0], count[0] - triton_interpreter.fewer(40, 12, backend, device), -1):
        calls.clear()
        with ctrl_c_at_line(nth, files), pytest.raises((KeyboardInterrupt, Stop)):
            optimizer.step(closure)
        perturbations += optimizer.perturbed
        optimizer.restore()
        before.assert_unchanged(grads=False)
    assert perturbations == 0 or files == (PACKAGE,)
