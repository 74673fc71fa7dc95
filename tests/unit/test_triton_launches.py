"""What a step of each method asks of a GPU by way of Triton: launches, compilations, waits, uploads, CUDA graphs."""

import pytest
import torch
from fake_gpu import fake_gpu, uploads  # noqa: F401 (a fixture)
from gpu_steps import Steps, every_base, every_method, every_precision

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
    for _ in range(2):
        launches, compiled, syncs = fake_gpu.count(steps)
        assert compiled == 0
        assert syncs == {}
        assert len(launches) <= 2 + 3 * method.ascents


def test_restore_is_ready_before_anything_is_perturbed(fake_gpu):  # noqa: F811
    """Loading a kernel takes memory, which may have run out when the weights must be restored."""
    steps = Steps("triton")
    steps.closure()
    steps.optimizer.first_step(zero_grad=False)
    _, compiled, _ = fake_gpu.count(steps.optimizer.restore)
    assert compiled == 0


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
    # Addresses are compared on the host; no number of the device is read.
    assert (compiled, set(syncs) - {"aten::equal"}) == (0, set())
    assert ("perturb_kernel" in launches) is ascends
    assert launches.count("grad_norm_kernel") >= 1
