"""One run of the command: trains a network, and measures the sharpness of its solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastsam import sharpness
from fastsam.demo.data import TRAIN_SIZE, NoisyDigits, load_noisy_digits
from fastsam.demo.sharpness.options import SharpnessOptions
from fastsam.demo.sharpness.rows import rows
from fastsam.demo.train import train_model

# The relative accuracy of eigenvalues, the products for a trace and a density, the draws for an average, the gradients
# for a worst case: a table and a picture need no more.
TOLERANCE = 1e-2
TRACE_PRODUCTS = 12
DENSITY_STEPS = 24
SAMPLES = 30
WORST_STEPS = 10
# Smaller batches stay in the cache; in eval mode the loss is the same.
BATCH = 300
# How many times the ascent sharpness is measured while training, and where the loss around the solution is.
TIMES = 6
RADII = [0.1 * step for step in range(-8, 9)]
# What measurements count in the progress bar, in passes of a batch of 16 images, which take as long: all of a run's but
# the density, after EIGENVALUES and TRACE of them the eigenvalues and the trace; and the density.
MEASURING, EIGENVALUES, TRACE, DENSITY = 1400, 720, 330, 720


@dataclass(frozen=True)
class Measured:
    """What one run has given.

    Attributes:
        accuracy: on the test images, in percent.
        loss: on the training images.
        eigenvalues: the Hessian's five largest.
        trace: of the Hessian.
        ascent, worst, average: the rise of the training loss within ``options.radius``.
        epochs, rises: after which epochs the ascent sharpness was measured while training, and what it was.
        line: the training loss at ``RADII`` along a filter-normalised random direction.
        density: the Hessian's spectral density; of the first seed only.
    """

    accuracy: float
    loss: float
    eigenvalues: list[float]
    trace: float
    ascent: float
    worst: float
    average: float
    epochs: list[int]
    rises: list[float]
    line: list[float]
    density: sharpness.SpectralDensity | None


def total_passes(name: str, seed: int, options: SharpnessOptions) -> float:
    """What :func:`measure_run` will report altogether."""
    method = _row(name, options)
    density = DENSITY if seed == 0 else 0
    return _steps(options) * options.epochs * method.epochs_factor * method.passes + MEASURING + density


def measure_run(name: str, seed: int, options: SharpnessOptions, progress: Callable[[float], Any]) -> Measured:
    """Trains the row ``name`` with ``seed``, and measures.

    Args:
        name: of the row.
        seed: as in the demo.
        options: the command's.
        progress: called with the passes since its last call.
    """
    method = _row(name, options)
    data = load_noisy_digits(options.noise, seed, options.device)
    epochs = options.epochs * method.epochs_factor
    when = sorted({max(1, round(epochs * part / TIMES)) for part in range(1, TIMES + 1)})
    rises: list[float] = []

    def after_epoch(epoch: int, model: nn.Module) -> None:
        if epoch in when:
            rises.append(sharpness.ascent(model, F.cross_entropy, _batches(data), options.radius).value)

    trained = train_model(method, data, seed, options, lambda passes, *_: progress(passes), after_epoch)
    measured = _measure(trained.model, data, options, seed, progress)
    density = _density(trained.model, data, progress) if seed == 0 else None
    line = _line(trained.model, data, seed)
    return Measured(trained.test_accuracy[-1], *measured, epochs=when, rises=rises, line=line, density=density)


def _measure(
    model: nn.Module, data: NoisyDigits, options: SharpnessOptions, seed: int, progress: Callable[[float], Any]
) -> tuple[float, list[float], float, float, float, float]:
    arguments = model, F.cross_entropy, _batches(data)
    eigenvalues = sharpness.hessian_eigenvalues(*arguments, 5, tol=TOLERANCE).values.tolist()
    progress(EIGENVALUES)
    trace = float(sharpness.hessian_trace(*arguments, samples=TRACE_PRODUCTS, seed=seed))
    progress(TRACE)
    ascent = sharpness.ascent(*arguments, options.radius)
    worst = sharpness.worst(*arguments, options.radius, steps=WORST_STEPS)
    average = sharpness.average(*arguments, options.radius, samples=SAMPLES, seed=seed)
    progress(MEASURING - EIGENVALUES - TRACE)
    return ascent.loss, eigenvalues, trace, ascent.value, worst.value, average.value


def _line(model: nn.Module, data: NoisyDigits, seed: int) -> list[float]:
    direction = sharpness.filter_normalized(model, seed)
    return sharpness.loss_line(model, F.cross_entropy, _batches(data), direction, RADII).losses


def _density(model: nn.Module, data: NoisyDigits, progress: Callable[[float], Any]) -> sharpness.SpectralDensity:
    found = sharpness.spectral_density(model, F.cross_entropy, _batches(data), runs=1, steps=DENSITY_STEPS)
    progress(DENSITY)
    return found


def _batches(data: NoisyDigits) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data.train_images.split(BATCH), data.train_labels.split(BATCH), strict=True))


def _steps(options: SharpnessOptions) -> int:
    return -(-TRAIN_SIZE // options.batch_size)


def _row(name: str, options: SharpnessOptions) -> Any:
    return next(method for method in rows(options) if method.name == name)
