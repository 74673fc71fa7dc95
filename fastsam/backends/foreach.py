"""``torch._foreach_*``: the operations as lists of tensors at a time, on any device that PyTorch has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsam.backends import AdamOptions, ClimbOptions, SGDOptions
from fastsam.backends.combination import (
    DISTANCE,
    EXTRA_X,
    EXTRA_Y,
    KEEP_KEPT,
    KEEP_TAKEN,
    KEEP_X,
    NOTHING,
    SCALE,
    TERM,
    A,
    B,
    Climb,
    Combination,
    Descent,
    Map,
    taking_part,
)
from fastsam.backends.rounding import CLIMB, UPDATE, followed_master, round_for
from fastsam.backends.scalars import Scalar, as_scalar, climb_scale, opmath_dtype
from fastsam.tables import GRAD, TensorTable

Options = TypeVar("Options")
Tensors = list[Tensor]


def check(device_type: str) -> None:
    """Runs on every device."""


def check_methods(device_type: str) -> None:
    """Runs every method."""


def grad_norm(tables: Sequence[TensorTable], options: Sequence[ClimbOptions]) -> Tensor:
    norms: Tensors = []
    for table in tables:
        for group, indices in _by_group(table.climbing, table, options):
            grads = _take(table.grads, indices)
            if group.adaptive:
                grads = list(torch._foreach_mul(_to(_take(table.values, indices), torch.float64), grads))
            norms += torch._foreach_norm(grads, dtype=torch.float64)
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=tables[0].device)
    return torch.linalg.vector_norm(torch.stack(norms))


def perturb_(table: TensorTable, norm: Tensor, options: Sequence[ClimbOptions]) -> None:
    if table.climbing:
        backups, values = _take(table.backups, table.climbing), _take(table.values, table.climbing)
        followed = list(map(followed_master, backups, values)) if table.has_masters else values
        torch._foreach_copy_(backups, followed)
    try:
        for group, indices in _by_group(table.climbing, table, options):
            _climb_(table, indices, norm, group)
    except BaseException:
        restore_(table)
        raise


def _climb_(table: TensorTable, indices: list[int], norm: Tensor, group: ClimbOptions) -> None:
    scale = climb_scale(as_scalar(group.rho, table.device), group.maximize, norm)
    values, grads = _take(table.values, indices), _take(table.grads, indices)
    dtype = opmath_dtype(table.dtype)
    on_cpu = scale.device.type == "cpu"
    if on_cpu and scale == 0:
        return
    if on_cpu and table.dtype == dtype and not group.adaptive:
        torch._foreach_add_(values, grads, alpha=scale.item())
        return
    climbed = list(torch._foreach_mul(_to(grads, dtype), scale.to(dtype)))
    if group.adaptive:
        points = _to(values, dtype)
        torch._foreach_mul_(climbed, points)
        torch._foreach_mul_(climbed, points)
    torch._foreach_add_(climbed, _to(_take(table.backups, indices), dtype))
    if table.stochastic:
        climbed = [round_for(table, i, t, CLIMB, group.rounding_seed) for i, t in zip(indices, climbed, strict=True)]
    if not on_cpu:
        # Selected, not multiplied by zero: 0 * inf would be NaN.
        climbed = [torch.where(scale == 0, w, moved.to(w.dtype)) for w, moved in zip(values, climbed, strict=True)]
    torch._foreach_copy_(values, climbed)


def dots(table: TensorTable, combination: Combination) -> Tensor:
    form, weights = combination
    result = torch.zeros((len(table.params), 3), dtype=torch.float64, device=table.device)
    indices = taking_part(form, table)
    if not indices:
        return result
    at = torch.tensor(indices, device=table.device)
    xs = _to(_take(table.row(form.x if isinstance(form, Climb) else GRAD), indices), torch.float64)
    mapped = xs
    if isinstance(form, Climb):
        points = _to(_take(table.values, indices), torch.float64)
        mapped = _mapped(xs, points, form.map, weights[at])
    result[at, 0] = _sums(mapped, xs)
    if form.y != NOTHING:
        ys = _to(_seconds(table, form.y, indices), torch.float64)
        result[at, 1], result[at, 2] = _sums(xs, ys), _sums(ys, ys)
    return result


def _sums(tensors: Tensors, others: Tensors) -> Tensor:
    return torch.stack([product.sum() for product in torch._foreach_mul(tensors, others)])


def perturb_by_(table: TensorTable, combination: Combination) -> None:
    form, weights = combination
    assert isinstance(form, Climb)
    again = form.y == DISTANCE
    if table.climbing and not again:
        torch._foreach_copy_(_take(table.backups, table.climbing), _take(table.values, table.climbing))
    try:
        if indices := taking_part(form, table):
            at = torch.tensor(indices, device=table.device)
            _climb_by_(table, form, indices, weights[at])
    except BaseException:
        if not again:
            restore_(table)
        raise


def _climb_by_(table: TensorTable, form: Climb, indices: list[int], weights: Tensor) -> None:
    dtype = opmath_dtype(table.dtype)
    values = _take(table.values, indices)
    mapped = _mapped(_to(_take(table.row(form.x), indices), dtype), _to(values, dtype), form.map, weights)
    climbed = _times(weights[:, A], mapped)
    if form.y != NOTHING:
        torch._foreach_add_(climbed, _times(weights[:, B], _to(_seconds(table, form.y, indices), dtype)))
    torch._foreach_add_(climbed, _to(_take(table.backups, indices), dtype))
    stays = (weights[:, A] == 0) & (weights[:, B] == (1 if form.y == DISTANCE else 0))
    if stays.device.type != "cpu" or stays.any():
        stay = stays.unbind()
        climbed = [torch.where(s, w, moved.to(w.dtype)) for s, w, moved in zip(stay, values, climbed, strict=True)]
    torch._foreach_copy_(values, climbed)


def _seconds(table: TensorTable, y: int, indices: Sequence[int]) -> Tensors:
    values = _take(table.values, indices)
    if y == DISTANCE:
        dtype = opmath_dtype(table.dtype)
        return list(torch._foreach_sub(_to(values, dtype), _to(_take(table.backups, indices), dtype)))
    row = table.row(y)
    return [torch.zeros_like(w) if (t := row[i]) is None else t for i, w in zip(indices, values, strict=True)]


def _mapped(xs: Tensors, points: Tensors, form: Map, weights: Tensor) -> Tensors:
    if form == Map.IDENTITY:
        return xs
    scales, terms = (list(weights[:, column].to(xs[0].dtype).unbind()) for column in (SCALE, TERM))
    if form == Map.POWER:
        powers = torch._foreach_pow(torch._foreach_abs(torch._foreach_mul(xs, scales)), terms)
        return list(torch._foreach_mul(torch._foreach_sign(xs), powers))
    operators = list(torch._foreach_add(torch._foreach_mul(torch._foreach_abs(points), scales), terms))
    return list(torch._foreach_mul(torch._foreach_mul(operators, operators), xs))


def _times(factors: Tensor, tensors: Tensors) -> Tensors:
    """Selected, not multiplied by zero: 0 * inf would be NaN."""
    products = list(torch._foreach_mul(tensors, list(factors.to(tensors[0].dtype).unbind())))
    zero = factors == 0
    if zero.device.type == "cpu" and not zero.any():
        return products
    return [torch.where(none, 0.0, product) for none, product in zip(zero.unbind(), products, strict=True)]


def restore_(table: TensorTable) -> None:
    if table.climbing:
        torch._foreach_copy_(_take(table.values, table.climbing), _take(table.backups, table.climbing))


def restore_and_sgd_(
    table: TensorTable,
    options: Sequence[SGDOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None = None,
) -> None:
    restore_(table)
    for group, indices in _by_group(table.present, table, options):
        work = _Work(table, indices, grad_scale, found_inf, group, group.weight_decay, combination)
        lr = as_scalar(group.lr, table.device)
        directions = work.grads
        if group.momentum != 0:
            (buffers,) = work.state
            torch._foreach_mul_(buffers, group.momentum)
            if group.dampening != 0:
                later = (work.steps != 0).double()  # a tensor's first step is not dampened
                weights = (1.0 - group.dampening * later).to(work.dtype)
                torch._foreach_add_(buffers, list(torch._foreach_mul(work.grads, list(weights.unbind()))))
            else:
                torch._foreach_add_(buffers, work.grads)
            directions = buffers
            if group.nesterov:
                directions = list(torch._foreach_add(work.grads, buffers, alpha=group.momentum))
        _add_scaled_(work.values, directions, -lr)
        work.store()


def restore_and_adam_(
    table: TensorTable,
    options: Sequence[AdamOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None = None,
) -> None:
    restore_(table)
    for group, indices in _by_group(table.present, table, options):
        coupled_decay = 0.0 if group.decoupled else group.weight_decay
        work = _Work(table, indices, grad_scale, found_inf, group, coupled_decay, combination)
        lr, beta1, beta2 = (as_scalar(x, table.device) for x in (group.lr, group.beta1, group.beta2))
        exp_avgs, exp_avg_sqs, *max_exp_avg_sqs = work.state
        if group.decoupled and group.weight_decay != 0:
            torch._foreach_mul_(work.values, _scalar(1 - lr * group.weight_decay, work.dtype))
        torch._foreach_lerp_(exp_avgs, work.grads, _scalar(1 - beta1, work.dtype))
        torch._foreach_mul_(exp_avg_sqs, _scalar(beta2, work.dtype))
        if isinstance(beta2, Tensor):
            _add_scaled_(exp_avg_sqs, list(torch._foreach_mul(work.grads, work.grads)), 1 - beta2)
        else:
            torch._foreach_addcmul_(exp_avg_sqs, work.grads, work.grads, value=1 - beta2)
        second_moments = exp_avg_sqs
        if group.amsgrad:
            (second_moments,) = max_exp_avg_sqs
            torch._foreach_maximum_(second_moments, exp_avg_sqs)
        steps = work.steps.double() + 1
        denominators = list(torch._foreach_sqrt(second_moments))
        torch._foreach_div_(denominators, list((1 - beta2**steps).sqrt().to(work.dtype).unbind()))
        torch._foreach_add_(denominators, group.eps)
        moves = list(torch._foreach_mul(exp_avgs, list((-lr / (1 - beta1**steps)).to(work.dtype).unbind())))
        torch._foreach_addcdiv_(work.values, moves, denominators)
        work.store()


class _Work:
    """The tensors of one group in the arithmetic's dtype: the stored ones themselves, or copies to store back."""

    def __init__(
        self,
        table: TensorTable,
        indices: Sequence[int],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        group: SGDOptions | AdamOptions,
        weight_decay: float,
        combination: Combination | None,
    ) -> None:
        self.dtype = opmath_dtype(table.dtype)
        self._table, self._indices, self._found_inf, self._seed = table, indices, found_inf, group.rounding_seed
        slots = [_take(slot, indices) for slot in table.state if slot[indices[0]] is not None]
        self._stored = [_take(table.masters if table.has_masters else table.values, indices), *slots]
        self.values, *self.state = [_to(tensors, self.dtype, copy=found_inf is not None) for tensors in self._stored]
        if table.has_masters:
            self.values = self._followed_masters()
        changed = grad_scale is not None or group.maximize or weight_decay != 0
        self._combined = None if combination is None else _Combined(table, indices, combination, found_inf)
        self.grads = _to(_take(table.grads, indices), self.dtype, copy=changed)
        if self._combined is not None:
            self.grads = self._combined.grads(self.grads)
        if grad_scale is not None:
            torch._foreach_mul_(self.grads, grad_scale.double().reciprocal().to(self.dtype).reshape(()))
        if group.maximize:
            torch._foreach_neg_(self.grads)
        if weight_decay != 0:
            torch._foreach_add_(self.grads, self.values, alpha=weight_decay)
        self._places = torch.tensor(indices, device=table.device)
        self.steps = table.steps[self._places]

    def _followed_masters(self) -> Tensors:
        climbed = set(self._table.climbing)  # their masters did it before the climb
        return [
            master if i in climbed else followed_master(master, self._table.values[i])
            for i, master in zip(self._indices, self.values, strict=True)
        ]

    def store(self) -> None:
        """Rounds the results once, at the store; under ``found_inf`` everything stays as it is."""
        if self._combined is not None:
            self._combined.move_(self.values)
            self._combined.keep()
        table = self._table
        results = [self.values, *self.state]
        if table.has_masters:
            self._store(_take(table.values, self._indices), self.values)
        elif table.stochastic:
            results = [
                [round_for(table, i, t, UPDATE + k, self._seed) for i, t in zip(self._indices, tensors, strict=True)]
                for k, tensors in enumerate(results)
            ]
        for stored, computed in zip(self._stored, results, strict=True):
            self._store(stored, computed)
        advanced = self.steps + 1
        if self._found_inf is not None:
            advanced = torch.where(self._found_inf != 0, self.steps, advanced)
        table.steps.index_copy_(0, self._places, advanced)

    def _store(self, stored: Tensors, computed: Tensors) -> None:
        if self._found_inf is not None:
            computed = [
                torch.where(self._found_inf != 0, old, new.to(old.dtype))
                for old, new in zip(stored, computed, strict=True)
            ]
        if any(new is not old for old, new in zip(stored, computed, strict=True)):
            torch._foreach_copy_(stored, computed)


