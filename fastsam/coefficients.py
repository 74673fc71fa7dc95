"""A method's formulas over tables: asks the backends for dots, and packs what the method computes for the kernels.

Nothing here waits for an accelerator or copies to it from the host: numbers of groups reach a device as arguments of
the kernels that fill tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fastsam.backends import Backend, grad_norms
from fastsam.distributed import GlobalSums, Sharding
from fastsam.methods.method import AscentTerms, DescentTerms, Dots, Facts, Method
from fastsam.runtime import streams
from fastsam.runtime.step_number import StepNumber
from fastsam.spec import Ascent, AscentCoefficients, AscentForm, AscentOptions, Descent, DescentCoefficients, Map, Row
from fastsam.tables import TensorTable

Values = Sequence[float | Tensor]
"""One per parameter group."""


class Coefficients:
    """One method's coefficients, and whether the present step's first pass was finite.

    Args:
        method: the method.
        sums: adds up over the ranks that hold other parts of the parameters.
    """

    def __init__(self, method: Method, sums: GlobalSums) -> None:
        self.method, self._sums = method, sums
        self._squares: Tensor | None = None
        # On each device: whether the ascent's dots were finite. If not, the first-pass gradients are not used.
        self._finite: dict[torch.device, Tensor] = {}
        # Of each table: the last ascent's dots.
        self._dots: list[Dots] = []

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's first (mapped) gradient; None if its dots are not that norm's square."""
        return None if self._squares is None else self._squares.sqrt()

    def norms(
        self, backends: Sequence[Backend], tables: Sequence[TensorTable], options: Sequence[AscentOptions]
    ) -> dict[torch.device, Tensor]:
        """The norm of the whole model's gradient, on each of the tables' devices; without tables on some device."""
        if not (self._sums.has_shard_groups or any(table.sharding for table in tables)):
            return grad_norms(backends, tables, options)
        home = home_of([table.device for table in tables])
        squares: dict[Sharding, Tensor] = {}
        for sharding in dict.fromkeys(table.sharding for table in tables):
            mine = [(b, t) for b, t in zip(backends, tables, strict=True) if t.sharding == sharding]
            norms = grad_norms([b for b, _ in mine], [t for _, t in mine], options)
            squares[sharding] = next(iter(norms.values())).to(home, non_blocking=True).square()
        norm = self._sums.total(squares, home).sqrt()
        return _on_each(norm, tables)

    def note_norms(self, norms: Mapping[torch.device, Tensor]) -> None:
        """The ascent was plain SAM's, by these norms."""
        self._finite = {device: norm < math.inf for device, norm in norms.items()}

    def ascents(
        self,
        backends: Sequence[Backend],
        tables: Sequence[TensorTable],
        options: Sequence[AscentOptions],
        step: int,
        further: bool,
    ) -> list[Ascent]:
        """What each table's ascent is."""
        form = self.method.ascent_form(further)
        assert form is not None
        facts = [_facts(table, options, step) for table in tables]
        maps = [_constants(table).ascent for table in tables]
        if form.map != Map.IDENTITY:
            maps = [_pack(_constants(t), self.method.map_terms(f)) for t, f in zip(tables, facts, strict=True)]
        each: Sequence[Tensor] = [b.dots(t, form, c) for b, t, c in zip(backends, tables, maps, strict=True)]
        each, totals = self._add_up(tables, each, lambda dots: self._weigh(dots, facts))
        is_norm = form.x == Row.GRAD and form.map != Map.POWER
        if not further:
            self._squares = next(iter(totals.values()))[0] if is_norm else None
        finite = {device: _all_finite(total) for device, total in totals.items()}
        self._finite = {d: f & self._finite[d] if further else f for d, f in finite.items()}
        self._dots = [Dots(totals[table.device], dots) for table, dots in zip(tables, each, strict=True)]
        result = []
        for table, dots, fact in zip(tables, self._dots, facts, strict=True):
            terms = self.method.ascent_terms(dots, fact, further)
            constants = _constants(table)
            packed = _pack(constants, terms)
            stays = constants.further if further else constants.ascent
            selected = torch.where(finite[table.device], packed, stays)
            result.append(Ascent(options, form=form, coefficients=selected))
        return result

    def descents(
        self,
        backends: Sequence[Backend],
        tables: Sequence[TensorTable],
        options: Sequence[AscentOptions],
        step: int,
        lrs: Callable[[], Values],
        ascended: bool,
        grad_scales: Sequence[Tensor | None],
    ) -> list[Descent] | None:
        """What takes the gradients' place in each table's update; None: nothing does."""
        form = self.method.descent_form(ascended)
        if form is None:
            return None
        ascents = self._dots if ascended and self._dots else [None] * len(tables)
        facts = [_facts(t, options, step, lrs, dots) for t, dots in zip(tables, ascents, strict=True)]
        # A parameter that was not perturbed has no part in a combination of both gradients.
        masks = [_constants(table).mask(table.perturbed) if ascended else None for table in tables]
        each: Sequence[Tensor] = [_constants(table).no_dots for table in tables]
        totals = {table.device: _constants(table).no_dots[0] for table in tables if table.params}
        measured: dict[torch.device, Tensor] = {}
        if self.method.measures(ascended):
            found = [b.dots(t, form, _constants(t).descent) for b, t in zip(backends, tables, strict=True)]
            each = [d if m is None else torch.where(m[:, None], d, 0.0) for d, m in zip(found, masks, strict=True)]
            each, totals = self._add_up(tables, each, lambda dots: dots)
            measured = {device: _all_finite(total) for device, total in totals.items()}
        result = []
        for table, dots, fact, mask, scale in zip(tables, each, facts, masks, grad_scales, strict=True):
            constants = _constants(table)
            used = _both(measured.get(table.device), self._finite.get(table.device) if ascended else None)
            terms = self.method.descent_terms(Dots(totals[table.device], dots), fact, ascended)
            packed = _pack(constants, terms)
            if form.decoupled and scale is not None:
                packed[:, DescentCoefficients.DECOUPLED_X : DescentCoefficients.DECOUPLED_Y + 1] /= scale.double()
            if any(_is_elsewhere(option.rho) or option.rho == 0 for option in options):
                # Where rho is 0, the gradient is the base's own.
                used = _both(used, (fact.rho != 0)[:, None] | constants.keeps)
            used = _both(used, None if mask is None else mask[:, None])
            result.append(Descent(form, packed if used is None else torch.where(used, packed, constants.descent)))
        return result

    def _weigh(self, each: Sequence[Tensor], facts: Sequence[Facts]) -> list[Tensor]:
        return [self.method.weigh(dots, fact) for dots, fact in zip(each, facts, strict=True)]

    def _add_up(
        self,
        tables: Sequence[TensorTable],
        each: Sequence[Tensor],
        weigh: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    ) -> tuple[Sequence[Tensor], dict[torch.device, Tensor]]:
        """The dots of whole parameters, if the method reads them, and their sums on each of the tables' devices."""
        home = home_of([table.device for table in tables])
        shardings: list[Sharding] = [table.sharding for table in tables]
        if self.method.reads_each_dot:
            each = self._sums.of_each_parameter(shardings, each)
            shardings = [()] * len(tables)
        parts: dict[Sharding, Tensor] = {}
        for sharding, dots in zip(shardings, weigh(each), strict=True):
            mine = dots.sum(dim=0).to(home, non_blocking=True)
            parts[sharding] = parts[sharding] + mine if sharding in parts else mine
        return each, _on_each(self._sums.total(parts, home, (3,)), tables)


