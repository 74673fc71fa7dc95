"""Memory layouts of strided tensors, and which tensors FastSAM can train."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_not
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastsam.distributed import local_of

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Of tensors in one allocation: a cache line, which suffices for every vector access.
ALIGNMENT_BYTES = 64


def as_real(tensor: Tensor) -> Tensor:
    """The tensor itself, or a complex one as pairs of reals (shape ``(..., 2)``)."""
    if not tensor.is_complex():
        return tensor.resolve_neg()
    return torch.view_as_real(tensor.resolve_conj().resolve_neg())


def has_memory(tensor: Tensor) -> bool:
    """Whether its elements lie at its address: a wrapper subclass, say, has none, nor has a ``ZeroTensor``."""
    return tensor.data_ptr() != 0 or tensor.numel() == 0


def copy_into(memory: Tensor, tensor: Tensor, name: str) -> Tensor:
    """Copies the elements of ``tensor``, also of one without an address, into ``memory``.

    Raises:
        RuntimeError: there are none to be read; ``name`` says what it is.
    """
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter)
    if is_plain and not has_memory(tensor) and not tensor._is_zerotensor():
        raise RuntimeError(f"{name} has no memory (its storage was freed or resized); give it memory or set it to None")
    memory.copy_(tensor)
    return memory


def _references(tensors: Sequence[Any], i: int) -> tuple[int, int, int]:
    """Who refers to ``tensors[i]``: in Python, in C++, and to its storage."""
    storage = torch._C._storage_Use_Count(tensors[i].untyped_storage()._cdata)
    return sys.getrefcount(tensors[i]), tensors[i]._use_count(), storage


def _sample_references() -> tuple[int, int, int] | None:
    """What :func:`_references` says of a gradient that only its parameter and one list have."""
    if not hasattr(Tensor, "_use_count"):
        return None
    param = torch.nn.Parameter(torch.zeros((), device="cpu"))
    param.grad = torch.zeros((), device="cpu")
    return _references([param.grad], 0)


_EXCLUSIVE = _sample_references()


def is_exclusive(grads: Sequence[Any], i: int) -> bool:
    """Whether only its parameter and the list ``grads`` have a gradient, so that nobody can write to it later.

    Memory that torch has not allocated (NumPy's, say), or that processes share, cannot be resized. Writes to inference
    tensors are not counted.
    """
    if _EXCLUSIVE is None or grads[i]._base is not None or grads[i].is_inference():
        return False
    if _references(grads, i) != _EXCLUSIVE:
        return False
    return bool(grads[i].untyped_storage().resizable())


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one contiguous range of memory, in some order of the dimensions.

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


def find_shared(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The indices of two of ``tensors`` that share the memory of an element; None if no two do.

    Tensors may interleave, as two columns of one matrix do. Each alone has passed :func:`is_dense`.
    """
    run: list[int] = []  # tensors whose address ranges form a chain of overlaps
    device, end = "", 0
    dense_end, dense_owner = 0, 0
    for where, start, i in sorted((str(t.device), t.data_ptr(), i) for i, t in enumerate(tensors) if t.numel() > 0):
        tensor = tensors[i]
        if where != device or start >= end:
            if (pair := _find_shared_element([tensors[i] for i in run])) is not None:
                return run[pair[0]], run[pair[1]]
            run, device, end, dense_end = [], where, 0, 0
        if start < dense_end:
            return dense_owner, i
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        run.append(i)
        end = max(end, start + (last + 1) * tensor.element_size())
        if is_dense(tensor):
            dense_end, dense_owner = start + (last + 1) * tensor.element_size(), i
    pair = _find_shared_element([tensors[i] for i in run])
    return None if pair is None else (run[pair[0]], run[pair[1]])


def _find_shared_element(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The same for tensors whose address ranges overlap: compares the addresses of all elements."""
    if len(tensors) < 2:
        return None
    places, owners = [], []
    for i, tensor in enumerate(tensors):
        place = torch.tensor(tensor.data_ptr(), device="cpu")
        # Every two bytes of an element: elements of another dtype may begin in the middle of one.
        steps = [stride * tensor.element_size() for stride in tensor.stride()]
        for length, step in zip((*tensor.shape, tensor.element_size() // 2), (*steps, 2), strict=True):
            place = place.unsqueeze(-1) + torch.arange(length, device="cpu") * step
        places.append(place.flatten())
        owners.append(torch.full((place.numel(),), i, device="cpu"))
    order = torch.cat(places).argsort(stable=True)
    sorted_places = torch.cat(places)[order]
    doubled = (sorted_places[1:] == sorted_places[:-1]).nonzero()
    if len(doubled) == 0:
        return None
    one, other = torch.cat(owners)[order[doubled[0, 0] : doubled[0, 0] + 2]].tolist()
    return one, other


def same_order(tensor: Tensor, like: Tensor) -> bool:
    """Whether two tensors of the same shape have the same strides where they matter."""
    # The stride of a dimension of size 1 is never used and may have any value.
    return tensor.numel() <= 1 or all(
        size == 1 or ours == theirs
        for size, ours, theirs in zip(tensor.shape, tensor.stride(), like.stride(), strict=True)
    )


def allocate_like(tensors: Sequence[Tensor], *, zero: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
    """A tensor like each of ``tensors`` (dense, of one dtype and device), as views of one allocation."""
    device, dtype = tensors[0].device, dtype or tensors[0].dtype
    step = ALIGNMENT_BYTES // dtype.itemsize
    starts, total = [], 0
    for tensor in tensors:
        starts.append(total)
        total += -(-tensor.numel() // step) * step
    memory = (torch.zeros if zero else torch.empty)(total, dtype=dtype, device=device)
    return [memory.as_strided(t.shape, t.stride(), start) for t, start in zip(tensors, starts, strict=True)]


class StateMemory:
    """Allocates the tensors of an optimizer's ``state``: each has its own storage, all share one version counter.

    With thousands of small tensors, checking them and incrementing their versions would take longer than the update.
    So their PyTorch objects are allocated next to each other, before any elements, and one increment counts for all:
    ``detach()`` passes the version counter on, and assigning ``.data`` keeps it.
    """

    RUN = 64

    def __init__(self) -> None:
        self._counters: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self._without_memory: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}

    def allocate(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialized memory for a tensor with the shape and the strides of ``like``, which is dense."""
        key = like.device, dtype
        known = self._without_memory.setdefault(key, [])
        if not known:
            counter = self._counters.setdefault(key, torch.empty(0, dtype=dtype, device=like.device))
            known += [counter.detach() for _ in range(self.RUN)]
            for tensor in known:
                tensor.data = torch.empty(0, dtype=dtype, device=like.device)
        made = known.pop(0)
        return made.resize_(like.numel()).as_strided_(like.shape, like.stride())

    def distinct(self, tensors: list[Tensor]) -> list[Tensor]:
        """Tensors that have the version counters of ``tensors``, a shared one once."""
        counters = list(self._counters.values())
        versions = [tensor._version for tensor in tensors]
        torch.autograd.graph.increment_version(counters)
        others = [tensor for tensor, version in zip(tensors, versions, strict=True) if tensor._version == version]
        return others + (counters if len(others) < len(tensors) else [])


_grad, _requires_grad = attrgetter("grad"), attrgetter("requires_grad")


def have_grads(params: Iterable[Tensor]) -> bool:
    """Whether any has a gradient."""
    return any(map(is_not, map(_grad, params), itertools.repeat(None)))


def any_may_move(params: Sequence[Tensor]) -> bool:
    """Whether :func:`may_move` says so of any."""
    return any(map(_requires_grad, params)) or have_grads(params)


def may_move(param: Tensor) -> bool:
    """Whether an optimizer has anything to do with the parameter."""
    return param.requires_grad or param.grad is not None


def check_parameter(param: Tensor, index: int) -> None:
    """Raises if FastSAM cannot train ``param``, the ``index``-th of the flattened groups."""
    if is_lazy(param):
        return  # no memory yet, and no gradient
    name = f"parameter {index} (shape {tuple(param.shape)})"
    param = local_of(param)
    if is_traceable_wrapper_subclass(param):
        raise TypeError(
            f"{name}: {type(param).__name__} parameters are not supported; pass plain tensors or DTensors of them"
        )
    if param.layout is not torch.strided:
        raise ValueError(f"{name}: sparse parameters are not supported; use a dense one")
    if param.device.type == "meta":
        raise ValueError(f"{name}: it is on the meta device; give it memory (module.to_empty(device=...)) first")
    real = param.dtype.to_real() if param.is_complex() else param.dtype
    if real not in SUPPORTED_DTYPES:
        raise ValueError(f"{name}: dtype {param.dtype} is not supported; use float32, float64, bfloat16 or float16")
    if param.is_inference():
        raise ValueError(f"{name}: it is an inference tensor; make the model outside of torch.inference_mode()")
    if not has_memory(param):
        raise ValueError(
            f"{name}: it has no memory (its storage was freed, or it is a fake tensor); give it some first"
        )
    try:
        is_dense(param)
    except ValueError as reason:
        raise ValueError(f"{name}: {reason}") from None


def check_disjoint(params: Sequence[Tensor]) -> None:
    """Raises ValueError if two of the flattened groups' parameters share memory: neither could be restored.

    Frozen ones without a gradient are not written to.
    """
    indices = [i for i, param in enumerate(params) if may_move(param) and not is_lazy(param)]
    if (pair := find_shared([local_of(params[i]) for i in indices])) is not None:
        one, other = sorted(indices[i] for i in pair)
        raise ValueError(
            f"parameter {other} (shape {tuple(params[other].shape)}) shares memory with parameter {one} (shape "
            f"{tuple(params[one].shape)}); tie weights by using one Parameter twice, and pass it once"
        )
