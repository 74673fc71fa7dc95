"""The worst perturbation in a ball, by projected gradient ascent with steps that halve themselves (Auto-PGD).

Croce and Hein, ICML 2020, https://arxiv.org/abs/2003.01690, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.sharpness import vectors
from fastsam.sharpness.objective import Objective
from fastsam.sharpness.vectors import Vector

MOMENTUM = 0.75
# A step is halved at a checkpoint if the loss rose in less than this share of the steps since the last one.
ENOUGH_RISES = 0.75


class Ball:
    """Perturbations ``e = T * d`` with ``||d||_p <= rho``; T = 1, or T = |w|. Directions d are handled, not e.

    Args:
        rho: the radius.
        p: 2 or infinity.
        scales: T for each parameter; None: 1.
    """

    def __init__(self, rho: float, p: float, scales: Vector | None) -> None:
        self.rho, self.p, self.scales = rho, p, scales

    def displacement(self, direction: Sequence[Tensor]) -> Vector:
        """E."""
        return vectors.times(direction, self.scales)

    def along(self, grads: Sequence[Tensor], length: float | None = None) -> Vector | None:
        """The steepest d of length rho, or of another; None where the gradient is zero or not finite."""
        slope = vectors.times(grads, self.scales)
        steepness = vectors.norm(slope)
        if steepness == 0 or not math.isfinite(steepness):
            return None
        length = self.rho if length is None else length
        if self.p == math.inf:
            return [length * s.sign() for s in slope]
        return vectors.scaled(slope, length / steepness)

    def drawn(self, params: Sequence[Tensor], generator: torch.Generator) -> Vector:
        """A random d on the sphere, or a corner of the cube."""
        direction = vectors.normal(params, generator)
        if self.p == math.inf:
            return [self.rho * d.sign() for d in direction]
        return vectors.scaled(direction, self.rho / vectors.norm(direction))

    def projected(self, direction: Vector) -> Vector:
        """The nearest d in the ball."""
        if self.p == math.inf:
            return [d.clamp(-self.rho, self.rho) for d in direction]
        length = vectors.norm(direction)
        return direction if length <= self.rho else vectors.scaled(direction, self.rho / length)


def checkpoints(steps: int) -> list[int]:
    """The steps after which the length of a step is looked at: ever more often."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted({math.ceil(share * steps) for share in shares[1:] if share < 1})


def search(objective: Objective, ball: Ball, start: Vector, steps: int) -> float:
    """The largest loss seen from ``start`` on; one gradient per step."""
    state = _Search(ball, start)
    looked_at = checkpoints(steps)
    for step in range(steps):
        with objective.at(ball.displacement(state.here)):
            state.note(*objective.gradient())
        if step in looked_at:
            state.look_at_step(step)
        state.move()
    with objective.at(ball.displacement(state.here)):
        return max(state.best_loss, objective.loss())


class _Search:
    def __init__(self, ball: Ball, start: Vector) -> None:
        self.ball = ball
        self.here = self.before = self.best = start
        self.grads = self.best_grads = start
        self.best_loss = self.best_loss_then = -math.inf
        self.length = self.length_then = 2 * ball.rho
        self.step_then = self.rises = 0

    def note(self, loss: float, grads: Vector) -> None:
        """Records the loss and the gradient at ``here``."""
        self.grads = grads
        if loss > self.best_loss:
            self.best_loss, self.best, self.best_grads = loss, self.here, grads
            self.rises += 1

    def look_at_step(self, step: int) -> None:
        """Halves the step and returns to the best point, where the loss rose too seldom, or not with this step."""
        seldom = self.rises < ENOUGH_RISES * (step - self.step_then)
        stuck = self.length == self.length_then and self.best_loss == self.best_loss_then
        self.length_then, self.best_loss_then = self.length, self.best_loss
        self.step_then, self.rises = step, 0
        if seldom or stuck:
            self.length /= 2
            self.here = self.before = self.best
            self.grads = self.best_grads

    def move(self) -> None:
        """One step from ``here``, with momentum."""
        step = self.ball.along(self.grads, self.length)
        if step is None:
            return
        target = self.ball.projected(vectors.combined(self.here, 1, step, 1))
        moved = vectors.combined(target, MOMENTUM, self.here, 1 - MOMENTUM)
        drift = vectors.combined(self.here, 1 - MOMENTUM, self.before, MOMENTUM - 1)
        self.here, self.before = self.ball.projected(vectors.combined(moved, 1, drift, 1)), self.here
