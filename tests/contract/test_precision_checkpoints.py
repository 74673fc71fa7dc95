"""Checkpoints and copies of parameters with masters or stochastic rounding."""

import copy
import io
import pickle

import pytest
import torch
from checks import assert_same_bits
from problem import Snapshot, assert_same_state, state_of
from registry import FUSED_VARIANTS, PRECISIONS, every_precision, every_variant, low_dtypes
from trained import MASTER, assert_rounded, two_variants

pytestmark = pytest.mark.face


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
