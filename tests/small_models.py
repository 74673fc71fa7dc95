"""The parameters over which the benchmarks' own parts are tested."""

import math

import torch
from torch import Tensor

SHAPES = [(7, 3), (5,)]


def parameters() -> list[Tensor]:
    """Of :data:`SHAPES`, from -1 to 1."""
    return [torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_() for shape in SHAPES]
