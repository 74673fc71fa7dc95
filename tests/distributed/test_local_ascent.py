"""DDP with ``local_ascent=True``: m-sharpness with one gradient all-reduce per step."""

import local_ascents
import pytest
from registry import METHODS

ALLOWED = {name for name, case in METHODS.items() if case.method.allows_local_ascent}


@pytest.mark.parametrize("base", ["sgd", "adamw", "rmsprop"])
@pytest.mark.parametrize(
    "options", [{}, {"static_graph": True}, {"gradient_as_bucket_view": True}], ids=["", "static_graph", "bucket_view"]
)
def test_weights_are_those_of_the_ascent_by_hand(ranks, base, options):
    for error, collectives in ranks(local_ascents.compare, base, options):
        assert error < 1e-12
        assert collectives == 1


def test_accumulation(ranks):
    for error, collectives in ranks(local_ascents.compare, "sgd", {}, 4, 2):
        assert error < 1e-12
        assert collectives == 1


def test_unused_parameters(ranks):
    for error, _ in ranks(local_ascents.compare, "sgd", {"find_unused_parameters": True}, 4, 1, True):
        assert error < 1e-12


@pytest.mark.parametrize("method", ["sam", "sam-3-steps", "asam", "amp"])
def test_replicas_stay_equal(ranks, method):
    assert ranks(local_ascents.replicas_after, 100 if method == "sam" else 10, method) == [(True, True)] * 2


def test_non_finite_gradient_stops_the_ascent_of_its_rank_alone(ranks):
    assert ranks(local_ascents.replicas_after, 6, "sam", True) == [(True, True)] * 2


def test_running_statistics_move_once(ranks):
    (weights, count), (others, _) = ranks(local_ascents.batch_norm_replicas, 4)
    assert weights == others
    assert count == 4


def test_refusals_name_the_reason(ranks):
    said, _ = ranks(local_ascents.refusals)
    assert {name for name in METHODS if not said[name]} == ALLOWED
    assert "local_ascent=True is not possible with GSAM" in said["gsam"]
    assert "fully_shard" in said["fsdp2"]
    assert "needs model=" in said["plain"]
    assert "no_sync()" in said["two phases"]


@pytest.mark.thorough
@pytest.mark.parametrize("base", ["sgd", "adamw"])
def test_on_four_ranks(four_ranks, base):
    for error, collectives in four_ranks(local_ascents.compare, base, {}):
        assert error < 1e-12
        assert collectives == 1
