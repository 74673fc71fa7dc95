"""Plain PyTorch, one tensor at a time: the ground truth, to be read beside the papers.

SAM: Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412 (equation 2). The adaptive climb: Kwon et al., ICML
2021, https://arxiv.org/abs/2102.11600, with T = |w| as in davda54/sam. The updates follow torch.optim's for-loops
operation by operation: on the CPU, in float32 and float64, they are bit-identical.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

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
from fastsam.backends.scalars import Scalar, add_scaled_, as_scalar, climb_scale, opmath_dtype
from fastsam.tables import GRAD, TensorTable

Options = TypeVar("Options", SGDOptions, AdamOptions)


def check(device_type: str) -> None:
    """Runs on every device."""


def check_methods(device_type: str) -> None:
    """Runs every method."""


def grad_norm(tables: Sequence[TensorTable], options: Sequence[ClimbOptions]) -> Tensor:
    squares = torch.zeros((), dtype=torch.float64, device=tables[0].device)
    for table in tables:
        for i, w, g in _climbing(table):
            g64 = g.double()
            term = w.double() * g64 if options[table.groups[i]].adaptive else g64
            squares += term.square().sum()
    return squares.sqrt()


def perturb_(table: TensorTable, norm: Tensor, options: Sequence[ClimbOptions]) -> None:
    for i in table.climbing:
        backup, w = _present(table.backups[i]), table.values[i]
        backup.copy_(followed_master(backup, w) if table.has_masters else w)
    try:
        for i, w, g in _climbing(table):
            rho, adaptive, maximize, seed = options[table.groups[i]]
            scale = climb_scale(as_scalar(rho, table.device), maximize, norm).to(opmath_dtype(w.dtype))
            w_op = w.to(scale.dtype)
            e = scale * g.to(scale.dtype)
            if adaptive:
                e = e * w_op * w_op
            climbed = _present(table.backups[i]).to(scale.dtype) + e
            rounded = round_for(table, i, climbed, CLIMB, seed) if table.stochastic else climbed.to(w.dtype)
            # Selected, not multiplied by zero: 0 * inf would be NaN.
            w.copy_(torch.where(scale == 0, w, rounded))
    except BaseException:
        restore_(table)
        raise


def dots(table: TensorTable, combination: Combination) -> Tensor:
    form, weights = combination
    result = torch.zeros((len(table.params), 3), dtype=torch.float64, device=table.device)
    for i in taking_part(form, table):
        x, y = _present(table.row(form.x if isinstance(form, Climb) else GRAD)[i]).double(), _second(table, form.y, i)
        mapped = _mapped(x, table.values[i].double(), form.map, weights[i]) if isinstance(form, Climb) else x
        result[i, 0] = (mapped * x).sum()
        if y is not None:
            result[i, 1], result[i, 2] = (x * y.double()).sum(), y.double().square().sum()
    return result


def perturb_by_(table: TensorTable, combination: Combination) -> None:
    form, weights = combination
    assert isinstance(form, Climb)
    dtype = opmath_dtype(table.dtype)
    if form.y != DISTANCE:
        for i in table.climbing:
            _present(table.backups[i]).copy_(table.values[i])
    try:
        for i in taking_part(form, table):
            w, start = table.values[i], _present(table.backups[i])
            factor_x, factor_y = weights[i, A], weights[i, B]
            stays = (factor_x == 0) & (factor_y == (1 if form.y == DISTANCE else 0))
            e = _times(factor_x, _mapped(_present(table.row(form.x)[i]).to(dtype), w.to(dtype), form.map, weights[i]))
            y = _second(table, form.y, i)
            if y is not None:
                e = e + _times(factor_y, y.to(dtype))
            w.copy_(torch.where(stays, w, (start.to(dtype) + e).to(w.dtype)))
    except BaseException:
        if form.y != DISTANCE:
            restore_(table)
        raise


def _second(table: TensorTable, y: int, i: int) -> Tensor | None:
    if y == NOTHING:
        return None
    if y == DISTANCE:
        dtype = opmath_dtype(table.dtype)
        return table.values[i].to(dtype) - _present(table.backups[i]).to(dtype)
    return table.row(y)[i]


def _mapped(x: Tensor, w: Tensor, form: Map, weights: Tensor) -> Tensor:
    scale, term = weights[SCALE].to(x.dtype), weights[TERM].to(x.dtype)
    if form == Map.POWER:
        return torch.where(x == 0, 0.0, torch.sign(x) * (scale * x).abs() ** term)
    if form == Map.ADAPTIVE:
        return (scale * w.abs() + term).square() * x
    return x


def _times(factor: Tensor, tensor: Tensor) -> Tensor:
    """Selected, not multiplied by zero: 0 * inf would be NaN."""
    return torch.where(factor == 0, 0.0, factor.to(tensor.dtype) * tensor)


def restore_(table: TensorTable) -> None:
    for i in table.climbing:
        table.values[i].copy_(_present(table.backups[i]))


def restore_and_sgd_(
    table: TensorTable,
    options: Sequence[SGDOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None = None,
) -> None:
    _restore_and_update_(table, options, _sgd, grad_scale, found_inf, combination)


def restore_and_adam_(
    table: TensorTable,
    options: Sequence[AdamOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None = None,
) -> None:
    _restore_and_update_(table, options, _adam, grad_scale, found_inf, combination)


def _climbing(table: TensorTable) -> Iterator[tuple[int, Tensor, Tensor]]:
    for i in table.climbing:
        yield i, table.values[i], _present(table.grads[i])


def _restore_and_update_(
    table: TensorTable,
    options: Sequence[Options],
    update: Callable[[Tensor, Tensor, list[Tensor], Tensor, Options], None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None,
) -> None:
    """Runs ``update`` in place on copies in the arithmetic's dtype, and rounds the results once, at the store."""
    restore_(table)
    dtype = opmath_dtype(table.dtype)
    combined = () if combination is None else taking_part(combination.form, table)
    climbed = set(table.climbing)
    for i in table.present:
        param, group = table.values[i], options[table.groups[i]]
        x = g = _present(table.grads[i]).to(dtype)
        if combination is not None and i in combined:
            g = _combined(table, combination, i, x)
        if grad_scale is not None:
            g = g * grad_scale.to(torch.float64).reciprocal().to(dtype)
        weights = _present(table.masters[i]) if table.has_masters else param
        stored: list[Tensor] = [weights] + [t for t in (slot[i] for slot in table.state) if t is not None]
        # In place where nothing has to be rounded or may have to be taken back.
        computed: list[Tensor] = [t.to(dtype, copy=t.dtype != dtype or found_inf is not None) for t in stored]
        if table.has_masters and i not in climbed:
            computed[0] = followed_master(weights, param)
        step = table.steps[i].clone()
        update(computed[0], g, computed[1:], step, group)
        if combination is not None and i in combined:
            _beyond_the_base_(table, combination, i, x, computed[0], found_inf)
        if table.has_masters:
            _store(param, computed[0], found_inf)
        elif table.stochastic:
            computed = [round_for(table, i, t, UPDATE + k, group.rounding_seed) for k, t in enumerate(computed)]
        for target, result in zip([*stored, table.steps[i]], [*computed, step], strict=True):
            _store(target, result, found_inf)


