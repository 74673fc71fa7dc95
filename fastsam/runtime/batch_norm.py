"""Batch-norm running statistics are updated in the first pass only: the second pass runs at perturbed weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastsam.runtime.grad_mode import untracked


class RunningStatistics:
    """Preserves the running statistics of a model's batch-norm layers during the second pass.

    The buffers are copied, and copied back in place. This works however a layer computes them (``momentum=None``,
    ``SyncBatchNorm``, a subclass with its own forward), and does not recompile a compiled model, as changing an
    attribute of its layers would.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._saved: list[tuple[nn.Module, str, Tensor, Tensor]] = []
        self._spare: dict[Tensor, Tensor] = {}

    @untracked
    def save(self) -> None:
        """Saves the statistics after the first pass."""
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
        _copy_all((copy, buffer) for buffer, copy in self._spare.items())
        self._saved = [(module, name, buffer, self._spare[buffer]) for module, name, buffer in buffers]

    def restore(self) -> None:
        """Restores the saved statistics; does nothing without a :meth:`save` since the last call."""
        saved, self._saved = self._saved, []
        copies = []
        for module, name, buffer, copy in saved:
            present = getattr(module, name)
            if present is not None and (present.device != buffer.device or present.dtype != buffer.dtype):
                present.copy_(copy)  # the model was moved or cast
                continue
            copies.append((buffer, copy))
            if present is not buffer:  # a layer that replaces its buffers instead of writing to them
                setattr(module, name, buffer)
        _copy_all(copies)


@torch.no_grad()
def _copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies the second of each pair to the first: on a GPU with one launch per device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        targets, sources = alike.setdefault((target.device, target.dtype), ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in alike.values():
        torch._foreach_copy_(targets, sources)
