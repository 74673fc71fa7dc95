"""Which steps perturb: rho = 0, schedules, AE-SAM's policy; and what the other steps still do."""

import copy
import functools
import io

import oracle
import pytest
import torch
import triton_interpreter
from checks import assert_same_bits
from registry import METHODS, every_method
from trajectory import STEPS, Network, assert_same_trajectory, closure_for, detached, follow_oracle, optimizer_for

from fastsam import FastSAM, methods, schedules
from fastsam.davda54 import SAM as OldSAM

pytestmark = pytest.mark.face

RATES = [0.05, 0.1, 0.02, 0.1, 0.05]
GROUPS = [{"rho": 0.1, "lr": lr, "momentum": 0.9, "weight_decay": 0.01} for lr in RATES]
COMPOSED = ["sam", "gsam", "friendly", "vasso", "stable", "lesam", "zsharp", "momentum"]


def zero_rho(groups):
    return [{**group, "rho": 0} for group in groups]


def train_counting(network, optimizer, params, count):
    """The weights after each step, and the number of its passes."""
    trajectory, passes = [], []
    for step in range(count):
        calls = []
        optimizer.step(closure_for(network, params, optimizer, step, calls))
        trajectory.append(detached(params))
        passes.append(len(calls))
    return trajectory, passes


# ---- rho = 0 ----


@every_method
def test_number_zero_costs_one_pass(backend, device, name):
    """And the step is the base's, bit for bit."""
    network, method = Network(device, 3), METHODS[name].method
    params, others = network.params(), network.params()
    optimizer = optimizer_for(params, backend, zero_rho(GROUPS), method=method)
    alone = optimizer_for(others, backend, zero_rho(GROUPS), schedule=lambda step: False)
    actual, passes = train_counting(network, optimizer, params, 2)
    assert passes == [1, 1]
    assert_same_bits(actual, train_counting(network, alone, others, 2)[0])


def test_two_phases_at_zero(backend, device):
    network = Network(device, 3)
    params = network.params()
    optimizer = optimizer_for(params, backend, zero_rho(GROUPS))
    closure_for(network, params, optimizer)()
    grads = [p.grad for p in params]
    assert optimizer.first_step() is False
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert not optimizer.perturbed
    optimizer.step()
    (expected,) = follow_oracle(network, oracle.sam, zero_rho(GROUPS), steps=1)
    assert_same_trajectory([detached(params)], [expected], 1e-12)


def test_schedule_of_rho_may_be_zero(backend, device):
    network = Network(device, 3)
    params = network.params()
    optimizer = FastSAM(params, rho=lambda step: 0.1 * (step % 2), lr=0.1, backend=backend)
    _, passes = train_counting(network, optimizer, params, 4)
    assert passes == [1, 2, 1, 2]


def test_one_perturbed_group_is_enough(backend, device):
    """A group that is not perturbed has no say, nor has a tensor: it is not read."""
    network = Network(device, 3)
    params = network.params()
    zero = torch.zeros((), device=device)
    for rhos, options, expected in (
        ([0, 0, 0, 0, 0.1], {}, 2),
        ([0, 0, 0, 0, 0.1], {"perturb": False}, 1),
        ([0, 0, 0, 0, zero], {}, 2),
    ):
        groups = [{"params": [p], "rho": rho} for p, rho in zip(params, rhos, strict=True)]
        groups[-1].update(options)
        optimizer = FastSAM(groups, lr=0.1, backend=backend)
        _, passes = train_counting(network, optimizer, params, 1)
        assert passes == [expected]


def test_davda54_loops_always_have_two_passes(device):
    """Its users ignore what first_step() returns, and their gradients would add up."""
    network = Network(device, 3)
    params = network.params()
    optimizer = OldSAM(params, torch.optim.SGD, rho=0.0, lr=0.1)
    for _ in range(2):
        closure_for(network, params, optimizer)()
        assert optimizer.first_step(zero_grad=True) is True
        closure_for(network, params, optimizer)()
        optimizer.second_step(zero_grad=True)
    with pytest.raises(ValueError, match="schedule is FastSAM's"):
        OldSAM(params, torch.optim.SGD, schedule=bool, lr=0.1)


# ---- schedules ----


