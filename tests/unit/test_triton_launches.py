"""What a step of each method asks of a GPU by way of Triton: launches, compilations, waits, uploads, CUDA graphs."""

import pytest
import torch
from fake_gpu import fake_gpu, uploads  # noqa: F401 (a fixture)

from fastsam import FastSAM, methods

METHODS = {
    "SAM": methods.SAM(),
    "SAM(p=4)": methods.SAM(p=4),
    "SAM(inner_steps=2)": methods.SAM(inner_steps=2),
    "ASAM": methods.ASAM(),
    "AMP": methods.AMP(),
    "AWP": methods.AWP(),
    "GSAM": methods.GSAM(),
    "WSAM": methods.WSAM(),
    "LookSAM": methods.LookSAM(k=2),
    "FriendlySAM": methods.FriendlySAM(),
    "MomentumSAM": methods.MomentumSAM(),
    "RandomSAM": methods.RandomSAM(),
}
BASES = {"SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "AdamW": (torch.optim.AdamW, {"lr": 0.1})}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


class Steps:
    """A small model's training steps."""

    def __init__(self, base=BASES["SGD"], dtype=torch.float32, **arguments):
        kind, options = base
        self.params = [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size in (3, 2000, 5)]
        self.optimizer = FastSAM(self.params, kind, backend="triton", **options, **arguments)
        self.alive = []

    def closure(self, fresh=False):
        for param in self.params:
            if param.grad is None or fresh:
                self.alive.append(param.grad)
                param.grad = torch.ones_like(param)
        return torch.zeros(())

    def __call__(self, closures=0):
        if closures:
            self.optimizer.step(closures=[self.closure] * closures)
        else:
            self.optimizer.step(self.closure)


@every_base
def test_plain_sam_is_three_launches(fake_gpu, base):  # noqa: F811
    steps = Steps(base)
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
@pytest.mark.parametrize("precision", ["float32", "stochastic", "masters"])
def test_steady_steps_compile_nothing_and_wait_for_nothing(fake_gpu, method, base, precision):  # noqa: F811
    arguments = {
        "float32": {},
        "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
        "masters": {"dtype": torch.bfloat16, "master_weights": True},
    }[precision]
    steps = Steps(base, method=method, **arguments)
    for _ in range(4):
        steps()
    for _ in range(2):
        launches, compiled, syncs = fake_gpu.count(steps)
        assert compiled == 0
        assert syncs == {}
        assert len(launches) <= 2 + 3 * method.ascents


def test_restore_is_ready_before_anything_is_perturbed(fake_gpu):  # noqa: F811
    """Loading a kernel takes memory, which may have run out when the weights must be restored."""
    steps = Steps()
    steps.closure()
    steps.optimizer.first_step(zero_grad=False)
    _, compiled, _ = fake_gpu.count(steps.optimizer.restore)
    assert compiled == 0


@every_method
def test_every_kind_of_step_can_be_captured(fake_gpu, method):  # noqa: F811
    """With an ascent and without, whatever the step before was."""
    for warm_up in (4, 5):
        steps = Steps(method=method)
        for _ in range(warm_up):
            steps()
        fake_gpu.capturing = True
        steps()
        fake_gpu.capturing = False


@pytest.mark.parametrize("warm_up", [4, 5])
@pytest.mark.parametrize("kind", ["interval=2", "interval=3", "8 closures", "new gradients"])
def test_steps_of_a_schedule_can_be_captured(fake_gpu, kind, warm_up):  # noqa: F811
    steps = Steps(interval=int(kind[-1]) if "interval" in kind else 1)
    closures = 8 if "closures" in kind else 0
    for _ in range(warm_up):
        steps(closures)
    fake_gpu.capturing = True
    for _ in range(30 if kind == "new gradients" else 1):
        if kind == "new gradients":
            steps.closure(fresh=True)
        steps(closures)
    fake_gpu.capturing = False
