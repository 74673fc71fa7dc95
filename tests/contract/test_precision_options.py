"""Rounding and masters as options: memory layouts, groups of every mode, changes between steps, what is refused."""

import copy

import internals
import pytest
import torch
from checks import Canaries, assert_same_bits
from problem import assert_same_state, state_of
from registry import FUSED_VARIANTS, PRECISIONS, every_precision, low_dtypes
from trained import MASTER, two_variants

from fastsam import FastSAM, davda54

pytestmark = pytest.mark.face

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
