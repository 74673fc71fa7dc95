"""Trains the demo's network with one method, and measures accuracy, memorized wrong labels, and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastsam.demo.averaging import WeightAverage
from fastsam.demo.data import NoisyDigits
from fastsam.demo.methods import Method
from fastsam.demo.mixup import Mixture, mix, plain
from fastsam.demo.model import make_cnn
from fastsam.demo.options import Options

# Called after each step with its passes, its loss, and the last epoch's test accuracy (None in the first epoch).
Progress = Callable[[float, float, "float | None"], None]
AfterEpoch = Callable[[int, nn.Module], None] | None
Closure = Callable[[], Tensor]


@dataclass
class Run:
    """One training run.

    Attributes:
        model: trained, in evaluation mode.
        test_accuracy: in percent, after each epoch.
        wrong_labels_learned: share of the wrong training labels that the trained model predicts, in percent.
        step_ms: median time of a step: all its passes and the optimizer.
        optimizer_ms: median time of a step outside the closure.
    """

    model: nn.Module
    test_accuracy: list[float]
    wrong_labels_learned: float
    step_ms: float
    optimizer_ms: float


@dataclass
class _Stopwatch:
    """Times steps and the closures in them. Synchronizes an accelerator, so that its work counts where it belongs."""

    device: torch.device
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    _in_closures: float = 0.0

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return 1e3 * time.perf_counter()

    def closure(self, closure: Closure) -> Closure:
        """The closure, whose time is not the optimizer's."""

        def timed() -> Tensor:
            start = self.now()
            loss = closure()
            self._in_closures += self.now() - start
            return loss

        return timed

    def time(self, step: Callable[[], Tensor]) -> Tensor:
        """Runs a step, and records its times."""
        self._in_closures = 0.0
        start = self.now()
        loss = step()
        self.step_ms.append(self.now() - start)
        self.optimizer_ms.append(self.step_ms[-1] - self._in_closures)
        return loss


def train_model(
    method: Method, data: NoisyDigits, seed: int, options: Options, progress: Progress, after_epoch: AfterEpoch = None
) -> Run:
    """Trains one network; the learning rate decreases from ``method.lr`` to 0 along half a cosine.

    Args:
        method: makes the optimizer.
        data: for training and testing, on the device that is used.
        seed: of the initial weights, of the order of the batches, and of mixtures, the same for every method.
        options: the demo's; ``options.lr`` takes precedence over ``method.lr``.
        progress: called after each step.
        after_epoch: called with the number of epochs so far and the model, which it must leave as it is.
    """
    model = make_cnn(seed, options.batch_norm).to(data.train_images.device)
    optimizer = method.make_optimizer(model, options.lr or method.lr, options)
    epochs = options.epochs * method.epochs_factor
    batches = -(-len(data.train_labels) // options.batch_size)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs * batches)
    average = WeightAverage(model, optimizer, epochs, data, options.batch_size) if method.averages else None
    stopwatch = _Stopwatch(data.train_images.device)
    shuffle = torch.Generator().manual_seed(seed)
    test_accuracy: list[float] = []
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(data.train_labels), generator=shuffle).split(options.batch_size):
            samples = data.train_images[batch], data.train_labels[batch]
            mixture = mix(*samples, options.mixup, shuffle) if method.mixes else plain(*samples)
            loss = stopwatch.time(partial(_step, method, model, optimizer, mixture, data, stopwatch))
            if average is None or not average.has_begun(epoch):
                schedule.step()
            progress(method.passes, loss.item(), test_accuracy[-1] if test_accuracy else None)
        solution = model if average is None else average.after_epoch(epoch)
        solution.eval()
        test_accuracy.append(accuracy(solution, data.test_images, data.test_labels))
        if after_epoch is not None:
            after_epoch(epoch + 1, solution)
    wrong = data.mislabelled
    return Run(
        model=solution,
        test_accuracy=test_accuracy,
        wrong_labels_learned=accuracy(solution, data.train_images[wrong], data.train_labels[wrong]),
        step_ms=statistics.median(stopwatch.step_ms),
        optimizer_ms=statistics.median(stopwatch.optimizer_ms),
    )


def _step(
    method: Method, model: nn.Module, optimizer: Any, mixture: Mixture, data: NoisyDigits, stopwatch: _Stopwatch
) -> Tensor:
    def closure_for(mixture: Mixture) -> Closure:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = mixture.loss(model)
            loss.backward()
            return loss

        return stopwatch.closure(closure)

    if method.parts_of is not None:
        return optimizer.step(closures=[closure_for(part) for part in mixture.split(method.parts_of)])[0]
    if method.ascends_on_all:
        everything = closure_for(plain(data.train_images, data.train_labels))
        return optimizer.step(closure_for(mixture), ascent_closure=everything)
    return optimizer.step(closure_for(mixture))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent; NaN if there are no images."""
    return 100 * (model(images).argmax(dim=1) == labels).double().mean().item()