class _Combined:
    """A combination's part in one group's update."""

    def __init__(
        self, table: TensorTable, indices: Sequence[int], combination: Combination, found_inf: Tensor | None
    ) -> None:
        form, weights = combination
        assert isinstance(form, Descent)
        self._form, self._table, self._found_inf = form, table, found_inf
        part = set(taking_part(form, table))
        self._places = [place for place, i in enumerate(indices) if i in part]
        self._indices = [indices[place] for place in self._places]
        self._weights = weights[torch.tensor(self._indices, dtype=torch.int64, device=table.device)]
        dtype = opmath_dtype(table.dtype)
        self._xs = _to(_take(table.grads, self._indices), dtype) if self._indices else []
        self._ys = _to(_seconds(table, form.y, self._indices), dtype) if self._indices and form.y != NOTHING else []

    def grads(self, grads: Tensors) -> Tensors:
        """``A * x + B * y``, where there is a y to combine with."""
        if not self._indices or self._form.y == NOTHING:
            return grads
        combined = _times(self._weights[:, A], self._xs)
        torch._foreach_add_(combined, _times(self._weights[:, B], self._ys))
        result = list(grads)
        for place, grad in zip(self._places, combined, strict=True):
            result[place] = grad
        return result

    def move_(self, values: Tensors) -> None:
        """``w`` past the base."""
        if not self._indices or not self._form.decoupled:
            return
        mine = [values[place] for place in self._places]
        extra = _times(self._weights[:, EXTRA_X], self._xs)
        torch._foreach_add_(extra, _times(self._weights[:, EXTRA_Y], self._ys))
        torch._foreach_sub_(mine, extra)

    def keep(self) -> None:
        if not self._indices or not self._form.keeps:
            return
        dtype = opmath_dtype(self._table.dtype)
        kept = _take(self._table.kept, self._indices)
        total = _times(self._weights[:, KEEP_X], self._xs)
        taken = _to(_take(self._table.taken, self._indices), dtype)
        torch._foreach_add_(total, _times(self._weights[:, KEEP_TAKEN], taken))
        torch._foreach_add_(total, _times(self._weights[:, KEEP_KEPT], _to(kept, dtype)))
        if self._found_inf is not None:
            overflow = self._found_inf != 0
            total = [torch.where(overflow, old, new.to(old.dtype)) for old, new in zip(kept, total, strict=True)]
        torch._foreach_copy_(kept, total)


