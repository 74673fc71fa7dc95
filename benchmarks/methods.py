"""The methods that are measured side by side, how each takes a step, and the bytes that its operations move."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.implementations import BASES, RHO, UPDATE
from benchmarks.results import FLOOR
from fastsam import FastSAM, methods
from fastsam.backends.combination import DISTANCE, NOTHING, Climb, Descent, Map
from fastsam.tables import PARAM, TAKEN

METHODS: dict[str, methods.Method] = {
    "SAM()": methods.SAM(),
    "SAM(p=4)": methods.SAM(p=4),
    "SAM(inner_steps=2)": methods.SAM(inner_steps=2),
    **{
        f"{method.__name__}()": method()
        for method in (
            methods.ASAM,
            methods.GSAM,
            methods.WSAM,
            methods.LookSAM,
            methods.FriendlySAM,
            methods.MomentumSAM,
            methods.AMP,
            methods.AWP,
            methods.RandomSAM,
        )
    },
}
SAM = next(iter(METHODS))


def period(method: methods.Method) -> int:
    """After how many steps a method begins again: LookSAM's k."""
    return next((k for k in range(1, 1000) if method.climbs(k)), 1)


def floor_bytes(method: methods.Method, base: str) -> float:
    """Bytes per fp32 parameter that the operations of a step read and write, on the average over a period.

    Each operation reads and writes a tensor once; small tensors of dot products and weights are not counted.
    """
    steps = period(method)
    return sum(_step_bytes(method, base, climbs=method.climbs(step)) for step in range(steps)) / steps


def _step_bytes(method: methods.Method, base: str, *, climbs: bool) -> int:
    total = FLOOR[UPDATE[base]]
    if climbs:
        total += sum(_climb_bytes(method.climb_form(ascent > 0)) for ascent in range(method.ascents))
        total += 4 if method.climbs_by == TAKEN else 0  # a random direction is written first
    form = method.descent_form(climbs)
    return total + (0 if form is None else _descent_bytes(form, measured=method.measures(climbs)))


def _climb_bytes(form: Climb | None) -> int:
    if form is None:
        return FLOOR["grad_norm"] + FLOOR["perturb_"]
    # Beside x: y's tensor, or backup and weight for the way climbed so far; the weight for ASAM's T.
    others = {NOTHING: 0, DISTANCE: 8}.get(form.y, 4)
    dots = 4 + others + (4 if form.map == Map.ADAPTIVE else 0)
    # A first climb reads weight and x and writes backup and weight, a further one reads the backup: as many bytes.
    return dots + FLOOR["perturb_"] + (0 if form.y in (NOTHING, DISTANCE, PARAM) else 4)


def _descent_bytes(form: Descent, *, measured: bool) -> int:
    y = 0 if form.y == NOTHING else 4
    kept = 0
    if form.keeps:
        # taken, if it is not y; what was kept, and is kept
        kept = (0 if form.y == TAKEN else 4) + 8
    return (4 + y if measured else 0) + y + kept


class MethodSteps:
    """One period of a method over made-up gradients.

    Args:
        method: the method.
        params: the parameters.
        gradients: has ``hand_to(params)``, called before each pass; that is not timed.
        base: one of ``BASES``.
        backend: FastSAM's.
    """

    def __init__(
        self, method: methods.Method, params: Sequence[Tensor], gradients: Any, base: str, backend: str
    ) -> None:
        base_class, options = BASES[base]
        self.optimizer = FastSAM(params, base_class, rho=RHO, method=method, backend=backend, **options)
        self._params, self._gradients = params, gradients
        self.steps = period(method)

    def __call__(self, clock: Any) -> float:
        """The mean time of a step by ``clock()``."""
        total = 0.0
        for _ in range(self.steps):
            more = True
            for _ in range(self.optimizer.method.ascents):
                self._gradients.hand_to(self._params)
                start = clock()
                more = self.optimizer.first_step(zero_grad=False)
                total += clock() - start
            if more:
                self._gradients.hand_to(self._params)
            start = clock()
            self.optimizer.step()
            total += clock() - start
        return total / self.steps
