"""Three measures of sharpness, each ``L(w + e) - L(w)``: along the gradient, at the worst e, over random e.

Wen et al., ICLR 2023, https://arxiv.org/abs/2211.05729, table 1. They are different notions, and minimizing one does
not minimize another.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.arguments import check, check_count
from fastsam.sharpness import vectors
from fastsam.sharpness.objective import LossFunction, Objective, is_finite
from fastsam.sharpness.search import Ball, search
from fastsam.sharpness.vectors import Vector


@dataclass(frozen=True)
class Sharpness:
    """One measurement.

    Attributes:
        measure: "ascent", "worst" or "average".
        value: ``L(w + e) - L(w)``; NaN where it could not be measured.
        loss: ``L(w)``.
        standard_error: of the value, where it is the mean of samples.
        settings: what was measured: rho, p, adaptive, m, steps, ...
    """

    measure: str
    value: float
    loss: float
    standard_error: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        error = "" if self.standard_error is None else f" +- {self.standard_error:.2g}"
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.measure} sharpness {self.value:.4g}{error} above the loss {self.loss:.4g} ({settings})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values under the attributes' names."""
        return asdict(self)


def ascent(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    rho: float,
    *,
    p: float = 2,
    adaptive: bool = False,
    m: int | None = None,
    train: bool = False,
) -> Sharpness:
    r"""The rise of the loss along SAM's perturbation, ``e = rho * g / ||g||_2``.

    It is not the largest eigenvalue in disguise: to second order ``rho * ||g|| + rho^2 / 2 * g'Hg / g'g``, and the
    direction of g near a minimum is a mixture of eigenvectors.

    Args:
        model, loss_fn, data, train: see :class:`~fastsam.sharpness.objective.Objective`.
        rho: the radius, > 0.
        p: the norm of the ball: 2; or ``math.inf``, ``e = rho * sign(g)``.
        adaptive: measure e in units of the weights, ``||e / |w| ||_p <= rho``: ``e = rho * w^2 * g / || |w| g ||``.
        m: the mean over parts of at most m samples, each with an e of its own (m-sharpness; batches are divided, never
            joined). None: one e for all data.

    Returns:
        The measurement; NaN, with a warning, where the gradient is zero or not finite, or the loss at w is not.
    """
    ball = _ball(rho, p, adaptive)

    def rise(objective: Objective, loss: float, grads: Vector, inside: Ball) -> float:
        direction = inside.along(grads)
        if direction is None:
            _warn_of_gradient()
            return math.nan
        with objective.at(inside.displacement(direction)):
            return objective.loss() - loss

    objective = Objective(model, loss_fn, data, train=train)
    return _mean_over_pieces("ascent", objective, ball, m, rise, {})


def worst(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    rho: float,
    *,
    steps: int = 20,
    p: float = 2,
    adaptive: bool = False,
    restarts: int = 1,
    m: int | None = None,
    seed: int = 0,
    train: bool = False,
) -> Sharpness:
    """The largest rise of the loss found in the ball, by projected gradient ascent: a lower bound of the maximum.

    Auto-PGD (Croce and Hein, ICML 2020, https://arxiv.org/abs/2003.01690), whose step begins at 2 rho and halves itself
    where the loss no longer rises, as in Andriushchenko et al., ICML 2023, https://arxiv.org/abs/2302.07011. The first
    start is SAM's perturbation, so that the result is never below :func:`ascent`; the others are random. With
    ``adaptive`` steps and projections are in units of ``|w|``.

    Args:
        model, loss_fn, data, train: see :class:`~fastsam.sharpness.objective.Objective`.
        rho, p, adaptive, m: as for :func:`ascent`.
        steps: gradients per start.
        restarts: the number of starts.
        seed: of the random starts.
    """
    check_count("steps", steps)
    check_count("restarts", restarts)
    ball = _ball(rho, p, adaptive)

    def rise(objective: Objective, loss: float, grads: Vector, inside: Ball) -> float:
        if not math.isfinite(vectors.norm(grads)):
            _warn_of_gradient()
            return math.nan
        generator = torch.Generator().manual_seed(seed)
        first = inside.along(grads)
        starts = [inside.drawn(objective.params, generator) if first is None else first]
        starts += [inside.drawn(objective.params, generator) for _ in range(restarts - 1)]
        return max(0.0, *(search(objective, inside, start, steps) - loss for start in starts))

    objective = Objective(model, loss_fn, data, train=train)
    return _mean_over_pieces("worst", objective, ball, m, rise, {"steps": steps, "restarts": restarts})