def _combined(table: TensorTable, combination: Combination, i: int, x: Tensor) -> Tensor:
    y = _second(table, combination.form.y, i)
    g = _times(combination.weights[i, A], x)
    return g if y is None else g + _times(combination.weights[i, B], y.to(x.dtype))


def _beyond_the_base_(
    table: TensorTable, combination: Combination, i: int, x: Tensor, w: Tensor, found_inf: Tensor | None
) -> None:
    """What a method changes besides: ``w`` past the base, and what it keeps."""
    form, weights = combination
    assert isinstance(form, Descent)
    if form.decoupled:
        y = _present(table.row(form.y)[i])
        w.sub_(_times(weights[i, EXTRA_X], x) + _times(weights[i, EXTRA_Y], y.to(x.dtype)))
    if form.keeps:
        taken, kept = _present(table.taken[i]), _present(table.kept[i])
        total = _times(weights[i, KEEP_X], x) + _times(weights[i, KEEP_TAKEN], taken.to(x.dtype))
        _store(kept, total + _times(weights[i, KEEP_KEPT], kept.to(x.dtype)), found_inf)


def _store(target: Tensor, result: Tensor, found_inf: Tensor | None) -> None:
    if target is not result:
        target.copy_(result if found_inf is None else torch.where(found_inf != 0, target, result.to(target.dtype)))


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _sgd(w: Tensor, g: Tensor, state: list[Tensor], step: Tensor, group: SGDOptions) -> None:
    lr = as_scalar(group.lr, w.device)
    first = step == 0
    step += 1
    if group.maximize:
        g = -g
    if group.weight_decay != 0:
        g = g.add(w, alpha=group.weight_decay)
    if group.momentum != 0:
        (momentum_buffer,) = state
        later = momentum_buffer.mul(group.momentum).add_(g, alpha=1 - group.dampening)
        momentum_buffer.copy_(torch.where(first, g, later))
        g = g.add(momentum_buffer, alpha=group.momentum) if group.nesterov else momentum_buffer
    add_scaled_(w, g, -lr)


def _adam(w: Tensor, g: Tensor, state: list[Tensor], step: Tensor, group: AdamOptions) -> None:
    lr, beta1, beta2 = (as_scalar(x, w.device) for x in (group.lr, group.beta1, group.beta2))
    exp_avg, exp_avg_sq, *max_exp_avg_sq = state
    step += 1
    t: Scalar = as_scalar(step, w.device)
    if group.maximize:
        g = -g
    if group.weight_decay != 0:
        if group.decoupled:
            w.mul_(1 - lr * group.weight_decay)
        else:
            g = g.add(w, alpha=group.weight_decay)
    exp_avg.lerp_(g, _weight(1 - beta1, w))
    exp_avg_sq.mul_(beta2)
    if isinstance(beta2, Tensor):
        add_scaled_(exp_avg_sq, g * g, 1 - beta2)
    else:
        exp_avg_sq.addcmul_(g, g, value=1 - beta2)
    second_moment = exp_avg_sq
    if group.amsgrad:
        torch.maximum(max_exp_avg_sq[0], exp_avg_sq, out=max_exp_avg_sq[0])
        second_moment = max_exp_avg_sq[0]
    step_size = lr / (1 - beta1**t)
    denominator = (second_moment.sqrt() / _weight((1 - beta2**t) ** 0.5, w)).add_(group.eps)
    if isinstance(step_size, Tensor):
        add_scaled_(w, exp_avg / denominator, -step_size)
    else:
        w.addcdiv_(exp_avg, denominator, value=-step_size)


def _weight(value: Scalar, like: Tensor) -> Scalar:
    return value.to(like.dtype) if isinstance(value, Tensor) else value
