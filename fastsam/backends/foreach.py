"""PyTorch's own kernels for lists of tensors (``torch._foreach_*``, ``torch._fused_*``), on any device that it has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from fastsam.backends import list_updates
from fastsam.backends.lists import Tensors, convert, copy_bits_, matching, multiply, norms, store_, take
from fastsam.backends.rounding import followed_master, round_all, round_for
from fastsam.backends.scalars import as_scalar, ascent_scale, opmath_dtype
from fastsam.spec import (
    NONE,
    PERTURBATION,
    Ascent,
    AscentCoefficients,
    AscentForm,
    AscentOptions,
    BaseOptions,
    Descent,
    DescentCoefficients,
    DescentForm,
    Draw,
    Map,
    Update,
)
from fastsam.tables import TensorTable, taking_part

if TYPE_CHECKING:
    from fastsam.backends import Request

Options = TypeVar("Options")


def unsupported_reason(request: Request) -> str:
    """Runs everything on every device."""
    return ""


# ---- reductions ----


def grad_norm(tables: Sequence[TensorTable], options: Sequence[AscentOptions]) -> Tensor:
    parts: Tensors = []
    for table in tables:
        for group, indices in _by_group(table.perturbed, table, options):
            factors = take(table.values, indices) if group.adaptive else None
            parts += norms(take(table.grads, indices), factors)
    if not parts:
        return torch.zeros((), dtype=torch.float64, device=tables[0].device)
    return torch.linalg.vector_norm(torch.stack(parts))


def dots(table: TensorTable, form: AscentForm | DescentForm, coefficients: Tensor) -> Tensor:
    result = torch.zeros((len(table.params), 3), dtype=torch.float64, device=table.device)
    if isinstance(form, DescentForm):
        form = DescentForm(form.y)  # the dots are of x and y alone, whatever else the form names
        xs_row = table.grads
    else:
        xs_row = table.row(form.x)
    indices = taking_part(form, table)
    if not indices:
        return result
    xs = convert(take(xs_row, indices), torch.float64)
    mapped = xs
    if isinstance(form, AscentForm) and form.map != Map.IDENTITY:
        points = convert(take(table.values, indices), torch.float64)
        mapped = _mapped(xs, points, form.map, _rows(coefficients, indices))
    columns = [_sums(mapped, xs)]
    if form.y != NONE:
        ys = convert(_seconds(table, form.y, indices), torch.float64)
        columns += [_sums(xs, ys), _sums(ys, ys)]
    for i, sums in zip(indices, torch.stack(columns, dim=1), strict=True):
        result[i, : len(columns)] = sums
    return result


def _sums(tensors: Tensors, others: Tensors) -> Tensor:
    return torch.stack([product.sum() for product in torch._foreach_mul(tensors, others)])


# ---- the ascent ----


def perturb_(table: TensorTable, ascent: Ascent) -> None:
    is_first = ascent.form.y != PERTURBATION
    if table.perturbed and is_first:
        backups, values = take(table.backups, table.perturbed), take(table.values, table.perturbed)
        copy_bits_(backups, list(map(followed_master, backups, values)) if table.has_masters else values)
    try:
        indices = taking_part(ascent.form, table)
        if ascent.norm is None:
            if indices:
                _perturb_by_form_(table, ascent, indices)
            return
        for group, mine in _by_group(indices, table, ascent.options):
            _perturb_by_norm_(table, mine, ascent.norm, group)
    except BaseException:
        if is_first:
            restore_(table)
        raise


def _perturb_by_norm_(table: TensorTable, indices: list[int], norm: Tensor, group: AscentOptions) -> None:
    """SAM's ascent of one group."""
    scale = ascent_scale(as_scalar(group.rho, table.device), group.maximize, norm)
    values, grads = take(table.values, indices), take(table.grads, indices)
    on_cpu = scale.device.type == "cpu"
    if on_cpu and scale == 0:
        return
    if _ascends_in_place(table, group):
        if group.adaptive:
            grads = list(torch._foreach_mul(grads, values))
            torch._foreach_mul_(grads, values)
        if on_cpu:
            torch._foreach_add_(values, grads, alpha=scale.item())
        else:
            step = scale.float()
            list_updates.subtract_(values, matching(grads, values), -step, step == 0)
        return
    dtype = opmath_dtype(table.dtype)
    perturbed = list(torch._foreach_mul(convert(grads, dtype), scale.to(dtype)))
    if group.adaptive:
        points = convert(values, dtype)
        torch._foreach_mul_(perturbed, points)
        torch._foreach_mul_(perturbed, points)
    torch._foreach_add_(perturbed, convert(take(table.backups, indices), dtype))
    if table.stochastic:
        perturbed = round_all(table, indices, perturbed, Draw.ASCENT, group.rounding_seed)
    # Selected, not multiplied by zero: 0 * inf would be NaN.
    store_(values, perturbed, scale.to(dtype) == 0)


