"""The demo's picture: accuracy while training, and the loss around the solutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle, product
from typing import Any

import numpy as np

from fastsam.demo.methods import Method
from fastsam.demo.options import Options
from fastsam.demo.train import Run

# Colours that colour-blind readers can tell apart (Okabe and Ito), FastSAM's first.
_COLOURS = ("#D55E00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#E69F00", "#999999", "#000000")

# The largest number of lines that are labelled with their numbers.
_FEW = 5

Styles = Mapping[Method, dict[str, Any]]


def draw(
    results: Mapping[Method, Sequence[Run]],
    profiles: Mapping[Method, Sequence[Sequence[float]]],
    radii: Sequence[float],
    options: Options,
) -> None:
    """Writes ``options.output``.

    Args:
        results: the runs of each method, one per seed.
        profiles: training losses of shape (lines, radii), for the methods that are profiled.
        radii: of the losses.
        options: the demo's.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = line_styles(list(results))
    crowded = len(results) > _FEW
    with pyplot.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(14 if crowded else 11, 4.2), dpi=140, layout="constrained"
        )
        _draw_accuracy(left, results, styles, crowded=crowded)
        _draw_profiles(right, profiles, radii, styles)
        figure.suptitle(
            f"Small CNN on 900 scanned digits, {options.noise:.0%} of the training labels wrong "
            f"({options.seeds} seed{'s' if options.seeds > 1 else ''})",
            fontsize=12,
        )
        figure.savefig(options.output)
        pyplot.close(figure)


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
        axes.plot(passes, accuracy.mean(axis=0), label=label, linewidth=1.5 if crowded else 2, **styles[method])
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
    worst = min(run.test_accuracy[-1] for runs in results.values() for run in runs)
    axes.set_ylim(bottom=max(0.0, 10 * (worst // 10) - 20), top=100)
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
