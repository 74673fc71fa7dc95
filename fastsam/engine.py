"""Runs a method over the tables: asks the backends for dots, and lets the method turn them into weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.backends import Backend, ClimbOptions
from fastsam.backends.combination import EXTRA_X, EXTRA_Y, A, B, Combination, default_weights
from fastsam.tables.memory import allocate_like
from fastsam.method import Dots, Facts, Method, Weights
from fastsam.tables import TensorTable


class MethodSteps:
    """One method's way from dots to weights, and whether the present step's climb was finite.

    Args:
        method: the method.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        # On each device: whether the climb's dots were finite. If not, what was taken is not used.
        self._finite: dict[torch.device, Tensor] = {}

    def note_norms(self, norms: Mapping[torch.device, Tensor]) -> None:
        """The climb was SAM's own, by these norms."""
        self._finite = {device: torch.isfinite(norm) for device, norm in norms.items()}

    def climb_combinations(
        self, backends: Sequence[Backend], tables: Sequence[TensorTable], options: Sequence[ClimbOptions], again: bool
    ) -> list[Combination]:
        """What each table climbs by."""
        form = self.method.climb_form(again)
        assert form is not None
        facts = [_facts(table, options, [0.0] * len(options)) for table in tables]
        maps = [_weights(t, self.method.map_weights(f), climbing=True) for t, f in zip(tables, facts, strict=True)]
        each = [b.dots(t, Combination(form, w)) for b, t, w in zip(backends, tables, maps, strict=True)]
        totals = _totals(tables, [self.method.weigh(d, f) for d, f in zip(each, facts, strict=True)])
        finite = {device: torch.isfinite(total).all() for device, total in totals.items()}
        self._finite = {d: f & self._finite[d] if again else f for d, f in finite.items()}
        result = []
        for table, dots, fact in zip(tables, each, facts, strict=True):
            weights = self.method.climb_weights(Dots(totals[table.device], dots), fact, again)
            packed = _weights(table, weights, climbing=True)
            stays = _neutral(table, climbing=True, again=again)
            result.append(Combination(form, torch.where(finite[table.device], packed, stays)))
        return result

    def descent_combinations(
        self,
        backends: Sequence[Backend],
        tables: Sequence[TensorTable],
        options: Sequence[ClimbOptions],
        groups: Sequence[Mapping[str, Any]],
        climbed: bool,
        grad_scales: Sequence[Tensor | None],
    ) -> list[Combination] | None:
        """What each table gives the base in the gradient's place; None: the gradient."""
        form = self.method.descent_form(climbed)
        if form is None:
            return None
        facts = [_facts(table, options, [group["lr"] for group in groups]) for table in tables]
        each = [torch.zeros((len(table.params), 3), dtype=torch.float64, device=table.device) for table in tables]
        if self.method.measures(climbed):
            plain = [Combination(form, _neutral(t, climbing=True)) for t in tables]
            each = [b.dots(t, c) for b, t, c in zip(backends, tables, plain, strict=True)]
        totals = _totals(tables, each)
        result = []
        for table, dots, fact, scale in zip(tables, each, facts, grad_scales, strict=True):
            finite = torch.isfinite(totals[table.device]).all()
            if climbed:
                finite = finite & self._finite.get(table.device, finite)
            weights = self.method.descent_weights(Dots(totals[table.device], dots), fact, climbed)
            packed = _weights(table, weights, climbing=False)
            if form.decoupled and scale is not None:
                packed[:, [EXTRA_X, EXTRA_Y]] /= scale.double()
            stays = _neutral(table, climbing=False)
            packed = torch.where(finite, packed, stays)
            # Where rho is 0, the gradient is the base's own.
            given = [A, B, EXTRA_X, EXTRA_Y]
            packed[:, given] = torch.where(fact.rho[:, None] == 0, stays[:, given], packed[:, given])
            result.append(Combination(form, packed))
        return result

    def lend_random(self, tables: Sequence[TensorTable], seed: int, step: int) -> None:
        """Gives every table a direction drawn from N(0, I)."""
        for number, table in enumerate(tables):
            directions = allocate_like(table.values, zero=False)
            memory = directions[0].untyped_storage().nbytes() // table.dtype.itemsize
            generator = torch.Generator(table.device)
            # 32 bits: the CPU's generator reads no more of a seed.
            generator.manual_seed((seed * 0x9E3779B1 + step * 0x85EBCA77 + number * 0xC2B2AE3D) % 2**32)
            directions[0].as_strided((memory,), (1,), 0).normal_(generator=generator)
            table.lend(list(directions))


