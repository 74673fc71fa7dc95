"""What trains wrongly in silence elsewhere: here it is right, or an error that says what to do."""

import pytest
import traps
from torch.distributed.fsdp import FSDPModule


@pytest.mark.parametrize("after_forward", [True, False])
@pytest.mark.parametrize("after_backward", [True, False])
def test_unsharded_copies_do_not_hide_the_ascent(ranks, after_backward, after_forward):
    assert max(ranks(traps.keep_unsharded, after_backward, after_forward, True)) < 1e-12


def test_the_trap_is_real(ranks):
    """Without ``model=`` the second pass sees the weights before the ascent."""
    assert min(ranks(traps.keep_unsharded, False, False, False)) > 1e-4


@pytest.mark.parametrize(("gives_model", "keeps_one"), [(True, False), (True, True), (False, False)])
def test_first_pass_without_gradient_sync_is_an_error(ranks, gives_model, keeps_one):
    for said in ranks(traps.first_pass_without_sync, gives_model, keeps_one):
        assert "set_requires_gradient_sync(True)" in said


def test_event_set_in_the_second_pass_is_not_waited_for(ranks):
    assert ranks(traps.event_before_the_ascent) == [[True, False]] * 2


@pytest.mark.skipif(not hasattr(FSDPModule, "reset_iter_state"), reason="nothing resets FSDP in this release of torch")
@pytest.mark.parametrize("number", [1, 2])
def test_exception_in_a_pass_leaves_fsdp_ready(ranks, number):
    for calls, came_back, error in ranks(traps.failing_pass, number):
        assert calls == number
        assert came_back
        assert error < 1e-12


@pytest.mark.parametrize("gives_closure", [True, False])
def test_optimizer_made_before_fully_shard_is_told(ranks, gives_closure):
    for said in ranks(traps.made_before_sharding, gives_closure):
        assert "after fully_shard()" in said


def test_parameters_swapped_for_dtensors_are_followed(ranks):
    assert max(ranks(traps.swapped_parameters)) < 1e-12


def test_refusals_name_the_wrapper(ranks):
    said, _ = ranks(traps.refusals)
    assert "FSDP1" in said["flat"]
    assert "shard_groups" in said["flat"]
    assert "FSDP1" in said["original"]
    assert "AWP" in said["awp"]
    assert "ASAM" in said["asam"]
    assert "FastSAM(params, ZeroRedundancyOptimizer" in said["zero"]
    assert "by another batch" in said["local zero"]
    assert "shard_groups must be" in said["not a group"]


def test_zero_as_the_base(ranks):
    assert max(ranks(traps.zero_as_base)) < 1e-7


@pytest.mark.parametrize(("method", "given_by"), [("sam", "arguments"), ("friendly", "partial")])
def test_zero_around_fastsam(ranks, method, given_by):
    assert max(ranks(traps.zero_around, method, given_by)) < 1e-12


@pytest.mark.parametrize("method", ["gsam", "looksam-k2"])
def test_zero_with_a_rank_that_has_no_parameters(ranks, method):
    assert max(ranks(traps.zero_around, method, "arguments", few=True)) < 1e-12


def test_zero_clears_the_gradients_of_all_ranks(ranks):
    """Between the passes; and the checkpoint holds no classes."""
    assert max(ranks(traps.zero_without_clearing)) < 1e-12


def test_failing_pass_under_zero_restores_the_weights_of_all_ranks(ranks):
    assert ranks(traps.zero_fails, 2) == [([False, True], True)] * 2


@pytest.mark.parametrize("method", ["sam", "gsam", "friendly"])
def test_stages_of_a_pipeline(ranks, method):
    assert max(ranks(traps.stages, method)) < 1e-12


def test_rank_without_gradients_takes_part(ranks):
    lengths = ranks(traps.rank_without_parameters)
    assert lengths == [pytest.approx(0.5), 0]
