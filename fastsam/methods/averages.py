"""Methods that ascend by an average of the gradients at w, which every step updates, also one without an ascent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastsam.arguments import check
from fastsam.methods.method import TINY, AscentTerms, DescentTerms, Dots, Facts, Method
from fastsam.spec import NONE, AscentForm, DescentForm, Row


@dataclass(frozen=True)
class FriendlySAM(Method):
    r"""Ascends by the noise of the batch's gradient alone: ``d = g - sigma * m``, ``e = rho * d / ||d||``.

    ``m <- lmbda * m + (1 - lmbda) * g``, from 0 on, stands for the gradient of the whole data set. Li et al., CVPR
    2024, https://arxiv.org/abs/2403.12350, algorithm 1.
    """

    sigma: float = 1.0
    lmbda: float = 0.9
    needs_first_grads: ClassVar[bool] = True
    state_name: ClassVar[str | None] = "fastsam_average"

    def __post_init__(self) -> None:
        check("sigma", self.sigma, ">= 0 and finite", 0 <= self.sigma < math.inf)
        check("lmbda", self.lmbda, "in [0, 1]", 0 <= self.lmbda <= 1)

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm(y=Row.METHOD_STATE)

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        # d by the average before this step.
        of_grad, of_average = 1 - self.sigma * (1 - self.lmbda), -self.sigma * self.lmbda
        squares, product, others = dots.total.unbind()
        length = of_grad**2 * squares + 2 * of_grad * of_average * product + of_average**2 * others
        scale = facts.rho / (length.clamp(min=0).sqrt() + TINY)
        return AscentTerms(scale * of_grad, scale * of_average)

    def descent_form(self, ascended: bool) -> DescentForm:
        return DescentForm(keeps=True)

    def measures(self, ascended: bool) -> bool:
        return not ascended  # a gradient that is not finite must not get into the average

    def descent_terms(self, dots: Dots, facts: Facts, ascended: bool) -> DescentTerms:
        return DescentTerms(keep_first=1 - self.lmbda, keep_state=self.lmbda)


@dataclass(frozen=True)
class VaSSO(Method):
    r"""Variance-suppressed sharpness: ascends by an average of gradients, ``e = rho * d / ||d||``.

    ``d <- (1 - theta) * d + theta * g``; d starts as the first g. Li and Giannakis,
    NeurIPS 2023, https://arxiv.org/abs/2309.15639. With a ``GradScaler`` the first pass's
    gradients must have one scale in all steps: unscale both passes.
    """

    theta: float = 0.9
    needs_first_grads: ClassVar[bool] = True
    state_name: ClassVar[str | None] = "fastsam_average"

    def __post_init__(self) -> None:
        check("theta", self.theta, "in (0, 1]", 0 < self.theta <= 1)

    def _of_grad(self, total: Tensor) -> Tensor:
        """The coefficient of g in the new d, that of the old one being the rest of 1: while that is 0, g itself."""
        return 1 - (1 - self.theta) * total[2].sign()

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm(y=Row.METHOD_STATE)

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        a = self._of_grad(dots.total)
        squares, product, others = dots.total.unbind()
        length = a.square() * squares + 2 * a * (1 - a) * product + (1 - a).square() * others
        scale = facts.rho / (length.clamp(min=0).sqrt() + TINY)
        return AscentTerms(scale * a, scale * (1 - a))

    def descent_form(self, ascended: bool) -> DescentForm:
        return DescentForm(NONE if ascended else Row.METHOD_STATE, keeps=True)

    def measures(self, ascended: bool) -> bool:
        return not ascended

    def descent_terms(self, dots: Dots, facts: Facts, ascended: bool) -> DescentTerms:
        a = self._of_grad(dots.total if facts.ascent is None else facts.ascent.total)
        return DescentTerms(keep_first=a, keep_state=1 - a)