def average(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    rho: float,
    *,
    samples: int = 100,
    adaptive: bool = False,
    seed: int = 0,
    train: bool = False,
) -> Sharpness:
    """The mean rise of the loss over random perturbations of length rho, ``e = rho * z / ||z||`` with z from N(0, I).

    To second order it is ``rho^2 / (2 n) * trace(H)`` for n parameters.

    Args:
        model, loss_fn, data, train: see :class:`~fastsam.sharpness.objective.Objective`.
        rho, adaptive: as for :func:`ascent`.
        samples: the number of perturbations, >= 2.
        seed: of the perturbations, which are the same for every model of the same shapes.
    """
    check("samples", samples, ">= 2", samples >= 2)
    ball = _ball(rho, 2, adaptive)
    objective = Objective(model, loss_fn, data, train=train)
    generator = torch.Generator().manual_seed(seed)
    settings = _settings(ball, {"samples": samples, "seed": seed})
    with objective.measuring():
        inside = ball(objective.params)
        loss = objective.loss()
        if not is_finite(loss):
            return Sharpness("average", math.nan, loss, math.nan, settings)
        rises = []
        for _ in range(samples):
            with objective.at(inside.displacement(inside.drawn(objective.params, generator))):
                rises.append(objective.loss() - loss)
    error = statistics.stdev(rises) / samples**0.5
    return Sharpness("average", statistics.mean(rises), loss, error, settings)


MakeBall = Callable[[Sequence[Tensor]], Ball]
Rise = Callable[[Objective, float, Vector, Ball], float]


def _ball(rho: float, p: float, adaptive: bool) -> MakeBall:
    check("rho", rho, "> 0 and finite", 0 < rho < math.inf)
    check("p", p, "2 or math.inf", p in (2, math.inf))
    return lambda params: Ball(rho, p, [w.detach().abs() for w in params] if adaptive else None)


def _settings(ball: MakeBall, more: dict[str, Any]) -> dict[str, Any]:
    shape = ball([])
    return {"rho": shape.rho, "p": shape.p, "adaptive": shape.scales is not None, **more}


def _mean_over_pieces(
    measure: str, objective: Objective, ball: MakeBall, m: int | None, rise: Rise, more: dict[str, Any]
) -> Sharpness:
    if m is not None:
        check_count("m", m)
    rises, losses, sizes = [], [], []
    settings = _settings(ball, more if m is None else {**more, "m": m})
    with objective.measuring():
        inside = ball(objective.params)
        for piece, size in objective.pieces(m):
            loss, grads = piece.gradient()
            losses.append(loss)
            sizes.append(size)
            rises.append(rise(piece, loss, grads, inside) if is_finite(loss) else math.nan)
    if not sizes:
        raise ValueError("data is empty: it gave no batch")
    value, loss = (_weighted_mean(values, sizes) for values in (rises, losses))
    return Sharpness(measure, value, loss, settings=settings)


def _weighted_mean(values: Sequence[float], sizes: Sequence[float]) -> float:
    return sum(v * s for v, s in zip(values, sizes, strict=True)) / sum(sizes)


def _warn_of_gradient() -> None:
    warnings.warn("the gradient at w is zero or not finite: it points nowhere", RuntimeWarning, stacklevel=5)
