"""bfloat16 and float16 parameters: stochastic rounding and float32 masters, on every backend."""

import copy
import io
import math
import pickle

import internals
import pytest
import torch
import triton_interpreter
from checks import Canaries, assert_same_bits, bits, values
from problem import Snapshot, assert_same_state, state_of
from registry import FUSED_VARIANTS, PRECISIONS, every_precision, every_variant, low_dtypes, with_masters

from fastsam import FastSAM, davda54

two_variants = pytest.mark.parametrize("variant", ["sgd-momentum", "adamw-amsgrad"])
SHAPES = [(33, 9), (), (257,), (0, 3), (2, 3, 4, 5)]
MASTER = "fastsam_master"


class Trained:
    """Parameters, and gradients that do not depend on them: pass ``i`` always gets the same."""

    def __init__(self, backend, device, dtype, variant, *, shapes=SHAPES, **options):
        self.params = [values(s, torch.bfloat16, device, i).to(dtype) for i, s in enumerate(shapes)]
        self.params = [p.requires_grad_() for p in self.params]
        cls, defaults = FUSED_VARIANTS[variant]
        self.optimizer = FastSAM(self.params, cls, backend=backend, **{"rho": 0.1, **defaults, **options})
        self.count = 0

    def give_grads(self, absent=()):
        self.count += 1
        for i, p in enumerate(self.params):
            grad = values(p.shape, torch.bfloat16, p.device, 100 * self.count + i)
            p.grad = None if i in absent else grad.to(p.dtype)

    def steps(self, count):
        for _ in range(count):
            self.perturb()
            self.descend()
        return self

    def perturb(self, absent=()):
        self.give_grads(absent)
        self.optimizer.first_step()

    def descend(self, absent=()):
        self.give_grads(absent)
        self.optimizer.second_step()

    def weights(self):
        return [p.detach().clone() for p in self.params]

    def masters(self):
        return [self.optimizer.state[p][MASTER].clone() for p in self.params]

    def moments(self):
        names = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
        state = [self.optimizer.state.get(p, {}) for p in self.params]
        return [{name: s[name].clone() for name in names if name in s} for s in state]


@pytest.fixture
def trained(backend, device):
    return lambda dtype, variant, **options: Trained(backend, device, dtype, variant, **options)


def assert_rounded(params, masters):
    assert all(m.dtype == torch.float32 for m in masters)
    assert_same_bits([p.detach() for p in params], [m.to(p.dtype) for p, m in zip(params, masters, strict=True)])


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


# ---- checkpoints and copies ----


def through_a_file(saved):
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_precision
@every_variant
@low_dtypes
def test_resumed_run_repeats_same_bits(trained, dtype, variant, precision):
    low = trained(dtype, variant, **PRECISIONS[precision]).steps(3)
    saved, weights = through_a_file(low.optimizer.state_dict()), low.weights()
    resumed = trained(dtype, variant)
    with torch.no_grad():
        for p, w in zip(resumed.params, weights, strict=True):
            p.copy_(w)
    resumed.optimizer.load_state_dict(saved)
    resumed.count = low.count
    low.steps(2)
    resumed.steps(2)
    assert_same_bits(resumed.weights(), low.weights())
    assert_same_state(state_of(resumed.optimizer), state_of(low.optimizer))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
@every_precision
@two_variants
def test_copies_continue_identically(trained, variant, precision, duplicate):
    low = trained(torch.bfloat16, variant, **PRECISIONS[precision]).steps(2)
    other = copy.copy(low)
    other.optimizer, other.params = duplicate((low.optimizer, low.params))
    low.steps(2)
    other.steps(2)
    assert_same_bits(other.weights(), low.weights())
    assert_same_state(state_of(other.optimizer), state_of(low.optimizer))


@every_precision
@every_variant
def test_torch_loads_state_and_gives_it_back(trained, variant, precision):
    """The variant alone loads the state, and FastSAM what the variant makes of it."""
    low = trained(torch.bfloat16, variant, **PRECISIONS[precision]).steps(2)
    cls, options = FUSED_VARIANTS[variant]
    plain = cls(low.params, **options)
    plain.load_state_dict(low.optimizer.state_dict())
    low.give_grads()
    plain.step()
    weights = low.weights()
    low.optimizer.load_state_dict(plain.state_dict())
    low.perturb()
    low.optimizer.restore()
    assert_same_bits(low.weights(), weights)
    low.steps(1)
    if "master_weights" in PRECISIONS[precision]:
        assert_rounded(low.params, low.masters())
        dtypes = {t.dtype for s in low.optimizer.state.values() for t in s.values()}
        assert dtypes == {torch.float32}


