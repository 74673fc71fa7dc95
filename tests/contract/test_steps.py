"""step(closure) and ascent_closure."""

import threading
import weakref

import pytest
import torch
from checks import assert_same_bits, values
from problem import Operators, Problem, Snapshot, Stop, TwoDtypes
from registry import BASES, METHODS, every_base, every_fused_base, first_or_later, kernel_backends
from torch import nn

from fastsam import FastSAM


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


@every_base
def test_step_is_two_passes_and_update(backend, device, base):
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
def test_update_leaves_gradients_as_they_are(backend, device, options):
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


def test_nothing_is_cleared_before_first_pass_and_everything_before_second(backend, device):
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
    # The first pass accumulated, and that sum is what the perturbation follows.
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


@every_base
@first_or_later
def test_no_gradient_anywhere_is_no_op(backend, device, base, warm):
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


@every_base
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


@every_base
def test_parameters_without_gradient_in_second_pass_come_back(backend, device, base):
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
        assert (calls[0] != calls[1]).any(), "it was to be perturbed"
        assert left.grad is None
        assert_same_bits(left.detach(), weights, f"step {step}")
    assert left not in optimizer.state


@pytest.mark.parametrize(("method", "given"), [("sam", "closure"), ("sam", "closures"), ("momentum", "closure")])
def test_a_step_without_a_gradient_changes_nothing_but_says_so(backend, device, method, given):
    """As torch's optimizers do; a model whose parameters were replaced would never train, in silence."""
    w = nn.Parameter(torch.ones(3, device=device))
    optimizer = FastSAM([w], lr=0.1, momentum=0.9, method=METHODS[method].method, backend=backend)
    with pytest.warns(UserWarning, match=r"changed nothing: no parameter has a gradient; call backward\(\) first"):
        optimizer.step(**{"closure": {"closure": lambda: None}, "closures": {"closures": [lambda: None] * 2}}[given])
    assert torch.equal(w, torch.ones(3, device=device))
    assert not optimizer.perturbed
    assert not optimizer.state


@every_base
def test_no_gradient_at_all_in_second_pass(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    before, calls = Snapshot(optimizer), []

    def closure():
        calls.append(problem.weights())
        optimizer.zero_grad()
        return problem.backward() if len(calls) == 1 else None

    with pytest.raises(RuntimeError, match="no parameter has a gradient after the second pass"):
        optimizer.step(closure)
    assert len(calls) == 2
    before.assert_unchanged(grads=False)


def test_gradient_in_second_pass_only(backend, device):
    late, other = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    optimizer = FastSAM([late, other], lr=0.5, backend=backend)
    seen = []

    def closure():
        seen.append(late.detach().clone())
        (other.sum() if len(seen) == 1 else other.sum() + late.sum()).backward()

    optimizer.step(closure)
    assert_same_bits(seen[1], torch.ones(3, device=device), "was not perturbed")
    assert_same_bits(late.detach(), torch.full((3,), 0.5, device=device), "but was updated")


def test_worker_thread_may_train(backend, device):
    here, there = Problem(device), Problem(device)
    one, two = here.optimizer(backend), there.optimizer(backend)
    here.step(one)
    worker = threading.Thread(target=there.step, args=(two,))
    worker.start()
    worker.join()
    assert_same_bits(there.weights(), here.weights())


def test_step_within_step_is_refused(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    before, calls = Snapshot(optimizer), []

    def closure():
        calls.append(1)
        if len(calls) == 2:
            optimizer.step(problem.backward)
        return problem.backward()

    with pytest.raises(RuntimeError, match=r"step\(closure\) is not possible while the weights are perturbed"):
        optimizer.step(closure)
    before.assert_unchanged(grads=False)


@every_base
@pytest.mark.parametrize("end", ["step", "two-phase", "restore", "raise", "refused"])
def test_gradients_are_released(backend, device, base, end):
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


# Each makes the host wait for an accelerator.
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


@kernel_backends
@every_fused_base
def test_nothing_is_read_back(backend, device, base):
    """As far as a CPU shows it: no operator that hands a tensor's value to Python."""
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


@kernel_backends
@every_fused_base
def test_later_steps_of_kernels_allocate_nothing(backend, device, base):
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


@every_base
def test_ascent_closure_takes_first_pass(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    order = []
    loss = optimizer.step(
        lambda: order.append("descent") or problem.backward(),
        ascent_closure=lambda: order.append("ascent") or problem.backward(),
    )
    assert order == ["ascent", "descent"]
    assert_same_bits(loss.detach(), Problem(device).loss().detach())


def test_ascent_closure_on_part_of_batch_is_two_phases_on_it(backend, device):
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
