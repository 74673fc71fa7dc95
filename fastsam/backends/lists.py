"""What the ``foreach`` backend does with lists of tensors: conversion, sums of squares, selection without a wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsam.backends.scalars import Scalar
from fastsam.tables import TensorTable

Tensors = list[Tensor]

# Elements whose squares are added up at a time on the CPU: in float64 they fit into the cache, and one thread adds
# them up, so that the sum does not depend on the number of threads.
PIECE = 32768

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def take(tensors: Sequence[Tensor | None], indices: Sequence[int]) -> Tensors:
    """The tensors at ``indices``, which are there."""
    return [tensors[i] for i in indices]  # type: ignore[misc]


def convert(tensors: Tensors, dtype: torch.dtype, *, copy: bool = False) -> Tensors:
    """The tensors in ``dtype``: themselves, if they have it and need not be copied."""
    if not tensors or (not copy and tensors[0].dtype == dtype):
        return tensors
    copies = [torch.empty_like(t, dtype=dtype) for t in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


def matching(tensors: Tensors, like: Tensors) -> Tensors:
    """``tensors`` with the strides of ``like``, which may differ only where they mean nothing (a size of 1).

    The multi-tensor kernels compare strides.
    """
    return [
        t if t.stride() == other.stride() else t.as_strided(other.shape, other.stride(), t.storage_offset())
        for t, other in zip(tensors, like, strict=True)
    ]


def store_(targets: Tensors, results: Tensors, stays: Tensor | None) -> None:
    """``targets <- results``, unless ``stays`` (0-dim bool). ``results`` may be overwritten.

    On an accelerator bits are selected by integer arithmetic: exact, without a wait, and without a launch per tensor.
    """
    if stays is not None and stays.device.type == "cpu" and bool(stays):
        return
    pairs = [pair for pair in zip(targets, results, strict=True) if pair[0] is not pair[1]]
    if not pairs:
        return
    targets, results = [target for target, _ in pairs], [result for _, result in pairs]
    if stays is None or stays.device.type == "cpu":
        torch._foreach_copy_(targets, results)
        return
    integers = _INTEGERS[targets[0].element_size()]
    new = [t.view(integers) for t in convert(results, targets[0].dtype)]
    old = [t.view(integers) for t in targets]
    torch._foreach_sub_(new, old)
    torch._foreach_mul_(new, stays.logical_not().to(integers))
    torch._foreach_add_(old, new)


def multiply(factors: Tensor, tensors: Tensors) -> Tensors:
    """Each tensor times its factor; zeros where that is 0, as 0 * inf would be NaN."""
    if factors.device.type == "cpu":
        numbers = factors.tolist()
        products = list(torch._foreach_mul(tensors, numbers))
        return [t if number != 0 else torch.zeros_like(t) for number, t in zip(numbers, products, strict=True)]
    factors = factors.to(tensors[0].dtype)
    products = list(torch._foreach_mul(tensors, list(factors.unbind())))
    return [torch.where(none, 0.0, product) for none, product in zip((factors == 0).unbind(), products, strict=True)]


def add_scaled_(tensors: Tensors, others: Tensors, factor: Scalar) -> None:
    """``tensors += factor * others``."""
    if isinstance(factor, Tensor):
        torch._foreach_add_(tensors, list(torch._foreach_mul(others, factor.to(others[0].dtype))))
    else:
        torch._foreach_add_(tensors, others, alpha=factor)


def in_dtype(value: Scalar, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value


class _Batch(NamedTuple):
    """Small tensors whose squares are added up together: where each has its place in the scratch memory."""

    indices: list[int]
    views: Tensors
    more_views: Tensors
    count: int


class Norms:
    """L2 norms on the CPU in float64, whose conversions do not leave the cache; attached to a table.

    ``torch._foreach_norm(dtype=torch.float64)`` converts one element at a time there.
    """

    def __init__(self, table: TensorTable) -> None:
        self._scratch = torch.empty((2, PIECE), dtype=torch.float64, device="cpu")
        self._batches: dict[tuple[int, ...], tuple[list[_Batch], list[int]]] = {}

    def of(self, table: TensorTable, indices: list[int], *, adaptive: bool) -> Iterator[Tensor]:
        """0-dim norms, of all pieces of the gradients (``adaptive``: times the weights) at ``indices``."""
        batches, large = self._cut(table, indices)
        scratch, more = self._scratch
        for batch in batches:
            torch._foreach_copy_(batch.views, take(table.grads, batch.indices))
            if adaptive:
                torch._foreach_copy_(batch.more_views, take(table.values, batch.indices))
                scratch[: batch.count].mul_(more[: batch.count])
            yield torch.linalg.vector_norm(scratch[: batch.count])
        for i in large:
            yield from self._of_pieces(table.values[i], take(table.grads, [i])[0], adaptive)

    def _of_pieces(self, value: Tensor, grad: Tensor, adaptive: bool) -> Iterator[Tensor]:
        count = value.numel()
        grads, values = (t.as_strided((count,), (1,), t.storage_offset()).split(PIECE) for t in (grad, value))
        for grad_piece, value_piece in zip(grads, values, strict=True):
            if grad.dtype == torch.float64 and not adaptive:
                yield torch.linalg.vector_norm(grad_piece)
                continue
            scratch, more = self._scratch[:, : len(grad_piece)]
            scratch.copy_(grad_piece)
            if adaptive:
                scratch.mul_(more.copy_(value_piece))
            yield torch.linalg.vector_norm(scratch)

    def _cut(self, table: TensorTable, indices: list[int]) -> tuple[list[_Batch], list[int]]:
        key = tuple(indices)
        if key not in self._batches:
            small = [i for i in indices if 0 < table.values[i].numel() <= PIECE // 4]
            large = [i for i in indices if table.values[i].numel() > PIECE // 4]
            self._batches = {key: ([self._batch(table, part) for part in _parts(table, small)], large)}
        return self._batches[key]

    def _batch(self, table: TensorTable, indices: list[int]) -> _Batch:
        starts, count = [], 0
        for i in indices:
            starts.append(count)
            count += table.values[i].numel()
        views, more = (
            [row.as_strided(v.shape, v.stride(), row.storage_offset() + start) for v, start in zip(values, starts)]
            for row in self._scratch
            for values in [take(table.values, indices)]
        )
        return _Batch(indices, views, more, count)


def _parts(table: TensorTable, indices: list[int]) -> Iterator[list[int]]:
    """The indices in runs of at most ``PIECE`` elements."""
    part: list[int] = []
    count = 0
    for i in indices:
        size = table.values[i].numel()
        if count + size > PIECE:
            yield part
            part, count = [], 0
        part.append(i)
        count += size
    if part:
        yield part
