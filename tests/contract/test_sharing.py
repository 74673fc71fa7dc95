"""Parameters that are shared, frozen, compiled, trained by several optimizers at once, or larger than 2^31 elements."""

import os
import threading
from contextlib import nullcontext

import pytest
import torch
import triton_interpreter
from checks import assert_same_bits
from internals import BACKENDS
from problem import Problem, Snapshot
from registry import every_fused_base
from torch import nn

from fastsam import FastSAM

pytestmark = pytest.mark.face


class Tied(Problem):
    """An embedding that is also the last layer, as in language models."""

    def __init__(self, device, *, tied=True):
        super().__init__(device)
        first, last = nn.Linear(4, 6, bias=False), nn.Linear(6, 4, bias=False)
        self.model = nn.Sequential(first, nn.Tanh(), last).to(device)
        self.y = self.x.roll(1, 0)
        with torch.no_grad():
            start = torch.linspace(-1, 1, 24).reshape(6, 4)
            first.weight.copy_(start)
            last.weight.copy_(start.t())
        if tied:
            # One parameter, read transposed.
            del last.weight
            last.weight = first.weight
            last.forward = lambda x: x @ first.weight


@every_fused_base
def test_tied_weight_is_one_parameter(backend, device, base):
    """It is perturbed once, by the sum of its gradients, and comes back once."""
    problem = Tied(device)
    (weight,) = problem.params
    optimizer = problem.optimizer(backend, base, rho=0.5)
    for _ in range(3):
        before = weight.detach().clone()
        problem.first_step(optimizer)
        assert float((weight.detach() - before).norm()) == pytest.approx(0.5, rel=1e-5)
        optimizer.restore()
        assert_same_bits(weight.detach(), before)
        problem.step(optimizer)
        assert problem.model[0].weight is problem.model[2].weight
        assert not torch.equal(weight.detach(), before)


@pytest.mark.parametrize("late", [False, True], ids=["given", "made"])
def test_two_parameters_over_one_memory_are_refused(backend, device, late):
    """The second one's backup would be the first one's perturbed weights: neither could come back."""
    first, other = (nn.Parameter(torch.ones(100, device=device)) for _ in range(2))
    message = r"parameter 1 \(shape \(100,\)\) shares memory with parameter 0 \(shape \(100,\)\)"
    if not late:
        other.data = first.data
        with pytest.raises(ValueError, match=message):
            FastSAM([first, other], backend=backend)
        return
    optimizer = FastSAM([first, other], lr=0.1, backend=backend)
    other.data = first.data

    def closure():
        first.grad, other.grad = torch.ones_like(first), torch.ones_like(other)

    with pytest.raises(ValueError, match=message):
        optimizer.step(closure)
    assert not optimizer.perturbed
    assert bool((first == 1).all())
    other.data = first.data.clone()
    optimizer.step(closure)
    assert_same_bits(other.detach(), first.detach())


@every_fused_base
def test_frozen_submodule_is_not_changed(backend, device, base):
    """Without a gradient it is neither perturbed nor decayed, and gets no state, until it thaws."""
    problem = Problem(device)
    frozen = problem.model[0]
    frozen.requires_grad_(False)
    optimizer = problem.optimizer(backend, base, weight_decay=0.1, rho=0.5)
    start = [p.detach().clone() for p in frozen.parameters()]
    seen = []

    def closure():
        seen.append([p.detach().clone() for p in frozen.parameters()])
        return problem.closure(optimizer)()

    for _ in range(2):
        optimizer.step(closure)
    for weights in (*seen, [p.detach() for p in frozen.parameters()]):
        assert_same_bits(weights, start)
    assert not any(p in optimizer.state for p in frozen.parameters())
    frozen.requires_grad_(True)
    optimizer.step(closure)
    assert not torch.equal(seen[-1][0], start[0]), "perturbed again"
    assert not torch.equal(frozen.weight.detach(), start[0])
    frozen.requires_grad_(False)
    optimizer.zero_grad()
    kept = [p.detach().clone() for p in frozen.parameters()]
    optimizer.step(closure)
    assert_same_bits([p.detach() for p in frozen.parameters()], kept)


@every_fused_base
def test_layer_that_is_frozen_between_passes_comes_back(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base, rho=0.5)
    start = problem.model[0].weight.detach().clone()
    problem.first_step(optimizer)
    problem.model[0].requires_grad_(False)
    problem.backward()
    optimizer.second_step()
    assert_same_bits(problem.model[0].weight.detach(), start)


