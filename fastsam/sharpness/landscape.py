"""The loss along a line and over a plane through a solution, as data and as figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.sharpness import vectors
from fastsam.sharpness.hessian import required
from fastsam.sharpness.objective import LossFunction, Objective
from fastsam.sharpness.vectors import Vector


@dataclass(frozen=True)
class Line:
    """The losses at ``w + radius * direction``."""

    radii: list[float]
    losses: list[float]

    def plot(self, axes: Any = None, **style: Any) -> Any:
        """Draws it into matplotlib axes (new ones by default), which are returned."""
        axes = _axes(axes)
        axes.plot(self.radii, self.losses, **style)
        axes.set(xlabel="distance along the direction", ylabel="loss")
        return axes


@dataclass(frozen=True)
class Plane:
    """The losses at ``w + radii[0][i] * directions[0] + radii[1][j] * directions[1]``, as ``losses[i][j]``."""

    radii: tuple[list[float], list[float]]
    losses: list[list[float]]

    def plot(self, axes: Any = None, levels: int = 20, **style: Any) -> Any:
        """Draws contours into matplotlib axes (new ones by default), which are returned."""
        axes = _axes(axes)
        # matplotlib wants rows along y, which is the second direction.
        columns = [list(column) for column in zip(*self.losses, strict=True)]
        drawn = axes.contourf(*self.radii, columns, levels=levels, **style)
        axes.figure.colorbar(drawn, ax=axes, label="loss")
        axes.set(xlabel="distance along the first direction", ylabel="distance along the second")
        return axes


def filter_normalized(model: nn.Module, seed: int = 0) -> Vector:
    """A random direction in which each filter has the norm of the same filter of ``model``.

    Li et al., NeurIPS 2018, https://arxiv.org/abs/1712.09913: so that networks of different scales can be compared.
    Zero for biases and the parameters of normalisation layers, as in the paper.

    Args:
        model: its parameters that require gradients.
        seed: of the Gaussian direction before normalisation, which is equal for models of the same shapes.
    """
    params = [p.detach() for p in model.parameters() if p.requires_grad]
    drawn = vectors.normal(params, torch.Generator().manual_seed(seed))
    return [_filters_of(p, d) for p, d in zip(params, drawn, strict=True)]


def difference(model: nn.Module, other: nn.Module) -> Vector:
    """The direction from one solution to another of the same shapes: radius 0 is ``model``, radius 1 is ``other``."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return [theirs.detach() - ours.detach() for ours, theirs in pairs if ours.requires_grad]


def loss_line(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    direction: Sequence[Tensor],
    radii: Sequence[float],
    *,
    train: bool = False,
) -> Line:
    """The loss along a line through the weights.

    Args:
        model, loss_fn, data, train: see :class:`~fastsam.sharpness.objective.Objective`. A network with batch norm is
            best seen with ``train=True`` and large batches: with the statistics of the solution, the loss explodes at a
            small distance, whether the minimum is flat or not.
        direction: one tensor for each parameter that requires a gradient: :func:`filter_normalized`,
            :func:`difference`, an eigenvector of :func:`~fastsam.sharpness.hessian_eigenvalues`.
        radii: where, in units of the direction.
    """
    objective = Objective(model, loss_fn, data, train=train)
    with objective.measuring():
        return Line(list(radii), [_loss_at(objective, vectors.scaled(direction, radius)) for radius in radii])


def loss_plane(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    directions: tuple[Sequence[Tensor], Sequence[Tensor]],
    radii: Sequence[float],
    second_radii: Sequence[float] | None = None,
    *,
    train: bool = False,
) -> Plane:
    """The loss over a plane through the weights.

    Args:
        model, loss_fn, data, train: as for :func:`loss_line`.
        directions: two, as for :func:`loss_line`.
        radii: along the first direction.
        second_radii: along the second; None: as along the first.
    """
    second_radii = radii if second_radii is None else second_radii
    objective = Objective(model, loss_fn, data, train=train)
    with objective.measuring():
        losses = [
            [_loss_at(objective, vectors.combined(directions[0], a, directions[1], b)) for b in second_radii]
            for a in radii
        ]
    return Plane((list(radii), list(second_radii)), losses)


def _loss_at(objective: Objective, displacement: Vector) -> float:
    with objective.at(displacement):
        return objective.loss()


def _filters_of(param: Tensor, direction: Tensor) -> Tensor:
    if param.dim() < 2:
        return torch.zeros_like(param)
    shape = -1, *[1] * (param.dim() - 1)
    norms = [tensor.flatten(1).norm(dim=1).view(shape) for tensor in (param, direction)]
    return direction * (norms[0] / norms[1])


def _axes(axes: Any) -> Any:
    return required("matplotlib.pyplot").subplots()[1] if axes is None else axes
