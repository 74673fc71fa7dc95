"""Methods that choose another ascent: its norm, its direction, its number of steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsam.arguments import check, check_count
from fastsam.methods.method import TINY, AscentTerms, Dots, Facts, Method
from fastsam.spec import NONE, PERTURBATION, AscentForm, Map, Row


@dataclass(frozen=True)
class SAM(Method):
    r"""Sharpness-Aware Minimization, over any p-norm and in several steps.

    ``e = rho * sign(g) |g|^(q-1) / (||g||_q^q)^(1/p)`` with ``1/p + 1/q = 1``: the maximum of ``<e, g>`` over
    ``||e||_p <= rho``; for p = 2, ``rho * g / ||g||``. Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412,
    equation 2.

    With ``inner_steps`` K > 1 the ascent is projected gradient ascent (there, appendix C; Andriushchenko and
    Flammarion, ICML 2022, https://arxiv.org/abs/2206.06232): K times
    ``e <- P(e + s * rho * g(w + e) / ||g(w + e)||)``, where P shortens ``e`` to the ball of radius
    rho. A step costs K + 1 passes. With groups of different rho the ball is ``||e / rho|| <= 1``; groups with rho = 0
    have no part in its norms.

    Args:
        p: in (1, inf].
        inner_steps: K.
        inner_lr: s, the length of an ascent step in units of rho; None: 1 / K.
    """

    p: float = 2.0
    inner_steps: int = 1
    inner_lr: float | None = None
    depends_on_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check("p", self.p, "in (1, inf]", self.p > 1)
        check_count("inner_steps", self.inner_steps)
        if self.inner_lr is not None:
            check("inner_lr", self.inner_lr, "> 0 and finite", 0 < self.inner_lr < math.inf)
            if self.inner_steps == 1:
                raise ValueError("inner_lr is for inner_steps > 1: a single step has the length rho")
        if self.p != 2 and self.inner_steps > 1:
            raise ValueError(
                f"inner_steps > 1 needs p=2, got p={self.p}: the projection onto another norm's ball is no scaling of e"
            )

    @property
    def ascents(self) -> int:
        return self.inner_steps

    @property
    def _q(self) -> float:
        return 1.0 if self.p == math.inf else self.p / (self.p - 1)

    def ascent_form(self, further: bool) -> AscentForm | None:
        if self.inner_steps > 1:
            return AscentForm(y=PERTURBATION if further else NONE)
        return None if self.p == 2 else AscentForm(map=Map.POWER)

    def map_terms(self, facts: Facts) -> AscentTerms:
        return AscentTerms(scale=1.0, term=self._q - 1)

    def weigh(self, dots: Tensor, facts: Facts) -> Tensor:
        if self.inner_steps == 1:
            return dots
        inverse = torch.where(facts.rho == 0, 0.0, 1 / facts.rho)
        return dots * torch.stack([facts.rho.sign().abs(), inverse, inverse.square()], dim=1)

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        squares, product, moved = dots.total.unbind()
        if self.p != 2:
            return AscentTerms(facts.rho, scale=1 / (squares ** (1 / self._q) + TINY), term=self._q - 1)
        step = (1 / self.inner_steps if self.inner_lr is None else self.inner_lr) / (squares.sqrt() + TINY)
        length = (moved + 2 * step * product + step.square() * squares).clamp(min=0).sqrt()
        shorter = 1 / length.clamp(min=1)
        return AscentTerms(facts.rho * step * shorter, shorter if further else 0.0)


@dataclass(frozen=True)
class ASAM(Method):
    r"""Adaptive SAM: ``e = rho * T^2 g / ||T g||``.

    ``T = |w| + eta`` for parameters of two and more dimensions, 1 for all others (biases, the weights of normalisation
    layers). Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600, equation 5 and section 4. ``adaptive=True``
    is davda54/sam's form of it: ``T = |w|`` everywhere.
    """

    eta: float = 0.01
    uses_shapes: ClassVar[bool] = True
    depends_on_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check("eta", self.eta, ">= 0 and finite", 0 <= self.eta < math.inf)

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm(map=Map.ADAPTIVE)

    def map_terms(self, facts: Facts) -> AscentTerms:
        return AscentTerms(scale=facts.matrix, term=1 + (self.eta - 1) * facts.matrix)

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        return self.map_terms(facts)._replace(a=facts.rho / (dots.total[0].sqrt() + TINY))


@dataclass(frozen=True)
class MomentumSAM(Method):
    r"""Ascends against the base's momentum: ``e = -rho * v / ||v||``, one pass per step.

    v is SGD's momentum buffer, Adam's first moment. ``step(closure)`` perturbs, calls the closure once, restores and
    updates, so that between steps the weights are the true ones; in two-phase use ``first_step()`` comes before the
    forward pass. Before the first update there is no momentum and no perturbation. Becker et al. 2024,
    https://arxiv.org/abs/2401.12033, algorithm 1.
    """

    needs_first_pass: ClassVar[bool] = False

    def check_group(self, base: type, group: Mapping[str, Any], *, fused: bool) -> None:
        super().check_group(base, group, fused=fused)
        if not fused:
            raise ValueError(
                "MomentumSAM ascends against its base's momentum: that must be SGD with momentum, Adam or AdamW, got "
                f"{base.__name__}"
            )
        if base is torch.optim.SGD and group.get("momentum", 0) == 0:
            raise ValueError("MomentumSAM needs a base with momentum, got SGD with momentum=0")

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm(x=Row.STATE)

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        # Where the base maximizes, its momentum points downhill, and v has turned round with it.
        return AscentTerms(-facts.rho.abs() / (dots.total[0].sqrt() + TINY))


@dataclass(frozen=True)
class AMP(Method):
    r"""Adversarial Model Perturbation: gradient ascent of ``inner_steps`` steps in a ball.

    Each is ``e <- e + inner_lr * g(w + e)``, with e shortened to ``||e|| <= eps`` where it is longer. Zheng et al.,
    CVPR 2021, https://arxiv.org/abs/2010.04925, algorithm 1: the norm is over all parameters together (the authors'
    code takes each tensor's). ``eps`` stands in rho's place; of rho counts only whether it is 0: such a group does not
    move. The ascent's length depends on the gradient's: under a GradScaler unscale before ``first_step()``.
    """

    inner_steps: int = 1
    inner_lr: float = 1.0
    eps: float = 0.5

    def __post_init__(self) -> None:
        check_count("inner_steps", self.inner_steps)
        check("inner_lr", self.inner_lr, "> 0 and finite", 0 < self.inner_lr < math.inf)
        check("eps", self.eps, ">= 0 and finite", 0 <= self.eps < math.inf)

    @property
    def ascents(self) -> int:
        return self.inner_steps

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm(y=PERTURBATION if further else NONE)

    def weigh(self, dots: Tensor, facts: Facts) -> Tensor:
        sign = facts.rho.sign()
        return dots * torch.stack([sign.abs(), sign, sign.abs()], dim=1)

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        squares, product, moved = dots.total.unbind()
        length = (moved + 2 * self.inner_lr * product + self.inner_lr**2 * squares).clamp(min=0).sqrt()
        shorter = (self.eps / (length + TINY)).clamp(max=1)
        return AscentTerms(facts.rho.sign() * self.inner_lr * shorter, shorter if further else 0.0)


@dataclass(frozen=True)
class AWP(Method):
    r"""Adversarial Weight Perturbation: for each matrix ``e = gamma * ||w|| * g / ||g||``; vectors do not move.

    Wu et al., NeurIPS 2020, https://arxiv.org/abs/2004.05884, equation 8 and section 4. The closures (or the
    ``ascent_closure``) compute the loss on adversarial inputs. ``gamma`` stands in rho's place; of rho counts only
    whether it is 0: such a group does not move.
    """

    gamma: float = 0.01
    reads_each_dot: ClassVar[bool] = True
    uses_shapes: ClassVar[bool] = True
    depends_on_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check("gamma", self.gamma, ">= 0 and finite", 0 <= self.gamma < math.inf)

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm(y=Row.PARAM)

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        squares, _, weights = dots.each.unbind(dim=1)
        return AscentTerms(facts.rho.sign() * facts.matrix * self.gamma * weights.sqrt() / (squares.sqrt() + TINY))


@dataclass(frozen=True)
class RandomSAM(Method):
    r"""Ascends in a random direction: ``e = rho * z / ||z||`` with z from N(0, I); one pass per step.

    The "average-direction" of Wen et al., ICLR 2023, https://arxiv.org/abs/2211.05729. z depends on ``seed``, the
    number of the step, the parameter and the element: it is the same on every device and for every sharding. As with
    :class:`MomentumSAM`, ``first_step()`` comes before the forward pass.
    """

    seed: int = 0
    needs_first_pass: ClassVar[bool] = False
    counts_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be a whole number in [0, 2**32), got {self.seed!r}")

    def noise_seed(self) -> int:
        return self.seed

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm(x=Row.DIRECTION)

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        return AscentTerms(facts.rho / (dots.total[0].sqrt() + TINY))
