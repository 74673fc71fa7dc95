"""FastSAM inside of ZeroRedundancyOptimizer, which gives each rank a part of the parameters to update.

The second pass needs all weights perturbed on every rank, and ZeroRedundancyOptimizer broadcasts them after its step
only: here they are broadcast after each ascent, too.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastsam.runtime.weight_caches import clear_weight_caches


def zero_around() -> Any:
    """The ZeroRedundancyOptimizer that is constructing an optimizer, or None; nothing in the parameters shows it."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if module is not None else None
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_filename == module.__file__ else None  # type: ignore[union-attr]
        if owner is not None and getattr(owner, "_optim_constructor", None) is not None:
            return owner
        frame = frame.f_back
    return None


def drop_arguments(zero: Any, groups: Any, names: Iterable[str]) -> None:
    """Takes arguments ``names`` out of parameter groups, into which ZeroRedundancyOptimizer copies all that it has."""
    if zero is None:
        return
    copied = {name: zero._optim_defaults[name] for name in names if name in zero._optim_defaults}
    for group in [*zero.param_groups, *groups]:
        for name, value in copied.items():
            if group.get(name) is value:
                group.pop(name, None)


class OthersWeights:
    """This rank's copies of the weights that other ranks perturb and update.

    Args:
        zero: the ZeroRedundancyOptimizer; None: there are no such weights, and nothing is done.
    """

    def __init__(self, zero: Any) -> None:
        self._zero = None if zero is None else weakref.ref(zero)
        self._backups: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def receive(self) -> None:
        """After an ascent: every rank's perturbed weights reach the others. All ranks must call this."""
        zero = None if self._zero is None else self._zero()
        if zero is None:
            return
        if not self._backups:
            self._backups = [(param, param.clone()) for param in self._params()]
        zero._sync_params()
        clear_weight_caches()

    @torch.no_grad()
    def restore(self) -> None:
        """An ascent is given up: the weights come back bit for bit, without the other ranks."""
        for param, backup in self._backups:
            param.copy_(backup)
        self.discard()

    def discard(self) -> None:
        """ZeroRedundancyOptimizer is about to broadcast the updated weights."""
        self._backups = []

    @torch.no_grad()
    def clear_grads(self) -> None:
        """Clears the gradients of these weights: what the next backward added to them would be averaged over ranks."""
        for param in self._params():
            if param.grad is not None and param.grad._base is not None:
                param.grad.zero_()  # a view of a buffer, which is to remain the gradient
            else:
                param.grad = None

    def _params(self) -> list[Tensor]:
        zero = None if self._zero is None else self._zero()
        if zero is None:
            return []
        mine = {id(param) for group in zero.optim.param_groups for param in group["params"]}
        return [param for group in zero.param_groups for param in group["params"] if id(param) not in mine]
