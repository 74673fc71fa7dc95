"""Which steps have an ascent: interval, schedule, rho, and AE-SAM's policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from fastsam.adaptive_policy import Statistics
from fastsam.groups import rho_in
from fastsam.methods import Method
from fastsam.schedules import AESAM, Schedule

STATISTICS = "fastsam_statistics"
"""In the groups of a checkpoint: AE-SAM's mean and variance, whether the next step ascends, and its number."""


class Policy:
    """Decides for each step whether the weights are perturbed.

    Args:
        interval: only every so many-th step may have an ascent.
        schedule: says so for each step; None: all.
    """

    def __init__(self, interval: int, schedule: Schedule | None) -> None:
        self.interval, self.schedule = interval, schedule
        self.statistics = Statistics(schedule) if isinstance(schedule, AESAM) else None

    @property
    def counts_steps(self) -> bool:
        """Whether the number of the step matters."""
        return self.interval > 1 or self.schedule is not None

    def ascends(self, step: int, groups: Sequence[Mapping[str, Any]], method: Method) -> bool:
        """Whether ``step`` has an ascent, as far as is known before its first pass."""
        if step % self.interval != 0 or not method.ascends(step):
            return False
        if self.statistics is not None:
            if not self.statistics.ascends_before_first_pass():
                return False
        elif self.schedule is not None and not self.schedule(step):  # type: ignore[operator]
            return False
        return any(group["perturb"] and not _is_zero(rho_in(group, step)) for group in groups)

    def check(self, method: Method, local_ascent: bool = False) -> None:
        """Raises ValueError if the schedule cannot be followed."""
        if self.statistics is not None and local_ascent:
            raise ValueError(
                f"schedule={self.schedule} is not possible with local_ascent=True: ranks with gradients of their own "
                "would decide differently"
            )
        if self.statistics is not None and not method.needs_first_pass:
            raise ValueError(f"schedule={self.schedule} decides by the gradient at w, which {method} does not compute")

    def rho_scale(self, step: int) -> float:
        """What rho is multiplied by in ``step``."""
        scale = getattr(self.schedule, "scale", None)
        return 1.0 if scale is None else float(scale(step))

    def commit(self) -> None:
        """The step is done."""
        if self.statistics is not None:
            self.statistics.commit()

    def discard(self) -> None:
        """The step has been given up."""
        if self.statistics is not None:
            self.statistics.discard()

    def save(self, groups: Sequence[dict[str, Any]]) -> None:
        """Adds to the groups of a checkpoint what the coming steps depend on."""
        if self.statistics is not None:
            for group in groups:
                group[STATISTICS] = self.statistics.numbers()

    def take_saved(self, groups: Sequence[dict[str, Any]]) -> list[float] | None:
        """Takes out of loaded groups what :meth:`save` has added."""
        found = [group.pop(STATISTICS, None) for group in groups]
        return found[0] if found else None

    def load(self, saved: Sequence[float] | None) -> None:
        """Goes on from what :meth:`take_saved` returned; None: as it is."""
        if self.statistics is not None and saved is not None:
            self.statistics.load(saved)


def _is_zero(rho: Any) -> bool:
    """Whether rho is the number 0; tensors are not read."""
    return isinstance(rho, (float, Real)) and rho == 0