def test_loaded_master_must_have_parameters_shape(trained):
    low = trained(torch.bfloat16, "sgd-momentum", master_weights=True).steps(1)
    saved = copy.deepcopy(low.optimizer.state_dict())
    saved["state"][0][MASTER] = saved["state"][0][MASTER][:5]
    before = Snapshot(low.optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 .*'fastsam_master' has shape \(5, 9\)"):
        low.optimizer.load_state_dict(saved)
    before.assert_unchanged()


def test_replaced_masters_are_used(trained):
    """Masters that are replaced, cast or taken away."""
    low = trained(torch.bfloat16, "adam", master_weights=True).steps(2)
    state = low.optimizer.state
    state[low.params[0]][MASTER] = state[low.params[0]][MASTER].double()
    state[low.params[2]][MASTER] = state[low.params[2]][MASTER].clone()
    del state[low.params[4]][MASTER]
    before = [low.optimizer.state[p].get(MASTER, p.detach().float()).float() for p in low.params]
    low.perturb()
    low.optimizer.restore()
    low.steps(1)
    other = trained(torch.bfloat16, "adam", master_weights=True).steps(2)
    with torch.no_grad():
        other.optimizer.state[other.params[4]][MASTER].copy_(before[4])
    other.count += 1
    other.steps(1)
    assert_same_bits(low.masters(), other.masters())
    assert state[low.params[0]][MASTER].dtype == torch.float32


def test_state_that_is_emptied_while_perturbed(trained):
    """The masters are all that knows the weights; they come back, and into the state."""
    low, other = (trained(torch.bfloat16, "sgd-plain", master_weights=True).steps(2) for _ in range(2))
    low.perturb()
    other.perturb()
    low.optimizer.state.clear()
    low.descend()
    other.descend()
    assert_same_bits(low.masters(), other.masters())


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


# ---- memory ----


@every_precision
@two_variants
@low_dtypes
def test_parameters_with_gaps(trained, dtype, variant, precision):
    """Bit for bit as dense ones, and nothing beside them is touched."""
    dense, strided = (trained(dtype, variant, shapes=[(6, 5), (33,)], **PRECISIONS[precision]) for _ in range(2))
    canaries = Canaries()
    for p, strides in zip(strided.params, [(13, 2), (3,)], strict=True):
        p.data = canaries.around(p.detach(), offset=1, strides=strides)
    for _ in range(3):
        for one in (dense, strided):
            one.perturb()
        assert_same_bits(strided.weights(), dense.weights(), "perturbed")
        for one in (dense, strided):
            one.descend()
        assert_same_bits(strided.weights(), dense.weights())
    if "master_weights" in PRECISIONS[precision]:
        assert_same_bits(strided.masters(), dense.masters())
    canaries.assert_alive()


@every_precision
@low_dtypes
def test_channels_last(trained, dtype, precision):
    """Walked in memory order: as the permuted parameter, bit for bit."""
    last, permuted = (trained(dtype, "adam", shapes=[(4, 3, 5, 6)], **PRECISIONS[precision]) for _ in range(2))
    last.params[0].data = last.params[0].data.to(memory_format=torch.channels_last)
    permuted.params[0].data = permuted.params[0].data.permute(0, 2, 3, 1).contiguous()
    give = permuted.give_grads

    def give_permuted(absent=()):
        permuted.params[0].data = permuted.params[0].data.permute(0, 3, 1, 2)
        permuted.params[0].grad = None
        give(absent)
        grad = permuted.params[0].grad.permute(0, 2, 3, 1).contiguous()
        permuted.params[0].grad = None
        permuted.params[0].data = permuted.params[0].data.permute(0, 2, 3, 1)
        permuted.params[0].grad = grad

    permuted.give_grads = give_permuted
    last.steps(2)
    for _ in range(2):
        permuted.perturb()
        permuted.give_grads()
        permuted.optimizer.second_step()
    assert_same_bits(last.params[0].detach().permute(0, 2, 3, 1), permuted.params[0].detach())


@every_precision
def test_complex_parameters_of_half_precision(trained, backend, device, precision):
    """Pairs of float16, in memory order."""
    real = trained(torch.float16, "sgd-momentum", shapes=[(12, 2)], **PRECISIONS[precision])
    pairs = trained(torch.float16, "sgd-momentum", shapes=[(12, 2)], **PRECISIONS[precision])
    param = torch.view_as_complex(pairs.params[0].detach().clone()).requires_grad_()
    cls, options = FUSED_VARIANTS["sgd-momentum"]
    optimizer = FastSAM([param], cls, rho=0.1, backend=backend, **options, **PRECISIONS[precision])
    real.steps(2)
    for _ in range(2):
        for step in (optimizer.first_step, optimizer.second_step):
            pairs.give_grads()
            param.grad = torch.view_as_complex(pairs.params[0].grad)
            step()
    assert_same_bits(torch.view_as_real(param.detach()), real.params[0].detach())
    if "master_weights" in PRECISIONS[precision]:
        assert optimizer.state[param][MASTER].dtype == torch.complex64
        assert_same_bits(torch.view_as_real(optimizer.state[param][MASTER]), real.masters()[0])


# ---- options ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@every_precision
@two_variants
def test_precision_options_change_nothing_for_wide_dtypes(trained, dtype, variant, precision):
    plain, precise = trained(dtype, variant), trained(dtype, variant, **PRECISIONS[precision])
    assert_same_bits(precise.steps(2).weights(), plain.steps(2).weights())
    assert_same_state(state_of(precise.optimizer), state_of(plain.optimizer))


@two_variants
def test_groups_of_every_mode_side_by_side(trained, backend, device, variant):
    """Each is kept as it says, and the norm is over all of them."""
    cls, options = FUSED_VARIANTS[variant]
    modes = [{}, *PRECISIONS.values()]
    low = trained(torch.bfloat16, variant, shapes=[(33, 9), (7,)] * 4)
    groups = [{"params": low.params[2 * i : 2 * i + 2], **precision} for i, precision in enumerate(modes)]
    low.optimizer = FastSAM(groups, cls, backend=backend, rho=0.1, **options)
    low.steps(3)
    assert internals.table_count(low.optimizer) == 4
    for i, p in enumerate(low.params):
        state = low.optimizer.state[p]
        assert (MASTER in state) == (i >= 4)
        moments = {t.dtype for name, t in state.items() if name in ("momentum_buffer", "exp_avg", "exp_avg_sq")}
        assert moments == {torch.float32 if i >= 4 else torch.bfloat16}


@two_variants
def test_mode_may_change_between_steps(trained, variant):
    low = trained(torch.bfloat16, variant)
    (group,) = low.optimizer.param_groups
    for precision in ({}, *PRECISIONS.values(), {}):
        group |= {"rounding": "nearest", "master_weights": False} | precision
        weights = low.weights()
        low.perturb()
        low.optimizer.restore()
        assert_same_bits(low.weights(), weights)
        low.steps(2)
        masters = group["master_weights"]
        for p in low.params:
            state = low.optimizer.state[p]
            assert (MASTER in state) == masters
            assert {t.dtype for t in state.values() if t.dim()} <= {torch.float32 if masters else torch.bfloat16}


def test_seed_may_change_between_steps(trained):
    low, other = (
        trained(torch.bfloat16, "sgd-plain", rounding="stochastic", rounding_seed=1).steps(1) for _ in range(2)
    )
    other.optimizer.param_groups[0]["rounding_seed"] = 2
    assert any(not torch.equal(a, b) for a, b in zip(low.steps(1).weights(), other.steps(1).weights(), strict=True))


WRONG = {
    "rounding": (ValueError, {"rounding": "up"}, r"rounding must be 'nearest' or 'stochastic', got 'up'"),
    "seed": (ValueError, {"rounding_seed": 2**32}, r"rounding_seed must be in 0 \.\.\. 2\*\*32 - 1, got 4294967296"),
    "negative": (ValueError, {"rounding_seed": -1}, r"rounding_seed must be in 0 .* got -1"),
    "bool": (TypeError, {"rounding_seed": True}, r"rounding_seed must be an int or None, got True"),
    "float": (TypeError, {"rounding_seed": 1.0}, r"rounding_seed must be an int or None, got 1\.0"),
    "masters": (TypeError, {"master_weights": 1}, r"master_weights must be True or False, got 1"),
}


@pytest.mark.parametrize(("error", "options", "message"), WRONG.values(), ids=WRONG)
def test_options_are_checked(trained, error, options, message):
    with pytest.raises(error, match=message):
        trained(torch.bfloat16, "sgd-plain", **options)
    low = trained(torch.bfloat16, "sgd-plain")
    new = torch.zeros(3, dtype=torch.bfloat16, device=low.params[0].device, requires_grad=True)
    with pytest.raises(error, match=message):
        low.optimizer.add_param_group({"params": [new], **options})
    low.optimizer.param_groups[0] |= options
    weights = low.weights()
    with pytest.raises(error, match=message):
        low.perturb()
    assert_same_bits(low.weights(), weights)
    assert not low.optimizer.perturbed


@pytest.mark.parametrize("option", [{"rounding": "stochastic"}, {"master_weights": True}], ids=["rounding", "masters"])
def test_bases_that_are_not_fused_are_refused(backend, device, option):
    message = r"(rounding='stochastic'|master_weights=True) is not supported with base RMSprop"
    make = lambda: torch.zeros(3, dtype=torch.bfloat16, device=device, requires_grad=True)  # noqa: E731
    with pytest.raises(ValueError, match=message):
        FastSAM([make()], torch.optim.RMSprop, backend=backend, **option)
    optimizer = FastSAM([make()], torch.optim.RMSprop, backend=backend)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [make()], **option})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= option
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)


def test_davda54_takes_options(backend, device):
    param = torch.ones(9, dtype=torch.bfloat16, device=device, requires_grad=True)
    optimizer = davda54.SAM([param], torch.optim.SGD, lr=0.1, backend=backend, master_weights=True)
    for step in (optimizer.first_step, optimizer.second_step):
        param.grad = torch.full_like(param, 1e-3)
        step()
    assert optimizer.state[param][MASTER].dtype == torch.float32
