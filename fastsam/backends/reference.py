"""Plain PyTorch, one tensor at a time: the ground truth, to be read beside the papers.

SAM: Foret et al., ICLR 2021, https://arxiv.org/abs/2010.01412 (equation 2). The adaptive ascent: Kwon et al., ICML
2021, https://arxiv.org/abs/2102.11600, with T = |w| as in davda54/sam. The updates follow torch.optim's for-loops
operation by operation: on the CPU, in float32 and float64, they are bit-identical.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastsam.backends.rounding import followed_master, round_for
from fastsam.backends.scalars import Scalar, add_scaled_, as_scalar, ascent_scale, opmath_dtype
from fastsam.spec import (
    NONE,
    PERTURBATION,
    AdamOptions,
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
    SGDOptions,
    Update,
)
from fastsam.tables import TensorTable, taking_part

if TYPE_CHECKING:
    from fastsam.backends import Request

T = TypeVar("T")


def unsupported_reason(request: Request) -> str:
    """Runs everything on every device."""
    return ""


# ---- reductions ----


def grad_norm(tables: Sequence[TensorTable], options: Sequence[AscentOptions]) -> Tensor:
    squares = torch.zeros((), dtype=torch.float64, device=tables[0].device)
    for table in tables:
        for i in table.perturbed:
            grad = _present(table.grads[i]).double()
            term = table.values[i].double() * grad if options[table.groups[i]].adaptive else grad
            squares += term.square().sum()
    return squares.sqrt()


def dots(table: TensorTable, form: AscentForm | DescentForm, coefficients: Tensor) -> Tensor:
    if isinstance(form, DescentForm):
        form = DescentForm(form.y)  # the dots are of x and y alone, whatever else the form names
    result = torch.zeros((len(table.params), 3), dtype=torch.float64, device=table.device)
    for i in taking_part(form, table):
        x, y = _x(table, form, i).double(), _y(table, form, i)
        w = table.values[i].double()
        mapped = _mapped(form.map, x, w, coefficients[i]) if isinstance(form, AscentForm) else x
        result[i, 0] = (mapped * x).sum()
        if y is not None:
            result[i, 1], result[i, 2] = (x * y.double()).sum(), y.double().square().sum()
    return result


# ---- the ascent ----


def perturb_(table: TensorTable, ascent: Ascent) -> None:
    is_first = ascent.form.y != PERTURBATION
    if is_first:
        for i in table.perturbed:
            backup, w = _present(table.backups[i]), table.values[i]
            backup.copy_(followed_master(backup, w) if table.has_masters else w)
    try:
        for i in taking_part(ascent.form, table):
            _perturb_parameter_(table, i, ascent)
    except BaseException:
        if is_first:
            restore_(table)
        raise


def _perturb_parameter_(table: TensorTable, i: int, ascent: Ascent) -> None:
    dtype, w = opmath_dtype(table.dtype), table.values[i]
    e, stays = _by_norm(table, i, ascent, ascent.norm) if ascent.norm is not None else _by_form(table, i, ascent)
    perturbed = _present(table.backups[i]).to(dtype) + e
    if table.stochastic:
        perturbed = round_for(table, i, perturbed, Draw.ASCENT, ascent.options[table.groups[i]].rounding_seed)
    # Selected, not multiplied by zero: 0 * inf would be NaN.
    w.copy_(torch.where(stays, w, perturbed.to(w.dtype)))


def _by_norm(table: TensorTable, i: int, ascent: Ascent, norm: Tensor) -> tuple[Tensor, Tensor]:
    """SAM's e, and whether w stays."""
    dtype, w = opmath_dtype(table.dtype), table.values[i]
    rho, adaptive, maximize, _ = ascent.options[table.groups[i]]
    scale = ascent_scale(as_scalar(rho, table.device), maximize, norm).to(dtype)
    e = scale * _present(table.grads[i]).to(dtype)
    return (e * w.to(dtype) * w.to(dtype) if adaptive else e), scale == 0


