"""The picture: spectra, the loss around the solutions, sharpness while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastsam.demo.sharpness.measure import RADII, Measured
from fastsam.demo.sharpness.options import SharpnessOptions

# Colours that colour-blind readers can tell apart (Okabe and Ito).
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#999999", "#000000")

# The smallest density that is shown.
FLOOR = 1e-6


def draw(results: Mapping[str, Sequence[Measured]], options: SharpnessOptions) -> None:
    """Writes ``options.output``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.2), dpi=140, layout="constrained")
        for colour, (name, runs) in zip(COLOURS, results.items(), strict=False):
            _draw_spectrum(axes[0], runs[0], name, colour)
            _draw_range(axes[1], RADII, [run.line for run in runs], name, colour)
            _draw_range(axes[2], runs[0].epochs, [run.rises for run in runs], name, colour)
        axes[0].set(title="Hessian's spectrum (first seed)", xlabel="eigenvalue", yscale="log", ylim=(FLOOR, None))
        axes[0].set_ylabel("density")
        axes[1].set(title="Training loss around the solutions", xlabel="along a random filter-normalised direction")
        axes[1].set_ylabel("cross-entropy (mean and range)")
        axes[2].set(title="Ascent sharpness while training", xlabel="epoch", yscale="log")
        axes[2].set_ylabel(f"rise within {options.radius:g} (mean and range)")
        axes[1].legend(frameon=False)
        for panel in axes:
            panel.grid(alpha=0.25)
        figure.suptitle(
            f"Small CNN on 900 scanned digits, {options.noise:.0%} of the training labels wrong "
            f"({options.seeds} seed{'s' if options.seeds > 1 else ''})",
            fontsize=12,
        )
        figure.savefig(options.output)
        pyplot.close(figure)


def _draw_spectrum(axes: Any, run: Measured, name: str, colour: str) -> None:
    density = run.density
    assert density is not None
    axes.plot(density.grid, density.density.clamp(min=FLOOR), label=name, color=colour, linewidth=1.5)


def _draw_range(axes: Any, x: Sequence[float], lines: Sequence[Sequence[float]], name: str, colour: str) -> None:
    values = np.array(lines)
    axes.plot(x, values.mean(axis=0), label=name, color=colour, linewidth=2)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.18, linewidth=0)
