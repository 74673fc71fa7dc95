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

# The relative accuracy of eigenvalues, the products for a trace, the draws for an average: a table needs no more.
TOLERANCE = 1e-2
TRACE_PRODUCTS = 24
SAMPLES = 50
# How often lambda_max is measured while training, and where the loss around the solution is.
TIMES = 4
RADII = [0.1 * step for step in range(-8, 9)]
# What the measurements count in the progress bar, in epochs' passes.
MEASURING = 15


@dataclass(frozen=True)
class Measured:
    """What one run has given.

    Attributes:
        accuracy: on the test images, in percent.
        loss: on the training images.
        eigenvalues: the Hessian's five largest.
        trace: of the Hessian.
        ascent, worst, average: the rise of the training loss within ``options.radius``.
        epochs, largest: after which epochs lambda_max was measured, and lambda_max.
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
    largest: list[float]
    line: list[float]
    density: sharpness.SpectralDensity | None


def total_passes(name: str, options: SharpnessOptions) -> float:
    """What :func:`measure_run` will report altogether."""
    method = _row(name, options)
    return _steps(options) * (options.epochs * method.epochs_factor * method.passes + MEASURING)


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
    when = sorted({max(1, round(epochs * part / TIMES)) for part in range(1, TIMES)})
    largest: list[float] = []

    def after_epoch(epoch: int, model: nn.Module) -> None:
        if epoch in when:
            largest.append(_largest(model, data, 1)[0])

    trained = train_model(method, data, seed, options, lambda passes, *_: progress(passes), after_epoch)
    measured = _measure(trained.model, data, options, seed, lambda: progress(_steps(options) * MEASURING / PARTS))
    return Measured(
        trained.test_accuracy[-1], *measured, epochs=[*when, epochs], largest=[*largest, measured[1][0]],
        line=_line(trained.model, data, seed), density=_density(trained.model, data) if seed == 0 else None,
    )  # fmt: skip


# How many measurements _measure reports.
PARTS = 5


def _measure(
    model: nn.Module, data: NoisyDigits, options: SharpnessOptions, seed: int, done: Callable[[], Any]
) -> tuple[float, list[float], float, float, float, float]:
    arguments = model, F.cross_entropy, _batches(data)
    eigenvalues = _largest(model, data, 5)
    done()
    trace = float(sharpness.hessian_trace(*arguments, samples=TRACE_PRODUCTS, seed=seed))
    done()
    ascent = sharpness.ascent(*arguments, options.radius)
    done()
    worst = sharpness.worst(*arguments, options.radius)
    done()
    average = sharpness.average(*arguments, options.radius, samples=SAMPLES, seed=seed)
    done()
    return ascent.loss, eigenvalues, trace, ascent.value, worst.value, average.value


def _largest(model: nn.Module, data: NoisyDigits, k: int) -> list[float]:
    found = sharpness.hessian_eigenvalues(model, F.cross_entropy, _batches(data), k, tol=TOLERANCE)
    return found.values.tolist()


def _line(model: nn.Module, data: NoisyDigits, seed: int) -> list[float]:
    direction = sharpness.filter_normalized(model, seed)
    return sharpness.loss_line(model, F.cross_entropy, _batches(data), direction, RADII).losses


def _density(model: nn.Module, data: NoisyDigits) -> sharpness.SpectralDensity:
    return sharpness.spectral_density(model, F.cross_entropy, _batches(data), runs=1)


def _batches(data: NoisyDigits) -> list[tuple[Tensor, Tensor]]:
    return [(data.train_images, data.train_labels)]


def _steps(options: SharpnessOptions) -> int:
    return -(-TRAIN_SIZE // options.batch_size)


def _row(name: str, options: SharpnessOptions) -> Any:
    return next(method for method in rows(options) if method.name == name)
