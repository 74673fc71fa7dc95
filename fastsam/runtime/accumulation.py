"""Gradients of earlier micro-batches that ``step(closure)`` would use in its first pass and lose in the second."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class AccumulationWatch:
    """Warns once if a step's closure adds to gradients that were computed before the step.

    One parameter stands for all. In normal use the closure replaces its gradient, or it has been zeroed in place since
    the last step. Otherwise a hook sees in the next step whether the closure clears it first.
    """

    def __init__(self) -> None:
        self._is_over = False
        self._param: Tensor | None = None
        # The gradient's storage stands for it: torch.utils.swap_tensors refuses tensors with weak references.
        self._left: tuple[weakref.ref[torch.UntypedStorage] | None, int] = None, 0
        self._unchanged: Tensor | None = None
        """In a closure: the gradient that the last step has left, if it is as it was."""
        self._is_suspect = False
        self._hook: Any = None
        self._found: Tensor | None = None

    def forget(self) -> None:
        """The parameters are others: the one that stood for all may be none of them."""
        self._param, self._left = None, (None, 0)

    def begin_closure(self, params: Iterable[Tensor]) -> None:
        """A step's first closure is about to run."""
        if self._is_over:
            return
        param = self._param
        if param is None:
            param = next((p for p in params if p.grad is not None and p.requires_grad), None)
        grad = None if param is None else param.grad
        if param is None or grad is None or not param.requires_grad or not _is_counted(grad):
            return
        left, version = self._left
        before = grad._version
        if left is not None and grad.untyped_storage() is left() and before <= version + 1:
            if before != version:
                return  # zeroed in place
            if not self._is_suspect:
                self._unchanged = grad
                return

        def note(_: Tensor) -> None:
            if param.grad is grad and grad._version == before and self._found is None:
                self._found = grad.clone()

        self._hook = param.register_hook(note)

    def end_closure(self) -> None:
        """It has run, or raised an exception."""
        unchanged, self._unchanged = self._unchanged, None
        if self._hook is None:
            # If the closure has written to it: zeros and a sum, or a sum alone?
            is_same = unchanged is not None and self._param is not None and self._param.grad is unchanged
            self._is_suspect = is_same and unchanged is not None and unchanged._version != self._left[1]
            return
        self._hook.remove()
        self._hook, self._is_suspect = None, False
        found, self._found = self._found, None
        # Read only once: zeroing a gradient by .data leaves no trace in the version counter.
        self._is_over = found is not None
        if found is not None and bool(found.any()):
            warnings.warn(
                "step(closure) has added to gradients of earlier backward passes: its second pass sees the last "
                "micro-batch alone. Clear the gradients in the closure; to accumulate, use step(closures=[...]) with "
                "one closure per micro-batch, or first_step() and second_step() after all backward passes of each "
                "phase (see fastsam.integrations for trainers)",
                UserWarning,
                stacklevel=4,
            )

    def end_step(self, params: Iterable[Tensor]) -> None:
        """A step has used the present gradients."""
        if self._is_over:
            return
        if self._param is None:
            trained = [p for p in params if p.grad is not None and p.requires_grad]
            self._param = min(trained, key=Tensor.numel, default=None)
        grad = None if self._param is None else self._param.grad
        if grad is None or not _is_counted(grad):
            self._left = None, 0
        else:
            self._left = weakref.ref(grad.untyped_storage()), grad._version


def _is_counted(grad: Tensor) -> bool:
    """Whether it has a storage and a version counter."""
    return grad.layout is torch.strided and not grad.is_inference()
