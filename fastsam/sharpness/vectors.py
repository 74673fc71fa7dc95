"""Lists of tensors, one for each parameter, as vectors. The tensors may be DTensors; numbers are then all ranks'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.distributed import placed_like, whole_of

Vector = list[Tensor]


def dot(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """``<x, y>``, summed in float64."""
    return sum(float(whole_of((x * y).sum(dtype=torch.float64))) for x, y in zip(xs, ys, strict=True))


def norm(xs: Sequence[Tensor]) -> float:
    """``||x||_2``."""
    return dot(xs, xs) ** 0.5


def scaled(xs: Sequence[Tensor], factor: float) -> Vector:
    """``factor * x``."""
    return [factor * x for x in xs]


def combined(xs: Sequence[Tensor], a: float, ys: Sequence[Tensor], b: float) -> Vector:
    """``a * x + b * y``."""
    return [a * x + b * y for x, y in zip(xs, ys, strict=True)]


def times(xs: Sequence[Tensor], ys: Sequence[Tensor] | None) -> Vector:
    """``x * y`` element by element; ``ys=None``: ``x``."""
    return list(xs) if ys is None else [x * y for x, y in zip(xs, ys, strict=True)]


def normal(params: Sequence[Tensor], generator: torch.Generator) -> Vector:
    """A vector from N(0, I); the same however the parameters are sharded, and on every device."""
    return [_placed(torch.randn(p.shape, generator=generator), p) for p in params]


def flatten(xs: Sequence[Tensor]) -> Tensor:
    """All elements as one float64 tensor on the CPU."""
    return torch.cat([whole_of(x).detach().reshape(-1).to("cpu", torch.float64) for x in xs])


def unflatten(flat: Tensor, params: Sequence[Tensor]) -> Vector:
    """The inverse of :func:`flatten`: tensors of the parameters' shapes, dtypes and placements."""
    parts = flat.split([p.numel() for p in params])
    return [_placed(part.reshape(p.shape), p) for part, p in zip(parts, params, strict=True)]


def size(params: Sequence[Tensor]) -> int:
    """The number of elements, over all ranks."""
    return sum(p.numel() for p in params)


def _placed(whole: Tensor, param: Tensor) -> Tensor:
    """``whole``, which is the same on all ranks, with the dtype, device and placements of ``param``."""
    return placed_like(param, whole.to(param.device, param.dtype))
