"""last_ascent: what step(closure) has measured anyway."""

import copy

import pytest
import torch
from problem import Problem, Stop
from registry import METHODS

from fastsam import methods

pytestmark = pytest.mark.face


@pytest.fixture
def problem(device):
    return Problem(device)


def losses_and_norm(problem, optimizer, adaptive=False):
    """The two losses by two-phase use of a copy, and the norm of the gradient at w."""
    optimizer.zero_grad()
    loss = problem.backward()
    grads = [p.grad * (p.detach().abs() if adaptive else 1) for p in problem.params]
    norm = torch.linalg.vector_norm(torch.cat([g.flatten().double() for g in grads]))
    optimizer.first_step()
    perturbed = problem.loss().detach()
    optimizer.restore()
    optimizer.zero_grad()
    return loss.detach(), perturbed, norm


@pytest.mark.parametrize("options", [{}, {"adaptive": True}, {"method": methods.GSAM()}], ids=str)
def test_is_what_two_phases_measure(problem, backend, options):
    optimizer = problem.optimizer(backend, rho=0.3, **options)
    assert optimizer.last_ascent is None
    for _ in range(2):
        expected = losses_and_norm(problem, optimizer, options.get("adaptive", False))
        returned = problem.step(optimizer)
        found = optimizer.last_ascent
        torch.testing.assert_close((found.loss, found.perturbed_loss), expected[:2])
        torch.testing.assert_close(found.grad_norm, expected[2], rtol=1e-6, atol=0)
        assert torch.equal(found.loss, returned.detach())
        assert not any(value.requires_grad or value.dim() for value in found)
        torch.testing.assert_close(found.sharpness, found.perturbed_loss - found.loss)
        assert found.sharpness > 0


def test_norm_is_a_copy(problem, backend):
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    first = optimizer.last_ascent
    number = first.grad_norm.item()
    problem.step(optimizer)
    assert first.grad_norm.item() == number != optimizer.last_ascent.grad_norm.item()


@pytest.mark.parametrize("name", METHODS)
def test_every_method(problem, backend, name):
    method = METHODS[name].method
    optimizer = problem.optimizer(backend, method=method, rho=0.05)
    problem.step(optimizer)
    if not method.needs_first_pass:
        assert optimizer.last_ascent is None
        return
    assert torch.isfinite(torch.stack(optimizer.last_ascent[:2])).all()
    norm = optimizer.last_ascent.grad_norm
    assert norm is None or (norm > 0 and norm.isfinite())


def test_several_ascents_have_the_norm_at_w(problem):
    optimizer = problem.optimizer("auto", method=methods.SAM(inner_steps=3), rho=0.3)
    problem.backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in problem.params]))
    problem.step(optimizer)
    torch.testing.assert_close(optimizer.last_ascent.grad_norm.float(), norm)
    assert optimizer.last_ascent.sharpness > 0


def test_micro_batches_have_the_mean(problem):
    optimizer = problem.optimizer("auto", rho=0.3)
    single = []
    for half in (slice(0, 3), slice(3, 8)):
        part = copy.deepcopy(problem)
        part.x, part.y = problem.x[half], problem.y[half]
        single.append(losses_and_norm(part, part.optimizer("auto", rho=0.3)))

    def closure(half):
        def run():
            loss = (problem.model(problem.x[half]) - problem.y[half]).square().mean()
            loss.backward()
            return loss

        return run

    optimizer.zero_grad()
    optimizer.step(closures=[closure(slice(0, 3)), closure(slice(3, 8))])
    means = [torch.stack(values).mean() for values in zip(*single, strict=True)]
    torch.testing.assert_close(tuple(optimizer.last_ascent), tuple(means))


def test_none_without_an_ascent_of_the_same_loss(problem):
    optimizer = problem.optimizer("auto", interval=2, rho=0.1)
    closure = problem.closure(optimizer)
    optimizer.step(closure)
    assert optimizer.last_ascent is not None
    optimizer.step(closure)
    assert optimizer.last_ascent is None, "a step without an ascent"
    optimizer.step(closure)
    optimizer.step(closure)
    optimizer.step(closure, ascent_closure=closure)
    assert optimizer.last_ascent is None, "losses of different data"
    optimizer.step(closure)
    optimizer.step(closure)
    assert optimizer.last_ascent is not None
    problem.first_step(optimizer)
    assert optimizer.last_ascent is None, "two-phase use"


def test_none_after_an_exception(problem):
    optimizer = problem.optimizer("auto")
    problem.step(optimizer)

    def fails():
        raise Stop

    with pytest.raises(Stop):
        optimizer.step(fails)
    assert optimizer.last_ascent is None


def test_closure_that_returns_something_else(problem):
    optimizer = problem.optimizer("auto")
    for returned, known in [(1.5, True), (None, False), ((1, 2), False), (torch.ones(3), False)]:

        def closure(returned=returned):
            optimizer.zero_grad()
            problem.backward()
            return returned

        optimizer.step(closure)
        assert (optimizer.last_ascent is not None) == known
        assert optimizer.step(closure) is returned


def test_copies_and_pickles_have_none(problem):
    optimizer = problem.optimizer("auto")
    problem.step(optimizer)
    assert copy.deepcopy(optimizer).last_ascent is None
