"""Base updates over lists of tensors: PyTorch's fused kernels where they are exact enough, else a list operation each.

The fused kernels read every tensor once, and select by ``found_inf`` themselves. Not theirs: a first step with
dampening beside others without a wait for its count, options in tensors other than a float32 learning rate, and on the
CPU 16-bit tensors, which are computed with as float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.backends.lists import Tensors, add_scaled_, convert, in_dtype, matching, store_, take
from fastsam.backends.rounding import followed_master, round_all
from fastsam.backends.scalars import as_scalar, opmath_dtype
from fastsam.spec import AdamOptions, BaseOptions, Draw, SGDOptions
from fastsam.tables import TensorTable


class Work:
    """The update of one group: its tensors, or copies of them in the arithmetic's dtype that are rounded at the end.

    Args:
        table: the table.
        indices: the parameters.
        group: the group's options.
        grads: the gradients, in the table's dtype or the arithmetic's; not written to.
        overflow: 0-dim bool on an accelerator: where it is true, nothing changes; None: it is false.
    """

    def __init__(
        self,
        table: TensorTable,
        indices: Sequence[int],
        group: BaseOptions,
        grads: Tensors,
        overflow: Tensor | None,
    ) -> None:
        self._table, self._indices, self._group, self._overflow = table, indices, group, overflow
        weights = table.masters if table.has_masters else table.values
        slots = [take(slot, indices) for slot in table.state if slot[indices[0]] is not None]
        self._stored = [take(weights, indices), *slots]
        self._is_fused = _is_fused(table, group)
        self.dtype = opmath_dtype(table.dtype)
        copy = overflow is not None and not self._is_fused
        self._weights, *self._state = [convert(tensors, self.dtype, copy=copy) for tensors in self._stored]
        if table.has_masters:
            self._weights = self._followed_masters()
        self._grads = convert(grads, self.dtype)

    def _followed_masters(self) -> Tensors:
        perturbed = set(self._table.perturbed)  # their masters have followed before the ascent
        return [
            master if i in perturbed else followed_master(master, self._table.values[i])
            for i, master in zip(self._indices, self._weights, strict=True)
        ]

    def update_(self) -> None:
        """Runs the base update."""
        group, steps = self._group, [self._table.steps[i] for i in self._indices]
        tensors = self._weights, self._grads, self._state
        if isinstance(group, SGDOptions):
            (_fused_sgd_ if self._is_fused else _sgd_)(*tensors, steps, group, self._overflow)
        else:
            counts: Tensors = [step for step in steps if step is not None]
            (_fused_adam_ if self._is_fused else _adam_)(*tensors, counts, group, self._overflow)

    def subtract_(self, places: Sequence[int], moves: Tensors) -> None:
        """Subtracts ``moves`` from the weights at ``places``, in the arithmetic's dtype."""
        weights = [self._weights[place] for place in places]
        if self._is_fused and self._overflow is not None:
            subtract_(weights, matching(moves, weights), 1.0, self._overflow)
        else:
            torch._foreach_sub_(weights, moves)

    def store_(self) -> None:
        """Rounds the results once."""
        table, results = self._table, [self._weights, *self._state]
        if table.has_masters:
            store_(take(table.values, self._indices), convert(self._weights, table.dtype), self._overflow)
        elif table.stochastic:
            draws = [Draw.WEIGHT, *range(Draw.STATE, Draw.STATE + len(self._state))]
            seed = self._group.rounding_seed
            results = [round_all(table, self._indices, t, d, seed) for t, d in zip(results, draws, strict=True)]
        for stored, result in zip(self._stored, results, strict=True):
            store_(stored, result, self._overflow)


def _is_fused(table: TensorTable, group: BaseOptions) -> bool:
    if table.device.type == "cpu":
        return True  # an option there is a number
    if table.device.type != "cuda" or (isinstance(group.lr, Tensor) and table.dtype == torch.float64):
        return False
    # Adam's kernel for CUDA has its bias corrections in float32: 1 - 0.999 has 14 bits left.
    return isinstance(group, SGDOptions) and (group.momentum == 0 or group.dampening == 0)


# ---- PyTorch's fused kernels ----


def subtract_(tensors: Tensors, others: Tensors, factor: float | Tensor, stays: Tensor) -> None:
    """``tensors -= factor * others`` on CUDA, unless ``stays`` (0-dim bool): one pass, and one rounding.

    Args:
        tensors: of one dtype, up to float64 (with a tensor for a factor: up to float32).
        others: of the same dtype and strides.
        factor: a number, or a 0-dim float32 tensor on the device.
        stays: on the device.
    """
    torch._fused_sgd_(
        tensors,
        others,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=factor,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=stays.float(),
    )


