"""The training loss along random directions through a solution (Li et al., NeurIPS 2018)."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsam.demo.data import NoisyDigits


@torch.no_grad()
def losses_along(model: nn.Module, data: NoisyDigits, radii: Sequence[float], seed: int) -> list[float]:
    """The loss over all training images, wrong labels included, at ``w + radius * d`` for each radius.

    Batch norm uses the statistics of the images at each point, as in training: with the solution's statistics the loss
    would explode at a small distance, whether the minimum is flat or not.

    Args:
        model: the solution ``w``; it is not changed.
        data: its training images and labels are used.
        radii: in units of the weights: each filter of ``d`` has the norm of the same filter of ``w``.
        seed: of the gaussian ``d`` before normalisation, which is equal for models of the same shapes.
    """
    moved = copy.deepcopy(model).train()
    generator = torch.Generator().manual_seed(seed)
    direction = [_filter_normalised(param, generator) for param in model.parameters()]
    losses = []
    for radius in radii:
        for param, weight, step in zip(moved.parameters(), model.parameters(), direction, strict=True):
            param.copy_(weight + radius * step)
        losses.append(F.cross_entropy(moved(data.train_images), data.train_labels).item())
    return losses


def _filter_normalised(param: Tensor, generator: torch.Generator) -> Tensor:
    """A gaussian direction for one parameter; zero for biases and batch-norm parameters, as in the paper."""
    direction = torch.randn(param.shape, generator=generator).to(param.device)
    if param.dim() < 2:
        return torch.zeros_like(param)
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (param, direction)]
    return direction * (norms[0] / norms[1]).view(-1, *[1] * (param.dim() - 1))
