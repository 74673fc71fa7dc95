"""How 16-bit parameters are stored: stochastic rounding and fp32 master weights, as options of a parameter group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

ROUNDINGS = ("nearest", "stochastic")

PRECISION_OPTIONS = ("rounding", "rounding_seed", "master_weights")

# The dtypes to which results of float32 arithmetic must be rounded.
ROUNDED_DTYPES = (torch.bfloat16, torch.float16)


class Precision(NamedTuple):
    """How the parameters of one table are stored."""

    stochastic: bool = False
    """Stored results are rounded up or down at random, without bias; with ``masters``, those of the ascent alone."""
    masters: bool = False
    """Float32 master weights, with the base's state in float32 too; the parameters are the rounded masters."""


def precision_of(group: Mapping[str, Any], dtype: torch.dtype) -> Precision:
    """How ``group`` stores its parameters of (real) ``dtype``."""
    if dtype not in ROUNDED_DTYPES:
        return Precision()
    return Precision(group.get("rounding") == "stochastic", bool(group.get("master_weights")))


def rounding_seed(group: Mapping[str, Any]) -> int:
    """The seed of the group's random numbers; 0 if it rounds to nearest."""
    return int(group["rounding_seed"]) if group.get("rounding") == "stochastic" else 0


def ascent_seed(seed: int, number: int) -> int:
    """The seed of a step's ascent ``number`` (from 0): each ascent has random numbers of its own."""
    return (seed + number * 0x9E3779B1) & 0xFFFFFFFF


DEFAULT_SEED = 0
"""A constant: replicas of a model must round alike, whatever the seeds of their generators."""


def check_precision(group: Mapping[str, Any], base: type, *, fused: bool) -> None:
    """Raises TypeError or ValueError if the group's options are invalid, or not supported with ``base``."""
    rounding, seed, masters = (group[name] for name in PRECISION_OPTIONS)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be {' or '.join(map(repr, ROUNDINGS))}, got {rounding!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"rounding_seed must be an int or None, got {seed!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"rounding_seed must be in 0 ... 2**32 - 1, got {seed}")
    if not isinstance(masters, bool):
        raise TypeError(f"master_weights must be True or False, got {masters!r}")
    if fused:
        return
    for option, is_set in ((f"rounding={rounding!r}", rounding != "nearest"), ("master_weights=True", masters)):
        if is_set:
            raise ValueError(
                f"{option} is not supported with base {base.__name__}, whose own step() rounds its results; use SGD, "
                "Adam or AdamW of torch.optim"
            )
