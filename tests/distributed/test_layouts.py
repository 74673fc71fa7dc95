"""Rarer layouts (offload, mixed precision, tied weights, several meshes, experts): the weights of one process."""

import layouts
import pytest

# Base and method; in the default tier each layout has one of them.
PAIRS = {"sgd-gsam": ("sgd", "gsam"), "adamw-sam": ("adamw", "sam"), "rmsprop-awp": ("rmsprop", "awp")}
# float32 passes: so much of the weights' largest.
TOLERANCES = {"mixed_precision": 1e-5}


def check(errors, layout):
    assert max(errors) < TOLERANCES.get(layout, 1e-12)


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_weights_are_those_of_one_process(ranks, layout):
    number = list(layouts.LAYOUTS).index(layout)
    pair = list(PAIRS.values())[number % len(PAIRS)]
    check(ranks(layouts.compare, layout, *pair, ("native", "foreach")[number % 2]), layout)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["native", "foreach"])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_weights_with_every_method_are_those_of_one_process(ranks, layout, pair, backend):
    check(ranks(layouts.compare, layout, *PAIRS[pair], backend), layout)


@pytest.mark.thorough
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("layout", layouts.LAYOUTS_OF_FOUR)
def test_weights_on_four_ranks_are_those_of_one_process(four_ranks, layout, pair):
    check(four_ranks(layouts.compare, layout, *PAIRS[pair], "native"), layout)


def test_passes_in_bfloat16(ranks):
    for error, without_ascents in ranks(layouts.bfloat16_passes, 3):
        assert error < 1e-5
        assert without_ascents > 1e-3


def test_gradients_of_running_collectives_are_waited_for(ranks):
    for kinds, error in ranks(layouts.gradients_that_still_arrive):
        assert kinds == {"AsyncCollectiveTensor"}
        assert error < 1e-12
