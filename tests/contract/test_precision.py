"""Masters and stochastic rounding: what training with them is."""

import math

import internals
import pytest
import torch
import triton_interpreter
from checks import assert_same_bits, bits
from problem import Snapshot, assert_same_state, state_of
from registry import PRECISIONS, every_precision, every_variant, low_dtypes, with_masters
from trained import MASTER, assert_rounded, two_variants

from fastsam import FastSAM, methods

# ---- masters ----


@with_masters
@every_variant
@low_dtypes
def test_masters_are_float32_training(trained, dtype, variant, precision):
    """Bit for bit, given the same gradients; the model computes with their rounding."""
    low, full = trained(dtype, variant, **PRECISIONS[precision]), trained(torch.float32, variant)
    for _ in range(4):
        low.perturb()
        full.perturb()
        if precision == "masters":
            assert_same_bits(low.weights(), [p.to(dtype) for p in full.weights()], "perturbed")
        low.descend()
        full.descend()
        assert_same_bits(low.masters(), full.weights(), "masters")
        assert_rounded(low.params, low.masters())
        for ours, theirs in zip(low.moments(), full.moments(), strict=True):
            assert_same_bits(list(ours.values()), list(theirs.values()), "moments")


@with_masters
@two_variants
def test_masters_in_adaptive_perturbation(trained, variant, precision):
    """It is scaled by the parameter, where the gradient was taken."""
    low = trained(torch.bfloat16, variant, adaptive=True, **PRECISIONS[precision]).steps(2)
    weights, masters = low.weights(), low.masters()
    low.give_grads()
    grads = [p.grad.double() for p in low.params]
    norm = math.sqrt(sum(float((w.double() * g).square().sum()) for w, g in zip(weights, grads, strict=True)))
    low.optimizer.first_step()
    for p, w, m, g in zip(low.params, weights, masters, grads, strict=True):
        exact = m.double() + 0.1 * g * w.double().square() / (norm + 1e-12)
        spacing = torch.finfo(torch.bfloat16).eps * exact.abs() * (0.51 if precision == "masters" else 1.01)
        assert ((p.detach().double() - exact).abs() <= spacing).all()
    low.optimizer.restore()
    assert_same_bits(low.weights(), weights)


@with_masters
def test_master_is_backup(trained, precision):
    low = trained(torch.bfloat16, "sgd-momentum", **PRECISIONS[precision]).steps(2)
    for p, backup in zip(low.params, internals.backups(low.optimizer), strict=True):
        assert backup.data_ptr() == low.optimizer.state[p][MASTER].data_ptr()


@with_masters
@two_variants
def test_edited_parameter_overrides_its_master(trained, variant, precision):
    """What somebody has written to a parameter becomes its master; elsewhere masters keep what rounding loses."""
    low = trained(torch.float16, variant, **PRECISIONS[precision]).steps(3)
    before = low.masters()
    with torch.no_grad():
        low.params[0][::2] = 0.123
        low.params[2].copy_(low.params[2] * 0.5)  # as a running average may, or a model's load_state_dict
    edited = low.weights()
    low.perturb()
    low.optimizer.restore()
    assert_same_bits(low.weights(), edited)
    expected = [m.clone() for m in before]
    expected[0][::2] = torch.tensor(0.123).to(torch.float16).float()
    expected[2] = edited[2].float()
    assert_same_bits(low.masters(), expected)


@with_masters
@pytest.mark.parametrize("how", ["perturb", "no gradient in the first pass"])
@two_variants
def test_edited_parameter_overrides_its_master_without_perturbation(trained, variant, precision, how):
    low, full = trained(torch.bfloat16, variant, **PRECISIONS[precision]), trained(torch.float32, variant)
    absent = (0, 2) if how != "perturb" else ()
    for optimizer in (low.optimizer, full.optimizer):
        optimizer.param_groups[0]["perturb"] = how != "perturb"
    for _ in range(3):
        for one in (low, full):
            one.perturb(absent)
            one.descend()
        assert_same_bits(low.masters(), full.weights())
        with torch.no_grad():
            for i, edited in ((0, torch.full_like(low.params[0], 0.5)), (2, low.params[2] * 0.75)):
                same = bits(edited) == bits(low.params[i])
                full.params[i].copy_(torch.where(same, full.params[i], edited.float()))
                low.params[i].copy_(edited)


@with_masters
@two_variants
def test_perturbed_parameter_without_second_gradient_is_restored(trained, variant, precision):
    low = trained(torch.bfloat16, variant, **PRECISIONS[precision]).steps(2)
    for absent in ((0, 2), (0,)):
        weights, masters = low.weights(), low.masters()
        low.perturb()
        low.descend(absent)
        for i in absent:
            assert_same_bits(low.params[i].detach(), weights[i])
            assert_same_bits(low.masters()[i], masters[i])
    fresh = trained(torch.bfloat16, variant, **PRECISIONS[precision])
    weights = fresh.weights()
    fresh.perturb()
    fresh.descend((0,))
    assert_same_bits(fresh.params[0].detach(), weights[0])
    assert fresh.params[0] not in fresh.optimizer.state, "torch.optim would take it for a complete state"
    fresh.steps(1)
    assert_rounded(fresh.params, fresh.masters())


