"""Batch-norm running statistics move in the first pass only: the second sees other weights than those that stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RunningStatistics:
    """Keeps the running statistics of a model's batch-norm layers over the second pass.

    The buffers themselves are copied, and copied back in place: so it does not matter how a layer computes them
    (``momentum=None``, ``SyncBatchNorm``, a subclass with a forward of its own), and a compiled model is not compiled
    again, as it would be if an attribute of its layers changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._spare: dict[Tensor, Tensor] = {}

    def save(self) -> None:
        """Notes the statistics after the first pass."""
        buffers = [
            (module, name, buffer)
            for module in self.model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for name in ("running_mean", "running_var", "num_batches_tracked")
            if (buffer := getattr(module, name)) is not None
        ]
        spare, self._spare = self._spare, {}
        for _, _, buffer in buffers:
            copy = spare.get(buffer)
            fits = copy is not None and copy.device == buffer.device and copy.dtype == buffer.dtype
            self._spare[buffer] = copy if copy is not None and fits else torch.empty_like(buffer)
            self._spare[buffer].copy_(buffer)
        self._kept = [(module, name, buffer, self._spare[buffer]) for module, name, buffer in buffers]

    def restore(self) -> None:
        """Puts them back; without a :meth:`save` since the last call, nothing happens."""
        kept, self._kept = self._kept, []
        for module, name, buffer, copy in kept:
            present = getattr(module, name)
            if present is not None and (present.device != buffer.device or present.dtype != buffer.dtype):
                present.copy_(copy)  # the model was moved or cast
                continue
            buffer.copy_(copy)
            if present is not buffer:  # a layer that makes new tensors instead of writing to its buffers
                setattr(module, name, buffer)
