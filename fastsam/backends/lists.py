"""What the ``foreach`` backend does with lists of tensors: conversion, sums of squares, selection without a wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsam.backends.scalars import Scalar

Tensors = list[Tensor]

# Elements whose squares are added up at a time on the CPU. With more, PyTorch divides them among threads: the sum would
# depend on their number, and takes several times as long where the dtypes of argument and result differ.
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


def copy_bits_(targets: Tensors, sources: Tensors) -> None:
    """``targets <- sources``, of one dtype, bit for bit: on CUDA, PyTorch alters NaNs when it copies 16-bit lists."""
    integers = _INTEGERS[targets[0].element_size()]
    torch._foreach_copy_([t.view(integers) for t in targets], [t.view(integers) for t in sources])


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


def norms(tensors: Tensors, factors: Tensors | None) -> Tensors:
    """0-dim L2 norms in float64, of all pieces of the tensors (times ``factors``, which lie in memory as they do)."""
    if tensors[0].device.type != "cpu":
        if factors is not None:
            tensors = list(torch._foreach_mul(convert(factors, torch.float64), tensors))
        return list(torch._foreach_norm(tensors, dtype=torch.float64))
    pieces = list(_pieces(tensors))
    if factors is None:
        return list(torch._foreach_norm(pieces, dtype=torch.float64))
    pairs = zip(pieces, _pieces(factors), strict=True)
    return [torch.linalg.vector_norm(factor.double() * piece) for piece, factor in pairs]


def _pieces(tensors: Tensors) -> Iterator[Tensor]:
    for tensor in tensors:
        if tensor.numel() <= PIECE:
            yield tensor
        else:
            yield from tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).split(PIECE)