def divide_kept(descent: Descent, scale: Tensor | None) -> None:
    """The only gradients of a step, which the method state is made of, still have a scaler's scale."""
    if scale is not None:
        columns = descent.coefficients[:, DescentCoefficients.KEEP_X : DescentCoefficients.KEEP_FIRST + 1]
        columns /= scale.double()


class _Constants:
    """What is the same for a table in every step, on its device."""

    def __init__(self, table: TensorTable) -> None:
        n, device = len(table.params), table.device
        self.ascent = torch.zeros((n, len(AscentTerms())), dtype=torch.float64, device=device)
        self.further = self.ascent.clone()
        self.further[:, 1] = 1.0
        self.descent = torch.zeros((n, len(DescentTerms())), dtype=torch.float64, device=device)
        for column, default in enumerate(DescentTerms()):
            self.descent[:, column].fill_(default)
        self.no_dots = torch.zeros((n, 3), dtype=torch.float64, device=device)
        columns = [column.name.startswith("KEEP") for column in DescentCoefficients]
        self.keeps = streams.send(torch.tensor(columns, device="cpu"), device)
        flags = torch.tensor([float(param.dim() > 1) for param in table.params], dtype=torch.float64, device="cpu")
        self.matrix = streams.send(flags, device)
        groups = torch.tensor(table.groups, dtype=torch.int64, device="cpu")
        self._in_group = {group: streams.send(groups == group, device) for group in sorted(set(table.groups))}
        self._spread: dict[str, tuple[list[float], Tensor]] = {}
        self._positions = streams.send(torch.tensor(table.positions, dtype=torch.int64, device="cpu"), device)
        self._mask: tuple[list[int], Tensor] | None = None

    def mask(self, indices: list[int]) -> Tensor | None:
        """Which parameters are among ``indices``, as bools ``(n,)``; None: all are."""
        if len(indices) == len(self.matrix):
            return None
        # The list is the same object from step to step, unless steps without an ascent come between.
        if self._mask is None or (self._mask[0] is not indices and self._mask[0] != indices):
            flags = torch.zeros(len(self.matrix), dtype=torch.bool, device="cpu")
            flags[indices] = True
            self._mask = indices, streams.send(flags, self.matrix.device)
        return self._mask[1]

    def uniform(self, table: TensorTable, seed: int, step: int) -> Tensor:
        """A number in [0, 1) for each parameter: a hash of seed, step and the parameter's position."""
        mask = 2**62 - 1
        here = (table.attached(StepNumber).of(step) * 0x85EBCA77 + (seed * 0x9E3779B1 & mask)) & mask
        x = self._positions * -0x61C8864680B583EB + here
        for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
            x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
        x = x ^ (x >> 31 & (1 << 33) - 1)
        return (x >> 11 & (1 << 53) - 1).double() * 2.0**-53

    def filled(self, name: str, number: float) -> Tensor:
        """The same number for each parameter: float64 ``(n,)``."""
        groups = max(self._in_group, default=0) + 1
        return self.spread(name, [number] * groups, [1.0] * groups)

    def spread(self, name: str, values: Values, signs: Sequence[float]) -> Tensor:
        """A number of each group as one of each parameter: float64 ``(n,)``."""
        plain = [None if _is_elsewhere(value) else float(value) for value in values]
        numbers = [sign * number for sign, number in zip(signs, plain, strict=True) if number is not None]
        # What a CUDA graph reads is made within it: what is kept here goes when a number changes.
        keeps = len(numbers) == len(plain) and not streams.is_capturing(self.matrix.device)
        if keeps and name in self._spread and self._spread[name][0] == numbers:
            return self._spread[name][1]
        result = torch.zeros_like(self.matrix)
        for group, mask in self._in_group.items():
            value, number = values[group], plain[group]
            if number is not None:
                result = result.masked_fill(mask, signs[group] * number)
            else:
                assert isinstance(value, Tensor)
                mine = value.detach().reshape(()).to(result.device, torch.float64, non_blocking=True)
                result = torch.where(mask, signs[group] * mine, result)
        if keeps:
            self._spread[name] = numbers, result
        return result


