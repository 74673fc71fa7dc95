"""Every method's trajectory beside its paper's algorithm in float64, on every backend; and what each must keep to."""

import copy
import functools
import io

import internals
import oracle
import pytest
import torch
import triton_interpreter
from checks import assert_same_bits, assert_within
from method_cases import ALIKE, MIXED, MOMENTUM, PLAIN, RATES, a_round, groups_with
from registry import METHODS, every_method
from trajectory import (
    STEPS,
    Network,
    assert_same_trajectory,
    closure_for,
    detached,
    follow_oracle,
    optimizer_for,
    train,
)

from fastsam import FastSAM, methods

# ---- trajectories ----

RUNS = {
    "alike": (ALIKE, 1, False),
    "groups": (MIXED, 1, False),
    "other-seed": (MIXED, 2, False),
    "third-seed": (MIXED, 3, False),
    "adamw": (MIXED, 4, True),
}


@functools.cache
def expected_trajectory(name, run, device):
    groups, seed, adamw = RUNS[run]
    return follow_oracle(Network(device, seed), METHODS[name].oracle, groups, adamw=adamw)


@pytest.mark.parametrize(
    "run", [pytest.param(run, marks=[pytest.mark.thorough] if "seed" in run else []) for run in RUNS]
)
@every_method
def test_trajectory_is_papers(backend, device, name, case, run):
    groups, seed, adamw = RUNS[run]
    count = triton_interpreter.fewer(STEPS, 3, backend, device)
    actual = train(Network(device, seed), backend, groups, count, method=case.method, adamw=adamw)
    assert_same_trajectory(actual, expected_trajectory(name, run, device), 1e-8 if adamw else 1e-9)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (methods.UnifiedSAM(lam=0), functools.partial(oracle.unified_sam, lam=0)),
        (methods.UnifiedSAM(lam=1), oracle.sam),
        (methods.LESAM(), oracle.lesam()),
        (methods.VaSSO(theta=1.0), oracle.sam),
        (methods.ZSharp(q=0.5), functools.partial(oracle.zsharp, q=0.5)),
        (methods.ESAM(beta=1.0), oracle.sam),
        (methods.WSAM(gamma=0.8 / 1.8, decouple=False), oracle.gradient_norm_penalty),
    ],
    ids=["USAM", "SAM", "LESAM", "VaSSO", "ZSharp", "ESAM", "GNP"],
)
def test_other_options(device, method, expected):
    """At the ends of their ranges methods are other methods."""
    network = Network(device, 22)
    actual = train(network, "reference", ALIKE, 6, method=method)
    assert_same_trajectory(actual, follow_oracle(network, expected, ALIKE, steps=6), 1e-9)


@every_method
def test_one_step_in_float32(backend, device, name, case):
    """Within a few roundings of what float64 makes of the same numbers."""
    network = Network(device, 5)
    network.starts = [w.float().double() for w in network.starts]
    (expected,) = follow_oracle(network, case.oracle, MIXED, steps=1)
    (actual,) = train(network, backend, MIXED, 1, dtype=torch.float32, method=case.method)
    for one, other, first in zip(actual, expected, network.starts, strict=True):
        # The gradients' own rounding is passed through two layers, the ascent, and WSAM's coefficient of 9.
        allowed = 400 * torch.finfo(torch.float32).eps * (other - first).abs().max() + 4e-7 * first.abs()
        assert ((one.double() - other).abs() <= allowed).all()


# ---- passes ----


@every_method
def test_number_of_passes_and_two_phases(backend, device, name, case):
    """The closure is called as often as the method needs; the two phases make the same bits."""
    method, network = case.method, Network(device, 6)
    one, other = network.params(), network.params()
    by_closure = optimizer_for(one, backend, MIXED, method=method)
    by_phases = optimizer_for(other, backend, MIXED, method=method)
    for step in range(a_round(case, backend, device)):
        calls = []
        by_closure.step(closure_for(network, one, by_closure, step, calls))
        passes = case.passes_of(step)
        assert len(calls) == passes
        closure = closure_for(network, other, by_phases, step)
        if case.ascents == 0:
            assert by_phases.first_step() is False
            closure()
        for ascent in range(case.ascents):
            closure()
            needs_another = by_phases.first_step()
            assert needs_another is (passes > 1) is by_phases.perturbed
            if needs_another and ascent + 1 < case.ascents:
                with pytest.raises(RuntimeError, match=r"ascends .* times"):
                    by_phases.step()
            if needs_another and ascent + 1 == case.ascents:
                closure()
        by_phases.step()
        assert not by_phases.perturbed
        assert_same_bits(detached(other), detached(one))