def _by_form(table: TensorTable, i: int, ascent: Ascent) -> tuple[Tensor, Tensor]:
    """``A * map(x) + B * y``, and whether w stays."""
    dtype, form = opmath_dtype(table.dtype), ascent.form
    coefficients = _present(ascent.coefficients)[i].to(dtype)
    a, b = coefficients[AscentCoefficients.A], coefficients[AscentCoefficients.B]
    x, y = _x(table, form, i).to(dtype), _y(table, form, i)
    e, stays = _times(a, _mapped(form.map, x, table.values[i].to(dtype), coefficients)), a == 0
    if y is None:
        return e, stays
    return e + _times(b, y.to(dtype)), stays & (b == (1 if form.y == PERTURBATION else 0))


def _x(table: TensorTable, form: AscentForm | DescentForm, i: int) -> Tensor:
    return _present(table.grads[i] if isinstance(form, DescentForm) else table.row(form.x)[i])


def _y(table: TensorTable, form: AscentForm | DescentForm, i: int) -> Tensor | None:
    if form.y == NONE:
        return None
    if form.y == PERTURBATION:
        dtype = opmath_dtype(table.dtype)
        return table.values[i].to(dtype) - _present(table.backups[i]).to(dtype)
    return table.row(form.y)[i]


def _mapped(how: Map, x: Tensor, w: Tensor, coefficients: Tensor) -> Tensor:
    scale, term = (coefficients[c].to(x.dtype) for c in (AscentCoefficients.SCALE, AscentCoefficients.TERM))
    if how == Map.POWER:
        return torch.where(x == 0, 0.0, torch.sign(x) * (scale * x).abs() ** term)
    if how == Map.ADAPTIVE:
        return (scale * w.abs() + term).square() * x
    return x


def _times(factor: Tensor, tensor: Tensor) -> Tensor:
    """Selected, not multiplied by zero: 0 * inf would be NaN."""
    return torch.where(factor == 0, 0.0, factor * tensor)


# ---- the descent ----


def prepare_update(table: TensorTable, update: Update, form: DescentForm | None) -> None:
    pass  # PyTorch loads its kernels


def restore_(table: TensorTable) -> None:
    for i in table.perturbed:
        table.values[i].copy_(_present(table.backups[i]))


