"""The base update's state tensors: found in the optimizer's ``state``, or made and put there under torch's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.fingerprint import Description, describe, nested_identities
from fastsam.memory_layout import allocate_like, as_real, is_dense, same_order

OptimizerState = Mapping[Tensor, dict[str, Any]]

STATE_SLOTS = 3


class StateNames(NamedTuple):
    """The tensors that a base update keeps for one parameter, under torch.optim's names."""

    moments: tuple[str, ...] = ()
    """One per state slot, of the parameter's shape and dtype."""
    step: str | None = None
    """The 0-dim count of updates, where it is kept in the optimizer's state."""


class PreparedState(NamedTuple):
    """State tensors that have been allocated but not yet put in place."""

    names: tuple[StateNames, ...]
    chosen: list[int]
    """The parameters that have or get a state."""
    fresh: dict[tuple[int, int], Tensor]
    """By parameter and slot."""
    steps: Tensor


class StateBinding:
    """Keeps a table's state slots and the optimizer's ``state`` one.

    Args:
        params: the table's parameters.
        values: their memory, whose strides the state shares.
        groups: the parameter group of each.
        steps: float32 ``(n,)``, the updates that each has had; the step counts in ``state`` are views of it.
        name: what messages call a parameter, by its index.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        values: Sequence[Tensor],
        groups: Sequence[int],
        steps: Tensor,
        name: Callable[[int], str],
    ) -> None:
        self._params, self._values, self._groups, self._name = params, values, groups, name
        self._steps, self._step_views = steps, list(steps.unbind())
        self._names: tuple[StateNames, ...] | None = None
        self._look: bytes | None = None
        self._alive: list[Any] = []
        self._bound: list[Tensor] = []
        self._description: Description | None = None
        self._stateful: set[int] = set()
        self._covered: list[int] | None = None
        self.written: list[Tensor] = []
        """What an update writes: one tensor for each version counter."""

    def prepare(self, state: OptimizerState, names: Sequence[StateNames], present: list[int]) -> PreparedState | None:
        """What is missing for the parameters ``present``, or None if nothing is; changes nothing."""
        names = tuple(names)
        if names == self._names and self._covers(present) and self._is_bound(state):
            return None
        wanted = set(present)
        chosen = [i for i, p in enumerate(self._params) if i in wanted or p in state]
        self._check_shapes(chosen, state, names)
        return PreparedState(names, chosen, *self._make(chosen, state, names))

    def note(self, state: OptimizerState) -> None:
        """Remembers which tensors ``state`` holds, once every table has published its own."""
        assert self._names is not None
        self._look = _look_at(state, self._names)
        # An identity means something only while its object lives.
        self._alive = [(param, entries, *entries.values()) for param, entries in state.items()]
        self._description = describe(self._bound)

    def _is_bound(self, state: OptimizerState) -> bool:
        same = self._look is not None and _look_at(state, self._names or ()) == self._look
        return same and describe(self._bound) == self._description

    def _covers(self, present: list[int]) -> bool:
        if present is not self._covered and self._stateful.issuperset(present):
            self._covered = present
        return present is self._covered

    def _check_shapes(self, chosen: list[int], state: OptimizerState, names: Sequence[StateNames]) -> None:
        for i in chosen:
            entries = state.get(self._params[i], {})
            for name in names[self._groups[i]].moments:
                value = entries.get(name)
                if value is not None and value.shape != self._params[i].shape:
                    raise RuntimeError(f"{self._name(i)}: its state {name!r} has shape {tuple(value.shape)}")

    def _make(
        self, chosen: list[int], state: OptimizerState, names: Sequence[StateNames]
    ) -> tuple[dict[tuple[int, int], Tensor], Tensor]:
        """Allocates, and fills from ``state``, what is not there in a form that the operations can use."""
        steps = self._steps.clone()
        needed: list[tuple[int, int]] = []
        for i in chosen:
            moments, step_name = names[self._groups[i]]
            entries = state.get(self._params[i], {})
            for slot, name in enumerate(moments):
                if entries.get(name) is None or not self._fits(i, entries[name]):
                    needed.append((i, slot))
            if step_name is not None and entries.get(step_name) is not None:
                steps[i].copy_(torch.as_tensor(entries[step_name]).reshape(()), non_blocking=True)
            elif moments and entries.get(moments[0]) is None:
                steps[i].fill_(0.0)
            elif moments:
                steps[i].fill_(1.0)  # torch.optim.SGD counts no steps: a momentum buffer says that there was one
        if not needed:
            return {}, steps
        fresh = dict(zip(needed, allocate_like([self._values[i] for i, _ in needed], zero=True), strict=True))
        for (i, slot), view in fresh.items():
            value = state.get(self._params[i], {}).get(names[self._groups[i]].moments[slot])
            if value is not None:
                view.copy_(as_real(value))
        return fresh, steps

    def _fits(self, i: int, value: Tensor) -> bool:
        real, like = as_real(value), self._values[i]
        return real.dtype == like.dtype and real.device == like.device and same_order(real, like) and is_dense(real)

    def publish(self, state: OptimizerState, prepared: PreparedState) -> list[list[Tensor | None]]:
        """Puts ``prepared`` in place.

        Returns:
            The state slots: for each a list with one entry per parameter.
        """
        names, chosen, fresh, steps = prepared
        self._steps.copy_(steps)
        slots: list[list[Tensor | None]] = [[None] * len(self._params) for _ in range(STATE_SLOTS)]
        written: dict[int, Tensor] = {id(self._steps): self._steps}
        self._bound = []
        for i in chosen:
            moments, step_name = names[self._groups[i]]
            if not moments and step_name is None:
                continue  # a look into the optimizer's defaultdict would make an entry
            entries = state[self._params[i]]
            if step_name is not None:
                entries[step_name] = self._step_views[i]
            for slot, name in enumerate(moments):
                value = fresh.get((i, slot))
                if value is not None:
                    entries[name] = torch.view_as_complex(value) if self._params[i].is_complex() else value
                value = entries[name]
                self._bound.append(value)
                slots[slot][i] = as_real(value.detach())
                # Views of one allocation share its version.
                base = value if value._base is None else value._base
                written[id(base)] = base
        self.written = list(written.values())
        self._names, self._look = names, None
        self._stateful, self._covered = set(chosen), None
        return slots


def _look_at(state: OptimizerState, names: Sequence[StateNames]) -> bytes:
    """Which tensors ``state`` holds under ``names``, by identity."""
    asked = {name for moments, step in names for name in (*moments, step) if name is not None}
    return nested_identities(state, tuple(sorted(asked)))
