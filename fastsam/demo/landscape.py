"""The training loss along random directions through a solution (Li et al., NeurIPS 2018)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsam.demo.data import NoisyDigits


@torch.no_grad()
def losses_along(model: nn.Module, data: NoisyDigits, radii: Sequence[float], seed: int) -> list[float]:
    """The loss over all training images at ``w + radius * d``, for each radius; the model comes back as it was.

    Args:
        model: in evaluation mode: batch norm keeps the statistics of the solution.
        radii: in units of the weights: each filter of ``d`` has the norm of the same filter of ``w``.
        seed: decides the gaussian ``d`` before that; the same for models of the same shapes.
    """
    params = list(model.parameters())
    solution = [param.clone() for param in params]
    generator = torch.Generator().manual_seed(seed)
    direction = [_filter_normalized(param, generator) for param in params]
    losses = []
    for radius in radii:
        for param, weight, step in zip(params, solution, direction, strict=True):
            param.copy_(weight + radius * step)
        losses.append(F.cross_entropy(model(data.train_images), data.train_labels).item())
    for param, weight in zip(params, solution, strict=True):
        param.copy_(weight)
    return losses


def _filter_normalized(param: Tensor, generator: torch.Generator) -> Tensor:
    """A gaussian direction for one parameter; zero for biases and batch norm's, as in the paper."""
    direction = torch.randn(param.shape, generator=generator).to(param.device)
    if param.dim() < 2:
        return torch.zeros_like(param)
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (param, direction)]
    return direction * (norms[0] / norms[1]).view(-1, *[1] * (param.dim() - 1))
