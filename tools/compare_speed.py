"""Compares the speed of two versions of the package, which take turns at every step.

    python tools/compare_speed.py BEFORE AFTER                    every row
    python tools/compare_speed.py BEFORE AFTER -k ResNet-18       those whose name contains "ResNet-18"

BEFORE and AFTER are folders that hold a package ``fastsam`` with its compiled extension. Each version has a process of
its own with the same parameters; a round is one optimizer part of a step (norm, perturb; restore, update) of each, so
that whatever slows the machine down slows both. Both are bound to the same processors, which differ in speed where a
machine is shared. Where a process's memory happens to lie makes a difference of its own for small tensors, so that
several pairs of processes are compared. What is reported is processor time, by the medians of each process's rounds. A
ratio below 1 says that AFTER is faster: the median of the pairs' ratios, and all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from text_table import text_table

ROOT = Path(__file__).parents[1]
WARM_UP = 3
PROCESSORS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


class Row(NamedTuple):
    """What is compared: a model's parameters (a name of ``benchmarks.shapes``), the base, and FastSAM's options."""

    model: str
    base: str
    options: dict[str, Any]
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """As it is printed, and looked for by ``-k``."""
        words = [self.options.get("rounding", ""), "masters" if self.options.get("master_weights") else ""]
        return " ".join(filter(None, [self.model, self.base, "" if self.dtype == "float32" else self.dtype, *words]))


SGD: dict[str, Any] = {"lr": 1e-3, "momentum": 0.9}
ADAMW: dict[str, Any] = {"lr": 1e-3}
ROWS = [
    Row("ResNet-18", "SGD", SGD),
    Row("ResNet-18", "AdamW", ADAMW),
    Row("ResNet-50", "SGD", SGD),
    Row("2,000 x 256", "SGD", SGD),
    Row("2,000 x 256", "AdamW", ADAMW),
    Row("4 x 4096^2", "SGD", SGD),
    Row("161 x 8", "SGD", SGD),
    Row("ResNet-18", "SGD", SGD, "bfloat16"),
    Row("ResNet-18", "SGD", SGD | {"rounding": "stochastic"}, "bfloat16"),
    Row("ResNet-18", "AdamW", ADAMW | {"master_weights": True}, "bfloat16"),
]

OTHER_SHAPES = {"4 x 4096^2": [(4096, 4096)] * 4, "161 x 8": [(8,)] * 161}


def bind(pair: int, threads: int) -> None:
    """Binds this process, and so the pair that it starts, to as many processors as the pair's threads need."""
    if hasattr(os, "sched_setaffinity"):
        usable = PROCESSORS[pair % len(PROCESSORS) :] + PROCESSORS[: pair % len(PROCESSORS)]
        os.sched_setaffinity(0, usable[:threads])


def take_turns(row: Row, folders: list[Path], threads: int, rounds: int) -> list[list[float]]:
    """Milliseconds of each version in each round."""
    sys.path.append(str(ROOT))
    from benchmarks.shapes import shapes_of

    shapes = OTHER_SHAPES.get(row.model) or shapes_of(row.model)
    children = []
    for folder in folders:
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        command = [sys.executable, __file__, "--child", repr((*row, shapes, threads))]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        children.append(subprocess.Popen(command, env=environment, cwd=folder, **pipes))
    times: list[list[float]] = [[] for _ in children]
    for number in range(WARM_UP + rounds):
        for child, mine in zip(children, times, strict=True):
            assert child.stdin is not None
            assert child.stdout is not None
            answer = ""
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write("\n")
                answer = child.stdout.readline()
            if not answer:
                raise SystemExit(f"compare_speed: {row.name} failed in {folders[children.index(child)]}")
            if number >= WARM_UP:
                mine.append(float(answer))
    for child in children:
        child.communicate()
    return times


def run_child(argument: str) -> None:
    """One version: a step for every line of standard input, and its milliseconds as a line of standard output."""
    import ast

    from fastsam import _C, FastSAM

    if not Path(_C.__file__).resolve().is_relative_to(Path.cwd().resolve()):
        raise SystemExit(f"compare_speed: {Path.cwd()} has no compiled extension; build it there first")
    _, base, options, dtype, shapes, threads = ast.literal_eval(argument)
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(s, generator=generator).mul_(0.02).to(getattr(torch, dtype)) for s in shapes]
    for param in params:
        param.requires_grad_()
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-3).to(param.dtype)
    optimizer = FastSAM(params, getattr(torch.optim, base), rho=0.05, backend="native", **options)
    gc.disable()
    for _ in sys.stdin:
        # Once outside of the clock: the other version's turn has emptied the caches.
        for _ in range(2):
            start = time.process_time()
            optimizer.first_step(zero_grad=False)
            optimizer.second_step()
            taken = time.process_time() - start
        print(1e3 * taken, flush=True)


def entry_of(row: Row, pairs: list[list[list[float]]]) -> dict[str, Any]:
    """One line of the table."""
    medians = [[statistics.median(mine) for mine in pair] for pair in pairs]
    before, after = (statistics.median(side) for side in zip(*medians, strict=True))
    ratios = sorted(after / before for before, after in medians)
    return {
        "row": row.name,
        "before, ms": f"{before:.3f}",
        "after, ms": f"{after:.3f}",
        "ratio": f"{statistics.median(ratios):.3f}",
        "of each pair": " ".join(f"{ratio:.2f}" for ratio in ratios),
    }


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="BEFORE AFTER")
    parser.add_argument("-k", default="", help="only rows whose name contains this")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5, help="of processes, one of each version")
    parser.add_argument("--rounds", type=int, default=30, help="of each pair")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_child(arguments.child)
        return
    if len(arguments.folders) != 2:
        parser.error("two folders are needed: BEFORE and AFTER")
    folders = [folder.resolve() for folder in arguments.folders]
    if absent := [folder for folder in folders if not (folder / "fastsam").is_dir()]:
        parser.error(f"there is no package fastsam in {absent[0]}")
    entries = []
    for row in ROWS:
        if arguments.k in row.name:
            print(f"{row.name} ...", file=sys.stderr, flush=True)
            pairs = []
            for pair in range(arguments.pairs):
                bind(pair, arguments.threads)
                pairs.append(take_turns(row, folders, arguments.threads, arguments.rounds))
            entries.append(entry_of(row, pairs))
    if not entries:
        parser.error(f"no row's name contains {arguments.k!r}")
    print(text_table(list(entries[0]), entries, [[] for _ in entries]))


if __name__ == "__main__":
    main()
