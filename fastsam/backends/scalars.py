"""Arithmetic with an option that may be a number or a 0-dim tensor, without waiting for an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on ``dtype`` is done in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_scalar(value: Scalar, device: torch.device) -> Scalar:
    """``value`` for tensors on ``device``: a number where that needs no waiting, else a float64 tensor there."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.device.type == "cpu":
        return float(value)
    return value.detach().reshape(()).to(device, torch.float64, non_blocking=True)


def ascent_scale(rho: Scalar, maximize: bool, norm: Tensor) -> Tensor:
    """``rho / (norm + 1e-12)``, signed; 0 where the norm is not finite, which callers take as "leave w alone"."""
    scale = rho / (norm + 1e-12)
    return torch.where(torch.isfinite(norm), -scale if maximize else scale, torch.zeros_like(norm))


def add_scaled_(tensor: Tensor, other: Tensor, factor: Scalar) -> Tensor:
    """``tensor += factor * other``; with a number, by the same instruction as torch.optim's for-loops."""
    if isinstance(factor, Tensor):
        return tensor.add_(other * factor.to(other.dtype))
    return tensor.add_(other, alpha=factor)