@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
@every_precision
@two_variants
@low_dtypes
def test_overflow_changes_nothing(trained, dtype, variant, precision, first):
    low = trained(dtype, variant, **PRECISIONS[precision]).steps(0 if first else 2)
    weights, moments = low.weights(), low.moments()
    masters = low.masters() if "master_weights" in PRECISIONS[precision] and not first else []
    low.perturb()
    low.give_grads()
    low.params[0].grad.fill_(math.inf)
    low.optimizer.grad_scale, low.optimizer.found_inf = torch.tensor(1024.0), torch.tensor(1.0)
    low.optimizer.second_step()
    del low.optimizer.grad_scale, low.optimizer.found_inf
    assert_same_bits(low.weights(), weights)
    if not first:
        for ours, theirs in zip(low.moments(), moments, strict=True):
            assert_same_bits(list(ours.values()), list(theirs.values()))
    assert_same_bits(low.masters() if masters else [], masters)
    other = trained(dtype, variant, **PRECISIONS[precision]).steps(0 if first else 2)
    low.count, other.count = 50, 50
    assert_same_bits(low.steps(1).weights(), other.steps(1).weights(), "the step after it")


@every_precision
@two_variants
@low_dtypes
def test_no_perturbation_by_what_is_not_finite(trained, dtype, variant, precision):
    low = trained(dtype, variant, **PRECISIONS[precision]).steps(1)
    weights = low.weights()
    low.give_grads()
    low.params[0].grad[0] = math.nan
    low.optimizer.first_step()
    assert_same_bits(low.weights(), weights)
    low.descend()
    assert all(bool(w.isfinite().all()) for w in low.weights())


@pytest.mark.parametrize("steps", [0, 2], ids=["first-step", "later"])
@every_precision
@two_variants
def test_failing_closure_leaves_everything_as_it_was(trained, variant, precision, steps):
    low = trained(torch.bfloat16, variant, **PRECISIONS[precision]).steps(steps)
    low.optimizer.zero_grad()
    before = Snapshot(low.optimizer)
    passes = []

    def closure():
        passes.append(1)
        low.give_grads()
        if len(passes) == 2:
            assert low.optimizer.perturbed
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        low.optimizer.step(closure)
    before.assert_unchanged(grads=False)


@every_precision
@low_dtypes
def test_restore(trained, dtype, precision):
    low = trained(dtype, "adam", **PRECISIONS[precision])
    for _ in range(3):
        weights, state = low.weights(), state_of(low.optimizer)
        low.perturb()
        assert any(bool((bits(p) != bits(w)).any()) for p, w in zip(low.params, weights, strict=True))
        low.optimizer.restore()
        assert_same_bits(low.weights(), weights)
        assert_same_state(state_of(low.optimizer), state)
        low.steps(1)