def _fused_sgd_(
    weights: Tensors,
    grads: Tensors,
    state: list[Tensors],
    steps: Sequence[Tensor | None],
    group: SGDOptions,
    overflow: Tensor | None,
) -> None:
    lr = as_scalar(group.lr, weights[0].device)
    everything = range(len(weights))
    # A first step is not dampened. Its buffer is zeros: is_first_step is not needed.
    first = {k for k in everything if group.momentum != 0 and group.dampening != 0 and _is_zero(steps[k])}
    for places, dampening in ((sorted(first), 0.0), ([k for k in everything if k not in first], group.dampening)):
        if not places:
            continue
        params = [weights[k] for k in places]
        torch._fused_sgd_(
            params,
            matching([grads[k] for k in places], params),
            matching([state[0][k] for k in places], params) if group.momentum != 0 else [],
            weight_decay=group.weight_decay,
            momentum=group.momentum,
            lr=in_dtype(lr, torch.float32),
            dampening=dampening,
            nesterov=group.nesterov,
            maximize=group.maximize,
            is_first_step=False,
            found_inf=None if overflow is None else overflow.float(),
        )


def _is_zero(step: Tensor | None) -> bool:
    return step is not None and float(step) == 0


def _fused_adam_(
    weights: Tensors,
    grads: Tensors,
    state: list[Tensors],
    steps: Tensors,
    group: AdamOptions,
    overflow: Tensor | None,
) -> None:
    device = weights[0].device
    exp_avgs, exp_avg_sqs, *max_exp_avg_sqs = (matching(slot, weights) for slot in state)
    (torch._fused_adamw_ if group.decoupled else torch._fused_adam_)(
        weights,
        matching(grads, weights),
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs[0] if group.amsgrad else [],
        list(torch._foreach_add(steps, 1.0)),
        lr=in_dtype(as_scalar(group.lr, device), torch.float32),
        beta1=float(group.beta1),
        beta2=float(group.beta2),
        weight_decay=group.weight_decay,
        eps=group.eps,
        amsgrad=group.amsgrad,
        maximize=group.maximize,
        found_inf=None if overflow is None else overflow.float(),
    )


# ---- one list operation at a time ----


def _decayed(weights: Tensors, grads: Tensors, maximize: bool, weight_decay: float) -> Tensors:
    if maximize:
        grads = list(torch._foreach_neg(grads))
    if weight_decay != 0:
        grads = list(torch._foreach_add(grads, weights, alpha=weight_decay))
    return grads


def _sgd_(
    weights: Tensors,
    grads: Tensors,
    state: list[Tensors],
    steps: Sequence[Tensor | None],
    group: SGDOptions,
    overflow: Tensor | None,
) -> None:
    lr = as_scalar(group.lr, weights[0].device)
    directions = grads = _decayed(weights, grads, group.maximize, group.weight_decay)
    if group.momentum != 0:
        (buffers,) = state
        torch._foreach_mul_(buffers, group.momentum)
        if group.dampening != 0:
            counts = torch.stack([torch.ones((), device=weights[0].device) if step is None else step for step in steps])
            # A tensor's first step is not dampened.
            factors = (1.0 - group.dampening * (counts != 0).double()).to(weights[0].dtype)
            torch._foreach_add_(buffers, list(torch._foreach_mul(grads, list(factors.unbind()))))
        else:
            torch._foreach_add_(buffers, grads)
        directions = buffers
        if group.nesterov:
            directions = list(torch._foreach_add(grads, buffers, alpha=group.momentum))
    add_scaled_(weights, directions, -lr)


def _adam_(
    weights: Tensors,
    grads: Tensors,
    state: list[Tensors],
    steps: Tensors,
    group: AdamOptions,
    overflow: Tensor | None,
) -> None:
    device, dtype = weights[0].device, weights[0].dtype
    lr, beta1, beta2 = (as_scalar(x, device) for x in (group.lr, group.beta1, group.beta2))
    exp_avgs, exp_avg_sqs, *max_exp_avg_sqs = state
    grads = _decayed(weights, grads, group.maximize, 0.0 if group.decoupled else group.weight_decay)
    if group.decoupled and group.weight_decay != 0:
        torch._foreach_mul_(weights, in_dtype(1 - lr * group.weight_decay, dtype))
    torch._foreach_lerp_(exp_avgs, grads, in_dtype(1 - beta1, dtype))
    torch._foreach_mul_(exp_avg_sqs, in_dtype(beta2, dtype))
    if isinstance(beta2, Tensor):
        add_scaled_(exp_avg_sqs, list(torch._foreach_mul(grads, grads)), 1 - beta2)
    else:
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, value=1 - beta2)
    second_moments = exp_avg_sqs
    if group.amsgrad:
        (second_moments,) = max_exp_avg_sqs
        torch._foreach_maximum_(second_moments, exp_avg_sqs)
    counts = torch.stack(steps).double() + 1
    denominators = list(torch._foreach_sqrt(second_moments))
    torch._foreach_div_(denominators, list((1 - beta2**counts).sqrt().to(dtype).unbind()))
    torch._foreach_add_(denominators, group.eps)
    moves = list(torch._foreach_mul(exp_avgs, list((-lr / (1 - beta1**counts)).to(dtype).unbind())))
    torch._foreach_addcdiv_(weights, moves, denominators)
