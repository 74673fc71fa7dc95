"""The measurements as a table, and what they say beside the paper's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

from fastsam.demo.report import aligned
from fastsam.demo.sharpness.measure import Measured
from fastsam.demo.sharpness.options import SharpnessOptions

COLUMNS: Sequence[tuple[str, Callable[[Measured], float]]] = (
    ("test acc. %", lambda run: run.accuracy),
    ("train loss", lambda run: run.loss),
    ("lambda_max", lambda run: run.eigenvalues[0]),
    ("max / 5th", lambda run: run.eigenvalues[0] / run.eigenvalues[4]),
    ("trace", lambda run: run.trace),
    ("ascent", lambda run: run.ascent),
    ("worst", lambda run: run.worst),
    ("average", lambda run: run.average),
)

# Foret et al., ICLR 2021, section 4.2: a WideResNet 40-10 without batch norm on CIFAR-10.
PAPER = "the paper's, of a WideResNet without batch norm on CIFAR-10: 24 without SAM and 1.0 with it, a factor of 24"
PAPER_RATIO = "the paper's: 11.4 without SAM, 2.6 with it"


def measurements_table(results: Mapping[str, Sequence[Measured]], options: SharpnessOptions) -> str:
    """One line per method: mean and standard deviation over the seeds."""
    rows = [("method", *(name for name, _ in COLUMNS))]
    for name, runs in results.items():
        rows.append((name, *(_spread([value(run) for run in runs]) for _, value in COLUMNS)))
    net = "batch norm with its running statistics" if options.batch_norm else "a network without batch norm"
    plural, spread = ("s", "mean and standard deviation. ") if options.seeds > 1 else ("", "")
    caption = (
        f"{options.noise:.0%} of the training labels wrong; {options.seeds} seed{plural}, {options.epochs} epochs; rho "
        f"{options.rho:g}. Measured on the training images in eval mode, {net};\n{spread}ascent, worst, average: how "
        f"much the loss rises within a radius of {options.radius:g}"
    )
    return f"{caption}\n\n{aligned(rows, heading_lines=1)}"


def verdict(results: Mapping[str, Sequence[Measured]]) -> str:
    """Whether lambda_max is lower with SAM, and how the figures compare with the paper's."""
    if not {"SGD", "FastSAM"} <= results.keys():
        return "lambda_max and the accuracies side by side: see the table"
    pairs = list(zip(results["SGD"], results["FastSAM"], strict=True))
    factors = [sgd.eigenvalues[0] / sam.eigenvalues[0] for sgd, sam in pairs]
    lower = sum(factor > 1 for factor in factors)
    ratios = [
        statistics.mean(run.eigenvalues[0] / run.eigenvalues[4] for run in results[n]) for n in ("SGD", "FastSAM")
    ]
    return (
        f"lambda_max is lower with FastSAM than with SGD in {lower} of {len(factors)} seeds, by factors of "
        f"{', '.join(f'{factor:.1f}' for factor in factors)}\n({PAPER})\n"
        f"lambda_max / lambda_5 is {ratios[0]:.1f} with SGD and {ratios[1]:.1f} with FastSAM\n({PAPER_RATIO})"
    )


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    if len(values) == 1:
        return _rounded(mean, 3)
    return f"{_rounded(mean, 3)} +- {_rounded(statistics.stdev(values), 2)}"


def _rounded(value: float, digits: int) -> str:
    """To significant digits, without an exponent where the number is large."""
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"
