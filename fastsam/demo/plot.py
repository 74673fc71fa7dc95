"""The demo's picture: accuracy while training, and the loss around the solutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import Any

import numpy as np

from fastsam.demo.methods import Method
from fastsam.demo.options import Options
from fastsam.demo.report import counted
from fastsam.demo.train import Run

# Colours that colour-blind readers can tell apart (Okabe and Ito), FastSAM's first.
_COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#999999", "#000000")

# The largest number of lines that are labelled with their numbers.
_FEW = 5

# In inches: a figure with few lines, and what a row of a legend beside the curves needs, and the titles above it.
_HEIGHT, _LEGEND_ROW, _TITLES = 4.2, 0.21, 1.2

Styles = Mapping[Method, dict[str, Any]]


def draw(
    results: Mapping[Method, Sequence[Run]],
    profiles: Mapping[Method, Sequence[Sequence[float]]],
    radii: Sequence[float],
    options: Options,
) -> Any:
    """Writes ``options.output``.

    Args:
        results: the runs of each method, one per seed.
        profiles: training losses of shape (lines, radii), for the methods that are profiled.
        radii: of the losses.
        options: the demo's.

    Returns:
        The figure.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    styles = line_styles(list(results))
    crowded = len(results) > _FEW
    size = (14, max(_HEIGHT, _TITLES + _LEGEND_ROW * len(results))) if crowded else (11, _HEIGHT)
    with rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=size, dpi=140, layout="constrained")
        left, right = figure.subplots(1, 2)
        _draw_accuracy(left, results, styles, crowded=crowded)
        _draw_profiles(right, profiles, radii, styles)
        figure.suptitle(
            f"Small CNN on 900 scanned digits, {options.noise:.0%} of the training labels wrong "
            f"({counted(options.seeds, 'seed')})",
            fontsize=12,
        )
        figure.savefig(options.output)
    return figure


def line_styles(methods: Sequence[Method]) -> Styles:
    """A colour and a dash for each method; FastSAM has the first."""
    ours = [method for method in methods if method.name == "FastSAM"]
    others = [method for method in methods if method.name != "FastSAM"]
    # The whole family has more lines than there are colours.
    lines = cycle(product(("-", "--", ":", "-."), _COLOURS if ours else _COLOURS[1:]))
    return {
        method: {"linestyle": dash, "color": colour}
        for method, (dash, colour) in zip(ours + others, lines, strict=False)
    }


def _draw_accuracy(axes: Any, results: Mapping[Method, Sequence[Run]], styles: Styles, *, crowded: bool) -> None:
    """``crowded``: the final accuracies are in the legend, best first, and ranges are faint."""
    last = {method: float(np.mean([run.test_accuracy[-1] for run in runs])) for method, runs in results.items()}
    for method in sorted(results, key=lambda method: -last[method]) if crowded else results:
        accuracy = np.array([run.test_accuracy for run in results[method]])
        passes = method.passes * np.arange(1, accuracy.shape[1] + 1)
        label = f"{last[method]:.1f}  {method.name}" if crowded else method.name
        # After a single epoch there is a point, not a line.
        marker = "o" if len(passes) == 1 else None
        width = 1.5 if crowded else 2
        axes.plot(passes, accuracy.mean(axis=0), label=label, linewidth=width, marker=marker, **styles[method])
        colour = styles[method]["color"]
        opacity = 0.05 if crowded else 0.18
        axes.fill_between(passes, accuracy.min(axis=0), accuracy.max(axis=0), color=colour, alpha=opacity, linewidth=0)
        if not crowded:
            axes.annotate(
                f"{last[method]:.1f}", (passes[-1], last[method]), (2, 9),
                textcoords="offset points", ha="center", color=colour, weight="bold",
            )  # fmt: skip
    axes.set(
        title="Accuracy on the test images (true labels)",
        xlabel="passes over the training images (FastSAM: two per epoch)",
    )
    axes.set_ylabel("% (mean and range of the seeds)")
    # Cut off below: the first epochs, which begin at chance, would take most of the height.
    worst = min(run.test_accuracy[-1] for runs in results.values() for run in runs)
    best = max(max(run.test_accuracy) for runs in results.values() for run in runs)
    axes.set_ylim(bottom=max(0.0, 10 * (worst // 10) - 20), top=min(100.0, 10 * (best // 10) + 15))
    axes.grid(alpha=0.25)
    if crowded:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, title="last epoch, %", alignment="left")
    else:
        axes.legend(loc="lower right", frameon=False)


def _draw_profiles(
    axes: Any,
    profiles: Mapping[Method, Sequence[Sequence[float]]],
    radii: Sequence[float],
    styles: Styles,
) -> None:
    for method, lines in profiles.items():
        losses = np.array(lines)
        low, high = np.quantile(losses, [0.1, 0.9], axis=0)
        axes.plot(radii, losses.mean(axis=0), label=method.name, linewidth=2, **styles[method])
        axes.fill_between(radii, low, high, color=styles[method]["color"], alpha=0.18, linewidth=0)
    axes.set(title="Training loss around the solutions", xlabel="distance along a random filter-normalised direction")
    axes.set_ylabel("cross-entropy (mean, 10-90%)")
    axes.grid(alpha=0.25)
    axes.legend(loc="upper center", frameon=False)
