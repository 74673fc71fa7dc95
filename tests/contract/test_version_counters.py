"""PyTorch sees every write: version counters."""

import itertools

import pytest
import torch
from checks import values
from problem import Problem
from registry import BASES, every_base, every_fused_base
from torch import nn

from fastsam import FastSAM

pytestmark = [pytest.mark.face, pytest.mark.usefixtures("one_thread")]


def versions(tensors):
    return [t._version for t in tensors]


@every_base
def test_every_write_to_weight_is_counted(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    for _ in range(2):
        counts = [versions(problem.params)]
        problem.first_step(optimizer)
        counts.append(versions(problem.params))
        problem.backward()
        optimizer.second_step()
        counts.append(versions(problem.params))
        problem.first_step(optimizer)
        counts.append(versions(problem.params))
        optimizer.restore()
        counts.append(versions(problem.params))
        for earlier, later in itertools.pairwise(counts):
            assert all(a < b for a, b in zip(earlier, later, strict=True))


@every_base
@pytest.mark.parametrize("write", ["perturb", "restore", "update", "step"])
def test_graph_that_saved_weight_before_write_cannot_go_backward_after_it(backend, device, base, write):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    if write in ("restore", "update"):
        problem.first_step(optimizer)
    # The input's gradient needs the weights.
    x = problem.x.clone().requires_grad_()
    stale = problem.model(x).sum()
    if write == "perturb":
        problem.first_step(optimizer)
    elif write == "restore":
        optimizer.restore()
    elif write == "update":
        problem.backward()
        optimizer.second_step()
    else:
        problem.step(optimizer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@every_fused_base
def test_every_write_to_state_is_counted(backend, device, base):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    problem.step(optimizer)
    state = [value for entries in optimizer.state.values() for value in entries.values()]
    assert len(state) == {"sgd": 4, "adamw": 12}[base]
    for _ in range(2):
        before = versions(state)
        problem.step(optimizer)
        assert all(a < b for a, b in zip(before, versions(state), strict=True))


@every_base
def test_what_is_not_written_is_not_counted(backend, device, base):
    """A frozen parameter may be saved by a graph that outlives the step."""
    problem = Problem(device)
    frozen, outside = (nn.Parameter(values((3,), torch.float32, device)) for _ in range(2))
    frozen.requires_grad_(False)
    still = nn.Parameter(values((3,), torch.float32, device))
    cls, options = BASES[base]
    groups = [{"params": [*problem.params, frozen]}, {"params": [still], "perturb": False}]
    optimizer = FastSAM(groups, cls, backend=backend, **options)
    before = versions([frozen, outside, still])
    for _ in range(2):
        problem.first_step(optimizer)
        optimizer.restore()
        problem.step(optimizer)
        problem.two_phase(optimizer)
    assert versions([frozen, outside, still]) == before
    still.grad = torch.ones_like(still)
    optimizer.first_step(zero_grad=False)
    assert versions([still]) == before[2:], "it is not perturbed"
    optimizer.second_step()
    assert still._version > before[2]