@pytest.mark.parametrize("name", ["looksam"])
def test_step_without_ascent_waits_for_its_update(backend, device, name, case):
    network = Network(device, 7)
    params = network.params()
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    optimizer.step(closure_for(network, params, optimizer, 0))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.first_step()
    closure_for(network, params, optimizer, 1)()
    before = detached(params)
    assert optimizer.first_step() is False
    assert all(p.grad is not None for p in params)
    assert_same_bits(detached(params), before)
    optimizer.restore()
    with pytest.raises(RuntimeError, match=r"step\(\) needs a closure"):
        optimizer.step()


# ---- invariants ----


@every_method
def test_rho_zero_is_base(backend, device, name, case):
    network = Network(device, 8)
    params, base_params = network.params(), network.params()
    optimizer = optimizer_for(params, backend, PLAIN, method=case.method)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(base_params, RATES, strict=True)]
    base = torch.optim.SGD(groups, foreach=False, **MOMENTUM)
    for step in range(a_round(case, backend, device)):
        for p, q in zip(params, base_params, strict=True):
            p.data.copy_(q)
            if q in base.state:
                optimizer.state[p]["momentum_buffer"].copy_(base.state[q]["momentum_buffer"])
        before = detached(base_params)
        optimizer.step(closure_for(network, params, optimizer, step))
        closure_for(network, base_params, base, step)()
        base.step()
        assert_within(detached(params), detached(base_params), before)


@pytest.mark.parametrize("name", [name for name, case in METHODS.items() if case.ascents])
def test_nan_in_first_pass_does_not_spread(backend, device, name, case):
    """No perturbation; the second pass runs at the weights, and neither they nor the method's buffers are lost."""
    network = Network(device, 9)
    params = network.params()
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    optimizer.step(closure_for(network, params, optimizer, 0))
    if isinstance(case.method, methods.LookSAM):  # the next step has an ascent, too
        saved = optimizer.state_dict()
        groups = [{**group, "fastsam_step": 0} for group in saved["param_groups"]]
        optimizer.load_state_dict({**saved, "param_groups": groups})
    buffers = [optimizer.state[p][case.state].clone() for p in params] if case.state else []
    before, closure, passes = detached(params), closure_for(network, params, optimizer, 1), []

    def poisoned():
        assert_same_bits(detached(params), before)
        closure()
        if not passes:
            params[0].grad[0, 0] = torch.nan
        passes.append(1)

    if case.ascents > 1:
        poisoned()
        optimizer.first_step()
        assert_same_bits(detached(params), before)
        optimizer.restore()
        return
    optimizer.step(poisoned)
    assert len(passes) == 2
    after = [optimizer.state[p][case.state] for p in params] if case.state else []
    assert all(bool(t.isfinite().all()) for t in [*params, *after])
    if isinstance(case.method, methods.FriendlySAM):
        assert_same_bits(after, buffers)


@pytest.mark.parametrize("name", ["momentum"])
def test_nan_in_momentum_does_not_perturb(backend, device, name, case):
    network = Network(device, 9)
    params = network.params()
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    optimizer.step(closure_for(network, params, optimizer, 0))
    before = detached(params)
    optimizer.state[params[0]]["momentum_buffer"][0, 0] = torch.nan
    optimizer.first_step()
    assert_same_bits(detached(params), before)
    optimizer.restore()


@every_method
def test_exception_undoes_step(backend, device, name, case):
    network = Network(device, 10)
    params, others = network.params(), network.params()
    optimizer = optimizer_for(params, backend, MIXED, method=case.method)
    undisturbed = optimizer_for(others, backend, MIXED, method=case.method)
    for step in range(a_round(case, backend, device)):
        before = detached(params)
        for allowed in range(case.passes_of(step)):
            calls = []
            closure = closure_for(network, params, optimizer, step, calls)

            def failing(closure=closure, calls=calls, allowed=allowed):
                if len(calls) == allowed:
                    raise ValueError("out of luck")
                return closure()

            with pytest.raises(ValueError, match="out of luck"):
                optimizer.step(failing)
            assert not optimizer.perturbed
            assert_same_bits(detached(params), before)
        optimizer.step(closure_for(network, params, optimizer, step))
        undisturbed.step(closure_for(network, others, undisturbed, step))
        assert_same_bits(detached(params), detached(others))


