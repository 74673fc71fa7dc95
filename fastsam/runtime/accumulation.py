"""Gradients of earlier micro-batches that ``step(closure)`` would use in its first pass and lose in the second."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor


class AccumulationWatch:
    """Warns once if a step's closure adds to gradients that somebody computed before the step.

    One parameter stands for all. Between two steps nothing is computed in normal use: its gradient is the one that the
    last step left, at most zeroed in place. Otherwise a hook sees whether the closure clears it first.
    """

    def __init__(self) -> None:
        self._is_over = False
        self._param: Tensor | None = None
        self._left: tuple[weakref.ref[Tensor] | None, int] = None, 0
        self._hook: Any = None
        self._is_found = False

    @contextmanager
    def watching(self, params: Iterable[Tensor]) -> Iterator[None]:
        """A block in which a step's first closure runs."""
        self._begin(params)
        try:
            yield
        finally:
            self._end_closure()

    def _begin(self, params: Iterable[Tensor]) -> None:
        if self._is_over:
            return
        param = self._param
        if param is None:
            param = next((p for p in params if p.grad is not None and p.requires_grad), None)
        grad = None if param is None else param.grad
        left, version = self._left
        is_left = left is not None and grad is left()
        if param is None or grad is None or (is_left and grad._version <= version + 1):
            return
        before = grad._version

        def note(_: Tensor) -> None:
            self._is_found = self._is_found or (param.grad is grad and grad._version == before)

        self._hook = param.register_hook(note) if param.requires_grad else None

    def _end_closure(self) -> None:
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        if self._is_found:
            self._is_over = True
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
        self._left = (None, 0) if grad is None else (weakref.ref(grad), grad._version)
