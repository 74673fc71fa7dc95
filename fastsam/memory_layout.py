"""How a strided tensor lies in memory: dense or with gaps, in which order, and whether that has changed."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Every step asks thousands of tensors where they are and how they look, and Python's own way to ask takes longer than
# the arithmetic on a small model. Neither helper is a public name of torch, so nothing depends on them: where one is
# missing, plain Python does the same.
try:
    # Compares dtype, device, shape and strides of many tensors in one call.
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None
try:
    from torch._C._dynamo.guards import _torchinductor_pyobject_tensor_data_ptr as _data_ptr_function

    from fastsam import _C
except ImportError:
    _C = None  # type: ignore[assignment]

# Between two tensors in one allocation: a cache line, and wide enough for every vector access.
ALIGNMENT_BYTES = 64


def addresses(tensors: list[Tensor] | list[Tensor | None]) -> bytes:
    """Where the first element of each tensor is, as int64s; 0 for None."""
    if _C is not None:
        return _C.addresses(tensors, _data_ptr_function)
    return array("q", [0 if t is None else t.data_ptr() for t in tensors]).tobytes()


def identities(objects: list[Any]) -> bytes:
    """Which objects a list holds, as int64s; they mean something only while the objects live."""
    return _C.identities(objects) if _C is not None else array("q", map(id, objects)).tobytes()


def nested_identities(entries: Mapping[Any, dict[str, Any]], names: tuple[str, ...]) -> bytes:
    """Which keys, dicts and values under ``names`` a dict of dicts holds; 0 for a name that a dict lacks."""
    if _C is not None and isinstance(entries, dict):
        return _C.nested_identities(entries, names)
    numbers = array("q")
    for key, inner in entries.items():
        numbers.extend([id(key), id(inner), *(id(inner[name]) if name in inner else 0 for name in names)])
    return numbers.tobytes()


class Fingerprint:
    """What some tensors looked like (dtype, device, shape, strides), to be compared with others later."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._expected = _describe(tensors)
        self._guards = _guards(tensors)

    def matches(self, tensors: Sequence[Tensor]) -> bool:
        """Whether ``tensors`` (none of them None) look the same, one by one."""
        if self._guards is not None and self._guards.check(*tensors):
            return True
        if _describe(tensors) != self._expected:
            return False
        # The guards also compare what does not matter here, such as requires_grad and an autocast block.
        self._guards = _guards(tensors)
        return True


def _describe(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [
        (t.dtype, t.device, t.shape, t.stride() if t.layout is torch.strided else t.layout, t.is_conj(), t.is_neg())
        for t in tensors
    ]


def _guards(tensors: Sequence[Tensor]) -> Any:
    if TensorGuards is None or not tensors or any(t.layout is not torch.strided for t in tensors):
        return None
    return TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    )


def as_real(tensor: Tensor) -> Tensor:
    """The tensor itself, or a complex one as pairs of reals (shape ``(..., 2)``)."""
    if not tensor.is_complex():
        return tensor.resolve_neg()
    return torch.view_as_real(tensor.resolve_conj().resolve_neg())


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one run of memory, in some order of the dimensions.

    Raises:
        ValueError: two elements share memory (an expanded or overlapping tensor).
    """
    reach = 0  # the largest offset that the dimensions so far lead to
    expected = 1
    dense = True
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size <= 1:
            continue
        if stride <= reach:
            if tensor.numel() == 0:
                break
            raise ValueError("its elements overlap in memory (an expanded tensor?); give it memory of its own")
        dense = dense and stride == expected
        expected = stride * size
        reach += stride * (size - 1)
    return dense or tensor.numel() <= 1


def same_order(tensor: Tensor, like: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same places, counted from their first."""
    # The stride of a dimension of size 1 is never used and may be anything.
    return tensor.numel() <= 1 or all(
        size == 1 or ours == theirs
        for size, ours, theirs in zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    )


def allocate_like(tensors: Sequence[Tensor], *, zero: bool) -> tuple[Tensor, list[Tensor]]:
    """One allocation that holds a tensor like each of ``tensors`` (dense, of one dtype and device).

    Returns:
        The allocation, a 1-D tensor, and views of it with the shapes and strides of ``tensors``.
    """
    first = tensors[0]
    step = ALIGNMENT_BYTES // first.element_size()
    starts, total = [], 0
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.numel() // step) * step
    memory = (torch.zeros if zero else torch.empty)(total, dtype=first.dtype, device=first.device)
    views = [memory.as_strided(t.shape, t.stride(), start) for t, start in zip(tensors, starts, strict=True)]
    return memory, views
