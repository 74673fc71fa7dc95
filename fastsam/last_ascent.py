"""What a step's ascent has measured anyway: the loss at w, the loss at w + e, the norm of the gradient."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor


class LastAscent(NamedTuple):
    """The ascent of one ``step(closure)``: detached 0-dim tensors, on the device where they were computed."""

    loss: Tensor
    """The first pass's loss, at w."""
    perturbed_loss: Tensor
    """The last pass's loss, at w + e."""
    grad_norm: Tensor | None
    """The norm that e was divided by: ``||g||_2`` over all perturbed parameters, for ASAM ``||T g||_2``. None for
    methods that compute neither (other p-norms, other directions)."""

    @property
    def sharpness(self) -> Tensor:
        """``L(w + e) - L(w)`` on this step's batch: the ascent sharpness, for one batch."""
        return self.perturbed_loss - self.loss


def record(loss: Any, perturbed_loss: Any, grad_norm: Tensor | None) -> LastAscent | None:
    """The record of one ascent; None if a closure did not return its loss as a number or a tensor of one element."""
    losses = _as_scalar(loss), _as_scalar(perturbed_loss)
    if losses[0] is None or losses[1] is None:
        return None
    # A copy: the backends compute every step's norm in the same memory.
    return LastAscent(losses[0], losses[1], None if grad_norm is None else grad_norm.clone())


def average(records: list[LastAscent | None]) -> LastAscent | None:
    """The means over a step's micro-batches; None if one of them has no record."""
    found = [r for r in records if r is not None]
    if not found or len(found) < len(records):
        return None
    norms = [r.grad_norm for r in found if r.grad_norm is not None]
    return LastAscent(
        torch.stack([r.loss for r in found]).mean(),
        torch.stack([r.perturbed_loss for r in found]).mean(),
        torch.stack(norms).mean() if len(norms) == len(found) else None,
    )


def _as_scalar(loss: Any) -> Tensor | None:
    if isinstance(loss, Tensor):
        return loss.detach().reshape(()) if loss.numel() == 1 else None
    return torch.tensor(float(loss)) if isinstance(loss, numbers.Real) else None
