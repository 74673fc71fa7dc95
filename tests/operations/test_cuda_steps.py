"""What a step of each method asks of a GPU by way of the CUDA kernels (on the CPU)."""

import collections
import math

import pytest
import torch
from gpu_steps import (
    CountingSyncs,
    Steps,
    allow_uploads_of_graphs_alone,
    assert_at_most_six_around_the_formula,
    every_base,
    every_method,
    every_part,
    every_precision,
    hide_the_host,
    read_tensors_on_the_device,
)
from operations.test_cuda_kernels import cuda_kernels, operators  # noqa: F401 (fixtures)

from fastsam import FastSAM, methods
from fastsam.backends.native_table import CudaTable
from fastsam.runtime import streams

pytestmark = [
    pytest.mark.parametrize("device", ["cpu"], indirect=True),
    pytest.mark.parametrize("backend", ["native"], indirect=True),
    pytest.mark.usefixtures("backend", "cuda_kernels", "hidden_host"),
]


@pytest.fixture
def hidden_host(monkeypatch):
    hide_the_host(monkeypatch)


@pytest.fixture
def capture(monkeypatch):
    """A switch: whether a graph is being captured."""
    allow_uploads_of_graphs_alone(monkeypatch)
    return lambda on: monkeypatch.setattr(streams, "is_capturing", lambda device: on)


def count(steps, kernels):
    """Launches, uploads and waits of one step."""

    def uploads():
        return sum(table.attached(CudaTable)._copy.uploads for table in steps.optimizer._engine.tables)

    launches, sent, waits = kernels.launches(), uploads(), collections.Counter()
    with CountingSyncs(waits):
        steps()
    return kernels.launches() - launches, uploads() - sent, dict(waits)


@every_method
@every_base
@every_precision
def test_steady_steps(cuda_kernels, method, base, precision):  # noqa: F811
    """Also with new gradients in every step: their addresses are arguments."""
    steps = Steps("native", base, method=method, **precision)
    for _ in range(4):
        steps()
    for fresh in (False, False, True, True):
        steps.closure(fresh)
        launches, uploads, waits = count(steps, cuda_kernels)
        assert launches <= 2 + 2 * method.ascents
        # Where steps with and without an ascent take turns, so do the addresses of backups.
        assert uploads <= isinstance(method, methods.LookSAM)
        assert waits == {}


@every_base
def test_plain_sam_is_three_launches(cuda_kernels, base):  # noqa: F811
    steps = Steps("native", base)
    for _ in range(3):
        steps()
    assert count(steps, cuda_kernels) == (3, 0, {})


@every_method
@every_base
@every_precision
def test_the_update_is_ready_before_anything_is_perturbed(cuda_kernels, method, base, precision):  # noqa: F811
    """Loading a kernel takes memory, which may have run out by then. Dot products write to no weight."""
    steps = Steps("native", base, method=method, **precision)
    steps.closure()
    cuda_kernels.loads(True)
    for _ in range(method.ascents):
        steps.optimizer.first_step(zero_grad=False)
        steps.closure()
    loads, launches = cuda_kernels.loads(False), cuda_kernels.launches()
    steps.optimizer.second_step()
    assert cuda_kernels.loads(False) - loads <= cuda_kernels.launches() - launches - 1


def test_tables_of_two_dtypes_and_of_many_tensors(cuda_kernels):  # noqa: F811
    """They have one norm, and kernels of their own, all of which are loaded before the first of them is perturbed."""
    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(499)]
    params += [torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(13)]
    optimizer = FastSAM(params, lr=0.5, rho=math.sqrt(525), backend="native")
    for param in params:
        param.grad = torch.ones_like(param)
    cuda_kernels.loads(True)
    optimizer.first_step(zero_grad=False)
    assert all(bool((param == 2).all()) for param in params)
    loads = cuda_kernels.loads(False)
    optimizer.second_step()
    assert cuda_kernels.loads(False) == loads
    assert all(bool((param == 0.5).all()) for param in params)


@every_method
@every_base
def test_tensors_as_options_are_not_read(cuda_kernels, monkeypatch, method, base):  # noqa: F811
    read_tensors_on_the_device(monkeypatch)
    steps = Steps("native", base, method=method, lr=torch.tensor(0.1), rho=torch.tensor(0.05))
    for _ in range(4):
        steps()
    for _ in range(5):
        assert count(steps, cuda_kernels)[2] == {}


@every_method
def test_at_most_six_launches_a_phase_around_kernels_and_formula(monkeypatch, method):
    assert_at_most_six_around_the_formula(monkeypatch, Steps("native", method=method), method)


@every_method
def test_every_kind_of_step_can_be_captured(capture, method):
    """With an ascent and without, whatever the step before was."""
    for warm_up in (4, 5):
        steps = Steps("native", method=method)
        for _ in range(warm_up):
            steps()
        capture(True)
        steps()
        capture(False)


@every_part
@every_method
def test_steps_of_a_part_of_the_parameters_can_be_captured(capture, method, left):
    steps = Steps("native", method=method)
    steps.leave_out(left)
    for _ in range(4):
        steps()
    capture(True)
    steps()
    capture(False)


@pytest.mark.parametrize("warm_up", [4, 5])
@pytest.mark.parametrize("kind", ["interval=2", "interval=3", "8 closures"])
def test_steps_of_a_schedule_can_be_captured(capture, kind, warm_up):
    steps = Steps("native", interval=int(kind[-1]) if "interval" in kind else 1)
    closures = 8 if "closures" in kind else 0
    for _ in range(warm_up):
        steps(closures)
    capture(True)
    steps(closures)