def test_late_and_early_say_when():
    late, early = schedules.Late(0.3, 10), schedules.Early(0.3, 10)
    assert [late(step) for step in range(11)] == [False] * 7 + [True] * 4
    assert [early(step) for step in range(11)] == [True] * 3 + [False] * 8
    assert not any(schedules.Late(0.0, 5)(step) for step in range(5))
    assert all(schedules.Late(1.0, 5)(step) for step in range(5))
    ramp = schedules.Late(0.5, 8, ramp=4)
    assert [ramp.scale(step) for step in range(4, 9)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@functools.cache
def scheduled_trajectory(name, device):
    return follow_oracle(Network(device, 4), oracle.only_in(METHODS[name].oracle, lambda step: step >= 3), GROUPS)


@pytest.mark.parametrize("name", COMPOSED)
def test_late_composes_with_every_method(backend, device, name):
    """The averages of gradients at w go on in the steps before."""
    network, case = Network(device, 4), METHODS[name]
    params = network.params()
    options = {"method": case.method, "schedule": schedules.Late(0.75, 12)}
    optimizer = optimizer_for(params, backend, GROUPS, **options)
    actual, passes = train_counting(network, optimizer, params, triton_interpreter.fewer(8, 4, backend, device))
    assert passes == [1, 1, 1, *[case.passes_of(0)] * (len(actual) - 3)]
    assert_same_trajectory(actual, scheduled_trajectory(name, device), 1e-9)


def test_ramp_scales_rho(backend, device):
    network = Network(device, 5)
    params = network.params()
    optimizer = optimizer_for(params, backend, GROUPS, schedule=schedules.Late(0.5, 12, ramp=4))

    def ramped(weights, gradient, groups, memory):
        step = memory["step"] = memory.get("step", -1) + 1
        rho = 0.1 * min(1, max(0, (step - 5) / 4))
        return oracle.sam(weights, gradient, [{**group, "rho": rho} for group in groups], memory)

    count = triton_interpreter.fewer(STEPS, 8, backend, device)
    actual, passes = train_counting(network, optimizer, params, count)
    assert passes == ([1] * 6 + [2] * 6)[:count]
    assert_same_trajectory(actual, follow_oracle(network, ramped, GROUPS), 1e-9)


def test_schedule_and_interval_must_both_agree(device):
    network = Network(device, 5)
    params = network.params()
    optimizer = FastSAM(params, lr=0.1, interval=2, schedule=lambda step: step >= 3)
    assert train_counting(network, optimizer, params, 7)[1] == [1, 1, 1, 1, 2, 1, 2]


@pytest.mark.parametrize("schedule", [schedules.Late(0.5, 8), schedules.AESAM(8), schedules.AESAM(8, delay=0)], ids=str)
def test_schedule_resumes_bit_for_bit(device, schedule):
    network = Network(device, 6)
    params = network.params()
    make = functools.partial(FastSAM, lr=0.1, schedule=schedule, method=methods.VaSSO())
    optimizer = make(params)
    train_counting(network, optimizer, params, 4)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = [p.detach().clone().requires_grad_() for p in params]
    other = make(resumed)
    other.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(optimizer)
    copies = [p for group in copied.param_groups for p in group["params"]]
    for step in range(4, 8):
        for some, theirs in ((optimizer, params), (other, resumed), (copied, copies)):
            some.step(closure_for(network, theirs, some, step))
        assert_same_bits(detached(params), detached(resumed))
        assert_same_bits(detached(params), detached(copies))


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        ("late", TypeError, "schedule must be a function"),
        (schedules.Late, TypeError, r"schedules\.Late\("),
        (schedules.AESAM, TypeError, r"schedules\.AESAM\("),
    ],
    ids=["text", "class", "policy's class"],
)
def test_what_is_no_schedule(schedule, error, message):
    with pytest.raises(error, match=message):
        FastSAM([torch.zeros(3, requires_grad=True)], lr=0.1, schedule=schedule)


@pytest.mark.parametrize(
    ("option", "make"),
    {
        "fraction": lambda: schedules.Late(1.5, 10),
        "total_steps": lambda: schedules.Early(0.5, 0),
        "ramp": lambda: schedules.Late(0.5, 10, ramp=-1),
        "delta": lambda: schedules.AESAM(10, delta=1.0),
        "delay": lambda: schedules.AESAM(10, delay=2),
        "lambda1": lambda: schedules.AESAM(10, lambda1=float("inf")),
    }.items(),
)
def test_option_out_of_range(option, make):
    with pytest.raises(ValueError, match=f"^{option} must be"):
        make()


# ---- AE-SAM ----