@with_masters
@pytest.mark.parametrize("cast", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_model_that_is_cast_while_perturbed(trained, precision, cast):
    """The weights that come back are those that were there, not what their masters know besides."""
    low = trained(torch.bfloat16, "sgd-momentum", **PRECISIONS[precision]).steps(2)
    weights = low.weights()
    low.perturb()
    for p in low.params:
        p.grad, p.data = None, p.data.to(cast)
    low.optimizer.restore()
    assert_same_bits(low.weights(), [w.to(cast) for w in weights])
    low.steps(2)
    assert all((MASTER in low.optimizer.state[p]) == (cast != torch.float32) for p in low.params)
    if cast == torch.float16:
        assert_rounded(low.params, low.masters())


# ---- stochastic rounding ----


@two_variants
@low_dtypes
def test_seed_decides_rounding(trained, dtype, variant):
    def weights(seed):
        return trained(dtype, variant, rounding="stochastic", rounding_seed=seed).steps(2).weights()

    assert_same_bits(weights(1), weights(1))
    assert any(not torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


def test_default_seed_is_a_constant(trained):
    """Replicas round alike, whatever the seeds of their generators."""
    torch.manual_seed(123456789012345)
    state = torch.get_rng_state()
    low = trained(torch.bfloat16, "sgd-plain", rounding="stochastic")
    assert torch.equal(torch.get_rng_state(), state), "no number was drawn"
    assert low.optimizer.param_groups[0]["rounding_seed"] == 0


@two_variants
def test_positions_and_steps_give_other_numbers(trained, variant):
    """Parameters of one shape, and steps one after another, are not rounded alike."""
    low = trained(torch.bfloat16, variant, shapes=[(64,), (64,)], rounding="stochastic")
    with torch.no_grad():
        low.params[1].copy_(low.params[0])
    perturbations = []
    for _ in range(2):
        weights = low.weights()
        for p in low.params:
            p.grad = torch.full_like(p, 1e-3)
        low.optimizer.first_step()
        perturbations += [(p.detach() - w).clone() for p, w in zip(low.params, weights, strict=True)]
        for p in low.params:
            p.grad = torch.zeros_like(p)
        low.optimizer.param_groups[0]["lr"] = 0.0
        low.optimizer.second_step()
    assert len({tuple(bits(c).tolist()) for c in perturbations}) == 4


def test_new_group_changes_nothing_for_others(trained):
    """It comes after them in the flattened groups."""
    low, other = (trained(torch.bfloat16, "adam", rounding="stochastic", rounding_seed=3) for _ in range(2))
    low.steps(1)
    other.steps(1)
    added = torch.zeros(5, dtype=torch.bfloat16, device=other.params[0].device, requires_grad=True)
    other.optimizer.add_param_group({"params": [added]})
    assert other.optimizer.param_groups[1]["rounding"] == "stochastic"
    assert other.optimizer.param_groups[1]["rounding_seed"] == 3
    low.steps(1)
    other.steps(1)
    assert_same_bits(other.weights(), low.weights())


def test_small_steps_add_up(trained):
    """Twenty steps of a thirty-second of the spacing: to nearest nothing moves."""
    n, count, step = 4096, 20, 2**-13

    def train(**options):
        low = trained(torch.bfloat16, "sgd-plain", shapes=[(n,)], lr=1.0, weight_decay=0.0, **options)
        with torch.no_grad():
            low.params[0].fill_(1.0)
        for _ in range(count):
            for phase in (low.optimizer.first_step, low.optimizer.second_step):
                low.params[0].grad = torch.full_like(low.params[0], step)
                phase()
        return low

    assert (train().params[0] == 1).all()
    assert (train(master_weights=True).masters()[0] == 1 - count * step).all()
    spread = math.sqrt(count * step * 2**-8 / n)
    mean = float(train(rounding="stochastic").weights()[0].double().mean())
    assert abs(mean - (1 - count * step)) < 5 * spread


def test_perturbation_of_small_weights(backend, device):
    """Weights of sigma 0.02 in bfloat16, and an e per element as that of 25 million at rho 0.05.

    To nearest, most of it is lost; by stochastic rounding, and from masters with bits of their own, all of it is there
    along the gradient.
    """
    n = 1 << (16 if triton_interpreter.runs(backend, device) else 20)
    rho = 0.05 * math.sqrt(n / 25e6)
    generator = torch.Generator().manual_seed(0)
    master, g = (torch.randn(n, generator=generator).to(device) for _ in range(2))
    master *= 0.02
    w, g = master.bfloat16(), g.bfloat16()

    def projection(master=None, **options):
        param = w.clone().requires_grad_()
        optimizer = FastSAM([param], rho=rho, lr=0.1, backend=backend, **options)
        if master is not None:
            optimizer.state[param][MASTER] = master.clone()
        param.grad = g.clone()
        optimizer.first_step()
        e = param.detach().double() - w.double()
        return float((e * g.double()).sum() / g.double().norm()) / rho

    assert 0.2 < projection() < 0.4
    assert projection(master_weights=True) == projection()
    tolerance = 0.01 if n == 1 << 20 else 0.03
    assert projection(rounding="stochastic", rounding_seed=0) == pytest.approx(1, abs=tolerance)
    assert projection(master, master_weights=True) == pytest.approx(1, abs=tolerance)


@low_dtypes
def test_each_ascent_and_each_parameter_has_random_numbers_of_its_own(backend, device, dtype):
    """Nine ascents of three parameters that are alike, to points between two numbers: 27 different roundings."""
    count = 4096
    params = [torch.ones(count, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    rho = torch.finfo(dtype).eps / 2 * math.sqrt(3 * count)
    method = methods.SAM(inner_steps=9, inner_lr=1.0)
    optimizer = FastSAM(params, rho=rho, method=method, rounding="stochastic", rounding_seed=7, lr=0.1, backend=backend)
    roundings = []
    for _ in range(9):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.first_step()
        roundings.append(torch.stack([(param.detach() > 1).double() for param in params]).cpu())
    optimizer.restore()
    assert len({bytes(each.to(torch.uint8).tolist()) for ascent in roundings for each in ascent}) == 27
    for ascent in roundings:
        correlations = torch.corrcoef(ascent) - torch.eye(3, dtype=torch.float64)
        assert float(correlations.abs().max()) < 5 / math.sqrt(count)
