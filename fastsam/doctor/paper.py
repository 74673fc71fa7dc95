"""SAM as in its papers, one tensor at a time: `reference` is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Paper:
    """SAM by equation 2 of Foret et al. (adaptive: Kwon et al.), over torch.optim's loop over tensors."""

    def __init__(
        self, groups: list[dict[str, Any]], base: Callable[..., Optimizer], adaptive: bool, **options: Any
    ) -> None:
        self.base_optimizer = base(groups, foreach=False, **options)
        self._adaptive = adaptive
        self._backups: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first_step(self, zero_grad: bool) -> None:
        """Perturbs the weights, unless a gradient is not finite."""
        assert not zero_grad
        members = [(p, group["rho"]) for group in self.base_optimizer.param_groups for p in group["params"]]
        self._backups = [(p, p.clone()) for p, _ in members]
        scales = [p.double().abs() if self._adaptive else torch.ones_like(p, dtype=torch.float64) for p, _ in members]
        grads = [scale * p.grad.double() for (p, _), scale in zip(members, scales, strict=True)]
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        if norm.isfinite():
            for (p, rho), scale, grad in zip(members, scales, grads, strict=True):
                p.copy_(p.double() + rho * scale * grad / (norm + 1e-12))

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the weights."""
        for p, backup in self._backups:
            p.copy_(backup)

    def second_step(self) -> None:
        """Restores the weights and updates them."""
        self.restore()
        self.base_optimizer.step()
