"""Detects writes to perturbed parameters by others: a restore would undo them, or a foreign one this ascent."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from operator import attrgetter

from torch import Tensor

# Version counters of at least so many parameters are compared: reading thousands would take longer than a launch.
SAMPLE = 16

_version = attrgetter("_version")

_perturbing: dict[int, weakref.ref[ForeignWrites]] = {}


class ForeignWrites:
    """Compares the version counters of a few parameters, evenly spaced, between the two phases of a step.

    A parameter that is also written to between the steps, when others are not, is the model's own to write (an
    embedding with ``max_norm``).
    """

    def __init__(self) -> None:
        self._params: list[Tensor] = []
        self._sample: list[Tensor] = []
        self._left: list[int] = []
        self._found: list[int] = []
        self._perturbed: list[int] = []
        self._me = weakref.ref(self)

    def watch(self, params: Iterable[Tensor]) -> None:
        """These are the parameters from now on."""
        left = dict(zip(map(id, self._sample), self._left, strict=True))
        self._params = list(params)
        moving = [param for param in self._params if param.requires_grad]
        self._sample = moving[:: max(1, len(moving) // SAMPLE)]
        self._left = [left.get(id(param), param._version) for param in self._sample]

    def begin(self) -> None:
        """An ascent is about to begin.

        Raises:
            RuntimeError: another FastSAM has perturbed one of the parameters.
        """
        if _perturbing:
            self._refuse_others()
        self._found = list(map(_version, self._sample))

    def note_ascent(self) -> None:
        """The parameters are perturbed now."""
        self._perturbed = list(map(_version, self._sample))
        _perturbing[id(self)] = self._me

    def find(self) -> list[Tensor]:
        """Parameters that have been written to since."""
        now = list(map(_version, self._sample))
        if now == self._perturbed:
            return []
        writes = [version - perturbed for version, perturbed in zip(now, self._perturbed, strict=True)]
        before = [found - left for found, left in zip(self._found, self._left, strict=True)]
        # Some were written to between the steps more often than others; or there is nothing but embeddings.
        usual, are_all_written = min(before), all(writes)
        return [
            param
            for param, count, earlier in zip(self._sample, writes, before, strict=True)
            if count and not (earlier > usual or (are_all_written and earlier > 0))
        ]

    def end(self) -> None:
        """The step is over."""
        self._left = list(map(_version, self._sample))
        _perturbing.pop(id(self), None)

    def _refuse_others(self) -> None:
        mine = set(self._params)
        for number, reference in list(_perturbing.items()):
            other = reference()
            if other is None:
                del _perturbing[number]
            elif other is not self and (shared := [i for i, p in enumerate(other._params) if p in mine]):
                raise RuntimeError(
                    f"parameter {shared[0]} of another FastSAM is also this one's, and is perturbed by it; call that "
                    "one's second_step() or restore() first"
                )
