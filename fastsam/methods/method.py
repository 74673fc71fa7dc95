"""What a method of the SAM family is: dot products in, the weights of two tensors out; the defaults are SAM's.

What the tensors are and what kernels make of them: ``fastsam/backends/combination.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastsam.backends.combination import Climb, Descent
from fastsam.bases import FUSED
from fastsam.tables import GRAD

Weights = dict[int, Tensor | float]
"""Columns of :mod:`fastsam.backends.combination`: one number for all parameters, or ``(n,)``."""


class Facts(NamedTuple):
    """What a method may ask about a table's parameters: float64 ``(n,)`` on its device."""

    rho: Tensor
    """Of each one's group; negative where the base maximizes."""
    lr: Tensor
    """Of each one's group; negative where the base maximizes."""
    matrix: Tensor
    """1 for a parameter of two and more dimensions, else 0 (biases, and the weights of normalisation layers)."""


class Dots(NamedTuple):
    """Float64: ``<map(x), x>, <x, y>, <y, y>``."""

    total: Tensor
    """``(3,)``: over all parameters of the optimizer that take part."""
    each: Tensor
    """``(n, 3)``: of each parameter of one table."""


@dataclass(frozen=True)
class Method:
    """What FastSAM asks a method. The defaults are SAM's; no form means its own kernels, without weights."""

    climbs_by: ClassVar[int] = GRAD
    """The row of the direction to climb. If it is not the gradient, there is no ascent pass: the climb comes first."""
    takes: ClassVar[bool] = False
    """Whether the first pass's gradient is needed for the update."""
    kept: ClassVar[str | None] = None
    """The name in ``state`` of what is kept from step to step."""
    counts: ClassVar[bool] = False
    """Whether the number of the step matters."""

    @cached_property
    def is_combined(self) -> bool:
        """Whether backends need more than SAM's five operations."""
        forms = [self.climb_form(again=False), self.descent_form(climbed=True), self.descent_form(climbed=False)]
        return any(form is not None for form in forms)

    @property
    def ascents(self) -> int:
        """How often a step climbs; each climb by a gradient is one more pass."""
        return 1

    def climbs(self, step: int) -> bool:
        """Whether step ``step`` (from 0) climbs at all; if not, it is one pass."""
        return True

    def check_group(self, base: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> None:
        """Raises ValueError if the method cannot work with a parameter group over ``base``."""
        form = self.descent_form(climbed=True)
        if form is not None and form.decoupled and base not in FUSED:
            raise ValueError(f"{self} needs SGD, Adam or AdamW as its base, got {base.__name__}; or decouple=False")
        if self.is_combined and (group.get("rounding") == "stochastic" or group.get("master_weights")):
            raise ValueError(
                f"{self} does not go with rounding='stochastic' or master_weights=True, as only SAM() does"
            )
        if group["adaptive"] and self.climb_form(False) is not None:
            raise ValueError(f"adaptive=True is for methods that climb as SAM() does, not for {self}; see methods.ASAM")

    def climb_form(self, again: bool) -> Climb | None:
        """``again``: the weights are climbed already, this is a further ascent."""
        return None

    def map_weights(self, facts: Facts) -> Weights:
        """What the climb's map needs for the dots."""
        return {}

    def weigh(self, dots: Tensor, facts: Facts) -> Tensor:
        """The ``(n, 3)`` dots as they are to be added up over all parameters."""
        return dots

    def climb_weights(self, dots: Dots, facts: Facts, again: bool) -> Weights:
        """The weights of ``e``."""
        raise NotImplementedError

    def descent_form(self, climbed: bool) -> Descent | None:
        """``climbed``: there was a climb in this step."""
        return None

    def measures(self, climbed: bool) -> bool:
        """Whether the descent needs dots."""
        return False

    def descent_weights(self, dots: Dots, facts: Facts, climbed: bool) -> Weights:
        """The weights of what the base is given for a gradient."""
        raise NotImplementedError
