"""Gradients of micro-batches, summed over a step and averaged."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastsam.runtime.grad_mode import untracked
from fastsam.tables.gradients import separate_grads
from fastsam.tables.memory import is_exclusive


class GradientSums:
    """The sums of the parameters' gradients over the micro-batches of a step."""

    def __init__(self) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._versions: dict[Tensor, int] = {}
        self._copied: dict[Tensor, None] = {}  # in order

    @untracked
    def add(self, params: Iterable[Tensor]) -> None:
        """Adds the present gradients; a parameter's first gradient becomes the sum if nothing else refers to it."""
        self._check()
        present = [param for param in params if param.grad is not None]
        grads: list[Any] = [param.grad for param in present]
        known = [i for i, param in enumerate(present) if param in self._sums]
        if known:
            torch._foreach_add_([self._sums[present[i]] for i in known], [grads[i] for i in known])
        for i, param in enumerate(present):
            if param not in self._sums:
                if not is_exclusive(grads, i):
                    self._copied[param] = None
                self._sums[param] = grads[i].clone() if param in self._copied else grads[i]
        self._versions = {param: total._version for param, total in self._sums.items()}

    @untracked
    def hand_over(self, params: Iterable[Tensor], count: int) -> bool:
        """Sets the parameters' gradients to the averages over ``count`` micro-batches; False if there is none."""
        self._check()
        separate_grads(self._copied)
        if self._sums:
            torch._foreach_mul_(list(self._sums.values()), 1 / count)
        for param in params:
            if param in self._copied and param.grad is not None:
                param.grad.copy_(self._sums[param])  # in the buffer of which it is a view
            else:
                param.grad = self._sums.get(param)
        return bool(self._sums)

    def _check(self) -> None:
        for param, version in self._versions.items():
            if self._sums[param]._version != version:
                raise RuntimeError(
                    f"the gradient of a parameter of shape {tuple(param.shape)} was written to after its micro-batch; "
                    "give .grad a tensor that nobody else writes to"
                )