def restore_and_update_(
    table: TensorTable,
    update: Update,
    options: Sequence[BaseOptions],
    descent: Descent | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    restore_(table)
    part = [] if descent is None else taking_part(descent.form, table)
    if update == Update.NONE:
        for i in part:
            _hand_over_(table, i, _direction(table, i, _present(descent)))
        return
    combined, perturbed = set(part), set(table.perturbed)
    inverse_scale = None if grad_scale is None else grad_scale.to(torch.float64).reciprocal()
    for i in table.present:
        # The masters of what is perturbed have followed before the ascent.
        follows = table.has_masters and i not in perturbed
        direction = _direction(table, i, _present(descent)) if i in combined else None
        _update_parameter_(table, i, options[table.groups[i]], direction, inverse_scale, found_inf, follows)


class _Direction(NamedTuple):
    """What a descent makes of one parameter's tensors, in the arithmetic's dtype."""

    grad: Tensor
    method_state: Tensor | None
    decoupled: Tensor | None


def _direction(table: TensorTable, i: int, descent: Descent) -> _Direction:
    dtype, form, c = opmath_dtype(table.dtype), descent.form, DescentCoefficients
    coefficients = descent.coefficients[i].to(dtype)

    def combine(*terms: tuple[DescentCoefficients, Tensor | None]) -> Tensor:
        first, *others = (_times(coefficients[column], t.to(dtype)) for column, t in terms if t is not None)
        return sum(others, start=first)

    x, y = _x(table, form, i), _y(table, form, i)
    kept = (c.KEEP_X, x), (c.KEEP_FIRST, table.first_grads[i]), (c.KEEP_STATE, table.method_state[i])
    return _Direction(
        combine((c.A, x), (c.B, y)),
        combine(*kept) if form.keeps else None,
        combine((c.DECOUPLED_X, x), (c.DECOUPLED_Y, y)) if form.decoupled else None,
    )


def _hand_over_(table: TensorTable, i: int, direction: _Direction) -> None:
    """Prepares the gradients for an unfused base; the decoupled part is subtracted after its step."""
    _present(table.grads[i]).copy_(direction.grad)
    if direction.method_state is not None:
        _present(table.method_state[i]).copy_(direction.method_state)
    if direction.decoupled is not None:
        _present(table.first_grads[i]).copy_(direction.decoupled)


def _update_parameter_(
    table: TensorTable,
    i: int,
    group: BaseOptions,
    direction: _Direction | None,
    inverse_scale: Tensor | None,
    found_inf: Tensor | None,
    follows: bool,
) -> None:
    """Runs the update in place on copies in the arithmetic's dtype, and rounds the results once, at the store."""
    dtype, param = opmath_dtype(table.dtype), table.values[i]
    g = _present(table.grads[i]).to(dtype) if direction is None else direction.grad
    if inverse_scale is not None:
        g = g * inverse_scale.to(dtype)
    weights = _present(table.masters[i]) if table.has_masters else param
    stored = [weights, *(t for t in (slot[i] for slot in table.state) if t is not None)]
    # In place where nothing has to be rounded or may have to be taken back.
    results = [t.to(dtype, copy=t.dtype != dtype or found_inf is not None) for t in stored]
    if follows:
        results[0] = followed_master(weights, param)
    count = table.steps[i]
    # Where no count is kept, it does not matter whether this is the first step.
    step = torch.ones((), device=table.device) if count is None else count.clone()
    if isinstance(group, SGDOptions):
        _sgd_(results[0], g, results[1:], step, group)
    else:
        _adam_(results[0], g, results[1:], step, group)
    draws = [Draw.WEIGHT, *range(Draw.STATE, Draw.STATE + len(stored) - 1)]
    if direction is not None and direction.decoupled is not None:
        results[0].sub_(direction.decoupled)
    if direction is not None and direction.method_state is not None:
        stored.append(_present(table.method_state[i]))
        results.append(direction.method_state)
        draws.append(Draw.METHOD_STATE)
    if table.has_masters:
        _store_(param, results[0], found_inf)
    elif table.stochastic:
        results = [round_for(table, i, t, d, group.rounding_seed) for t, d in zip(results, draws, strict=True)]
    for target, result in zip([*stored, step if count is None else count], [*results, step], strict=True):
        _store_(target, result, found_inf)


def _store_(target: Tensor, result: Tensor, found_inf: Tensor | None) -> None:
    if target is not result:
        target.copy_(result if found_inf is None else torch.where(found_inf != 0, target, result.to(target.dtype)))


def _present(value: T | None) -> T:
    """``value``, which is there."""
    assert value is not None
    return value


# ---- the base updates ----


def _sgd_(w: Tensor, g: Tensor, state: list[Tensor], step: Tensor, group: SGDOptions) -> None:
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


def _adam_(w: Tensor, g: Tensor, state: list[Tensor], step: Tensor, group: AdamOptions) -> None:
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
    exp_avg.lerp_(g, _in(w.dtype, 1 - beta1))
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
    denominator = (second_moment.sqrt() / _in(w.dtype, (1 - beta2**t) ** 0.5)).add_(group.eps)
    if isinstance(step_size, Tensor):
        add_scaled_(w, exp_avg / denominator, -step_size)
    else:
        w.addcdiv_(exp_avg, denominator, value=-step_size)


def _in(dtype: torch.dtype, value: Scalar) -> Scalar:
    return value.to(dtype) if isinstance(value, Tensor) else value
