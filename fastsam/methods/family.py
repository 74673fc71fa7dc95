"""The SAM family, schedules for rho, and the groups of SAM-ON.

Each method is a small class that turns dot products into the weights of two tensors (``fastsam/method.py``); none
launches a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsam.backends.combination import (
    DISTANCE,
    EXTRA_X,
    EXTRA_Y,
    KEEP_KEPT,
    KEEP_TAKEN,
    KEEP_X,
    NOTHING,
    SCALE,
    TERM,
    A,
    B,
    Climb,
    Descent,
    Map,
)
from fastsam.bases import FUSED
from fastsam.method import Dots, Facts, Method, Weights
from fastsam.tables import KEPT, PARAM, STATE, TAKEN

TINY = 1e-12
"""Added to every norm that something is divided by, as in SAM."""


@dataclass(frozen=True)
class SAM(Method):
    r"""Sharpness-Aware Minimization, over any p-norm and in several steps.

    ``e = rho * sign(g) |g|^(q-1) / (||g||_q^q)^(1/p)`` with ``1/p + 1/q = 1``: the maximum of ``<e, g>`` over
    ``||e||_p <= rho``; for p = 2, ``rho * g / ||g||``. Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412,
    equation 2.

    With ``inner_steps`` K > 1 the climb is projected gradient ascent (there, appendix C; Andriushchenko and Flammarion,
    ICML 2022, https://arxiv.org/abs/2206.06232): K times ``e <- P(e + s * rho * g(w + e) / ||g(w + e)||)``, where P
    shortens ``e`` to the ball of radius rho. A step costs K + 1 passes. With groups of different rho the ball is
    ``||e / rho|| <= 1``; groups with rho = 0 have no part in its norms.

    Args:
        p: in (1, inf].
        inner_steps: K.
        inner_lr: s, the length of an ascent step in units of rho; None: 1 / K.
    """

    p: float = 2.0
    inner_steps: int = 1
    inner_lr: float | None = None

    def __post_init__(self) -> None:
        _check("p", self.p, "in (1, inf]", self.p > 1)
        _check_count("inner_steps", self.inner_steps)
        if self.inner_lr is not None:
            _check("inner_lr", self.inner_lr, "> 0 and finite", 0 < self.inner_lr < math.inf)
            if self.inner_steps == 1:
                raise ValueError("inner_lr is for inner_steps > 1: a single step has the length rho")
        if self.p != 2 and self.inner_steps > 1:
            raise ValueError(f"inner_steps > 1 needs p=2, got p={self.p}")

    @property
    def ascents(self) -> int:
        return self.inner_steps

    @property
    def _q(self) -> float:
        return 1.0 if self.p == math.inf else self.p / (self.p - 1)

    def climb_form(self, again: bool) -> Climb | None:
        if self.inner_steps > 1:
            return Climb(y=DISTANCE if again else NOTHING)
        return None if self.p == 2 else Climb(map=Map.POWER)

    def map_weights(self, facts: Facts) -> Weights:
        return {SCALE: 1.0, TERM: self._q - 1}

    def weigh(self, dots: Tensor, facts: Facts) -> Tensor:
        if self.inner_steps == 1:
            return dots
        inverse = torch.where(facts.rho == 0, 0.0, 1 / facts.rho)
        return dots * torch.stack([facts.rho.sign().abs(), inverse, inverse.square()], dim=1)

    def climb_weights(self, dots: Dots, facts: Facts, again: bool) -> Weights:
        squares, product, climbed = dots.total.unbind()
        if self.p != 2:
            return {A: facts.rho, SCALE: 1 / (squares ** (1 / self._q) + TINY), TERM: self._q - 1}
        step = (1 / self.inner_steps if self.inner_lr is None else self.inner_lr) / (squares.sqrt() + TINY)
        length = (climbed + 2 * step * product + step.square() * squares).clamp(min=0).sqrt()
        shorter = 1 / length.clamp(min=1)
        return {A: facts.rho * step * shorter, B: shorter if again else 0.0}


@dataclass(frozen=True)
class ASAM(Method):
    r"""Adaptive SAM: ``e = rho * T^2 g / ||T g||``.

    ``T = |w| + eta`` for parameters of two and more dimensions, 1 for all others (biases, the weights of normalisation
    layers). Kwon et al., ICML 2021, https://arxiv.org/abs/2102.11600, equation 5 and section 4. ``adaptive=True``
    is davda54/sam's form of it: ``T = |w|`` everywhere.
    """

    eta: float = 0.01

    def __post_init__(self) -> None:
        _check("eta", self.eta, ">= 0 and finite", 0 <= self.eta < math.inf)

    def climb_form(self, again: bool) -> Climb:
        return Climb(map=Map.ADAPTIVE)

    def map_weights(self, facts: Facts) -> Weights:
        return {SCALE: facts.matrix, TERM: 1 + (self.eta - 1) * facts.matrix}

    def climb_weights(self, dots: Dots, facts: Facts, again: bool) -> Weights:
        return {A: facts.rho / (dots.total[0].sqrt() + TINY), **self.map_weights(facts)}


@dataclass(frozen=True)
class GSAM(Method):
    r"""Surrogate Gap Guided SAM: climbs as SAM, descends with ``g_p - alpha * (g - <g, g_p> / <g_p, g_p> g_p)``.

    ``g`` is the gradient at w, ``g_p`` the one at w + e: the part of g that is orthogonal to g_p is ascended, which
    narrows the surrogate gap without raising the perturbed loss. Zhuang et al., ICLR 2022,
    https://arxiv.org/abs/2203.08065, algorithm 1. There rho follows the lr: :class:`RhoByLR`.
    """

    alpha: float = 0.4
    takes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check("alpha", self.alpha, ">= 0 and finite", 0 <= self.alpha < math.inf)

    def descent_form(self, climbed: bool) -> Descent | None:
        return Descent(y=TAKEN) if climbed else None

    def measures(self, climbed: bool) -> bool:
        return climbed

    def descent_weights(self, dots: Dots, facts: Facts, climbed: bool) -> Weights:
        perturbed, product, _ = dots.total.unbind()
        parallel = torch.where(perturbed == 0, 0.0, product / perturbed)
        return {A: 1 + self.alpha * parallel, B: -self.alpha}


@dataclass(frozen=True)
class WSAM(Method):
    r"""Weighted sharpness as a regularisation term: the loss ``L + gamma / (1 - gamma) * (L_SAM - L)``.

    With ``g`` at w and ``g_p`` at w + e: coupled, the base is given ``g + gamma / (1 - gamma) * (g_p - g)``; decoupled,
    it is given ``g``, and ``w`` goes by ``-lr * gamma / (1 - gamma) * (g_p - g)`` besides, so that neither momentum nor
    preconditioner sees the sharpness. gamma = 1/2 coupled is SAM. Yue et al., KDD 2023,
    https://arxiv.org/abs/2305.15817, algorithms 1 and 2.
    """

    gamma: float = 0.9
    decouple: bool = True
    takes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check("gamma", self.gamma, "in [0, 1)", 0 <= self.gamma < 1)
        if not isinstance(self.decouple, bool):
            raise TypeError(f"decouple must be True or False, got {self.decouple!r}")

    def descent_form(self, climbed: bool) -> Descent | None:
        return Descent(y=TAKEN, decoupled=self.decouple) if climbed else None

    def descent_weights(self, dots: Dots, facts: Facts, climbed: bool) -> Weights:
        weight = self.gamma / (1 - self.gamma)
        if not self.decouple:
            return {A: weight, B: 1 - weight}
        return {A: 0.0, B: 1.0, EXTRA_X: facts.lr * weight, EXTRA_Y: -facts.lr * weight}


@dataclass(frozen=True)
class LookSAM(Method):
    r"""A SAM step every k-th time; between them one pass, with the direction that SAM added last.

    In steps 0, k, 2k...: SAM's, keeping ``g_v = g_p - <g_p, g> / <g, g> g``, the part of the gradient at w + e that is
    orthogonal to the one at w. In all others: ``g + alpha * ||g|| / ||g_v|| * g_v``. Liu et al., CVPR 2022,
    https://arxiv.org/abs/2203.02714, algorithm 1; all norms are over all parameters together.
    """

    k: int = 5
    alpha: float = 0.7
    takes: ClassVar[bool] = True
    kept: ClassVar[str | None] = "fastsam_direction"
    counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_count("k", self.k)
        _check("alpha", self.alpha, ">= 0 and finite", 0 <= self.alpha < math.inf)

    def climbs(self, step: int) -> bool:
        return step % self.k == 0

    def descent_form(self, climbed: bool) -> Descent:
        return Descent(y=TAKEN, keeps=True) if climbed else Descent(y=KEPT)

    def measures(self, climbed: bool) -> bool:
        return True

    def descent_weights(self, dots: Dots, facts: Facts, climbed: bool) -> Weights:
        squares, product, others = dots.total.unbind()
        if not climbed:
            return {B: torch.where(others == 0, 0.0, self.alpha * (squares / others).sqrt())}
        parallel = torch.where(others == 0, 0.0, product / others)
        return {A: 1.0, KEEP_X: 1.0, KEEP_TAKEN: -parallel, KEEP_KEPT: 0.0}


@dataclass(frozen=True)
class FriendlySAM(Method):
    r"""Climbs by the noise of the batch's gradient alone: ``d = g - sigma * m``, ``e = rho * d / ||d||``.

    ``m <- lmbda * m + (1 - lmbda) * g``, from 0 on, stands for the gradient of the whole data set. Li et al., CVPR
    2024, https://arxiv.org/abs/2403.12350, algorithm 1.
    """

    sigma: float = 1.0
    lmbda: float = 0.9
    takes: ClassVar[bool] = True
    kept: ClassVar[str | None] = "fastsam_average"

    def __post_init__(self) -> None:
        _check("sigma", self.sigma, ">= 0 and finite", 0 <= self.sigma < math.inf)
        _check("lmbda", self.lmbda, "in [0, 1]", 0 <= self.lmbda <= 1)

    def climb_form(self, again: bool) -> Climb:
        return Climb(y=KEPT)

    def climb_weights(self, dots: Dots, facts: Facts, again: bool) -> Weights:
        # d by the average before this step.
        of_grad, of_average = 1 - self.sigma * (1 - self.lmbda), -self.sigma * self.lmbda
        squares, product, others = dots.total.unbind()
        length = of_grad**2 * squares + 2 * of_grad * of_average * product + of_average**2 * others
        scale = facts.rho / (length.clamp(min=0).sqrt() + TINY)
        return {A: scale * of_grad, B: scale * of_average}

    def descent_form(self, climbed: bool) -> Descent | None:
        return Descent(keeps=True) if climbed else None

    def descent_weights(self, dots: Dots, facts: Facts, climbed: bool) -> Weights:
        return {KEEP_TAKEN: 1 - self.lmbda, KEEP_KEPT: self.lmbda}


@dataclass(frozen=True)
class MomentumSAM(Method):
    r"""Climbs against the base's momentum: ``e = -rho * v / ||v||``, one pass per step.

    v is SGD's momentum buffer, Adam's first moment. ``step(closure)`` climbs, calls the closure once, restores and
    updates, so that between steps the weights are the true ones; in two-phase use ``first_step()`` comes before the
    forward pass. Before the first update there is no momentum and no climb. Becker et al. 2024,
    https://arxiv.org/abs/2401.12033, algorithm 1.
    """

    climbs_by: ClassVar[int] = STATE

    def check_group(self, base: type[torch.optim.Optimizer], group: Mapping[str, Any]) -> None:
        super().check_group(base, group)
        if base not in FUSED:
            raise ValueError(f"MomentumSAM needs SGD with momentum, Adam or AdamW as its base, got {base.__name__}")
        if base is torch.optim.SGD and group.get("momentum", 0) == 0:
            raise ValueError("MomentumSAM needs a base with momentum, got SGD with momentum=0")

    def climb_form(self, again: bool) -> Climb:
        return Climb(x=STATE)

    def climb_weights(self, dots: Dots, facts: Facts, again: bool) -> Weights:
        # Where the base maximizes, its momentum points downhill, and v has turned round with it.
        return {A: -facts.rho.abs() / (dots.total[0].sqrt() + TINY)}


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
        _check_count("inner_steps", self.inner_steps)
        _check("inner_lr", self.inner_lr, "> 0 and finite", 0 < self.inner_lr < math.inf)
        _check("eps", self.eps, ">= 0 and finite", 0 <= self.eps < math.inf)

    @property
    def ascents(self) -> int:
        return self.inner_steps

    def climb_form(self, again: bool) -> Climb:
        return Climb(y=DISTANCE if again else NOTHING)

    def weigh(self, dots: Tensor, facts: Facts) -> Tensor:
        sign = facts.rho.sign()
        return dots * torch.stack([sign.abs(), sign, sign.abs()], dim=1)

    def climb_weights(self, dots: Dots, facts: Facts, again: bool) -> Weights:
        squares, product, climbed = dots.total.unbind()
        length = (climbed + 2 * self.inner_lr * product + self.inner_lr**2 * squares).clamp(min=0).sqrt()
        shorter = (self.eps / (length + TINY)).clamp(max=1)
        return {A: facts.rho.sign() * self.inner_lr * shorter, B: shorter if again else 0.0}


@dataclass(frozen=True)
class AWP(Method):
    r"""Adversarial Weight Perturbation: for each matrix ``e = gamma * ||w|| * g / ||g||``; vectors do not move.

    Wu et al., NeurIPS 2020, https://arxiv.org/abs/2004.05884, equation 8 and section 4. The closures (or the
    ``ascent_closure``) compute the loss on adversarial inputs. ``gamma`` stands in rho's place; of rho counts only
    whether it is 0: such a group does not move.
    """

    gamma: float = 0.01

    def __post_init__(self) -> None:
        _check("gamma", self.gamma, ">= 0 and finite", 0 <= self.gamma < math.inf)

    def climb_form(self, again: bool) -> Climb:
        return Climb(y=PARAM)

    def climb_weights(self, dots: Dots, facts: Facts, again: bool) -> Weights:
        squares, _, weights = dots.each.unbind(dim=1)
        return {A: facts.rho.sign() * facts.matrix * self.gamma * weights.sqrt() / (squares.sqrt() + TINY)}


@dataclass(frozen=True)
class RandomSAM(Method):
    r"""Climbs in a random direction: ``e = rho * z / ||z||`` with z from N(0, I); one pass per step.

    The "average-direction" of Wen et al., ICLR 2023, https://arxiv.org/abs/2211.05729. z depends on ``seed``, the
    number of the step and the device. As with :class:`MomentumSAM`, ``first_step()`` comes before the forward pass.
    """

    seed: int = 0
    climbs_by: ClassVar[int] = TAKEN
    counts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be a whole number in [0, 2**32), got {self.seed!r}")

    def climb_form(self, again: bool) -> Climb:
        return Climb(x=TAKEN)

    def climb_weights(self, dots: Dots, facts: Facts, again: bool) -> Weights:
        return {A: facts.rho / (dots.total[0].sqrt() + TINY)}


@dataclass(frozen=True)
class RhoByLR:
    """A rho that follows its group's learning rate, from ``rho_min`` at ``lr_min`` to ``rho_max`` at ``lr_max``.

    Zhuang et al. (see :class:`GSAM`), algorithm 1. With the smallest values 0, rho is proportional to the lr.
    """

    rho_max: float
    lr_max: float
    rho_min: float = 0.0
    lr_min: float = 0.0

    def __post_init__(self) -> None:
        _check("rho_max", self.rho_max, ">= 0 and finite", 0 <= self.rho_max < math.inf)
        _check("rho_min", self.rho_min, ">= 0 and finite", 0 <= self.rho_min < math.inf)
        _check("lr_max", self.lr_max, "> lr_min", self.lr_min < self.lr_max < math.inf)

    def of(self, lr: float | Tensor) -> float | Tensor:
        """The radius at ``lr``, never below 0."""
        rho = self.rho_min + (self.rho_max - self.rho_min) * (lr - self.lr_min) / (self.lr_max - self.lr_min)
        return rho.clamp(min=0) if isinstance(rho, Tensor) else max(rho, 0.0)


RhoSchedule = Callable[[int], "float | Tensor"] | RhoByLR


def norm_layers_only(model: nn.Module, kinds: tuple[type[nn.Module], ...] = (), **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for SAM-ON: only the normalisation layers' weights climb, no biases.

    Mueller et al., NeurIPS 2023, https://arxiv.org/abs/2306.04226.

    Args:
        model: the model.
        kinds: the classes of the layers whose weights climb; else torch's normalisation layers, and every class whose
            name ends in ``Norm``.
        **options: of both groups.

    Returns:
        The climbing group, and all other parameters with ``perturb=False``.

    Raises:
        ValueError: the model has no such layer with a weight.
    """
    climbing: dict[Tensor, None] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and (isinstance(module, kinds) if kinds else _is_norm_layer(module)):
            climbing[weight] = None
    if not climbing:
        raise ValueError("model has no normalisation layer with a weight; name the classes (kinds=)")
    others = [p for p in model.parameters() if p not in climbing]
    groups = [{"params": list(climbing), **options}, {"params": others, "perturb": False, **options}]
    return groups if others else groups[:1]


_NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def _is_norm_layer(module: nn.Module) -> bool:
    return isinstance(module, _NORM_LAYERS) or type(module).__name__.endswith("Norm")


def _check(name: str, value: Any, condition: str, holds: bool) -> None:
    if not holds:
        raise ValueError(f"{name} must be {condition}, got {value!r}")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def check_method(method: Any) -> None:
    """Raises TypeError if ``method`` is no method."""
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method must be an instance: methods.{method.__name__}()")
    if not isinstance(method, Method):
        raise TypeError(f"method must be one of fastsam.methods, got {type(method).__name__}")


__all__ = [
    "AMP",
    "ASAM",
    "AWP",
    "GSAM",
    "SAM",
    "WSAM",
    "FriendlySAM",
    "LookSAM",
    "Method",
    "MomentumSAM",
    "RandomSAM",
    "RhoByLR",
    "norm_layers_only",
]