def _ascends_in_place(table: TensorTable, group: AscentOptions) -> bool:
    """Whether one kernel adds e to the weights where they are, and rounds once."""
    if table.stochastic or table.has_masters:
        return False
    if table.device.type == "cpu":
        return table.dtype == opmath_dtype(table.dtype)
    # The fused kernel reads its learning rate in float32.
    is_fused = table.device.type == "cuda" and table.dtype != torch.float64 and table.grad_dtype == table.dtype
    return is_fused and not (group.adaptive and table.dtype != torch.float32)


def _perturb_by_form_(table: TensorTable, ascent: Ascent, indices: list[int]) -> None:
    form, dtype = ascent.form, opmath_dtype(table.dtype)
    assert ascent.coefficients is not None
    coefficients = _rows(ascent.coefficients, indices)
    a, b = (coefficients[:, column].to(dtype) for column in (AscentCoefficients.A, AscentCoefficients.B))
    values = take(table.values, indices)
    xs = convert(take(table.row(form.x), indices), dtype)
    perturbed = multiply(a, _mapped(xs, convert(values, dtype), form.map, coefficients))
    if form.y != NONE:
        torch._foreach_add_(perturbed, multiply(b, convert(_seconds(table, form.y, indices), dtype)))
    torch._foreach_add_(perturbed, convert(take(table.backups, indices), dtype))
    if table.stochastic:
        perturbed = [
            round_for(table, i, t, Draw.ASCENT, ascent.options[table.groups[i]].rounding_seed)
            for i, t in zip(indices, perturbed, strict=True)
        ]
    stays = a == 0
    if form.y != NONE:
        stays &= b == (1 if form.y == PERTURBATION else 0)
    if stays.device.type != "cpu" or stays.any():
        moved = zip(stays.unbind(), values, perturbed, strict=True)
        perturbed = [torch.where(stay, w, new.to(w.dtype)) for stay, w, new in moved]
    torch._foreach_copy_(values, perturbed)


def _seconds(table: TensorTable, y: int, indices: Sequence[int]) -> Tensors:
    """The y of each parameter; zeros where there is none."""
    values = take(table.values, indices)
    if y == PERTURBATION:
        dtype = opmath_dtype(table.dtype)
        return list(torch._foreach_sub(convert(values, dtype), convert(take(table.backups, indices), dtype)))
    row = table.row(y)
    dtype = next((t.dtype for t in row if t is not None), table.dtype)
    return [
        torch.zeros_like(w, dtype=dtype) if (t := row[i]) is None else t for i, w in zip(indices, values, strict=True)
    ]


def _mapped(xs: Tensors, points: Tensors, form: Map, coefficients: Tensor) -> Tensors:
    if form == Map.IDENTITY:
        return xs
    scales, terms = (
        list(coefficients[:, column].to(xs[0].dtype).unbind())
        for column in (AscentCoefficients.SCALE, AscentCoefficients.TERM)
    )
    if form == Map.POWER:
        powers = torch._foreach_pow(torch._foreach_abs(torch._foreach_mul(xs, scales)), terms)
        return list(torch._foreach_mul(torch._foreach_sign(xs), powers))
    operators = list(torch._foreach_add(torch._foreach_mul(torch._foreach_abs(points), scales), terms))
    return list(torch._foreach_mul(torch._foreach_mul(operators, operators), xs))


# ---- the descent ----


def prepare_update(table: TensorTable, update: Update, form: DescentForm | None) -> None:
    pass  # PyTorch loads its kernels


def restore_(table: TensorTable) -> None:
    if table.perturbed:
        copy = torch._foreach_copy_ if table.has_masters else copy_bits_
        copy(take(table.values, table.perturbed), take(table.backups, table.perturbed))


