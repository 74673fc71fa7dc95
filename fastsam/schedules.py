"""Schedules of rho."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastsam.arguments import check


@dataclass(frozen=True)
class RhoByLR:
    """A rho that follows its group's learning rate, from ``rho_min`` at ``lr_min`` to ``rho_max`` at ``lr_max``.

    Zhuang et al. (see :class:`fastsam.methods.GSAM`), algorithm 1. With ``rho_min`` and ``lr_min`` 0, rho is
    proportional to the lr.
    """

    rho_max: float
    lr_max: float
    rho_min: float = 0.0
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        check("rho_max", self.rho_max, ">= 0 and finite", 0 <= self.rho_max < math.inf)
        check("rho_min", self.rho_min, ">= 0 and finite", 0 <= self.rho_min < math.inf)
        check("lr_max", self.lr_max, "> lr_min", self.lr_min < self.lr_max < math.inf)

    def of(self, lr: float | Tensor) -> float | Tensor:
        """The radius at ``lr``, never below 0."""
        rho = self.rho_min + (self.rho_max - self.rho_min) * (lr - self.lr_min) / (self.lr_max - self.lr_min)
        return rho.clamp(min=0) if isinstance(rho, Tensor) else max(rho, 0.0)


RhoSchedule = Callable[[int], "float | Tensor"] | RhoByLR


def is_schedule(rho: Any) -> bool:
    """Whether ``rho`` is a schedule: a function of the step number, or :class:`RhoByLR`."""
    return callable(rho) or isinstance(rho, RhoByLR)
