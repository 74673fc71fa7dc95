"""Every way to distribute a model x methods x bases: the weights are those of one process, in float64."""

import pytest
import ways
from registry import BASES, METHODS

# What flat shards do not allow: both treat matrices differently from vectors.
BY_SHAPE = ("asam", "awp", "vasso", "zsharp", "gcsam")
ONE_METHOD_EACH = {
    "fsdp2": tuple(METHODS),
    "fsdp2_columns": ("sam", "awp"),
    "tp": ("sam", "gsam", "asam", "awp"),
    "sequence": ("sam", "friendly"),
    "ddp": ("sam", "looksam-k2"),
    "fsdp1": ("sam", "wsam"),
    "fsdp1_original": ("sam", "sam-3-steps"),
}


def bases_of(way, number, method):
    """The bases in turn; momentum must be there for MomentumSAM."""
    names = [name for name in BASES if not (method == "momentum" and name == "rmsprop")]
    return names[number % len(names)]


PAIRS = [
    pytest.param(way, bases_of(way, number, method), method, id=f"{way}-{method}")
    for way, chosen in ONE_METHOD_EACH.items()
    for number, method in enumerate(chosen)
]
ALL = [
    pytest.param(way, base, method, id=f"{way}-{base}-{method}")
    for way in (*ways.WAYS, "hsdp", "tp_fsdp2")
    for base in BASES
    for method in METHODS
    if not (way.startswith("fsdp1") and method in BY_SHAPE) and not (method == "momentum" and base == "rmsprop")
    # ESAM draws whole tensors: here, one for all parameters of a unit.
    if not (way == "fsdp1" and method == "esam")
]


@pytest.mark.parametrize(("way", "base", "method"), PAIRS)
def test_weights_are_those_of_one_process(ranks, way, base, method):
    backend = ("native", "foreach")[len(method) % 2]
    assert max(ranks(ways.compare, way, base, method, backend)) < 1e-12


@pytest.mark.thorough
@pytest.mark.parametrize(("way", "base", "method"), ALL)
def test_weights_on_four_ranks_are_those_of_one_process(four_ranks, way, base, method):
    assert max(four_ranks(ways.compare, way, base, method)) < 1e-12
