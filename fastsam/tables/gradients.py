"""Gradients -> the rows of a table: read, checked and, where their layout differs from the parameter's, copied."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from operator import is_
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsam.distributed import is_distributed, local_of
from fastsam.spec import Row
from fastsam.tables.memory import (
    as_real,
    copy_into,
    find_shared,
    has_memory,
    is_exclusive,
    same_order,
)

if TYPE_CHECKING:
    from fastsam.tables.table import TensorTable


class Gradients:
    """Reads the gradients of one table, and owns the memory of those that have to be copied."""

    def __init__(self) -> None:
        self._scratch: dict[int, Tensor] = {}
        self.in_buffers: list[int] = []
        """The parameters whose gradients lie in a buffer of somebody else's: they stay there.

        Those of DTensors do not: the buffer that FSDP reduces gradients in is a new one in each backward.
        """

    def read(self, table: TensorTable) -> bool:
        """Reads the parameters' present gradients into the row GRAD, ``present`` and ``grad_dtype``.

        Returns:
            False, and the table has no gradients, if a parameter has changed.

        Raises:
            RuntimeError: a sparse gradient, or one of another shape or device; the caller drops what was read before.
        """
        found = table.reader.read_grads()
        if found is None:
            table.drop_grads()
            return False
        grads, addresses = found
        if addresses is None:
            self._examine(table, grads)
            return True
        version = table.versions[Row.GRAD]
        table.set_row(Row.GRAD, grads, addresses)
        if table.versions[Row.GRAD] != version:
            self.in_buffers = self._find_in_buffers(table, grads)
        return True

    def adopt(self, table: TensorTable, i: int) -> Tensor:
        """The present gradient as memory that nobody else writes to."""
        # What others refer to (a buffer, DDP's bucket) is written again by the next backward; scratch by the next read.
        if i in self._scratch and self._scratch[i] is table.grads[i]:
            return self._scratch.pop(i)
        is_ours = is_distributed(table.params[i]) or is_exclusive(table.grads, i)
        grad = table.grads[i]
        assert grad is not None
        if is_ours:
            return grad
        return torch.empty_like(table.values[i], dtype=grad.dtype).copy_(grad)

    def _find_in_buffers(self, table: TensorTable, grads: list[Tensor | None]) -> list[int]:
        params = table.params
        return [
            i for i, g in enumerate(grads) if g is not None and g._base is not None and not is_distributed(params[i])
        ]

    def _examine(self, table: TensorTable, grads: list[Tensor | None]) -> None:
        table.reader.expect_grads(usable=False)  # if this raises, the next ones are examined, too
        present = [(i, g) for i, g in enumerate(grads) if g is not None]
        for i, grad in present:
            _check(table, i, grad)
        ordinary = all(grad.dtype == table.params[i].dtype for i, grad in present)
        table.grad_dtype = table.dtype if ordinary else torch.promote_types(table.dtype, torch.float32)
        self.in_buffers = self._find_in_buffers(table, grads)
        laid_out = [None if g is None else self._lay_out(table, i, g) for i, g in enumerate(grads)]
        table.present = [i for i, _ in present]
        table.set_row(Row.GRAD, laid_out)
        table.reader.expect_grads(usable=all(map(is_, grads, laid_out)))

    def _lay_out(self, table: TensorTable, i: int, grad: Tensor) -> Tensor:
        """The gradient itself if it has the table's dtype and the parameter's layout, else a copy that does."""
        real = grad if not (grad.is_complex() or grad.is_neg()) else as_real(grad)
        if real.dtype == table.grad_dtype and same_order(real, table.values[i]) and has_memory(real):
            # A subclass may compute otherwise, or refuse to.
            return real if type(real) is Tensor else real.as_subclass(Tensor)
        if i not in self._scratch or self._scratch[i].dtype != table.grad_dtype:
            self._scratch[i] = torch.empty_like(table.values[i], dtype=table.grad_dtype)
        return copy_into(self._scratch[i], real, f"{table.name(i)}: its gradient")


def separate_grads(params: Iterable[Tensor]) -> None:
    """Gives gradients that share an element with another one, or with themselves, memory of their own.

    ``torch.autograd.grad`` may return one tensor for two parameters, or an expanded one. A gradient that is to be
    written to, for a base that reads it there, must be one parameter's alone.
    """
    owners = [param for param in params if param.grad is not None and param.grad.layout is torch.strided]
    grads = [local_of(param.grad) for param in owners]
    storages = {grad.untyped_storage()._cdata for grad in grads}
    if len(storages) == len(grads) and not any(map(_is_read_only, grads)):
        return
    copied = [param for param, grad in zip(owners, grads, strict=True) if _is_read_only(grad)]
    rest = [(p, g) for p, g in zip(owners, grads, strict=True) if not _is_read_only(g) and has_memory(g)]
    if _are_apart([grad for _, grad in rest]):
        rest = []
    while (pair := find_shared([grad for _, grad in rest])) is not None:
        copied.append(rest.pop(max(pair))[0])
    for param in copied:
        assert param.grad is not None
        param.grad = param.grad.clone(memory_format=torch.contiguous_format)


def _are_apart(grads: Sequence[Tensor]) -> bool:
    """Whether all are contiguous, and none reaches into another one, as DDP's views of a bucket do not."""
    if not all(grad.is_contiguous() for grad in grads):
        return False
    spans = sorted((grad.data_ptr(), grad.data_ptr() + grad.numel() * grad.element_size()) for grad in grads)
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def _is_read_only(grad: Tensor) -> bool:
    """Whether torch refuses to write to it: two elements share memory, or it is an inference tensor."""
    return bool(torch._debug_has_internal_overlap(grad) == 1) or grad.is_inference()


def _check(table: TensorTable, i: int, grad: Tensor) -> None:
    value = table.values[i]
    if grad.layout is not torch.strided:
        raise RuntimeError(
            f"{table.name(i)}: sparse gradients are not supported; use dense ones (torch.nn.Embedding(sparse=False))"
        )
    if grad.device != value.device:
        raise RuntimeError(f"{table.name(i)}: its gradient is on {grad.device}, the parameter on {value.device}")
    if grad.shape != table.locals[i].shape:
        raise RuntimeError(f"{table.name(i)}: its gradient has shape {tuple(grad.shape)}")
    if grad.is_complex() != table.params[i].is_complex():
        raise RuntimeError(f"{table.name(i)}: its gradient has dtype {grad.dtype}")
