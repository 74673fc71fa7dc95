"""One small all-reduce for each process group that shards parameters; what must agree on all ranks does."""

import collectives
import pytest
import torch

# Of first_step() and of second_step(): for the norm or the dots of the ascent, for the dots of the descent.
COUNTS = {"sam": (1, 0), "asam": (1, 0), "awp": (1, 0), "gsam": (1, 1), "wsam": (1, 0), "friendly": (1, 0)}


@pytest.mark.parametrize("method", COUNTS)
def test_fsdp2_has_one_all_reduce_for_each_sum(ranks, method):
    assert ranks(collectives.count_all_reduces, "fsdp2", method) == [COUNTS[method]] * 2


@pytest.mark.parametrize(("way", "counts"), [("tp", (1, 0)), ("ddp", (0, 0)), ("fsdp1", (1, 0))])
def test_other_ways_have_one_all_reduce_or_none(ranks, way, counts):
    assert ranks(collectives.count_all_reduces, way, "sam") == [counts] * 2


@pytest.mark.thorough
@pytest.mark.parametrize(("way", "counts"), [("fsdp2", (1, 0)), ("hsdp", (1, 0)), ("tp_fsdp2", (2, 0))])
def test_four_ranks_have_one_all_reduce_for_each_group(four_ranks, way, counts):
    assert four_ranks(collectives.count_all_reduces, way, "sam") == [counts] * 4


def test_a_few_numbers_are_reduced(ranks):
    assert ranks(collectives.count_bytes, "sam") == [[(torch.float64, 1)]] * 2
    assert ranks(collectives.count_bytes, "asam") == [[(torch.float64, 3)]] * 2
    # AWP needs the norm of each of the 10 parameters.
    assert ranks(collectives.count_bytes, "awp") == [[(torch.float64, 30)]] * 2


@pytest.mark.parametrize("method", ["sam", "gsam", "awp"])
@pytest.mark.parametrize("way", ["fsdp2", "fsdp1"])
def test_non_finite_shard_stops_the_ascent_on_all_ranks(ranks, way, method):
    if (way, method) == ("fsdp1", "awp"):
        pytest.skip("flat shards have no matrices")
    stayed, finite, moved = zip(*ranks(collectives.step_with_bad_shard, way, "first", method), strict=True)
    assert all(stayed)
    assert all(finite)
    assert all(moved)


@pytest.mark.parametrize("unscales", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize(("is_bad", "scale"), [(False, 1024.0), (True, 512.0)], ids=["finite", "overflow"])
@pytest.mark.parametrize("base", ["sgd", "rmsprop"])
def test_grad_scaler_agrees_on_all_ranks(ranks, base, is_bad, scale, unscales):
    assert ranks(collectives.scaler_step, "fsdp2", base, is_bad, unscales) == [(True, scale)] * 2


@pytest.mark.parametrize(("base", "method"), [("adamw", "friendly"), ("sgd", "looksam-k2"), ("rmsprop", "sam")])
@pytest.mark.parametrize("way", ["fsdp2", "sequence"])
def test_state_has_the_placements_of_its_parameter(ranks, way, base, method):
    for count, wrong in ranks(collectives.state_types, way, base, method):
        assert count == 10
        assert not wrong


def test_direction_is_given_the_dtensors(ranks):
    for seen, error in ranks(collectives.direction_sees):
        assert seen == {"DTensor"}
        assert error < 1e-12
