"""The demo's results as a table for the terminal."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from fastsam.demo.methods import Method
from fastsam.demo.options import Options
from fastsam.demo.train import Run

_HEADINGS = ("method", "lr", "passes", "test accuracy %", "wrong labels", "ms per", "optimizer's")
_HEADINGS_BELOW = ("", "", "over data", "mean (min-max)", "learned %", "step", "share")


def results_table(results: Mapping[Method, Sequence[Run]], options: Options) -> str:
    """One line per method: medians and means over the seeds, accuracy after the last epoch."""
    rows: list[tuple[str, ...]] = [_HEADINGS, _HEADINGS_BELOW]
    for method, runs in results.items():
        accuracy = [run.test_accuracy[-1] for run in runs]
        step_ms = statistics.median(run.step_ms for run in runs)
        share = statistics.median(run.optimizer_ms / run.step_ms for run in runs)
        rows.append(
            (
                method.name,
                f"{options.lr or method.lr:g}",
                f"{options.epochs * method.epochs_factor * method.passes:g}",
                f"{statistics.mean(accuracy):.1f} ({min(accuracy):.1f}-{max(accuracy):.1f})",
                f"{statistics.mean(run.wrong_labels_learned for run in runs):.0f}".replace("nan", "-"),
                f"{step_ms:.2f}",
                f"{share:.0%}",
            )
        )
    caption = (
        f"{options.noise:.0%} of the training labels wrong; {counted(options.seeds, 'seed')}, "
        f"{counted(options.epochs, 'epoch')}, batches of {options.batch_size};\n"
        f"FastSAM: rho {options.rho:g}, backend {options.backend}; on {options.device}"
    )
    return f"{caption}\n\n{aligned(rows, heading_lines=2)}"


def sweep_table(accuracies: Mapping[Method, Mapping[float, float]]) -> str:
    """One line per method, one column per learning rate; an asterisk marks the best of each line."""
    rates = list(next(iter(accuracies.values())))
    rows = [("method", *(f"lr {rate:g}" for rate in rates))]
    for method, by_rate in accuracies.items():
        best = max(by_rate.values())
        rows.append((method.name, *(f"{value:.1f}{'*' if value == best else ' '}" for value in by_rate.values())))
    return aligned(rows, heading_lines=1)


def counted(number: int, noun: str) -> str:
    """``1 seed``, ``2 seeds``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def aligned(rows: Sequence[Sequence[str]], heading_lines: int) -> str:
    """The first column to the left, the others to the right, a rule below the headings."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    lines.insert(heading_lines, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)
