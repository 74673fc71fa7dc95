"""Directions of ascent that are not gradients: computed by a method in plain PyTorch, or given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.distributed import is_distributed, local_of, placed_like
from fastsam.methods import Method
from fastsam.tables import TensorTable
from fastsam.tables.memory import as_real


def choose_directions(tables: Sequence[TensorTable], method: Method, further: bool) -> None:
    """Asks the method for the directions of the perturbed parameters; a parameter without one is not perturbed.

    Raises:
        TypeError: the method did not return a sequence of tensors and None.
        ValueError: it returned too many or too few, or one of another shape or device.
    """
    places = _places(tables)
    params = [table.params[i] for table, i in places]
    grads: list[Any] = [param.grad for param in params]
    _set_directions(tables, places, method.direction(params, grads), f"{method}: direction", perturb_all=further)


def set_displacements(tables: Sequence[TensorTable], tensors: Sequence[Tensor | None], count: int) -> None:
    """Makes ``tensors``, one for each of ``count`` parameters in the groups' order, the directions; None: it stays.

    Raises:
        TypeError, ValueError: as in :func:`choose_directions`.
    """
    for table in tables:
        table.choose_perturbed(_every_group(table), list(range(len(table.params))))
    if len(tensors) != count:
        raise ValueError(f"perturb_by(): tensors must have {count} entries, one per parameter, got {len(tensors)}")
    places = _places(tables)
    positions = [table.positions[i] for table, i in places]
    for position in set(range(count)).difference(positions):
        if tensors[position] is not None:
            raise ValueError(f"perturb_by(): the entry of parameter {position}, which is frozen, must be None")
    mine = [tensors[position] for position in positions]
    _set_directions(tables, places, mine, "perturb_by(): tensors", perturb_all=False)


Place = tuple[TensorTable, int]


def _places(tables: Sequence[TensorTable]) -> list[Place]:
    """The perturbed parameters in the groups' order."""
    found = [(table.positions[i], table, i) for table in tables for i in table.perturbed]
    return [(table, i) for _, table, i in sorted(found, key=lambda place: place[0])]


def _every_group(table: TensorTable) -> list[bool]:
    return [True] * (max(table.groups) + 1)


def _set_directions(
    tables: Sequence[TensorTable], places: Sequence[Place], found: Any, what: str, perturb_all: bool
) -> None:
    """Sets the directions ``found`` at ``places``; where there is None, a parameter stays, unless ``perturb_all``."""
    if not isinstance(found, Sequence):
        raise TypeError(f"{what} must be a sequence of tensors, got {type(found).__name__}")
    if len(found) != len(places):
        raise ValueError(f"{what} must have {len(places)} entries, one per parameter, got {len(found)}")
    directions: dict[int, list[Tensor | None]] = {id(table): [None] * len(table.params) for table in tables}
    copies: list[Tensor] = []
    sources: list[Tensor] = []
    for direction, (table, i) in zip(found, places, strict=True):
        if direction is not None:
            _check(f"{what}: the entry of {table.name(i)}", table, i, direction)
            # A copy, which the step owns: a method may return a gradient, or a tensor of its own.
            copies.append(torch.empty_like(table.values[i]))
            sources.append(as_real(local_of(placed_like(table.params[i], direction)).detach()))
            directions[id(table)][i] = copies[-1]
    if copies:
        torch._foreach_copy_(copies, sources)
    for table in tables:
        mine = directions[id(table)]
        table.set_directions(mine)
        if not perturb_all and any(mine[i] is None for i in table.perturbed):
            table.choose_perturbed(_every_group(table), [i for i in table.perturbed if mine[i] is not None])


def _check(what: str, table: TensorTable, i: int, direction: Any) -> None:
    if not isinstance(direction, Tensor):
        raise TypeError(f"{what} must be a tensor or None, got {type(direction).__name__}")
    if direction.shape != table.params[i].shape:
        raise ValueError(f"{what} has shape {tuple(direction.shape)}")
    if is_distributed(table.params[i]) != is_distributed(direction):
        raise ValueError(f"{what} must be a {type(table.params[i].data).__name__} like the parameter")
    if local_of(direction).device != table.device:
        raise ValueError(f"{what} is on {direction.device}")
    if direction.is_complex() != table.params[i].is_complex():
        raise ValueError(f"{what} has dtype {direction.dtype}")