@every_method
def test_checkpoint_and_copy_resume_bit_for_bit(backend, device, name, case):
    network = Network(device, 11)
    params = network.params()
    optimizer = optimizer_for(params, backend, MIXED, method=case.method)
    for step in range(2):
        optimizer.step(closure_for(network, params, optimizer, step))
    file = io.BytesIO()
    torch.save({"weights": detached(params), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [w.clone().requires_grad_() for w in saved["weights"]]
    other = optimizer_for(resumed, backend, groups_with(0.3), method=case.method)
    other.load_state_dict(saved["optimizer"])
    copied = copy.deepcopy(optimizer)
    copies = [p for group in copied.param_groups for p in group["params"]]
    for step in range(2, a_round(case, backend, device)):
        for some, theirs in ((optimizer, params), (other, resumed), (copied, copies)):
            some.step(closure_for(network, theirs, some, step))
        assert_same_bits(detached(params), detached(resumed))
        assert_same_bits(detached(params), detached(copies))


@every_method
def test_overflow_in_second_pass_changes_nothing(backend, device, name, case):
    network = Network(device, 19)
    params = network.params(torch.float32)
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    optimizer.step(closure_for(network, params, optimizer, 0))
    before = detached(params)
    state = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in params}
    closure = closure_for(network, params, optimizer, 1)
    for _ in range(case.ascents):
        closure()
        optimizer.first_step()
    if case.ascents == 0:
        optimizer.first_step()
    closure()
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device=device), torch.ones((), device=device)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    assert_same_bits(detached(params), before)
    for p in params:
        for key, value in state[p].items():
            assert_same_bits(optimizer.state[p][key], value, key)


@pytest.mark.parametrize("name", ["gsam", "wsam-coupled", "looksam", "friendly", "asam", "amp-3-steps"])
def test_unfused_base(device, name):
    """RMSprop, beside the same gradients given to it alone."""
    network = Network(device, 12)
    params, weights = network.params(), network.params()
    groups = [{"params": [p], "rho": group["rho"]} for p, group in zip(params, MIXED, strict=True)]
    optimizer = FastSAM(groups, torch.optim.RMSprop, method=METHODS[name].method, lr=0.01, foreach=False)
    base = torch.optim.RMSprop(weights, lr=0.01, foreach=False)
    memory = {}
    for step in range(8):
        optimizer.step(closure_for(network, params, optimizer, step))
        gradient = lambda w, step=step: network.gradient(w, step)  # noqa: E731
        given = METHODS[name].oracle(detached(weights), gradient, MIXED, memory)
        for w, g in zip(weights, given, strict=True):
            w.grad = g
        base.step()
        assert_same_trajectory([detached(params)], [detached(weights)], 1e-9)


@pytest.mark.parametrize("name", ["gsam", "looksam", "friendly"])
def test_first_gradients_are_adopted_not_copied(backend, device, name, case):
    network = Network(device, 13)
    params = network.params()
    optimizer = optimizer_for(params, backend, ALIKE, method=case.method)
    closure_for(network, params, optimizer, 0)()
    addresses = [p.grad.data_ptr() for p in params]
    optimizer.first_step(zero_grad=False)
    assert all(p.grad is None for p in params)
    assert [t.data_ptr() for t in internals.first_gradients(optimizer)] == addresses
    optimizer.restore()
    assert not any(t is not None for t in internals.first_gradients(optimizer))
    # A view of a larger tensor (DDP's bucket) still belongs to another.
    bucket = torch.zeros(100, dtype=torch.float64, device=device)
    closure_for(network, params, optimizer, 0)()
    params[1].grad = bucket[8:16].copy_(params[1].grad)
    optimizer.first_step()
    bucket.fill_(torch.nan)
    closure_for(network, params, optimizer, 0)()
    optimizer.second_step()
    assert all(torch.isfinite(p).all() for p in params)
