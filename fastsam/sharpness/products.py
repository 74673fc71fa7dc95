"""Hessian-vector products, by double backward or by differences of gradients, as a function of flat vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from fastsam.arguments import check
from fastsam.sharpness import vectors
from fastsam.sharpness.objective import Objective
from fastsam.sharpness.vectors import Vector

Result = TypeVar("Result")


class HessianProducts:
    """The Hessian of an objective at its present weights, as a linear operator.

    Args:
        objective: the loss as a function of the weights.
        hvp: ``"autograd"`` or ``"finite_difference"``.
    """

    def __init__(self, objective: Objective, hvp: str) -> None:
        check("hvp", hvp, "'autograd' or 'finite_difference'", hvp in ("autograd", "finite_difference"))
        if hvp == "autograd" and objective.ranks.sharded:
            raise ValueError("double backward does not work through sharded parameters; use hvp='finite_difference'")
        self.objective = objective
        self.params = objective.params
        self.size = vectors.size(objective.params)
        self._times = objective.product if hvp == "autograd" else self._by_differences

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The block in which products can be computed.

        Raises:
            ValueError: the loss at w is not finite.
        """
        with self.objective.measuring():
            loss = self.objective.loss()
            if not math.isfinite(loss):
                raise ValueError(f"the loss at w is {loss}: it has no Hessian")
            self._length = vectors.norm([p.detach() for p in self.params])
            yield

    def solve(self, solver: Callable[[Callable[[Tensor], Tensor]], Result]) -> Result:
        """``solver``'s result, given the product of flat float64 vectors on the CPU; on one rank for all."""
        return self.objective.ranks.solve(self._flat, self.size, solver)

    def _flat(self, vector: Tensor) -> Tensor:
        return vectors.flatten(self._times(vectors.unflatten(vector, self.params)))

    def _by_differences(self, vector: Vector) -> Vector:
        """``(g(w + h v) - g(w - h v)) / 2h``, with 2h as it was stored: w + h v is rounded."""
        square = vectors.dot(vector, vector)
        if square == 0:
            return vector
        # The error is of the order of h^2 + eps / h, in units of ||w||: least near the cube root of eps.
        eps = max(torch.finfo(p.dtype).eps for p in self.params)
        h = eps ** (1 / 3) * max(self._length, 1.0) / square**0.5
        ends = []
        for step in (vectors.scaled(vector, h), vectors.scaled(vector, -h)):
            with self.objective.at(step):
                _, grads = self.objective.gradient()
                ends.append((grads, [p.detach().clone() for p in self.params]))
        (up, above), (down, below) = ends
        moved = vectors.dot(vectors.combined(above, 1, below, -1), vector) / square
        return vectors.combined(up, 1 / moved, down, -1 / moved)
