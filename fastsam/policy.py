"""Which steps have an ascent: interval, schedule, rho, and AE-SAM's statistics of the gradient's norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.groups import rho_in
from fastsam.methods import Method
from fastsam.schedules import AESAM, Schedule

STATISTICS = "fastsam_statistics"
"""In the groups of a checkpoint: AE-SAM's mean and variance, and whether the next step ascends."""


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


class _Observation(NamedTuple):
    mean: Tensor
    variance: Tensor
    ascends: _Flag


class Statistics:
    """AE-SAM's moving average and variance of the squared norm of the gradients at w."""

    def __init__(self, config: AESAM) -> None:
        self.config = config
        self.state = (0.0, 0.0, True)
        self._current: _Observation | None = None
        self._next: _Observation | None = None

    def ascends_before_first_pass(self) -> bool:
        """The decision that belongs to the step before; with ``delay=0``, True."""
        if self.config.delay == 0:
            return True
        return self.state[2] if self._current is None else self._current.ascends.read()

    def observe(self, norm: Tensor, step: int) -> None:
        """Takes the norm of this step's gradients at w into account; :meth:`commit` makes that permanent."""
        delta, current = self.config.delta, self._current
        mean, variance = self.state[:2] if current is None else (current.mean, current.variance)
        squares = norm.square()
        new_mean = delta * mean + (1 - delta) * squares
        new_variance = delta * variance + (1 - delta) * (squares - new_mean).square()
        # Negated, so that a norm that is not a number perturbs.
        ascends = ~(squares < new_mean + self.config.threshold(step) * new_variance.sqrt())
        finite = torch.isfinite(new_variance)
        new_mean, new_variance = torch.where(finite, new_mean, mean), torch.where(finite, new_variance, variance)
        self._next = _Observation(new_mean, new_variance, _Flag(ascends | ~finite))

    @property
    def has_observed(self) -> bool:
        """Whether this step's gradients have been taken into account."""
        return self._next is not None

    def ascends_after_first_pass(self) -> bool:
        """The decision that belongs to this step, for ``delay=0``; else True."""
        assert self._next is not None
        return self.config.delay == 1 or self._next.ascends.read()

    def commit(self) -> None:
        """The step is done."""
        if self._next is not None:
            self._current, self._next = self._next, None

    def discard(self) -> None:
        """The step has been given up."""
        self._next = None

    def numbers(self) -> list[float]:
        """Mean, variance and the coming step's decision, for a checkpoint."""
        if (now := self._current) is not None:
            self.state = float(now.mean), float(now.variance), now.ascends.read()
        return [float(number) for number in self.state]

    def load(self, numbers: Sequence[float]) -> None:
        """Goes on from what :meth:`numbers` returned."""
        mean, variance, ascends = numbers
        self.state, self._current, self._next = (mean, variance, bool(ascends)), None, None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "numbers": self.numbers()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.config = state["config"]
        self.load(state["numbers"])


class _Flag:
    """A bool that a device computes; reading it waits for the copy to the host alone."""

    def __init__(self, value: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._value = value
        if value.device.type == "cuda":
            self._value = torch.empty((), dtype=torch.bool, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


def _is_zero(rho: Any) -> bool:
    """Whether rho is the number 0; tensors are not read."""
    return isinstance(rho, Real) and rho == 0
