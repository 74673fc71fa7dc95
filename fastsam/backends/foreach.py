"""``torch._foreach_*``: the operations as lists of tensors at a time, on any device that PyTorch has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsam.backends import AdamOptions, ClimbOptions, SGDOptions
from fastsam.backends.scalars import Scalar, as_scalar, climb_scale, opmath_dtype
from fastsam.tensor_table import TensorTable

Options = TypeVar("Options")
Tensors = list[Tensor]


def check(device_type: str) -> None:
    """Runs on every device."""


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
        torch._foreach_copy_(_take(table.backups, table.climbing), _take(table.values, table.climbing))
    try:
        for group, indices in _by_group(table.climbing, table, options):
            scale = climb_scale(as_scalar(group.rho, table.device), group.maximize, norm)
            _climb_(_take(table.values, indices), _take(table.grads, indices), scale, group.adaptive)
    except BaseException:
        restore_(table)
        raise


def _climb_(values: Tensors, grads: Tensors, scale: Tensor, adaptive: bool) -> None:
    dtype = opmath_dtype(values[0].dtype)
    on_cpu = scale.device.type == "cpu"
    if on_cpu and scale == 0:
        return
    if on_cpu and values[0].dtype == dtype and not adaptive:
        torch._foreach_add_(values, grads, alpha=scale.item())
        return
    points = _to(values, dtype)
    climbed = list(torch._foreach_mul(_to(grads, dtype), scale.to(dtype)))
    if adaptive:
        torch._foreach_mul_(climbed, points)
        torch._foreach_mul_(climbed, points)
    torch._foreach_add_(climbed, points)
    if not on_cpu:
        # Selected, not multiplied by zero: 0 * inf would be NaN.
        climbed = [torch.where(scale == 0, w, moved.to(w.dtype)) for w, moved in zip(values, climbed, strict=True)]
    torch._foreach_copy_(values, climbed)


def restore_(table: TensorTable) -> None:
    if table.climbing:
        torch._foreach_copy_(_take(table.values, table.climbing), _take(table.backups, table.climbing))


def restore_and_sgd_(
    table: TensorTable, options: Sequence[SGDOptions], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    restore_(table)
    for group, indices in _by_group(table.present, table, options):
        work = _Work(table, indices, grad_scale, found_inf, group.maximize, group.weight_decay)
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
    table: TensorTable, options: Sequence[AdamOptions], grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    restore_(table)
    for group, indices in _by_group(table.present, table, options):
        coupled_decay = 0.0 if group.decoupled else group.weight_decay
        work = _Work(table, indices, grad_scale, found_inf, group.maximize, coupled_decay)
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
        maximize: bool,
        weight_decay: float,
    ) -> None:
        self.dtype = opmath_dtype(table.dtype)
        self._found_inf = found_inf
        slots = [_take(slot, indices) for slot in table.state if slot[indices[0]] is not None]
        self._stored = [_take(table.values, indices), *slots]
        copy = found_inf is not None or table.dtype != self.dtype
        self.values, *self.state = [_to(tensors, self.dtype, copy=copy) for tensors in self._stored]
        changed = grad_scale is not None or maximize or weight_decay != 0
        self.grads = _to(_take(table.grads, indices), self.dtype, copy=changed)
        if grad_scale is not None:
            torch._foreach_mul_(self.grads, grad_scale.double().reciprocal().to(self.dtype).reshape(()))
        if maximize:
            torch._foreach_neg_(self.grads)
        if weight_decay != 0:
            torch._foreach_add_(self.grads, self.values, alpha=weight_decay)
        self._step_counts = table.steps
        self._indices = torch.tensor(indices, device=table.device)
        self.steps = table.steps[self._indices]

    def store(self) -> None:
        """Rounds the results once, at the store; under ``found_inf`` everything stays as it is."""
        advanced = self.steps + 1
        if self._found_inf is not None:
            advanced = torch.where(self._found_inf != 0, self.steps, advanced)
        self._step_counts.index_copy_(0, self._indices, advanced)
        for stored, computed in zip(self._stored, [self.values, *self.state], strict=True):
            if self._found_inf is not None:
                computed = [
                    torch.where(self._found_inf != 0, old, new.to(old.dtype))
                    for old, new in zip(stored, computed, strict=True)
                ]
            if computed[0] is not stored[0]:
                torch._foreach_copy_(stored, computed)


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