def _facts(table: TensorTable, options: Sequence[ClimbOptions], lrs: Sequence[float | Tensor]) -> Facts:
    sign = [-1.0 if option.maximize else 1.0 for option in options]
    rho = _by_parameter(table, "rho", [option.rho for option in options], sign)
    lr = _by_parameter(table, "lr", lrs, sign)
    if "matrix" not in table.cache:
        flags = [float(param.dim() > 1) for param in table.params]
        table.cache["matrix"] = torch.tensor(flags, dtype=torch.float64).to(table.device)
    return Facts(rho, lr, table.cache["matrix"])


def _by_parameter(table: TensorTable, name: str, values: Sequence[float | Tensor], signs: Sequence[float]) -> Tensor:
    """A number for each group as one for each parameter, on the table's device; sent there only when it changes."""
    numbers = [
        sign if isinstance(value, Tensor) and value.device.type != "cpu" else float(value) * sign
        for value, sign in zip(values, signs, strict=True)
    ]
    known, tensor = table.cache.get(f"{name} by parameter", (None, None))
    if known != numbers:
        tensor = torch.tensor([numbers[group] for group in table.groups], dtype=torch.float64)
        if table.device.type != "cpu":
            tensor = tensor.pin_memory().to(table.device, non_blocking=True)
        table.cache[f"{name} by parameter"] = numbers, tensor
    assert tensor is not None
    for index, value in enumerate(values):
        if isinstance(value, Tensor) and value.device.type != "cpu":
            mine = torch.tensor([group == index for group in table.groups]).to(table.device)
            factor = value.detach().reshape(()).to(table.device, torch.float64, non_blocking=True)
            tensor = torch.where(mine, tensor * factor, tensor)
    return tensor


def _neutral(table: TensorTable, *, climbing: bool, again: bool = False) -> Tensor:
    """The weights that leave everything as it is; not to be written to."""
    key = f"neutral weights {climbing} {again}"
    if key not in table.cache:
        weights = default_weights(len(table.params), table.device, climbing=climbing)
        if again:
            weights[:, B] = 1.0
        table.cache[key] = weights
    neutral: Tensor = table.cache[key]
    return neutral


def _weights(table: TensorTable, columns: Weights, *, climbing: bool) -> Tensor:
    if not columns:
        return _neutral(table, climbing=climbing)
    weights = _neutral(table, climbing=climbing).clone()
    for column, value in columns.items():
        weights[:, column] = value
    return weights


def _totals(tables: Sequence[TensorTable], each: Sequence[Tensor]) -> dict[torch.device, Tensor]:
    """The sums over all parameters, on each of the tables' devices."""
    sums: dict[torch.device, Tensor] = {}
    for table, dots in zip(tables, each, strict=True):
        mine = dots.sum(dim=0)
        sums[table.device] = sums[table.device] + mine if table.device in sums else mine
    if len(sums) == 1:
        return sums
    home = next((device for device in sums if device.type != "cpu"), next(iter(sums)))
    total = torch.stack([part.to(home, non_blocking=True) for part in sums.values()]).sum(dim=0)
    return {device: total.to(device, non_blocking=device.type != "cpu") for device in sums}
