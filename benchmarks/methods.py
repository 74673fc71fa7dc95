"""The methods that are measured side by side, the bytes that each one's step moves, and how each takes a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from benchmarks.implementations import BASES, RHO
from benchmarks.operations import UPDATE_BYTES
from fastsam import FastSAM, methods

SAM = "SAM()"
METHODS: dict[str, methods.Method] = {
    SAM: methods.SAM(),
    "SAM(p=4)": methods.SAM(p=4),
    "SAM(inner_steps=2)": methods.SAM(inner_steps=2),
    "ASAM()": methods.ASAM(),
    "GSAM()": methods.GSAM(),
    "WSAM()": methods.WSAM(),
    "LookSAM()": methods.LookSAM(),
    "FriendlySAM()": methods.FriendlySAM(),
    "MomentumSAM()": methods.MomentumSAM(),
    "AMP()": methods.AMP(),
    "AWP()": methods.AWP(),
    "RandomSAM()": methods.RandomSAM(),
    "StableSAM()": methods.StableSAM(),
    "VaSSO()": methods.VaSSO(),
    "UnifiedSAM()": methods.UnifiedSAM(),
    "SAGM()": methods.SAGM(),
    "LESAM()": methods.LESAM(),
    "ESAM()": methods.ESAM(),
    "ZSharp()": methods.ZSharp(),
    "GCSAM()": methods.GCSAM(),
}

# Bytes per fp32 parameter that a step's operations read and write beside the base's update, each tensor once an
# operation; small tensors of dot products and coefficients are not counted. A norm is 4, a first ascent 16.
_DOTS, _ASCENT = 4, 16
_BYTES: dict[str, float] = {
    SAM: _DOTS + _ASCENT,
    "SAM(p=4)": _DOTS + _ASCENT,
    # The second ascent: dots of g, w and backup; it reads backup, w and g and writes w.
    "SAM(inner_steps=2)": _DOTS + _ASCENT + 12 + 16,
    "ASAM()": _DOTS + 4 + _ASCENT,  # w, for T, in the norm
    "GSAM()": _DOTS + _ASCENT + 8 + 4,  # dots of both gradients; both in the update
    "WSAM()": _DOTS + _ASCENT + 4,  # both gradients in the update
    # One step of five: as GSAM, and the direction is read and written; the others: dots of g and direction, both in
    # the update.
    "LookSAM()": (_DOTS + _ASCENT + 8 + 4 + 8 + 4 * (8 + 4)) / 5,
    # The average in dots and ascent; it, read and written, and the first gradient in the update.
    "FriendlySAM()": (_DOTS + 4) + (_ASCENT + 4) + 4 + 8,
    "MomentumSAM()": _DOTS + _ASCENT,
    "AMP()": _DOTS + _ASCENT,
    "AWP()": _DOTS + 4 + _ASCENT,  # w in the norms
    "RandomSAM()": 4 + _DOTS + _ASCENT,  # the direction is written first
    "StableSAM()": _DOTS + _ASCENT + 4,  # the second gradient's norm
    "VaSSO()": (_DOTS + 4) + (_ASCENT + 4) + 4 + 8,  # as FriendlySAM
    "UnifiedSAM()": _DOTS + _ASCENT,
    "SAGM()": _DOTS + _ASCENT + 4,  # both gradients in the update
    "LESAM()": _DOTS + _ASCENT,
    "ESAM()": _DOTS + _ASCENT,
    # The gradient is read once more, and the direction written; PyTorch's own temporaries are not counted.
    "ZSharp()": 8 + _DOTS + _ASCENT,
    "GCSAM()": 8 + _DOTS + _ASCENT,
}


def period(name: str) -> int:
    """After how many steps a method begins again: LookSAM's k."""
    return getattr(METHODS[name], "k", 1)


def floor_bytes(name: str, base: str) -> float:
    """Bytes per fp32 parameter that a step cannot do without, on the average over a period."""
    return _BYTES[name] + UPDATE_BYTES[base]


class MethodSteps:
    """One period of a method over made-up gradients.

    Args:
        name: one of ``METHODS``.
        params: the parameters.
        gradients: has ``hand_to(params)``, called before each pass; that is not timed.
        base: one of ``BASES``.
        backend: FastSAM's.
    """

    def __init__(self, name: str, params: Sequence[Tensor], gradients: Any, base: str, backend: str) -> None:
        base_class, options = BASES[base]
        self.optimizer = FastSAM(params, base_class, rho=RHO, method=METHODS[name], backend=backend, **options)
        self._params, self._gradients = params, gradients
        self._steps = period(name)

    def __call__(self, clock: Callable[[], float]) -> float:
        """The mean time of a step by ``clock()``."""
        total = 0.0
        for _ in range(self._steps):
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
        return total / self._steps
