"""SAM without this package: the usual loop over tensors, lists of tensors over a fused base, the same compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Tensors = Sequence[Tensor]


class LoopSAM:
    """SAM as most projects write it: davda54/sam's algorithm, one tensor at a time.

    With every operation of https://github.com/davda54/sam, ``1.0 * grad`` where it is not adaptive included.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        base: type[Optimizer],
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        **base_kwargs: Any,
    ) -> None:
        self.base_optimizer = base(params, **base_kwargs)
        self._rho, self._adaptive = rho, adaptive
        self._old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        scale = self._rho / (self._grad_norm() + 1e-12)
        for p in self._params():
            self._old[p] = p.data.clone()
            p.add_((torch.pow(p, 2) if self._adaptive else 1.0) * p.grad * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self._params():
            p.data = self._old[p]
        self.base_optimizer.step()

    def _grad_norm(self) -> Tensor:
        norms = [((torch.abs(p) if self._adaptive else 1.0) * p.grad).norm(p=2) for p in self._params()]
        return torch.norm(torch.stack(norms), p=2)

    def _params(self) -> list[Tensor]:
        return [p for group in self.base_optimizer.param_groups for p in group["params"] if p.grad is not None]


class ListSAM:
    """SAM as calls of ``torch._foreach_*`` over the fused base, with backups that stay allocated.

    Args:
        params: the parameters.
        base: ``torch.optim.SGD`` or ``AdamW``.
        rho: the radius.
        scale_on_host: wait for the norm, so that the scale is a number: one pass over the gradients less.
        options: the base's.
    """

    def __init__(
        self, params: Tensors, base: type[Optimizer], *, rho: float, scale_on_host: bool = False, **options: Any
    ) -> None:
        self._params = list(params)
        self._backups = [torch.empty_like(p) for p in self._params]
        self._rho, self._scale_on_host = rho, scale_on_host
        self.base_optimizer = base(self._params, fused=True, **options)

    @torch.no_grad()
    def first_step(self) -> None:
        grads = _grads(self._params)
        scale = _scale(grads, self._rho)
        torch._foreach_copy_(self._backups, self._params)
        if self._scale_on_host:
            torch._foreach_add_(self._params, grads, alpha=float(scale))
        else:
            torch._foreach_add_(self._params, torch._foreach_mul(grads, scale))

    @torch.no_grad()
    def second_step(self) -> None:
        torch._foreach_copy_(self._params, self._backups)
        self.base_optimizer.step()


class CompiledSAM:
    """The same two phases as functions of lists, each through ``torch.compile``, which fuses all that it can.

    Args:
        params: the parameters.
        base: ``torch.optim.SGD`` or ``AdamW``; its update is written out, so that it becomes one with the restore.
        rho: the radius.
        compiler: ``torch.compile``'s backend.
        options: ``lr`` and SGD's ``momentum``; everything else is the base's default.
    """

    def __init__(
        self, params: Tensors, base: type[Optimizer], *, rho: float, compiler: str = "inductor", **options: Any
    ) -> None:
        self._params, self._rho = list(params), rho
        self._backups = [torch.empty_like(p) for p in self._params]
        update, slots = _UPDATES[base.__name__]
        self._state = [[torch.zeros_like(p) for p in self._params] for _ in range(slots)]
        self._steps = torch.zeros((), device=self._params[0].device)
        self._options = options
        self._perturb: Callable[..., None] = torch.compile(_perturb, backend=compiler, dynamic=False)
        self._update: Callable[..., None] = torch.compile(update, backend=compiler, dynamic=False)

    @torch.no_grad()
    def first_step(self) -> None:
        self._perturb(self._params, _grads(self._params), self._backups, self._rho)

    @torch.no_grad()
    def second_step(self) -> None:
        self._steps += 1
        grads = _grads(self._params)
        self._update(self._params, self._backups, grads, *self._state, steps=self._steps, **self._options)


def _grads(params: Tensors) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _scale(grads: Tensors, rho: float) -> Tensor:
    # In the gradients' dtype: with another one _foreach_mul goes tensor by tensor.
    norms = torch._foreach_norm(grads, 2, torch.float32)
    return (rho / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-12)).to(grads[0].dtype)


def _perturb(params: Tensors, grads: Tensors, backups: Tensors, rho: float) -> None:
    scale = _scale(grads, rho)
    torch._foreach_copy_(backups, params)
    torch._foreach_add_(params, torch._foreach_mul(grads, scale))


def _sgd(
    params: Tensors, backups: Tensors, grads: Tensors, momenta: Tensors, *, steps: Tensor, lr: float, momentum: float
) -> None:
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_add_(momenta, grads)
    torch._foreach_copy_(params, torch._foreach_add(backups, momenta, alpha=-lr))


def _adamw(
    params: Tensors, backups: Tensors, grads: Tensors, averages: Tensors, squares: Tensors, *, steps: Tensor, lr: float
) -> None:
    beta1, beta2, eps, weight_decay = 0.9, 0.999, 1e-8, 1e-2
    torch._foreach_lerp_(averages, grads, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    dtype = params[0].dtype
    denominators = torch._foreach_sqrt(squares)
    torch._foreach_div_(denominators, (1 - beta2**steps).sqrt().to(dtype))
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(averages, denominators)
    torch._foreach_mul_(updates, (-lr / (1 - beta1**steps)).to(dtype))
    decayed = torch._foreach_mul(backups, 1 - lr * weight_decay)
    torch._foreach_copy_(params, torch._foreach_add(decayed, updates))


_UPDATES: dict[str, tuple[Callable[..., None], int]] = {"SGD": (_sgd, 1), "AdamW": (_adamw, 2)}
