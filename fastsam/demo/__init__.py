"""``python -m fastsam demo``: SGD against FastSAM on digits with wrong labels; a table and a picture.

With 40% of the labels wrong, a network that fits its training data memorizes wrong labels, and its test accuracy shows
how well an optimizer's minima generalise. For each seed, every method gets the same split, wrong labels, initial
weights and order of batches, and the same momentum, weight decay and learning-rate schedule; the initial learning rate
is the best for each method (``--sweep``).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import mean

import torch
from torch.nn import functional as F

from fastsam.demo.data import NoisyDigits, load_noisy_digits
from fastsam.demo.methods import LEARNING_RATES, Method, rows, to_sweep
from fastsam.demo.options import Options
from fastsam.demo.report import counted, results_table, sweep_table
from fastsam.demo.train import Run, train_model

# What the demo imports, and the distributions that have it.
EXTRAS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}

# Where the picture shows the loss around each solution.
RADII = [0.15 * step for step in range(-6, 7)]
DIRECTIONS = 3


def run(options: Options) -> int:
    """Runs the demo, prints its table and writes its picture; returns the exit status."""
    missing = [package for name, package in EXTRAS.items() if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the demo also needs: pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    with one_thread():
        splits = [load_noisy_digits(options.noise, seed, options.device) for seed in range(options.seeds)]
        if options.sweep is not None:
            _sweep(splits, options)
        else:
            _compare(splits, options)
    return 0


def _compare(splits: Sequence[NoisyDigits], options: Options) -> None:
    from fastsam.demo.plot import draw

    results = train_all(rows(options), splits, options)
    print(f"\n{results_table(results, options)}\n", flush=True)
    draw(results, _profiles(results, splits), RADII, options)
    print(f"curves, and the loss around both solutions: {options.output}")


def _sweep(splits: Sequence[NoisyDigits], options: Options) -> None:
    accuracies: dict[Method, dict[float, float]] = {method: {} for method in to_sweep(options)}
    for lr in options.sweep or LEARNING_RATES:
        for method, runs in train_all(list(accuracies), splits, replace(options, lr=lr)).items():
            accuracies[method][lr] = mean(run.test_accuracy[-1] for run in runs)
    seeds = counted(options.seeds, "seed")
    print(f"\ntest accuracy after the last epoch, %, mean of {seeds}\n{sweep_table(accuracies)}")


def train_all(methods: Sequence[Method], splits: Sequence[NoisyDigits], options: Options) -> dict[Method, list[Run]]:
    """Trains every method on every split (``splits[seed]``), under one progress bar that counts passes."""
    from tqdm import tqdm

    results: dict[Method, list[Run]] = {method: [] for method in methods}
    steps = options.epochs * -(-len(splits[0].train_labels) // options.batch_size)
    total = round(len(splits) * sum(steps * method.epochs_factor * method.passes for method in methods))
    with tqdm(total=total, unit="pass", unit_scale=True, mininterval=0.5, smoothing=0.05, dynamic_ncols=True) as bar:

        def progress(passes: float, loss: float, accuracy: float | None) -> None:
            bar.set_postfix(loss=f"{loss:.2f}", accuracy="-" if accuracy is None else f"{accuracy:.1f}%", refresh=False)
            bar.update(passes)

        for seed, data in enumerate(splits):
            for method in methods:
                bar.set_description(f"{method.name}, seed {seed + 1}/{len(splits)}")
                results[method].append(train_model(method, data, seed, options, progress))
    return results


def _profiles(
    results: Mapping[Method, Sequence[Run]], splits: Sequence[NoisyDigits]
) -> dict[Method, list[list[float]]]:
    """For each profiled method a line per split and direction; the directions are the same for all methods.

    The loss is over all training images, wrong labels included, and batch norm uses their statistics at each point.
    """
    from fastsam.sharpness import filter_normalized, loss_line

    return {
        method: [
            loss_line(
                run.model,
                F.cross_entropy,
                [(data.train_images, data.train_labels)],
                filter_normalized(run.model, DIRECTIONS * seed + number),
                RADII,
                train=True,
            ).losses
            for seed, (run, data) in enumerate(zip(runs, splits, strict=True))
            for number in range(DIRECTIONS)
        ]
        for method, runs in results.items()
        if method.profiled
    }


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one CPU thread: with tensors this small, more threads are slower, on a busy machine much slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
