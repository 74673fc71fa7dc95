"""Schedules: in which steps to perturb, and how rho changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastsam.arguments import check, check_count


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


@dataclass(frozen=True)
class Late:
    r"""Perturbs in the last part of the training only: a training costs ``1 + fraction`` times the base's passes.

    Zhou et al., ICLR 2025, https://arxiv.org/abs/2410.10373: SAM in the last 25 of 200 epochs has nearly all of the
    gain.

    Args:
        fraction: which part of the steps, in [0, 1].
        total_steps: how many steps the training has.
        ramp: over so many steps rho rises linearly to its value when the part begins.
    """

    fraction: float
    total_steps: int
    ramp: int = 0

    def __post_init__(self) -> None:
        check("fraction", self.fraction, "in [0, 1]", 0 <= self.fraction <= 1)
        check_count("total_steps", self.total_steps)
        check("ramp", self.ramp, "a whole number >= 0", isinstance(self.ramp, int) and self.ramp >= 0)

    def __call__(self, step: int) -> bool:
        """Whether ``step`` (from 0) has an ascent."""
        return step >= self._start

    def scale(self, step: int) -> float:
        """What rho is multiplied by in ``step``."""
        return min(1.0, (step - self._start + 1) / self.ramp) if self.ramp else 1.0

    @property
    def _start(self) -> int:
        return self.total_steps - round(self.fraction * self.total_steps)


@dataclass(frozen=True)
class Early:
    """Perturbs in the first part of the training only.

    Args:
        fraction: which part of the steps, in [0, 1].
        total_steps: how many steps the training has.
    """

    fraction: float
    total_steps: int

    def __post_init__(self) -> None:
        check("fraction", self.fraction, "in [0, 1]", 0 <= self.fraction <= 1)
        check_count("total_steps", self.total_steps)

    def __call__(self, step: int) -> bool:
        """Whether ``step`` (from 0) has an ascent."""
        return step < round(self.fraction * self.total_steps)


@dataclass(frozen=True)
class AESAM:
    r"""Perturbs where the gradient is large, by the statistics of its squared norm.

    ``mu <- delta * mu + (1 - delta) * ||g||^2`` and ``s^2 <- delta * s^2 + (1 - delta) * (||g||^2 - mu)^2``, from 0 on
    and with the new mu; a step has an ascent if ``||g||^2 >= mu + c * s``, where c goes linearly from ``lambda2`` in
    the first step to ``lambda1`` in the last. Jiang et al., ICLR 2023, https://arxiv.org/abs/2304.14647. The equations
    and their order follow a published transcription of the paper's algorithm. The default values of ``lambda1``,
    ``lambda2`` and ``delta`` are ours: with them about half of the steps perturb.

    The norm is that of the perturbed parameters' gradients. It depends on the loss scale: with a ``GradScaler``,
    unscale before ``first_step()``. A non-finite norm leaves mu and s as they are, and the step perturbs (which a
    non-finite gradient turns into a no-op).

    Args:
        total_steps: how many steps the training has.
        lambda1: c in the last step.
        lambda2: c in the first step.
        delta: in [0, 1).
        delay: 0: the paper's decision, for which the host waits once after the first pass of each step. 1: each step
            uses the decision that belongs to the step before, so that a device is never waited for while it computes;
            the first step perturbs. Only ``delay=1`` can be captured into CUDA graphs: one for steps with an ascent and
            one for steps without; ``optimizer.ascends_next`` says which comes next.
    """

    total_steps: int
    lambda1: float = -1.0
    lambda2: float = 1.0
    delta: float = 0.9
    delay: int = 1

    def __post_init__(self) -> None:
        check_count("total_steps", self.total_steps)
        for name in ("lambda1", "lambda2"):
            check(name, getattr(self, name), "finite", math.isfinite(getattr(self, name)))
        check("delta", self.delta, "in [0, 1)", 0 <= self.delta < 1)
        check("delay", self.delay, "0 or 1", self.delay in (0, 1))

    def threshold(self, step: Any) -> Any:
        """C in ``step``, a number or a tensor."""
        done = step / self.total_steps
        done = done.clamp(max=1.0) if isinstance(done, Tensor) else min(done, 1.0)
        return done * self.lambda1 + (1 - done) * self.lambda2


Schedule = Callable[[int], bool] | AESAM


def check_schedule(schedule: Any) -> None:
    """Raises TypeError unless ``schedule`` says in which steps to perturb."""
    if schedule is not None and not (callable(schedule) or isinstance(schedule, AESAM)):
        raise TypeError(
            "schedule must be a function of the step number, or one of fastsam.schedules, "
            f"got {type(schedule).__name__}"
        )
    if isinstance(schedule, type):
        raise TypeError(f"schedule must be an instance: schedules.{schedule.__name__}(...)")
