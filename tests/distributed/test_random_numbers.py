"""Stochastic rounding, masters, random directions: 1, 2 and 4 ranks give the same bits from the same gradients."""

import itertools

import pytest
import random_numbers
from internals import BACKENDS
from registry import by_default

ROUNDED = {"rounding": "stochastic", "rounding_seed": 11}


@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_places_of_shards(ranks, kind):
    for right in ranks(random_numbers.places, kind):
        assert all(right)


CHOSEN = [("columns", "native"), ("rows", "foreach"), ("rows", "reference"), ("columns", "triton")]


@pytest.mark.parametrize(("kind", "backend"), by_default(itertools.product(["rows", "columns"], BACKENDS), CHOSEN))
def test_stochastic_rounding_does_not_depend_on_the_sharding(ranks, kind, backend):
    for same in ranks(random_numbers.same_bits, kind, backend, "SAM", "bfloat16", **ROUNDED):
        assert all(same)


@pytest.mark.parametrize("options", [{}, ROUNDED], ids=["nearest", "stochastic"])
def test_master_weights_do_not_depend_on_the_sharding(ranks, options):
    """By native: torch's own kernels, which foreach runs, give single elements of float32 other last bits."""
    options = options | {"master_weights": True, "whole_backend": "native"}
    for same in ranks(random_numbers.same_bits, "rows", "native", "SAM", "bfloat16", **options):
        assert all(same)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_random_directions_do_not_depend_on_the_sharding(ranks, kind, dtype):
    for same in ranks(random_numbers.same_bits, kind, "reference", "RandomSAM", dtype):
        assert all(same)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["rows", "columns", "strided"])
def test_places_of_shards_on_four_ranks(four_ranks, kind):
    for right in four_ranks(random_numbers.places, kind):
        assert all(right)


@pytest.mark.thorough
@pytest.mark.parametrize("backend", ["native", "foreach", "triton"])
@pytest.mark.parametrize("kind", ["rows", "columns", "strided"])
def test_on_four_ranks(four_ranks, kind, backend):
    for same in four_ranks(random_numbers.same_bits, kind, backend, "SAM", "bfloat16", **ROUNDED):
        assert all(same)
