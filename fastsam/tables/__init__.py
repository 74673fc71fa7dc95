"""Tensors -> addresses and chunks: the tables that every backend works on, and when they must be rebuilt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from fastsam.precision import Precision, precision_of
from fastsam.tables.memory import check_disjoint, check_parameter
from fastsam.tables.signature import identities
from fastsam.tables.state import Wanted
from fastsam.tables.table import Member, TensorTable, taking_part

__all__ = ["Member", "TensorTable", "TensorTables", "Wanted", "taking_part"]


class TensorTables:
    """The tables of an optimizer, one per device, dtype and precision, rebuilt whenever these or parameters change."""

    def __init__(self) -> None:
        self._members: list[tuple[Any, ...]] = []
        self._tables: list[TensorTable] = []

    def __iter__(self) -> Iterator[TensorTable]:
        return iter(self._tables)

    def read_grads(self, groups: Sequence[Mapping[str, Any]]) -> list[TensorTable]:
        """The tables for the parameters as they are now, with their present gradients."""
        members = [(identities(g["params"]), g.get("rounding"), g.get("master_weights")) for g in groups]
        if members != self._members or not all(table.read_grads() for table in self._tables):
            self.drop()
            self._tables = _build(groups)
            # A lazy parameter that has been initialized is still the same object, but not in a table yet.
            lazy = any(is_lazy(param) for group in groups for param in group["params"])
            self._members = [] if lazy else members
            for table in self._tables:
                table.read_grads()
        return self._tables

    @contextmanager
    def holding_grads(self) -> Iterator[None]:
        """A block in which the tables refer to gradients; they drop them at its end, also after an error."""
        try:
            yield
        finally:
            for table in self._tables:
                table.drop_grads()

    def drop(self) -> None:
        """Drops all tables; the next step builds new ones."""
        self._members, self._tables = [], []


def _build(groups: Sequence[Mapping[str, Any]]) -> list[TensorTable]:
    buckets: dict[tuple[torch.device, torch.dtype, Precision], list[Member]] = {}
    params = [(param, index) for index, group in enumerate(groups) for param in group["params"]]
    for position, (param, _) in enumerate(params):
        check_parameter(param, position)
    check_disjoint([param for param, _ in params])
    for position, (param, group_index) in enumerate(params):
        if is_lazy(param):
            continue
        dtype = param.dtype.to_real() if param.is_complex() else param.dtype
        key = param.device, dtype, precision_of(groups[group_index], dtype)
        buckets.setdefault(key, []).append(Member(position, param, group_index))
    return [TensorTable(device, dtype, members, precision) for (device, dtype, precision), members in buckets.items()]
