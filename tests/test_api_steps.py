"""step(closure), the two phases, ascent_closure and restore(); and what an exception or a Ctrl-C leaves behind."""

import os
import signal
import sys
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import triton_interpreter
from checks import assert_same_bits, values
from problem import BASES, FUSED_BASES, Problem, Snapshot, assert_same_state, give_grad, state_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastsam
from fastsam import FastSAM
from fastsam import optimizer as optimizer_module
from fastsam.backends import load
from fastsam.tables import TensorTable

PACKAGE = str(Path(fastsam.__file__).parent)
TORCH_OPTIM = str(Path(torch.optim.__file__).parent)
UPDATES = ("restore_and_sgd_", "restore_and_adam_")

base_names = pytest.mark.parametrize("base", BASES)


class Stop(Exception):
    """What the tests' closures raise."""


@pytest.fixture
def interruptible():
    """Ctrl-C is a KeyboardInterrupt here even where the test run ignores it, as one in the background does."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, previous)


class TwoDtypes(Problem):
    """A problem with two tables: the second layer and the batch's second half are in float64."""

    def __init__(self, device):
        super().__init__(device)
        self.model[2].double()

    def loss(self):
        return (self.model[2](self.model[1](self.model[0](self.x)).double()) - self.y).square().mean()


class WideGradients(Problem):
    """The first layer is in bfloat16 and has float32 gradients."""

    def __init__(self, device):
        super().__init__(device)
        self.model[0].bfloat16()

    def loss(self):
        return (self.model[2](self.model[1](self.model[0](self.x.bfloat16()).float())) - self.y).square().mean()

    def backward(self):
        loss = super().backward()
        for param in self.model[0].parameters():
            give_grad(param, param.grad.float())
        return loss


def passes(problem, optimizer, log, *, clear=True):
    """A closure that notes in ``log`` what it found: grad mode, gradients before, gradients made, weights."""

    def closure():
        found = [None if p.grad is None else p.grad.clone() for p in problem.params]
        if clear:
            optimizer.zero_grad()
        loss = problem.backward()
        log.append(
            {
                "grad_enabled": torch.is_grad_enabled(),
                "found": found,
                "made": [p.grad.clone() for p in problem.params],
                "weights": problem.weights(),
                "loss": loss,
            }
        )
        return loss

    return closure


# ---- step(closure) ----


@base_names
def test_a_step_is_two_passes_and_an_update(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    log, start = [], problem.weights()
    returned = optimizer.step(passes(problem, optimizer, log))
    first, second = log
    assert returned is first["loss"]
    assert_same_bits(first["weights"], start)
    moved = torch.cat([(b.double() - a.double()).flatten() for a, b in zip(start, second["weights"], strict=True)])
    assert float(moved.norm()) == pytest.approx(0.05, rel=1e-5)
    assert_same_bits([p.grad for p in problem.params], second["made"], "gradients after the step")
    assert not optimizer.perturbed
    assert all((a != b).any() for a, b in zip(start, problem.weights(), strict=True))


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"maximize": True}, {"nesterov": True}], ids=str)
def test_the_update_leaves_the_gradients_as_they_are(backend, device, options):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, **options)
    log = []
    for _ in range(2):
        optimizer.step(passes(problem, optimizer, log))
        assert_same_bits([p.grad for p in problem.params], log[-1]["made"])


