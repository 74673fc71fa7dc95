"""Gradients of micro-batches, summed over a step and averaged."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class GradientSums:
    """The sums of the parameters' gradients over the micro-batches of a step."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}

    def add(self, params: Iterable[Tensor]) -> None:
        """Adds the present gradients; a parameter's first gradient itself becomes the sum."""
        present = {p: p.grad for p in params if p.grad is not None}
        known = [p for p in present if p in self._sums]
        if known:
            torch._foreach_add_([self._sums[p] for p in known], [present[p] for p in known])
        for param in present.keys() - self._sums.keys():
            grad = present[param]
            self._sums[param] = grad.clone() if grad._base is not None else grad

    def hand_over(self, params: Iterable[Tensor], count: int) -> bool:
        """Sets the parameters' gradients to the averages over ``count`` micro-batches; False if there is none."""
        for param in params:
            param.grad = self._sums.get(param)
        if self._sums:
            torch._foreach_mul_(list(self._sums.values()), 1 / count)
        return bool(self._sums)