def combine_(table: TensorTable, combination: Combination) -> None:
    """``g <- A * x + B * y`` in the gradients themselves, and what is kept: for bases that are not fused."""
    combined = _Combined(table, table.present, combination, None)
    grads = _take(table.grads, table.present)
    if grads:
        results = combined.grads(_to(grads, opmath_dtype(table.dtype)))
        combined.keep()
        torch._foreach_copy_(grads, results)


def _by_group(
    indices: Sequence[int], table: TensorTable, options: Sequence[Options]
) -> Iterator[tuple[Options, list[int]]]:
    for group, option in enumerate(options):
        mine = [i for i in indices if table.groups[i] == group]
        if mine:
            yield option, mine


def _take(tensors: Sequence[Tensor | None], indices: Sequence[int]) -> Tensors:
    return [tensors[i] for i in indices]  # type: ignore[misc]


def _to(tensors: Tensors, dtype: torch.dtype, *, copy: bool = False) -> Tensors:
    if not copy and tensors[0].dtype == dtype:
        return tensors
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def _scalar(value: Scalar, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _add_scaled_(tensors: Tensors, others: Tensors, factor: Scalar) -> None:
    if isinstance(factor, Tensor):
        torch._foreach_add_(tensors, list(torch._foreach_mul(others, factor.to(others[0].dtype))))
    else:
        torch._foreach_add_(tensors, others, alpha=factor)
