"""Trains the demo's network with one method, and measures accuracy, memorized wrong labels, and time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from fastsam.demo.data import NoisyDigits
from fastsam.demo.methods import Method
from fastsam.demo.model import make_cnn
from fastsam.demo.options import Options

# Called after each step with its passes, its loss, and the last epoch's test accuracy (None in the first epoch).
Progress = Callable[[float, float, "float | None"], None]


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

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return 1e3 * time.perf_counter()

    def step(self, optimizer: Optimizer, closure: Callable[[], Tensor]) -> Tensor:
        in_closure = 0.0

        def timed_closure() -> Tensor:
            nonlocal in_closure
            start = self.now()
            loss = closure()
            in_closure += self.now() - start
            return loss

        start = self.now()
        loss = optimizer.step(timed_closure)  # type: ignore[arg-type]
        self.step_ms.append(self.now() - start)
        self.optimizer_ms.append(self.step_ms[-1] - in_closure)
        return loss  # type: ignore[return-value]


def train_model(method: Method, data: NoisyDigits, seed: int, options: Options, progress: Progress) -> Run:
    """Trains one network; the learning rate decreases from ``method.lr`` to 0 along half a cosine.

    Args:
        method: makes the optimizer.
        data: for training and testing, on the device that is used.
        seed: of the initial weights and of the order of the batches, the same for every method.
        options: the demo's; ``options.lr`` takes precedence over ``method.lr``.
        progress: called after each step.
    """
    model = make_cnn(seed).to(data.train_images.device)
    optimizer = method.make_optimizer(model, options.lr or method.lr, options)
    epochs = options.epochs * method.epochs_factor
    batches = -(-len(data.train_labels) // options.batch_size)
    schedule = CosineAnnealingLR(optimizer, T_max=epochs * batches)
    stopwatch = _Stopwatch(data.train_images.device)
    shuffle = torch.Generator().manual_seed(seed)
    test_accuracy: list[float] = []
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(len(data.train_labels), generator=shuffle).split(options.batch_size):
            images, labels = data.train_images[batch], data.train_labels[batch]

            def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                return loss

            loss = stopwatch.step(optimizer, closure)
            schedule.step()
            progress(method.passes, loss.item(), test_accuracy[-1] if test_accuracy else None)
        model.eval()
        test_accuracy.append(_accuracy(model, data.test_images, data.test_labels))
    wrong = data.mislabelled
    return Run(
        model=model,
        test_accuracy=test_accuracy,
        wrong_labels_learned=_accuracy(model, data.train_images[wrong], data.train_labels[wrong]),
        step_ms=statistics.median(stopwatch.step_ms),
        optimizer_ms=statistics.median(stopwatch.optimizer_ms),
    )


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """In percent; NaN if there are no images."""
    return 100 * (model(images).argmax(dim=1) == labels).double().mean().item()
