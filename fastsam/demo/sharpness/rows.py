"""The rows of the table: the demo's, or the perturbations that ``--m`` compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fastsam.demo import methods
from fastsam.demo.methods import Method
from fastsam.demo.sharpness.options import SharpnessOptions

_SAM = replace(methods.METHODS[2], name="SAM, m = 16 (the batch)")

PERTURBATIONS = (
    methods.METHODS[0],
    replace(methods.FAMILY["random"], name="random directions"),
    replace(_SAM, name="n-SAM (all images)", ascends_on_all=True, passes=19),
    _SAM,
    replace(_SAM, name="SAM, m = 4", parts_of=4, passes=6),
    replace(_SAM, name="SAM, m = 1", parts_of=1, passes=13),
)
"""What ``--m`` compares: Andriushchenko and Flammarion, ICML 2022, https://arxiv.org/abs/2206.06232, figure 1.

``passes`` is for the progress bar alone: a step's time in units of a pass over 16 images.
"""


def rows(options: SharpnessOptions) -> Sequence[Method]:
    """The methods to compare."""
    return PERTURBATIONS if options.m else methods.rows(options)
