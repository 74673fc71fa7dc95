"""Methods whose perturbation has another length than rho: it depends on the gradient's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from fastsam.arguments import check, check_count
from fastsam.methods.method import TINY, AscentTerms, Dots, Facts, Method
from fastsam.spec import AscentForm


@dataclass(frozen=True)
class UnifiedSAM(Method):
    r"""Between SAM and its unnormalized form: ``e = rho * (1 - lam + lam / ||g||) * g``.

    lam = 1 is SAM, lam = 0 USAM (``e = rho * g``). Oikonomou and Loizou, ICLR 2025, https://arxiv.org/abs/2503.02225.
    The length of e depends on the gradient's: under a ``GradScaler`` unscale before ``first_step()``.
    """

    lam: float = 0.5

    def __post_init__(self) -> None:
        check("lam", self.lam, "in [0, 1]", 0 <= self.lam <= 1)

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm()

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        return AscentTerms(facts.rho * (1 - self.lam + self.lam / (dots.total[0].sqrt() + TINY)))


@dataclass(frozen=True)
class LESAM(Method):
    r"""Loss-equated SAM: the radius that raises the linearized loss by ``sigma``, ``min(sigma / ||g||, rho)``.

    rho is the largest radius; the authors' example has none (rho = 999). With ``total_steps``, sigma falls to 0 along a
    cosine in the last ``decay`` of the steps. Wang et al., ICML 2026, https://arxiv.org/abs/2605.10183; the schedule
    and the defaults are those of the authors' code. The radius depends on the gradient's length: under a ``GradScaler``
    unscale before ``first_step()``.

    Args:
        sigma: > 0.
        total_steps: how many steps the training has; None: sigma is constant.
        decay: the fraction of the steps in which sigma falls.
    """

    sigma: float = 0.35
    total_steps: int | None = None
    decay: float = 0.2
    counts_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("sigma", self.sigma, "> 0 and finite", 0 < self.sigma < math.inf)
        check("decay", self.decay, "in [0, 1]", 0 <= self.decay <= 1)
        if self.total_steps is not None:
            check_count("total_steps", self.total_steps)

    def sigma_in(self, step: int) -> float:
        """Sigma in ``step``."""
        if self.total_steps is None:
            return self.sigma
        length = round(self.decay * self.total_steps)
        done = (step - (self.total_steps - length)) / max(length - 1, 1)
        return self.sigma * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0))) / 2

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm()

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        norm = dots.total[0].sqrt() + TINY
        radius = (self.sigma_in(facts.step) / norm).minimum(facts.rho.abs())
        return AscentTerms(facts.rho.sign() * radius / norm)
