"""Tensors -> addresses and chunks: the tables that every backend works on, and when they must be rebuilt."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fastsam.distributed import Sharding, local_of
from fastsam.precision import Precision, precision_of
from fastsam.runtime.streams import StreamGuard
from fastsam.tables.memory import any_may_move, check_disjoint, check_parameter, have_grads, may_move
from fastsam.tables.signature import identities
from fastsam.tables.state import Wanted
from fastsam.tables.table import Member, TensorTable, taking_part

__all__ = ["Member", "TensorTable", "TensorTables", "Wanted", "taking_part"]


class TensorTables:
    """The tables of an optimizer, one per device, dtype, precision and sharding, rebuilt whenever these change.

    Args:
        sharding_of: the process groups over which sums over a parameter are added up.
    """

    def __init__(self, sharding_of: Callable[[Tensor], Sharding] = lambda _: ()) -> None:
        self._sharding_of = sharding_of
        self._members: list[tuple[Any, ...]] = []
        self._tables: list[TensorTable] = []
        self._frozen: list[Tensor] = []
        self._streams = StreamGuard()
        self._holding = _HeldGrads(self)
        self.builds = 0
        """How often tables were built."""

    def __iter__(self) -> Iterator[TensorTable]:
        return iter(self._tables)

    def read_grads(self, groups: Sequence[Mapping[str, Any]]) -> list[TensorTable]:
        """The tables for the parameters as they are now, with their present gradients."""
        self._streams.free()
        members = [(identities(g["params"]), g.get("rounding"), g.get("master_weights")) for g in groups]
        usual = members == self._members and not (self._frozen and any_may_move(self._frozen))
        if not (usual and all(table.read_grads() for table in self._tables)):
            self.drop()
            self._tables, self._frozen = _build(groups, self._sharding_of)
            self.builds += 1
            # A lazy parameter that has been initialized is still the same object, but not in a table yet.
            lazy = any(is_lazy(param) for group in groups for param in group["params"])
            self._members = [] if lazy else members
            for table in self._tables:
                table.read_grads()
        return self._tables

    @property
    def in_buffers(self) -> list[Tensor]:
        """The parameters whose gradients are views of a buffer of somebody else's."""
        return [table.params[i] for table in self._tables for i in table.gradients.in_buffers]

    def has_strange_grads(self) -> bool:
        """Whether a parameter has a gradient that was frozen when the tables were built, and so is in none."""
        return bool(self._frozen) and have_grads(self._frozen)

    def holding_grads(self) -> AbstractContextManager[Any]:
        """A block in which the tables refer to gradients; they drop them at its end, also after an error."""
        return self._holding

    def drop(self) -> None:
        """Forgets everything; the next step builds anew."""
        for table in self._tables:
            self._streams.keep(table.device, table.made_on, table)
        self._members, self._tables, self._frozen = [], [], []


class _HeldGrads:
    """See :meth:`TensorTables.holding_grads`. Made once: a generator takes several times as long."""

    def __init__(self, tables: TensorTables) -> None:
        self._tables = weakref.proxy(tables)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for table in self._tables:
            table.drop_grads()


def _build(
    groups: Sequence[Mapping[str, Any]], sharding_of: Callable[[Tensor], Sharding]
) -> tuple[list[TensorTable], list[Tensor]]:
    """The tables, and the frozen parameters, which are in none.

    Raises:
        TypeError, ValueError: a parameter that is not frozen, or has a gradient, cannot be trained.
    """
    buckets: dict[tuple[torch.device, torch.dtype, Precision, Sharding], list[Member]] = {}
    params = [(param, index) for index, group in enumerate(groups) for param in group["params"]]
    frozen = [param for param, _ in params if not may_move(param)]
    for position, (param, group_index) in enumerate(params):
        if not may_move(param):
            continue
        check_parameter(param, position)
        if is_lazy(param):
            continue
        dtype = param.dtype.to_real() if param.is_complex() else param.dtype
        device = local_of(param).device  # a mesh names no number of an accelerator
        key = device, dtype, precision_of(groups[group_index], dtype), sharding_of(param)
        buckets.setdefault(key, []).append(Member(position, param, group_index))
    check_disjoint([param for param, _ in params])
    return [TensorTable(key[0], key[1], members, *key[2:]) for key, members in buckets.items()], frozen
