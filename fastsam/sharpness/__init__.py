"""Sharpness of minima: three measures, the Hessian's spectrum, loss landscapes; also while training.

Every function takes ``(model, loss_fn, data)`` and leaves the model as it was, bit for bit: weights, buffers,
gradients, mode, random numbers. See :class:`fastsam.sharpness.objective.Objective` for what these arguments may be.
"""

from fastsam.sharpness.hessian import (
    Eigenvalues,
    SpectralDensity,
    Trace,
    hessian_eigenvalues,
    hessian_trace,
    spectral_density,
)
from fastsam.sharpness.landscape import Line, Plane, difference, filter_normalized, loss_line, loss_plane
from fastsam.sharpness.measures import Sharpness, ascent, average, worst
from fastsam.sharpness.monitor import Monitor
from fastsam.sharpness.objective import normalized_logits

__all__ = [
    "Eigenvalues",
    "Line",
    "Monitor",
    "Plane",
    "Sharpness",
    "SpectralDensity",
    "Trace",
    "ascent",
    "average",
    "difference",
    "filter_normalized",
    "hessian_eigenvalues",
    "hessian_trace",
    "loss_line",
    "loss_plane",
    "normalized_logits",
    "spectral_density",
    "worst",
]