@every_fused_base
def test_two_threads_train_two_halves_of_model(backend, device, base):
    """Each half as if it were alone, bit for bit."""
    interpreted = triton_interpreter.runs(backend, device)
    steps = 4 if interpreted else 40
    # Triton's interpreter replaces triton.language while a kernel runs: there the threads take turns, a step each.
    turn = threading.Lock() if interpreted else nullcontext()

    def halves():
        problems = [Problem(device, seed) for seed in (1, 2)]
        model = nn.ModuleList([problem.model for problem in problems])  # one model, two optimizers
        return model, [(problem, problem.optimizer(backend, base)) for problem in problems]

    _, alone = halves()
    for problem, optimizer in alone:
        for _ in range(steps):
            problem.step(optimizer)
    _, together = halves()
    barrier, failures = threading.Barrier(2), []

    def train(problem, optimizer):
        try:
            barrier.wait()
            for _ in range(steps):
                with turn:
                    problem.step(optimizer)
        except BaseException as reason:
            failures.append(reason)

    workers = [threading.Thread(target=train, args=half) for half in together]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    for (one, _), (other, _) in zip(alone, together, strict=True):
        assert_same_bits(other.weights(), one.weights())


# What the compiled model sees does not depend on the backend, and torch.compile takes seconds.
one_backend = pytest.mark.parametrize(
    "backend",
    [name if name == "native" else pytest.param(name, marks=pytest.mark.thorough) for name in BACKENDS],
    indirect=True,
)


@one_backend
@pytest.mark.parametrize(
    "compiler", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.thorough])]
)
@every_fused_base
def test_compiled_model_sees_both_passes(backend, device, base, compiler):
    """The second pass runs at the perturbed weights: compiled code reads them where they are, in place."""
    plain, compiled = Problem(device), Problem(device)
    torch._dynamo.reset()
    eager = compiled.model
    graphs = torch.compile(eager, backend=compiler)
    optimizers = [problem.optimizer(backend, base, rho=0.5) for problem in (plain, compiled)]
    for _ in range(3):
        losses = []
        for problem, optimizer, model in zip((plain, compiled), optimizers, (plain.model, graphs), strict=True):
            passes = []

            def closure(problem=problem, optimizer=optimizer, model=model, passes=passes):
                optimizer.zero_grad()
                loss = (model(problem.x) - problem.y).square().mean()
                loss.backward()
                passes.append(loss.detach())
                return loss

            optimizer.step(closure)
            losses.append(passes)
        assert losses[1][0] < losses[1][1], "the perturbation is uphill"
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(compiled.weights(), plain.weights(), rtol=1e-4, atol=1e-5)


@one_backend
def test_step_that_fails_in_compiled_code_changes_nothing(backend, device):
    problem = Problem(device)
    torch._dynamo.reset()
    model = torch.compile(problem.model, backend="aot_eager")
    optimizer = problem.optimizer(backend)
    before, calls = Snapshot(optimizer), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(problem.x if len(calls) == 1 else problem.x[:, :3]).square().mean()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError):
        optimizer.step(closure)
    assert len(calls) == 2
    before.assert_unchanged(grads=False)


# ---- size ----

HUGE = 2**31 + 4096 + 3


@pytest.mark.huge
@pytest.mark.timeout(3600)
def test_more_than_two_to_31_elements(backend, device):
    """No index is 32 bits wide: the last elements are perturbed, come back and are updated like the first. 17 GiB."""
    if backend in ("reference", "foreach"):
        pytest.skip("its temporaries in float32 would take 8 GiB each")
    if backend == "triton" and device.type == "cpu":
        pytest.skip("Triton's interpreter would take a day")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 2**30
    if device.type == "cpu" and memory < 18:
        pytest.fail(f"needs 18 GiB of free memory, has {memory:.0f}")
    weight = torch.zeros(HUGE, dtype=torch.bfloat16, device=device).requires_grad_()
    gradient = torch.zeros(HUGE, dtype=torch.bfloat16, device=device)
    weight.grad = gradient
    # Around the edges of 31 and 32 bits of elements and of bytes.
    places = torch.tensor([0, 1, 2**29, 2**30 - 1, 2**30, 2**31 - 1, 2**31, 2**31 + 1, HUGE - 1], device=device)
    gradient[places] = 2.0
    optimizer = FastSAM([weight], rho=3.0, lr=0.5, momentum=0.5, backend=backend)
    optimizer.first_step(zero_grad=False)
    perturbed = weight.detach()[places]
    assert_same_bits(perturbed, torch.full_like(perturbed, 1.0))  # rho * 2 / (2 * sqrt(9 places))
    assert weight.detach().count_nonzero() == len(places)
    optimizer.second_step()
    updated = weight.detach()[places]
    assert_same_bits(updated, torch.full_like(updated, -1.0))
    assert weight.detach().count_nonzero() == len(places)
    optimizer.first_step(zero_grad=False)
    optimizer.second_step()
    updated = weight.detach()[places]
    assert_same_bits(updated, torch.full_like(updated, -2.5))  # the momentum is there too: 0.5 * (0.5 * 2 + 2) more
    assert weight.detach().count_nonzero() == len(places)
