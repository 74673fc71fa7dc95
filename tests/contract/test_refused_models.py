"""Refused: sparse gradients, options that are wrong, models that change under way."""

import pytest
import torch
from checks import assert_same_bits
from problem import Problem, Snapshot, assert_same_state, state_of
from registry import BASES, every_base, first_or_later
from torch import nn

from fastsam import FastSAM

pytestmark = pytest.mark.face


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


@every_base
@first_or_later
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


def test_bad_rho_in_group_is_refused_by_next_step(backend, device):
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


@every_base
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_model_that_changes_between_passes_is_refused_and_restored(backend, device, base, change):
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
def test_restore_follows_model_that_changed(backend, device, change):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    start = problem.weights()
    problem.first_step(optimizer)
    change(problem)
    optimizer.restore()
    assert not optimizer.perturbed
    assert_same_bits([w.float() for w in problem.weights()], start)
