"""Copies, parameter groups, hooks and schedulers: FastSAM as a torch.optim.Optimizer among others."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import triton_interpreter
from checks import assert_same_bits, has_torchs_bits, values
from problem import (
    Problem,
    Snapshot,
    assert_one_with_its_base,
    assert_same_state,
    saved_and_loaded,
    state_of,
)
from registry import BASES, every_base
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastsam import FastSAM

pytestmark = pytest.mark.face

# ---- copies ----

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda both: pickle.loads(pickle.dumps(both)),
    "save": lambda both: _through_file(both),
}


def _through_file(both):
    file = io.BytesIO()
    torch.save(both, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@every_base
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "trained"])
def test_copies_train_identically_and_independently(backend, device, base, copied, steps):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base, rho=0.1, adaptive=True, replay_rng=True)
    for _ in range(steps):
        problem.step(optimizer)
    twin = Problem(device)
    twin.model, other = copied((problem.model, optimizer))
    assert type(other) is FastSAM
    assert type(other.base_optimizer) is type(optimizer.base_optimizer)
    assert other.backend == backend
    assert other.defaults == optimizer.defaults
    assert not other.perturbed
    assert_one_with_its_base(other)
    assert all(p is q for p, q in zip(other.param_groups[0]["params"], twin.params, strict=True))
    untouched = Snapshot(optimizer)
    for _ in range(2):
        twin.step(other)
    untouched.assert_unchanged()
    for _ in range(2):
        problem.step(optimizer)
    assert_same_bits(twin.weights(), problem.weights())
    assert_same_state(state_of(other), state_of(optimizer))
    draws = []
    other.step(lambda: draws.append(torch.rand(2)) or twin.backward())
    assert_same_bits(draws[1], draws[0], "replay_rng")


def test_copy_can_be_saved_loaded_and_added_to(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    _, other = copy.deepcopy((problem.model, optimizer))
    other.load_state_dict(other.state_dict())
    assert_one_with_its_base(other)
    other.add_param_group({"params": [nn.Parameter(torch.zeros(2, device=device))]})
    assert other.param_groups[1]["rho"] == 0.05
    assert_one_with_its_base(other)
    assert len(optimizer.param_groups) == 1
    assert repr(other).startswith("FastSAM over SGD (")


# ---- groups ----


@every_base
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["same-dtype", "other-dtype"])
def test_group_may_be_added_in_mid_run(backend, device, base, dtype):
    """It trains from then on as a group that had been there, without gradients, from the start."""
    problems = [Problem(device), Problem(device)]
    extras = [nn.Parameter(values((5,), dtype, device)) for _ in problems]
    cls, options = BASES[base]
    from_the_start = FastSAM(
        [{"params": problems[0].params}, {"params": [extras[0]], "rho": 0.3, "lr": 0.02}],
        cls,
        backend=backend,
        **options,
    )
    later = FastSAM(problems[1].params, cls, backend=backend, **options)

    def closure(problem, optimizer, extra, used):
        def run():
            optimizer.zero_grad()
            loss = problem.loss() + (extra.square().sum() if used else 0.0)
            loss.backward()
            return loss

        return run

    for step in range(5):
        if step == 2:
            given = {"params": extras[1], "rho": 0.3, "lr": 0.02}
            later.add_param_group(given)
            assert given == {"params": extras[1], "rho": 0.3, "lr": 0.02}
        for problem, optimizer, extra in zip(problems, (from_the_start, later), extras, strict=True):
            optimizer.step(closure(problem, optimizer, extra, step >= 2))
    assert_same_bits(problems[1].weights(), problems[0].weights())
    assert_same_bits(extras[1].detach(), extras[0].detach())
    assert_same_state(state_of(later), state_of(from_the_start))


def test_added_group_takes_constructors_options(backend, device):
    problem = Problem(device)
    optimizer = FastSAM(problem.params, rho=0.3, adaptive=True, lr=0.2, momentum=0.8, backend=backend)
    optimizer.param_groups[0]["rho"] = 0.9
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1, device=device))]})
    assert set(optimizer.param_groups[1]) == set(optimizer.param_groups[0])
    added = optimizer.param_groups[1]
    assert [added[name] for name in ("rho", "adaptive", "perturb", "lr", "momentum")] == [0.3, True, True, 0.2, 0.8]
    assert_one_with_its_base(optimizer)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"rho": -1.0}, ValueError, "rho must be"),
        ({"perturb": "no"}, TypeError, "perturb must be True or False"),
        ({"params": "again"}, ValueError, "parameter 4 .* is parameter 0 again"),
        ([nn.Parameter(torch.zeros(1))], TypeError, "a parameter group must be a dict"),
        ({"lr": 0.1, "params": None}, TypeError, "params must be"),
    ],
    ids=["rho", "perturb", "duplicate", "list", "params"],
)
def test_bad_group_changes_nothing(backend, device, group, error, message):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    if isinstance(group, dict):
        group = {"params": [nn.Parameter(torch.zeros(1, device=device))], **group}
        if group["params"] == "again":
            group["params"] = [problem.params[0]]
    before = Snapshot(optimizer)
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    before.assert_unchanged()
    problem.step(optimizer)


def test_parameters_removed_from_group_are_not_written(backend, device):
    """Groups are lists that programs edit."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.step(optimizer)
    left = optimizer.param_groups[0]["params"].pop()
    kept = left.detach().clone()
    problem.step(optimizer)
    assert_same_bits(left.detach(), kept)


