"""Methods that give the base something else than the gradient at w + e."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastsam.arguments import check, check_count
from fastsam.methods.method import TINY, AscentTerms, DescentTerms, Dots, Facts, Method
from fastsam.spec import AscentForm, DescentForm, Row


@dataclass(frozen=True)
class GSAM(Method):
    r"""Surrogate Gap Guided SAM: ascends as SAM, descends with ``g_p - alpha * (g - <g, g_p> / <g_p, g_p> g_p)``.

    ``g`` is the gradient at w, ``g_p`` the one at w + e: the part of g that is orthogonal to g_p is ascended, which
    narrows the surrogate gap without raising the perturbed loss. Zhuang et al., ICLR 2022,
    https://arxiv.org/abs/2203.08065, algorithm 1. There rho follows the lr: :class:`RhoByLR`.
    """

    alpha: float = 0.4
    needs_first_grads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("alpha", self.alpha, ">= 0 and finite", 0 <= self.alpha < math.inf)

    def descent_form(self, ascended: bool) -> DescentForm | None:
        return DescentForm(y=Row.FIRST_GRAD) if ascended else None

    def measures(self, ascended: bool) -> bool:
        return ascended

    def descent_terms(self, dots: Dots, facts: Facts, ascended: bool) -> DescentTerms:
        perturbed, product, _ = dots.total.unbind()
        parallel = torch.where(perturbed == 0, 0.0, product / perturbed)
        return DescentTerms(1 + self.alpha * parallel, -self.alpha)


@dataclass(frozen=True)
class WSAM(Method):
    r"""Weighted sharpness as a regularisation term: the loss ``L + gamma / (1 - gamma) * (L_SAM - L)``.

    With ``g`` at w and ``g_p`` at w + e: coupled, the base is given ``g + gamma / (1 - gamma) * (g_p - g)``; decoupled,
    it is given ``g``, and ``w`` also moves by ``-lr * gamma / (1 - gamma) * (g_p - g)``, so that neither momentum nor
    preconditioner sees the sharpness. gamma = 1/2 coupled is SAM. Yue et al., KDD 2023,
    https://arxiv.org/abs/2305.15817, algorithms 1 and 2.
    """

    gamma: float = 0.9
    decouple: bool = True
    needs_first_grads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("gamma", self.gamma, "in [0, 1)", 0 <= self.gamma < 1)
        if not isinstance(self.decouple, bool):
            raise TypeError(f"decouple must be True or False, got {self.decouple!r}")

    def descent_form(self, ascended: bool) -> DescentForm | None:
        return DescentForm(y=Row.FIRST_GRAD, decoupled=self.decouple) if ascended else None

    def descent_terms(self, dots: Dots, facts: Facts, ascended: bool) -> DescentTerms:
        weight = self.gamma / (1 - self.gamma)
        if not self.decouple:
            return DescentTerms(weight, 1 - weight)
        return DescentTerms(0.0, 1.0, decoupled_x=facts.lr * weight, decoupled_y=-facts.lr * weight)


@dataclass(frozen=True)
class LookSAM(Method):
    r"""A SAM step every k-th time; between them one pass, with the direction that SAM added last.

    In steps 0, k, 2k...: SAM's, keeping ``g_v = g_p - <g_p, g> / <g, g> g``, the part of the gradient at w + e that is
    orthogonal to the one at w. In all others: ``g + alpha * ||g|| / ||g_v|| * g_v``. Liu et al., CVPR 2022,
    https://arxiv.org/abs/2203.02714, algorithm 1; all norms are over all parameters together.
    """

    k: int = 5
    alpha: float = 0.7
    needs_first_grads: ClassVar[bool] = True
    state_name: ClassVar[str | None] = "fastsam_direction"
    counts_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("k", self.k)
        check("alpha", self.alpha, ">= 0 and finite", 0 <= self.alpha < math.inf)

    def ascends(self, step: int) -> bool:
        return step % self.k == 0

    def descent_form(self, ascended: bool) -> DescentForm:
        return DescentForm(y=Row.FIRST_GRAD, keeps=True) if ascended else DescentForm(y=Row.METHOD_STATE)

    def measures(self, ascended: bool) -> bool:
        return True

    def descent_terms(self, dots: Dots, facts: Facts, ascended: bool) -> DescentTerms:
        squares, product, others = dots.total.unbind()
        if not ascended:
            return DescentTerms(b=torch.where(others == 0, 0.0, self.alpha * (squares / others).sqrt()))
        parallel = torch.where(others == 0, 0.0, product / others)
        return DescentTerms(keep_x=1.0, keep_first=-parallel, keep_state=0.0)


@dataclass(frozen=True)
class StableSAM(Method):
    r"""Ascends as SAM, descends with ``||g|| / ||g_p|| * g_p``: the gradient at w + e with the length of the one at w.

    Tan et al., JMLR 26, 2025, https://arxiv.org/abs/2401.07250. Only the number ``||g||`` is kept for the
    update. With a ``GradScaler`` both passes must have one scale.
    """

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm()

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        return AscentTerms(facts.rho / (dots.total[0].sqrt() + TINY))

    def descent_form(self, ascended: bool) -> DescentForm | None:
        return DescentForm() if ascended else None

    def measures(self, ascended: bool) -> bool:
        return True

    def descent_terms(self, dots: Dots, facts: Facts, ascended: bool) -> DescentTerms:
        assert facts.ascent is not None
        return DescentTerms(facts.ascent.total[0].sqrt() / (dots.total[0].sqrt() + TINY))


@dataclass(frozen=True)
class SAGM(Method):
    r"""Sharpness-Aware Gradient Matching: ``e = (rho / ||g|| - alpha) * g``, descends with ``(g + g_p) / 2``.

    It minimizes ``L(w) + L(w + rho * g / ||g|| - alpha * g)``, whose gradients then agree. Wang et al., CVPR 2023,
    https://arxiv.org/abs/2303.10353. A group with rho = 0 is the base's own. The length of e depends on the
    gradient's: under a ``GradScaler`` unscale both passes.
    """

    alpha: float = 0.001
    needs_first_grads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("alpha", self.alpha, ">= 0 and finite", 0 <= self.alpha < math.inf)

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm()

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        return AscentTerms(facts.rho / (dots.total[0].sqrt() + TINY) - facts.rho.sign() * self.alpha)

    def descent_form(self, ascended: bool) -> DescentForm | None:
        return DescentForm(y=Row.FIRST_GRAD) if ascended else None

    def descent_terms(self, dots: Dots, facts: Facts, ascended: bool) -> DescentTerms:
        return DescentTerms(0.5, 0.5)
