"""FastSAM inside of ZeroRedundancyOptimizer, which gives each rank a part of the parameters to update.

The second pass needs all weights perturbed on every rank, and ZeroRedundancyOptimizer broadcasts them after its step
only: here they are broadcast after each ascent, too.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor

from fastsam.runtime.weight_caches import clear_weight_caches

# FastSAM's arguments that are about the whole optimizer.
NO_GROUP_OPTIONS = (
    "method", "interval", "schedule", "model", "replay_rng", "shard_groups", "local_ascent", "backend"
)  # fmt: skip


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


def drop_arguments(zero: Any, groups: Any) -> None:
    """Takes what no group may have out of parameter groups, into which ZeroRedundancyOptimizer copies all arguments."""
    for group in [*zero.param_groups, *groups] if zero is not None else ():
        for name in NO_GROUP_OPTIONS:
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
            mine = {id(param) for group in zero.optim.param_groups for param in group["params"]}
            params = [param for group in zero.param_groups for param in group["params"] if id(param) not in mine]
            self._backups = [(param, param.clone()) for param in params]
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
