"""``python -m fastsam sharpness``: how sharp the minima of SGD and of FastSAM are; a table and a picture.

The networks, data and training are the demo's. Everything is measured on the training images with their wrong labels,
which is the loss that was minimized, in eval mode: batch norm, where there is any, with its running statistics.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from queue import Empty
from typing import Any

import torch

from fastsam.demo.sharpness.measure import Measured, measure_run, total_passes
from fastsam.demo.sharpness.options import SharpnessOptions
from fastsam.demo.sharpness.report import measurements_table, verdict
from fastsam.demo.sharpness.rows import rows

# What this imports, and the distributions that have it.
EXTRAS = {
    "hessian_eigenthings": "hessian-eigenthings",
    "matplotlib": "matplotlib",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}

Results = dict[str, list[Measured]]


def run(options: SharpnessOptions) -> int:
    """Trains, measures, prints the table and writes the picture; returns the exit status."""
    missing = [package for name, package in EXTRAS.items() if importlib.util.find_spec(name) is None]
    if missing:
        print(f"this also needs: pip install {' '.join(missing)}", file=sys.stderr)
        return 1
    from fastsam.demo.sharpness.plot import draw

    results = measure_all(options)
    print(f"\n{measurements_table(results, options)}\n\n{verdict(results)}\n", flush=True)
    draw(results, options)
    print(f"spectra, losses around the solutions, sharpness while training: {options.output}")
    return 0


def measure_all(options: SharpnessOptions) -> Results:
    """Trains and measures every row with every seed, in ``options.processes`` processes, under one progress bar."""
    from tqdm import tqdm

    names = [method.name for method in rows(options)]
    jobs = [(name, seed) for seed in range(options.seeds) for name in names]
    total = round(sum(total_passes(*job, options) for job in jobs))
    with tqdm(total=total, unit="pass", unit_scale=True, mininterval=0.5, dynamic_ncols=True) as bar:
        if options.processes == 1:
            found = [measure_run(name, seed, options, bar.update) for name, seed in jobs]
        else:
            found = _in_processes(jobs, options, bar.update)
    return {name: [found[jobs.index((name, seed))] for seed in range(options.seeds)] for name in names}


def _in_processes(
    jobs: Sequence[tuple[str, int]], options: SharpnessOptions, update: Callable[[float], Any]
) -> list[Measured]:
    context = get_context("spawn")
    passes = context.Queue()
    with ProcessPoolExecutor(options.processes, context, initializer=_begin, initargs=(passes,)) as pool:
        # The longest first: otherwise the last one would run alone for long.
        order = sorted(jobs, key=lambda job: -total_passes(job[0], job[1], options))
        found = {job: pool.submit(_measure, *job, options) for job in order}
        futures: list[Future[Measured]] = [found[job] for job in jobs]
        try:
            while not all(future.done() for future in futures):
                try:
                    update(passes.get(timeout=0.5))
                except Empty:
                    if any(future.done() and future.exception() for future in futures):
                        break
        finally:
            pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]


def _begin(passes: Any) -> None:
    """In a new process: where its progress goes."""
    global _passes
    _passes = passes
    torch.set_num_threads(1)


def _measure(name: str, seed: int, options: SharpnessOptions) -> Measured:
    return measure_run(name, seed, options, _passes.put)


_passes: Any = None