@functools.cache
def adaptive_trajectory(name, delay, device):
    network, case, memory = Network(device, 7), METHODS[name], {}
    policy = oracle.aesam(case.oracle, STEPS, delay)

    def remembering(weights, gradient, groups, _):
        return policy(weights, gradient, groups, memory)

    return follow_oracle(network, remembering, GROUPS), memory["ascents"]


@pytest.mark.parametrize("delay", [0, 1], ids=["at-once", "delayed"])
@pytest.mark.parametrize("name", ["sam", "gsam", "vasso", "stable"])
def test_adaptive_policy_is_papers(backend, device, name, delay):
    network = Network(device, 7)
    params = network.params()
    schedule = schedules.AESAM(STEPS, delay=delay)
    optimizer = optimizer_for(params, backend, GROUPS, method=METHODS[name].method, schedule=schedule)
    expected, ascents = adaptive_trajectory(name, delay, device)
    assert 2 < sum(ascents) < len(ascents) - 2, "some steps of each kind"
    actual, passes = train_counting(network, optimizer, params, triton_interpreter.fewer(STEPS, 5, backend, device))
    assert passes == [1 + ascends for ascends in ascents][: len(actual)]
    assert_same_trajectory(actual, expected, 1e-9)


@pytest.mark.parametrize("delay", [0, 1], ids=["at-once", "delayed"])
def test_adaptive_policy_in_two_phases(device, delay):
    network = Network(device, 7)
    one, other = network.params(), network.params()
    schedule = schedules.AESAM(STEPS, delay=delay)
    by_closure, by_phases = (FastSAM(params, lr=0.1, schedule=schedule) for params in (one, other))
    for step in range(STEPS):
        by_closure.step(closure_for(network, one, by_closure, step))
        closure = closure_for(network, other, by_phases, step)
        closure()
        if by_phases.first_step():
            closure()
        by_phases.step()
        assert_same_bits(detached(other), detached(one))


def test_adaptive_policy_survives_failures_and_infinities(device):
    """A step that is given up, or that has no finite norm, leaves the statistics as they were."""
    network = Network(device, 8)
    params, others = network.params(), network.params()
    optimizer, undisturbed = (FastSAM(p, lr=0.0, schedule=schedules.AESAM(12)) for p in (params, others))
    for step in range(4):
        closure = closure_for(network, params, optimizer, step)
        closure()
        optimizer.first_step()
        optimizer.restore()

        def poisoned(closure=closure):
            closure()
            params[0].grad[0, 0] = torch.inf

        assert optimizer._policy.statistics.numbers()[:3] == undisturbed._policy.statistics.numbers()[:3]
        before = optimizer._policy.statistics.numbers()
        weights = detached(params)
        optimizer.step(poisoned)
        for p, w in zip(params, weights, strict=True):
            p.data.copy_(w)
        assert optimizer._policy.statistics.numbers() == [*before[:2], 1.0, before[3] + 1]
        optimizer._policy.statistics.load(before)
        for some, theirs in ((optimizer, params), (undisturbed, others)):
            for group in some.param_groups:
                group["fastsam_step"] = step
            some.step(closure_for(network, theirs, some, step))


def test_cheaper_first_pass_decides_and_whole_batch_descends(device):
    """``delay=0`` learns of a step without an ascent when the first pass was over a part of the batch."""
    network, half = Network(device, 9), slice(0, 8)
    params = network.params()
    optimizer = FastSAM(params, lr=0.1, schedule=schedules.AESAM(STEPS, lambda1=9.0, lambda2=9.0, delay=0))
    calls = []
    whole = closure_for(network, params, optimizer, 0, calls)
    optimizer.step(whole, ascent_closure=closure_for(network, params, optimizer, 0, calls, half))
    assert len(calls) == 2
    (expected,) = follow_oracle(network, oracle.sam, [{"rho": 0.0, "lr": 0.1}] * 5, steps=1)
    assert_same_trajectory([detached(params)], [expected], 1e-12)


def test_what_does_not_go_with_adaptive_policy():
    params = [torch.zeros(3, requires_grad=True)]
    schedule = schedules.AESAM(10)
    with pytest.raises(ValueError, match="MomentumSAM"):
        FastSAM(params, lr=0.1, momentum=0.9, method=methods.MomentumSAM(), schedule=schedule)
    with pytest.raises(ValueError, match="the gradient at w is not computed"):
        FastSAM(params, lr=0.1, schedule=schedule).step(closures=[lambda: None])