def test_repr(backend, device):
    param = nn.Parameter(torch.zeros(1, device=device))
    optimizer = FastSAM([param], torch.optim.AdamW, rho=0.125, lr=0.5, backend=backend)
    text = repr(optimizer)
    assert text.startswith("FastSAM over AdamW (\nParameter Group 0\n")
    for line in ("    rho: 0.125\n", "    adaptive: False\n", "    lr: 0.5\n", "    betas: (0.9, 0.999)\n"):
        assert line in text


def test_zero_grad_is_torchs(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    problem.backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in problem.params)
    optimizer.zero_grad()
    assert [p.grad for p in problem.params] == [None] * 4


# ---- step hooks ----


@pytest.fixture
def hook_calls():
    """The calls of hooks that are registered for every optimizer."""
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, a, k: calls.append(("global-pre", o))),
        register_optimizer_step_post_hook(lambda o, a, k: calls.append(("global-post", o))),
    ]
    yield calls
    for handle in handles:
        handle.remove()


@every_base
@pytest.mark.parametrize("use", ["closure", "two-phase", "step", "no-gradient"])
def test_hooks_run_once_per_step(backend, device, hook_calls, base, use):
    problem = Problem(device)
    optimizer = problem.optimizer(backend, base)
    optimizer.register_step_pre_hook(lambda o, a, k: hook_calls.append(("pre", o)))
    optimizer.register_step_post_hook(lambda o, a, k: hook_calls.append(("post", o)))
    for _ in range(2):
        hook_calls.clear()
        if use == "closure":
            problem.step(optimizer)
        elif use == "no-gradient":
            optimizer.zero_grad()
            optimizer.step(lambda: None)
        else:
            problem.first_step(optimizer)
            assert hook_calls == []
            problem.backward()
            optimizer.step() if use == "step" else optimizer.second_step()
        assert hook_calls == [(name, optimizer) for name in ("global-pre", "pre", "post", "global-post")]


def test_pre_hook_may_replace_closure(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    used = []
    optimizer.register_step_pre_hook(lambda o, a, k: ((o, lambda: used.append(1) or problem.backward()), {}))
    optimizer.step(lambda: pytest.fail("replaced"))
    assert used == [1, 1]


def test_what_hooks_see(backend, device):
    """Before: the weights as they were. After: weights updated, not perturbed."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    seen = {}
    optimizer.register_step_pre_hook(lambda o, a, k: seen.update(before=problem.weights(), perturbed=o.perturbed))
    optimizer.register_step_post_hook(lambda o, a, k: seen.update(after=problem.weights(), still=o.perturbed))
    start = problem.weights()
    problem.step(optimizer)
    assert_same_bits(seen["before"], start)
    assert_same_bits(seen["after"], problem.weights())
    assert (seen["perturbed"], seen["still"]) == (False, False)


# ---- schedulers ----

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.StepLR(o, 2)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3),
}


def test_every_scheduler_of_torchs_is_here():
    theirs = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, lr_scheduler.LRScheduler) and not name.startswith("_")
    }
    assert theirs - {"LRScheduler"} <= set(SCHEDULERS)


@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
@every_base
@pytest.mark.parametrize("use", ["closure", "two-phase"])
@pytest.mark.filterwarnings("error")
def test_schedulers_as_on_base_alone(backend, device, make, base, use):
    """No warning, the same rates, and updates that follow them (momentum and betas where those cycle)."""
    mine, theirs = Problem(device), Problem(device)
    optimizer, alone = mine.optimizer(backend, base, rho=torch.tensor(0.0)), theirs.base(base)
    schedulers = make(optimizer), make(alone)
    with warnings.catch_warnings():
        # SequentialLR's own, about a call that it makes itself.
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
        for _ in range(triton_interpreter.fewer(5, 2, backend, device)):
            mine.step(optimizer) if use == "closure" else mine.two_phase(optimizer)
            theirs.plain_step(alone)
            for scheduler in schedulers:
                scheduler.step(*([1.0] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
            (group,), (expected,) = optimizer.param_groups, alone.param_groups
            for name in ("lr", "momentum", "betas"):
                assert group.get(name) == expected.get(name), name
    assert_one_with_its_base(optimizer)
    if has_torchs_bits(backend, device) or base == "rmsprop":
        assert_same_bits(mine.weights(), theirs.weights())
    else:
        torch.testing.assert_close(mine.weights(), theirs.weights(), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_scheduler_and_its_optimizer_resume(backend, device):
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for _ in range(3):
        problem.step(optimizer)
        scheduler.step()
    resumed = Problem(device)
    resumed.model.load_state_dict(problem.model.state_dict())
    other = resumed.optimizer(backend)
    again = lr_scheduler.CosineAnnealingLR(other, 8)
    again.load_state_dict(scheduler.state_dict())
    other.load_state_dict(saved_and_loaded(optimizer))
    for _ in range(3):
        problem.step(optimizer)
        scheduler.step()
        resumed.step(other)
        again.step()
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert_same_bits(resumed.weights(), problem.weights())


def test_scheduler_before_any_step_still_warns(backend, device):
    """first_step() is no step: else the warning that guards others' loops would be lost."""
    problem = Problem(device)
    optimizer = problem.optimizer(backend)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    problem.first_step(optimizer)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)"):
        scheduler.step()
