"""Models and parameters that are small enough for a step to cost nothing, and their losses."""

import math

import torch
from torch import Tensor, nn

SHAPES = [(7, 3), (5,)]
X = torch.linspace(-1, 1, 12).reshape(4, 3)


def parameters() -> list[Tensor]:
    """Of :data:`SHAPES`, from -1 to 1."""
    return [torch.linspace(-1, 1, math.prod(shape)).view(shape).requires_grad_() for shape in SHAPES]


def make_model():
    """The same at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def closure_of(optimizer, model):
    def closure():
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    return closure
