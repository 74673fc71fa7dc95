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
        self._kept: list[tuple[Tensor, Tensor]] | None = None
        self._spare: dict[Tensor, Tensor] = {}

    def save(self) -> None:
        """Notes the statistics after the first pass."""
        buffers = [
            buffer
            for module in self.model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in (module.running_mean, module.running_var, module.num_batches_tracked)
            if buffer is not None
        ]
        self._spare = {b: s for b, s in self._spare.items() if s.device == b.device and s.dtype == b.dtype}
        self._kept = [(b, self._spare.setdefault(b, torch.empty_like(b))) for b in dict.fromkeys(buffers)]
        for buffer, copy in self._kept:
            copy.copy_(buffer)

    def restore(self) -> None:
        """Puts them back; without a :meth:`save` since the last call, nothing happens."""
        kept, self._kept = self._kept, None
        for buffer, copy in kept or ():
            buffer.copy_(copy)