@pytest.mark.parametrize("outside", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_closures_run_with_gradients_enabled(backend, device, outside):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    log = []
    with outside():
        mode = torch.is_grad_enabled()
        optimizer.step(passes(problem, optimizer, log))
        optimizer.step(passes(problem, optimizer, log), ascent_closure=passes(problem, optimizer, log))
        assert torch.is_grad_enabled() is mode
    assert [entry["grad_enabled"] for entry in log] == [True] * 4


def test_nothing_is_cleared_before_the_first_pass_and_everything_before_the_second(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    earlier = [values(p.shape, p.dtype, device, seed=3) for p in problem.params]
    for p, g in zip(problem.params, earlier, strict=True):
        p.grad = g.clone()
    log = []
    optimizer.step(passes(problem, optimizer, log, clear=False))
    first, second = log
    assert_same_bits(first["found"], earlier)
    assert second["found"] == [None] * 4
    # The first pass accumulated, and that sum is what the climb follows.
    alone = Problem(device)
    alone.backward()
    for p, g, made in zip(alone.params, earlier, first["made"], strict=True):
        torch.testing.assert_close(made, g + p.grad)
    assert_same_bits([p.grad for p in problem.params], second["made"])


def test_gradients_that_are_absent_stay_absent(backend, device):
    """Not zeros: momentum and weight decay would move a parameter that has none."""
    problem = Problem(device)
    unused = nn.Parameter(torch.ones(3, device=device))
    optimizer = FastSAM([*problem.params, unused], lr=0.1, momentum=0.9, weight_decay=0.1, backend=backend)
    for _ in range(2):
        optimizer.step(problem.backward)  # clears nothing
        assert unused.grad is None
    assert_same_bits(unused.detach(), torch.ones(3, device=device))
    assert unused not in optimizer.state


@base_names
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_no_gradient_anywhere_is_a_no_op(backend, device, base, warm):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    if warm:
        problem.step(optimizer)
        optimizer.zero_grad()
    before, calls = Snapshot(optimizer), []
    assert optimizer.step(lambda: calls.append(1) or "loss") == "loss"
    assert calls == [1]
    before.assert_unchanged()
    problem.step(optimizer)
    assert not torch.equal(problem.params[0].detach(), before.weights[0])


@base_names
def test_addresses_never_change(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    addresses = [p.data_ptr() for p in problem.params]
    storages = [p.untyped_storage().data_ptr() for p in problem.params]
    seen = []

    def closure():
        seen.append([p.data_ptr() for p in problem.params])
        return problem.closure(optimizer)()

    for _ in range(2):
        optimizer.step(closure)
    problem.two_phase(optimizer)
    problem.first_step(optimizer)
    optimizer.restore()
    assert seen == [addresses] * 4
    assert [p.data_ptr() for p in problem.params] == addresses
    assert [p.untyped_storage().data_ptr() for p in problem.params] == storages


@base_names
def test_parameters_without_a_gradient_in_the_second_pass_come_back(backend, device, base):
    """-0.0 and a NaN of its own bits among them: what comes back is the bits."""
    weights = torch.tensor([1.0, -0.0, 1e-42, 3.0e38], device=device)
    used, left = nn.Parameter(values((5,), torch.float32, device)), nn.Parameter(weights.clone())
    cls, options = BASES[base]
    optimizer = FastSAM([used, left], cls, rho=0.5, backend=backend, **options)
    for step in range(2):
        calls = []

        def closure(calls=calls):
            calls.append(left.detach().clone())
            loss = used.square().sum()
            if len(calls) == 1:
                loss = loss + (left * values((4,), torch.float32, device, seed=4)).sum()
            loss.backward()
            return loss

        optimizer.zero_grad()
        optimizer.step(closure)
        assert (calls[0] != calls[1]).any(), "it was to climb"
        assert left.grad is None
        assert_same_bits(left.detach(), weights, f"step {step}")
    assert left not in optimizer.state


@base_names
def test_no_gradient_at_all_in_the_second_pass(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    before, calls = Snapshot(optimizer), []

    def closure():
        calls.append(problem.weights())
        optimizer.zero_grad()
        return problem.backward() if len(calls) == 1 else None

    optimizer.step(closure)
    assert len(calls) == 2
    before.assert_unchanged(grads=False)


def test_a_gradient_in_the_second_pass_only(backend, device):
    late, other = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    optimizer = FastSAM([late, other], lr=0.5, backend=backend)
    seen = []

    def closure():
        seen.append(late.detach().clone())
        (other.sum() if len(seen) == 1 else other.sum() + late.sum()).backward()

    optimizer.step(closure)
    assert_same_bits(seen[1], torch.ones(3, device=device), "did not climb")
    assert_same_bits(late.detach(), torch.full((3,), 0.5, device=device), "but was updated")


def test_a_worker_thread_may_train(backend, device):
    here, there = Problem(device), Problem(device)
    one, two = here.optimizer(backend), there.optimizer(backend)
    here.step(one)
    worker = threading.Thread(target=there.step, args=(two,))
    worker.start()
    worker.join()
    assert_same_bits(there.weights(), here.weights())


def test_a_step_within_a_step_is_refused(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    before, calls = Snapshot(optimizer), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            optimizer.step(problem.backward)
        return problem.backward()

    with pytest.raises(RuntimeError, match=r"step\(closure\) is not possible while the weights are climbed"):
        optimizer.step(closure)
    before.assert_unchanged(grads=False)


@base_names
@pytest.mark.parametrize("end", ["step", "two-phase", "restore", "raise", "refused"])
def test_gradients_are_let_go(backend, device, base, end):
    """Held beyond the phase that read them, they would double the memory of the next backward."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    grads = []

    def backward():
        optimizer.zero_grad()
        assert [ref() for ref in grads] == [None] * len(grads)
        problem.backward()
        grads.extend(weakref.ref(p.grad) for p in problem.params)
        if end == "raise" and len(grads) == 8:
            raise Stop

    if end == "step":
        optimizer.step(backward)
    elif end == "raise":
        with pytest.raises(Stop):
            optimizer.step(backward)
    elif end == "refused":
        optimizer.param_groups[0]["rho"] = -1.0
        with pytest.raises(ValueError, match="rho"):
            optimizer.step(backward)
    else:
        backward()
        optimizer.first_step()
        backward()
        optimizer.second_step() if end == "two-phase" else optimizer.restore()
    optimizer.zero_grad()
    assert [ref() for ref in grads] == [None] * len(grads)


class Operators(TorchDispatchMode):
    """The operators that are run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Staging memory is the host's, and used again and again.
        self.names.append("staging" if kwargs.get("pin_memory") else str(func))
        return func(*args, **kwargs)


# Each makes the host wait for an accelerator.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


@pytest.mark.parametrize("base", FUSED_BASES)
def test_nothing_is_read_back(backend, device, base):
    """As far as a CPU shows it: no operator that hands a tensor's value to Python."""
    if backend in ("reference", "foreach") and device.type == "cpu":
        pytest.skip("where reading costs nothing, these compute with Python's numbers")
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    scaler = torch.amp.GradScaler(device.type)
    for _ in range(2):
        scaler.scale(problem.loss()).backward()
        with Operators() as first:
            optimizer.first_step()
        scaler.scale(problem.loss()).backward()
        with Operators() as second:
            scaler.step(optimizer)
        scaler.update()
        names = [name.removeprefix("aten.").split(".")[0] for name in first.names + second.names]
        assert names
        assert not set(READS) & set(names)
        optimizer.zero_grad()


@pytest.mark.parametrize("base", FUSED_BASES)
def test_later_steps_of_kernels_allocate_nothing(operations, backend, device, base):
    if backend in ("reference", "foreach"):
        pytest.skip("temporaries are how they compute")
    problem = TwoDtypes(device)
    optimizer = problem.optimizer(backend, base)
    for _ in range(2):
        problem.step(optimizer)
    problem.backward()
    with Operators() as first:
        optimizer.first_step()
    problem.backward()
    with Operators() as second:
        optimizer.second_step()
    assert backend != "native" or any("perturb_" in name for name in first.names)
    allocating = [n for n in first.names + second.names if any(w in n for w in ("empty", "zeros", "clone", "_to_copy"))]
    assert allocating == []


# ---- ascent_closure ----


@base_names
def test_ascent_closure_takes_the_first_pass(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    order = []
    loss = optimizer.step(
        lambda: order.append("descent") or problem.backward(),
        ascent_closure=lambda: order.append("ascent") or problem.backward(),
    )
    assert order == ["ascent", "descent"]
    assert_same_bits(loss.detach(), Problem(device).loss().detach())


def test_ascent_closure_on_a_part_of_the_batch_is_the_two_phases_on_it(backend, device):
    one, two = Problem(device), Problem(device)
    mine, phases = one.optimizer(backend), two.optimizer(backend)

    def part(problem):
        loss = (problem.model(problem.x[:3]) - problem.y[:3]).square().mean()
        loss.backward()
        return loss

    for _ in range(3):
        mine.zero_grad()
        mine.step(one.closure(mine), ascent_closure=lambda: part(one))
        phases.zero_grad()
        part(two)
        phases.first_step()
        two.backward()
        phases.second_step()
        assert_same_bits(one.weights(), two.weights())


def test_ascent_closure_alone_is_refused(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.backward()
    for perturbed in (False, True):
        if perturbed:
            optimizer.first_step(zero_grad=False)
        before = Snapshot(optimizer)
        with pytest.raises(RuntimeError, match="ascent_closure needs a closure"):
            optimizer.step(ascent_closure=problem.backward)
        before.assert_unchanged()


# ---- the two phases ----


@base_names
def test_two_phases_are_the_closure_step(backend, device, base):
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


def test_second_step_goes_through_a_subclass_step(backend, device):
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
    climbed = "is not possible while the weights are climbed; call second_step\\(\\) or restore\\(\\) first"
    return {
        "step-without-closure": (
            False,
            lambda o, p: o.step(),
            r"step\(\) needs a closure.*first_step\(\).*second_step\(\)",
        ),
        "second-without-first": (False, lambda o, p: o.second_step(), r"second_step\(\) without first_step\(\)"),
        "first-twice": (True, lambda o, p: o.first_step(), rf"first_step\(\) {climbed}"),
        "closure-while-climbed": (True, lambda o, p: o.step(p.backward), rf"step\(closure\) {climbed}"),
    }


@base_names
@pytest.mark.parametrize(("climb", "act", "message"), refusals().values(), ids=refusals())
def test_phases_out_of_order_are_refused(backend, device, base, climb, act, message):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    problem.backward()
    if climb:
        optimizer.first_step(zero_grad=False)
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        act(optimizer, problem)
    before.assert_unchanged()


@base_names
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
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


@base_names
def test_restore_gives_the_climb_up(backend, device, base):
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


@base_names
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_gradient_that_is_not_finite_does_not_climb(backend, device, base, bad):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
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


# ---- refused: gradients, and parameters that change under way ----


class Bag(nn.Module):
    """An embedding whose gradient can be sparse, beside a dense weight."""

    def __init__(self, device):
        super().__init__()
        self.table = nn.Embedding(6, 3).to(device)
        self.scale = nn.Parameter(torch.ones(3, device=device))

    def backward(self, sparse):
        self.table.sparse = sparse
        rows = self.table(torch.tensor([0, 2, 2], device=self.scale.device))
        (rows * self.scale).square().sum().backward()


@base_names
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("sparse_pass", [1, 2], ids=["in-pass-1", "in-pass-2"])
def test_sparse_gradients_are_refused(backend, device, base, sparse_pass, warm):
    bag = Bag(device)
    cls, options = BASES[base]
    optimizer = FastSAM(bag.parameters(), cls, backend=backend, **options)
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(1)
        bag.backward(sparse=len(calls) == sparse_pass)

    if warm:
        calls = [0] * 10
        optimizer.step(closure)
        calls = []
    before = Snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 1 \(shape \(6, 3\)\): sparse gradients are not supported"):
        optimizer.step(closure)
    before.assert_unchanged(grads=False)
    calls = [0] * 10
    optimizer.step(closure)
    assert not torch.equal(bag.table.weight.detach(), before.weights[1])


def test_a_bad_rho_in_a_group_is_refused_by_the_next_step(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    for rho, error in ((-1.0, ValueError), (float("nan"), ValueError), ("far", TypeError), (torch.ones(2), ValueError)):
        optimizer.param_groups[0]["rho"] = rho
        weights, state = problem.weights(), state_of(optimizer)
        with pytest.raises(error, match="rho must be"):
            problem.step(optimizer)
        assert not optimizer.perturbed
        assert_same_bits(problem.weights(), weights)
        assert_same_state(state_of(optimizer), state)


CHANGES = {
    "cast": lambda problem: problem.model.double(),
    "other-memory": lambda problem: setattr(problem.params[2], "data", problem.params[2].data.clone()),
}


@base_names
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_model_that_changes_between_the_passes_is_refused_and_restored(backend, device, base, change):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    start, state, calls = problem.weights(), state_of(optimizer), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            change(problem)
            problem.x, problem.y = (t.to(problem.params[0].dtype) for t in (problem.x, problem.y))
        return problem.closure(optimizer)()

    with pytest.raises(
        RuntimeError, match=r"parameter \d \(shape .*\) was moved, cast or given other memory.*restore\(\)"
    ):
        optimizer.step(closure)
    assert not optimizer.perturbed
    assert_same_bits([w.float() for w in problem.weights()], start)
    assert_same_state(state_of(optimizer), state)
    problem.step(optimizer)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_restore_follows_a_model_that_changed(backend, device, change):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    start = problem.weights()
    problem.first_step(optimizer)
    change(problem)
    optimizer.restore()
    assert not optimizer.perturbed
    assert_same_bits([w.float() for w in problem.weights()], start)


# ---- exceptions ----


@base_names
@pytest.mark.parametrize("kind", [Stop, KeyboardInterrupt], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("call", [1, 2], ids=["pass-1", "pass-2"])
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_a_closure_that_raises_changes_nothing(backend, device, base, kind, call, warm):
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


def test_an_ascent_closure_that_raises_changes_nothing(backend, device):
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


@base_names
@pytest.mark.parametrize(("operation", "after"), OPERATIONS.items(), ids=OPERATIONS)
def test_an_operation_of_the_climb_that_fails_changes_nothing(
    backend, device, operations, monkeypatch, base, operation, after
):
    """Of two tables the first has climbed when the second one's operation fails."""
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


@pytest.mark.parametrize("base", FUSED_BASES)
def test_an_update_that_fails_leaves_no_climbed_weights(backend, device, operations, monkeypatch, base):
    problem = TwoDtypes(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    before = Snapshot(optimizer)

    def fail(*args):
        raise Stop

    with monkeypatch.context() as patch:
        for name in UPDATES:
            patch.setattr(operations, name, fail)
        with pytest.raises(Stop):
            problem.step(optimizer)
    before.assert_unchanged(grads=False)


@base_names
def test_a_base_that_fails_leaves_no_climbed_weights(backend, device, monkeypatch, base):
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


def _raises(kind, act, *arguments):
    try:
        act(*arguments)
    except kind:
        return True
    return False


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


FAILING = [*((base, TwoDtypes) for base in BASES), *((base, WideGradients) for base in FUSED_BASES)]


@pytest.mark.parametrize(("base", "make_problem"), FAILING, ids=lambda x: x if isinstance(x, str) else x.__name__)
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
def test_any_operator_that_fails_before_the_update_changes_nothing(
    backend, device, operations, monkeypatch, base, make_problem, warm
):
    """Every single operator of PyTorch's outside the closures, allocations among them, fails in its turn."""
    began = []
    starts = [
        (TensorTable, "publish_state"),
        (optimizer_module, "unhooked_step"),
        *((module, name) for module in {operations, load("foreach", device.type)} for name in UPDATES),
    ]
    for module, name in starts:
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, run=run: (began.append(1), run(*a))[1])
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
            raised = _raises(torch.OutOfMemoryError, optimizer.step, closure)
        if began:
            break
        assert raised
        before.assert_unchanged(grads=False)
        failed.append(mode.failed)
    assert any("perturb" in name or "copy_" in name for name in failed)
    # Backups, and where the base is fused a state.
    allocations = [name for name in failed if "empty" in name or "zeros" in name]
    assert warm or len(allocations) >= (2 if base == "rmsprop" else 4)


@pytest.mark.parametrize("base", FUSED_BASES)
def test_all_state_is_allocated_before_any_is_put_in_place(backend, device, operations, monkeypatch, base):
    """Of two tables the second must not run out of memory when the first one's state is there already."""
    problem, ran = TwoDtypes(device), Operators()
    optimizer = problem.optimizer(backend, base)
    positions = {}
    for module, name in [(TensorTable, "publish_state"), *((operations, name) for name in UPDATES)]:
        run = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, n=name, run=run: (positions.setdefault(n, len(ran.names)), run(*a))[1]
        )
    problem.first_step(optimizer)
    problem.backward()
    with ran:
        optimizer.second_step()
    first = positions.pop("publish_state")
    (last,) = positions.values()
    assert any("zeros" in name for name in ran.names[:first])
    assert [n for n in ran.names[first:last] if any(w in n for w in ("empty", "zeros", "clone", "_to_copy"))] == []


# ---- Ctrl-C ----

MOMENTS = ["before", "in-forward", "in-backward", "after"]


@base_names
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("call", [1, 2], ids=["pass-1", "pass-2"])
def test_ctrl_c_in_a_closure_changes_nothing(backend, device, interruptible, base, moment, call):
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


@base_names
@pytest.mark.parametrize("when", ["before", "after"])
def test_ctrl_c_during_the_update_waits_for_its_end(
    backend, device, operations, interruptible, monkeypatch, base, when
):
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
            patch.setattr(optimizer_module, "unhooked_step", interrupted(optimizer_module.unhooked_step))
        for name in UPDATES:
            patch.setattr(operations, name, interrupted(getattr(operations, name)))
        with pytest.raises(KeyboardInterrupt):
            problem.step(optimizer)
    assert len(ran) == (1 if base == "rmsprop" else 2), "to its end"
    assert not optimizer.perturbed
    assert_same_bits(problem.weights(), undisturbed.weights())
    assert_same_state(state_of(optimizer), state_of(other))


def test_ctrl_c_during_first_step_leaves_a_climb_that_restore_ends(
    backend, device, operations, interruptible, monkeypatch
):
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


@base_names
@pytest.mark.parametrize("warm", [False, True], ids=["first", "later"])
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
            interrupted = _raises(KeyboardInterrupt, problem.step, optimizer)
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
        nth += triton_interpreter.fewer(19, 61, backend, device)  # every line would take minutes
    assert outcomes["nothing"] > 10
    assert outcomes["all"] > 0


@pytest.mark.parametrize(
    "files",
    [(PACKAGE,), (f"{PACKAGE}/tensor_table.py", f"{PACKAGE}/backends")],
    ids=["anywhere", "in-the-work-itself"],
)
def test_ctrl_c_while_an_exception_is_undone(backend, device, interruptible, files):
    """Of an impatient user's two, the second does not stop the undoing; between two lines of Python it may at worst
    leave a climb, which restore() ends.
    """
    problem = TwoDtypes(device)
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    before, calls, climbs = Snapshot(optimizer), [], 0

    def closure():
        calls.append(1)
        problem.closure(optimizer)()
        if len(calls) == 2:
            raise Stop

    with ctrl_c_at_line(0, files) as count, pytest.raises(Stop):
        optimizer.step(closure)
    for nth in range(count[0], count[0] - 40, -1):
        calls.clear()
        with ctrl_c_at_line(nth, files), pytest.raises((KeyboardInterrupt, Stop)):
            optimizer.step(closure)
        climbs += optimizer.perturbed
        optimizer.restore()
        before.assert_unchanged(grads=False)
    assert climbs == 0 or files == (PACKAGE,)