def restore_and_update_(
    table: TensorTable,
    update: Update,
    options: Sequence[BaseOptions],
    descent: Descent | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    restore_(table)
    if update == Update.NONE:
        if descent is not None:
            _hand_over_(table, _Directions(table, table.present, descent))
        return
    overflow = None if found_inf is None else found_inf != 0
    if overflow is not None and overflow.device.type == "cpu":
        if overflow:
            return
        overflow = None
    for group, indices in _by_group(table.present, table, options):
        directions = None if descent is None else _Directions(table, indices, descent)
        _update_group_(table, indices, group, directions, grad_scale, overflow)


class _Directions:
    """What a descent makes of one group's gradients, for the parameters ``indices`` that have a part in it."""

    def __init__(self, table: TensorTable, indices: Sequence[int], descent: Descent) -> None:
        form, dtype = descent.form, opmath_dtype(table.dtype)
        part = set(taking_part(form, table))
        self.places = [place for place, i in enumerate(indices) if i in part]
        self.indices = [indices[place] for place in self.places]
        self.grads: Tensors = []
        self.moves: Tensors = []
        self.states: Tensors = []
        if not self.indices:
            return
        columns = [column.contiguous() for column in _rows(descent.coefficients, self.indices).unbind(1)]
        c = DescentCoefficients
        xs = convert(take(table.grads, self.indices), dtype)
        ys = convert(_seconds(table, form.y, self.indices), dtype) if form.y != NONE else None
        self.grads = _combine(columns[c.A], xs, columns[c.B], ys)
        if form.decoupled:
            self.moves = _combine(columns[c.DECOUPLED_X], xs, columns[c.DECOUPLED_Y], ys)
        if form.keeps:
            firsts = convert(take(table.first_grads, self.indices), dtype)
            states = convert(take(table.method_state, self.indices), dtype)
            self.states = _combine(columns[c.KEEP_X], xs, columns[c.KEEP_FIRST], firsts)
            torch._foreach_add_(self.states, multiply(columns[c.KEEP_STATE], states))


def _combine(a: Tensor, xs: Tensors, b: Tensor, ys: Tensors | None) -> Tensors:
    results = multiply(a, xs)
    if ys is not None:
        torch._foreach_add_(results, multiply(b, ys))
    return results


def _hand_over_(table: TensorTable, directions: _Directions) -> None:
    """Prepares the gradients for an unfused base; the decoupled part is subtracted after its step."""
    for row, results in (
        (table.grads, directions.grads),
        (table.method_state, directions.states),
        (table.first_grads, directions.moves),
    ):
        if results:
            torch._foreach_copy_(take(row, directions.indices), results)


def _update_group_(
    table: TensorTable,
    indices: list[int],
    group: BaseOptions,
    directions: _Directions | None,
    grad_scale: Tensor | None,
    overflow: Tensor | None,
) -> None:
    """``overflow``: 0-dim bool on an accelerator; where it is true, nothing changes."""
    dtype = opmath_dtype(table.dtype)
    grads = take(table.grads, indices)
    if directions is not None and directions.indices:
        grads = list(convert(grads, dtype))
        for place, grad in zip(directions.places, directions.grads, strict=True):
            grads[place] = grad
    if grad_scale is not None:
        grads = list(torch._foreach_mul(convert(grads, dtype), grad_scale.double().reciprocal().to(dtype)))
    work = list_updates.Work(table, indices, group, grads, overflow)
    work.update_()
    if directions is not None and directions.moves:
        work.subtract_(directions.places, directions.moves)
    work.store_()
    if directions is not None and directions.states:
        states, mine = directions.states, directions.indices
        if table.stochastic and not table.has_masters:
            states = round_all(table, mine, states, Draw.METHOD_STATE, group.rounding_seed)
        store_(take(table.method_state, mine), states, overflow)
    counts = [count for count in (table.steps[i] for i in indices) if count is not None]
    if counts:
        torch._foreach_add_(counts, 1.0 if overflow is None else overflow.logical_not().float())


# ---- small things ----


def _by_group(
    indices: Sequence[int], table: TensorTable, options: Sequence[Options]
) -> Iterator[tuple[Options, list[int]]]:
    for group, option in enumerate(options):
        mine = list(indices) if len(options) == 1 else [i for i in indices if table.groups[i] == group]
        if mine:
            yield option, mine


def _rows(coefficients: Tensor, indices: Sequence[int]) -> Tensor:
    """The rows of some parameters, without an index that would have to be sent to an accelerator if it can be."""
    if len(indices) == len(coefficients):
        return coefficients
    return torch.stack([coefficients[i] for i in indices])
