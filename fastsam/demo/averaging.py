"""Stochastic weight averaging over the last epochs (Izmailov et al., UAI 2018), with torch.optim.swa_utils."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from fastsam.demo.data import NoisyDigits

# The share of the epochs whose weights are averaged, and their learning rate in units of the one before.
SHARE = 0.25
RATE = 1.0


class WeightAverage:
    """The average of a model's weights after each of the last epochs, at a constant learning rate."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, epochs: int, data: NoisyDigits, batch_size: int) -> None:
        self._model, self._optimizer = model, optimizer
        self._average = AveragedModel(model)
        self._first = epochs - max(1, round(SHARE * epochs))
        self._batches = data.train_images.split(batch_size)
        self._schedule: SWALR | None = None

    def has_begun(self, epoch: int) -> bool:
        """Whether ``epoch`` (from 0) is one of the last."""
        return epoch >= self._first

    def after_epoch(self, epoch: int) -> nn.Module:
        """Takes the present weights into the average, and returns it; before that, the model itself."""
        if not self.has_begun(epoch + 1):
            return self._model
        if self._schedule is None:
            lr = self._optimizer.param_groups[0]["lr"]
            self._schedule = SWALR(self._optimizer, swa_lr=RATE * lr, anneal_epochs=1)
        self._schedule.step()
        if not self.has_begun(epoch):
            return self._model
        self._average.update_parameters(self._model)
        update_bn(self._batches, self._average)
        return self._average.module
