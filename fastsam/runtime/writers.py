"""Who else writes to parameters while they are perturbed: the restore would undo it, or a foreign one our ascent."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from operator import attrgetter

from torch import Tensor

# Version counters of so many parameters are compared: reading every one would take longer than a launch.
SAMPLE = 8

_version = attrgetter("_version")

_perturbing: weakref.WeakSet[ForeignWrites] = weakref.WeakSet()


class ForeignWrites:
    """Compares the version counters of a few parameters, evenly spaced, between the two phases of a step.

    A parameter that is also written to between the steps is the model's own to write (an embedding with ``max_norm``).
    """

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._sample: list[Tensor] = []
        self._left: list[int] = []
        self._perturbed: list[int] = []
        self._ours: list[bool] = []

    def watch(self, params: Iterable[Tensor]) -> None:
        """These are the parameters from now on."""
        self._params = list(params)
        moving = [param for param in self._params if param.requires_grad]
        self._sample = moving[:: max(1, len(moving) // SAMPLE)]
        self.end()

    def begin(self) -> None:
        """An ascent is about to begin.

        Raises:
            RuntimeError: another FastSAM has perturbed one of the parameters.
        """
        if len(_perturbing):
            mine = set(self._params)
            for other in _perturbing:
                if other is not self and (shared := [i for i, p in enumerate(other._params) if p in mine]):
                    raise RuntimeError(
                        f"parameter {shared[0]} of another FastSAM is also this one's, and is perturbed by it; call "
                        "that one's second_step() or restore() first"
                    )
        self._ours = [a == b for a, b in zip(map(_version, self._sample), self._left, strict=True)]

    def note_ascent(self) -> None:
        """The parameters are perturbed now."""
        self._perturbed = list(map(_version, self._sample))
        _perturbing.add(self)

    def find(self) -> Tensor | None:
        """A parameter that somebody else has written to since."""
        now = map(_version, self._sample)
        for param, version, before, ours in zip(self._sample, now, self._perturbed, self._ours, strict=False):
            if ours and version != before:
                return param
        return None

    def end(self) -> None:
        """The step is over."""
        self._left = list(map(_version, self._sample))
        _perturbing.discard(self)
