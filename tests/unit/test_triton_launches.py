"""What a step of each method asks of a GPU by way of Triton: launches, compilations, waits, uploads, CUDA graphs."""

import pytest
import torch
from fake_gpu import fake_gpu, uploads  # noqa: F401 (a fixture)
from gpu_steps import (
    METHODS,
    SmallOperations,
    Steps,
    assert_at_most_six_around_the_formula,
    every_base,
    every_method,
    every_part,
    every_precision,
    read_tensors_on_the_device,
)

from fastsam import FastSAM
from fastsam.schedules import AESAM


@every_base
def test_plain_sam_is_three_launches(fake_gpu, base):  # noqa: F811
    steps = Steps("triton", base)
    steps.closure()

    def step():
        steps.optimizer.first_step(zero_grad=False)
        steps.optimizer.second_step(zero_grad=False)

    for _ in range(2):
        step()
    before = uploads(steps.optimizer)
    launches, compiled, syncs = fake_gpu.count(step)
    assert launches == ["grad_norm_kernel", "perturb_kernel", "restore_and_update_kernel"]
    assert (compiled, syncs, uploads(steps.optimizer) - before) == (0, {}, 0)
    steps.closure(fresh=True)
    fake_gpu.count(step)
    assert uploads(steps.optimizer) - before == 1


@every_method
@every_base
@every_precision
def test_steady_steps_compile_nothing_and_wait_for_nothing(fake_gpu, method, base, precision):  # noqa: F811
    steps = Steps("triton", base, method=method, **precision)
    for _ in range(4):
        steps()
    for fresh in (False, False, True, True):
        steps.closure(fresh)
        before = uploads(steps.optimizer)
        launches, compiled, syncs = fake_gpu.count(steps)
        assert compiled == 0
        assert syncs == {}
        assert len(launches) <= 2 + 2 * method.ascents
        # The addresses that a phase sees first, and those of backups where they come and go with the kind of step.
        assert uploads(steps.optimizer) - before <= 1 + method.ascents


@every_method
@every_base
def test_tensors_as_options_are_not_read(fake_gpu, monkeypatch, method, base):  # noqa: F811
    read_tensors_on_the_device(monkeypatch)
    options = {"lr": torch.tensor(0.1), "rho": torch.tensor(0.05)}
    steps = Steps("triton", base, method=method, **options)
    for _ in range(4):
        steps()
    for _ in range(5):
        _, _, syncs = fake_gpu.count(steps)
        assert syncs == {}


@every_method
def test_at_most_six_launches_a_phase_around_kernels_and_formula(fake_gpu, monkeypatch, method):  # noqa: F811
    assert_at_most_six_around_the_formula(monkeypatch, Steps("triton", method=method), method)


def test_random_directions_take_as_many_launches_for_many_tensors_as_for_few(fake_gpu, monkeypatch):  # noqa: F811
    method, counts = METHODS["random"], []
    for count in (2, 40):
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(count)]
        optimizer = FastSAM(params, lr=0.1, method=method, backend="triton")

        def step(params=params, optimizer=optimizer):
            for param in params:
                param.grad = torch.ones_like(param)
            optimizer.first_step(zero_grad=False)
            optimizer.second_step()

        step()
        operations = SmallOperations(monkeypatch, method)
        with operations:
            step()
        counts.append(operations.formula[0].total())
    assert counts[1] == counts[0] <= 200


def test_restore_is_ready_before_anything_is_perturbed(fake_gpu):  # noqa: F811
    """Loading a kernel takes memory, which may have run out when the weights must be restored."""
    steps = Steps("triton")
    steps.closure()
    steps.optimizer.first_step(zero_grad=False)
    _, compiled, _ = fake_gpu.count(steps.optimizer.restore)
    assert compiled == 0


@every_method
@every_base
@every_precision
def test_the_update_is_ready_before_anything_is_perturbed(fake_gpu, method, base, precision):  # noqa: F811
    """But for dot products of the descent, which write to no weight."""
    steps = Steps("triton", base, method=method, **precision)
    steps.closure()
    for _ in range(method.ascents):
        steps.optimizer.first_step(zero_grad=False)
        steps.closure()
    launches, compiled, _ = fake_gpu.count(steps.optimizer.second_step)
    assert launches[-1] == "restore_and_update_kernel"
    assert compiled <= launches.count("dots_kernel")


@every_method
def test_every_kind_of_step_can_be_captured(fake_gpu, method):  # noqa: F811
    """With an ascent and without, whatever the step before was."""
    for warm_up in (4, 5):
        steps = Steps("triton", method=method)
        for _ in range(warm_up):
            steps()
        fake_gpu.capturing = True
        steps()
        fake_gpu.capturing = False


def test_captured_step_says_what_its_ascent_has_measured(fake_gpu):  # noqa: F811
    """Each replay writes these tensors; nothing of the host's is in them."""
    steps = Steps("triton")
    for _ in range(4):
        steps()
    fake_gpu.capturing = True
    _, _, syncs = fake_gpu.count(steps)
    fake_gpu.capturing = False
    assert all(isinstance(value, torch.Tensor) for value in steps.optimizer.last_ascent)
    assert "aten::_local_scalar_dense" not in syncs


@every_part
@every_method
def test_steps_of_a_part_of_the_parameters_can_be_captured(fake_gpu, method, left):  # noqa: F811
    steps = Steps("triton", method=method)
    steps.leave_out(left)
    for _ in range(4):
        steps()
    fake_gpu.capturing = True
    steps()
    fake_gpu.capturing = False


@pytest.mark.parametrize("warm_up", [4, 5])
@pytest.mark.parametrize("kind", ["interval=2", "interval=3", "8 closures", "new gradients"])
def test_steps_of_a_schedule_can_be_captured(fake_gpu, kind, warm_up):  # noqa: F811
    steps = Steps("triton", interval=int(kind[-1]) if "interval" in kind else 1)
    closures = 8 if "closures" in kind else 0
    for _ in range(warm_up):
        steps(closures)
    fake_gpu.capturing = True
    for _ in range(30 if kind == "new gradients" else 1):
        if kind == "new gradients":
            steps.closure(fresh=True)
        steps(closures)
    fake_gpu.capturing = False


@every_base
@pytest.mark.parametrize("ascends", [True, False], ids=["with an ascent", "without"])
def test_adaptive_steps_are_captured_as_two_graphs(fake_gpu, ascends, base):  # noqa: F811
    """The host waits before a step, for the decision alone; within one there is nothing to wait for."""
    steps = Steps("triton", base, schedule=AESAM(100))
    decision = lambda: steps.optimizer._policy.statistics._decision._value  # noqa: E731
    for kind in (None, True, False, True, False):
        if kind is not None:
            decision().fill_(kind)
        steps()
    decision().fill_(ascends)
    fake_gpu.capturing = True
    with pytest.raises(RuntimeError, match="ascends_next"):
        steps()
    fake_gpu.capturing = False
    assert steps.optimizer.ascends_next is ascends
    fake_gpu.capturing = True
    launches, compiled, syncs = fake_gpu.count(steps)
    fake_gpu.capturing = False
    assert (compiled, syncs) == (0, {})
    assert ("perturb_kernel" in launches) is ascends
    assert launches.count("grad_norm_kernel") >= 1