def _constants(table: TensorTable) -> _Constants:
    return table.attached(_Constants)


def _facts(
    table: TensorTable,
    options: Sequence[AscentOptions],
    step: int,
    lrs: Callable[[], Values] = list,
    ascent: Dots | None = None,
) -> Facts:
    signs = [-1.0 if option.maximize else 1.0 for option in options]
    constants = _constants(table)
    return Facts(
        step,
        functools.partial(constants.spread, "rho", [option.rho for option in options], signs),
        lambda: constants.spread("lr", lrs(), signs),
        lambda: constants.matrix,
        functools.partial(constants.uniform, table),
        ascent,
    )


def _pack(constants: _Constants, terms: AscentTerms | DescentTerms) -> Tensor:
    """The terms as columns of one tensor: the constant one of the defaults where there is nothing else."""
    neutral = constants.ascent if isinstance(terms, AscentTerms) else constants.descent
    columns = list(neutral.unbind(dim=1))
    is_neutral = True
    for (name, default), (j, term) in zip(type(terms)._field_defaults.items(), enumerate(terms), strict=True):
        if isinstance(term, Tensor):
            columns[j] = term.expand(len(neutral))
        elif term != default:
            columns[j] = constants.filled(f"{type(terms).__name__}.{name}", term)
        else:
            continue
        is_neutral = False
    return neutral if is_neutral else torch.stack(columns, dim=1)


def whole_direction(table: TensorTable, options: Sequence[AscentOptions]) -> Ascent:
    """``w <- w + d`` for every parameter that has a direction d."""
    shape = len(table.params), len(AscentCoefficients)
    coefficients = torch.zeros(shape, dtype=torch.float64, device=table.device)
    coefficients[:, AscentCoefficients.A].fill_(1.0)
    return Ascent(options, form=AscentForm(x=Row.DIRECTION), coefficients=coefficients)


def home_of(devices: Sequence[torch.device]) -> torch.device:
    """Where numbers of several devices are added up: on an accelerator where there is one, so that nothing waits."""
    return next((device for device in devices if device.type != "cpu"), next(iter(devices), torch.device("cpu")))


def _on_each(number: Tensor, tables: Sequence[TensorTable]) -> dict[torch.device, Tensor]:
    """A tensor on each of the tables' devices; without tables on its own."""
    devices = [table.device for table in tables] or [number.device]
    return {device: number.to(device, non_blocking=device.type != "cpu") for device in devices}


def _all_finite(sums: Tensor) -> Tensor:
    # torch.isfinite is four kernels; this norm is one, and NaN where there is one.
    return torch.linalg.vector_norm(sums, math.inf) < math.inf


def _both(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Where both are true; None is true everywhere."""
    return other if one is None else one if other is None else one & other


def _is_elsewhere(value: float | Tensor) -> bool:
    """Whether reading the value would wait for an accelerator."""
    return isinstance(value, Tensor) and value.device.type != "cpu"
