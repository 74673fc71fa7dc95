"""No address is trusted: whatever is swapped, assigned or exchanged at any moment, only parameters are written to.

Casts and new memory for ``.data`` are in unit/test_table.py and test_steps.py, both at random in test_fuzz.py.
"""

import copy

import pytest
import torch
from checks import assert_same_bits
from problem import Problem
from registry import every_fused_base
from torch import nn


class Averaged(Problem):
    """A model, and a copy of it with other weights, such as their average (SWA) or a target network."""

    def __init__(self, device):
        super().__init__(device)
        self.average = copy.deepcopy(self.model)
        with torch.no_grad():
            for p in self.average.parameters():
                p.add_(1)

    @property
    def pairs(self):
        return list(zip(self.model.parameters(), self.average.parameters(), strict=True))

    def averages(self):
        return [a.detach().clone() for a in self.average.parameters()]


def exchange_memory(problem):
    for p, a in problem.pairs:
        p.data, a.data = a.data, p.data


def exchange_numbers(problem):
    with torch.no_grad():
        for p, a in problem.pairs:
            kept = p.clone()
            p.copy_(a)
            a.copy_(kept)


def exchange_tensors(problem):
    for p, a in problem.pairs:
        p.grad = None
        torch.utils.swap_tensors(p, a)


EXCHANGES = [exchange_memory, exchange_numbers, exchange_tensors]
every_exchange = pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda f: f.__name__)


@every_fused_base
@every_exchange
def test_weights_exchanged_between_steps(backend, device, base, exchange):
    """For an evaluation and back, then for good: training goes on from the weights that the model has."""
    problem, plain = Averaged(device), Averaged(device)
    optimizer, alone = problem.optimizer(backend, base, rho=torch.tensor(0.0)), plain.base(base)
    for exchanges in (0, 2, 1, 1, 2):
        for _ in range(exchanges):
            exchange(problem)
            exchange_numbers(plain)
        kept = problem.averages()
        start = plain.weights()
        problem.step(optimizer)
        plain.plain_step(alone)
        assert_same_bits(problem.averages(), kept, "the other model")
        for weight, expected, first in zip(problem.weights(), plain.weights(), start, strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)
            assert not torch.equal(weight, first)


@every_fused_base
@pytest.mark.parametrize("exchange", [exchange_memory, exchange_tensors], ids=lambda f: f.__name__)
def test_memory_exchanged_between_passes_is_refused(backend, device, base, exchange):
    problem = Averaged(device)
    optimizer = problem.optimizer(backend, base, rho=0.5)
    problem.step(optimizer)
    start = problem.weights()
    problem.first_step(optimizer)
    exchange(problem)
    problem.backward()
    kept = problem.averages()
    with pytest.raises(
        RuntimeError, match=r"parameter 0 .*given other memory between the two passes; call restore\(\)"
    ):
        optimizer.second_step()
    optimizer.restore()
    assert_same_bits(problem.weights(), start)
    assert_same_bits(problem.averages(), kept, "memory that is the other model's now")
    problem.step(optimizer)
    assert_same_bits(problem.averages(), kept, "memory that is the other model's now")


@every_fused_base
def test_numbers_written_between_the_passes_are_refused(backend, device, base):
    """The restore would undo what another optimizer has written; ``restore()`` brings the weights back."""
    problem = Averaged(device)
    optimizer = problem.optimizer(backend, base, rho=0.5)
    start = problem.weights()
    problem.first_step(optimizer)
    exchange_numbers(problem)
    problem.backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 .*was written to while it was perturbed.*call restore\(\)"):
        optimizer.second_step()
    optimizer.restore()
    assert_same_bits(problem.weights(), start)
    problem.step(optimizer)


@every_fused_base
@pytest.mark.parametrize("aliased", [False, True], ids=["copies", "its own"])
def test_assigned_parameters_are_not_optimizers(backend, device, base, aliased):
    """``load_state_dict(assign=True)`` gives a model new ones; nothing is written to them."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base, rho=0.5)
    problem.step(optimizer)
    old, start = problem.params, problem.weights()
    problem.first_step(optimizer)
    loaded = (
        problem.model.state_dict() if aliased else {k: v.clone() + 1 for k, v in problem.model.state_dict().items()}
    )
    problem.model.load_state_dict(loaded, assign=True)
    assert not set(map(id, problem.params)) & set(map(id, old))
    assigned = problem.weights()
    problem.backward()
    optimizer.second_step()  # no gradient has reached the old parameters: they come back
    assert_same_bits([p.detach() for p in old], start)
    assert_same_bits(problem.weights(), start if aliased else assigned)
    for p in old:
        p.grad = None
    optimizer.step(problem.backward)  # and there is nothing to train
    assert_same_bits(problem.weights(), start if aliased else assigned)


@every_fused_base
def test_assigned_before_optimizer_is_made(backend, device, base):
    """Parameters over somebody else's memory (a checkpoint's, say) train there."""
    problem, other = Problem(device), Problem(device)
    checkpoint = {name: value.clone() for name, value in problem.model.state_dict().items()}
    problem.model.load_state_dict(checkpoint, assign=True)
    one, two = problem.optimizer(backend, base), other.optimizer(backend, base)
    for _ in range(2):
        problem.step(one)
        other.step(two)
    assert_same_bits(problem.weights(), other.weights())
    assert_same_bits(list(checkpoint.values()), other.weights())


@every_fused_base
def test_module_that_swaps_its_tensors_when_it_is_cast(backend, device, base):
    """``torch.__future__.set_swap_module_params_on_conversion``: the same Parameter objects, other tensors in them."""
    problem, plain = Problem(device), Problem(device)
    optimizer, alone = problem.optimizer(backend, base, rho=torch.tensor(0.0)), plain.base(base)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for dtype in (torch.float32, torch.float64, torch.float64):
            optimizer.zero_grad()
            problem.model.to(dtype)
            problem.x, problem.y = problem.x.to(dtype), problem.y.to(dtype)
            problem.step(optimizer)
            plain.plain_step(alone)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert all(p.dtype == torch.float64 for p in problem.params)
    for weight, expected in zip(problem.weights(), plain.weights(), strict=True):
        torch.testing.assert_close(weight.float(), expected, rtol=1e-4, atol=1e-5)


@every_fused_base
def test_averaging_and_batch_norm_of_torchs_swa(backend, device, base):
    """``torch.optim.swa_utils`` beside FastSAM: the average sees the weights, never a perturbation."""
    problem = Problem(device)
    problem.model.add_module("norm", nn.BatchNorm1d(3).to(device))
    optimizer = problem.optimizer(backend, base, rho=0.5)
    average = torch.optim.swa_utils.AveragedModel(problem.model)
    sums = [torch.zeros_like(w) for w in problem.weights()]
    for _ in range(4):
        problem.step(optimizer)
        average.update_parameters(problem.model)
        for total, weight in zip(sums, problem.weights(), strict=True):
            total += weight / 4
    for mean, expected in zip(average.module.parameters(), sums, strict=True):
        torch.testing.assert_close(mean.detach(), expected)
