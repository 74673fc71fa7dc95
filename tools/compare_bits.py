"""Compares plain SAM's results of two versions of the package, bit for bit.

    python tools/compare_bits.py BEFORE AFTER               every trajectory
    python tools/compare_bits.py BEFORE AFTER -k adamw      those whose name contains "adamw"

BEFORE and AFTER are folders that hold a package ``fastsam`` with its compiled extension. Each version trains the same
parameters by the public API, in a process of its own: every base, dtype, rounding and backend below, with one and
with two threads. Gradients are functions of the weights by single elementwise operations, so that a difference in any
step is a difference at the end. Weights (at w and at w + e) and the base's state are compared as integers: -0.0 is not
0.0, and the bits of NaN count. Bits differ between instruction sets and PyTorch versions: both run on this machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

STEPS = 4
# Odd tails; more than one chunk of 65,536 elements; an empty tensor.
SHAPES = ((33, 31), (1,), (), (70_001,), (0,), (257,), (64, 129), (3, 5, 7))

BASES = {
    "sgd": (torch.optim.SGD, {}),
    "sgd-momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 1e-2}),
    "sgd-nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "sgd-dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "maximize": True}),
    "adam": (torch.optim.Adam, {"weight_decay": 1e-2}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 1e-2, "betas": (0.4, 0.97)}),
    "adamw-amsgrad": (torch.optim.AdamW, {"amsgrad": True}),
}
NEAREST: dict[str, Any] = {}
STOCHASTIC = {"rounding": "stochastic", "rounding_seed": 1234}
MASTERS = {"master_weights": True}
PRECISIONS = {
    "float32": (torch.float32, NEAREST),
    "float64": (torch.float64, NEAREST),
    "bfloat16": (torch.bfloat16, NEAREST),
    "bfloat16-stochastic": (torch.bfloat16, STOCHASTIC),
    "bfloat16-masters": (torch.bfloat16, MASTERS),
    "bfloat16-stochastic-masters": (torch.bfloat16, STOCHASTIC | MASTERS),
    "float16": (torch.float16, NEAREST),
    "float16-stochastic": (torch.float16, STOCHASTIC),
}


class Trajectory(NamedTuple):
    """One training run: names of its entries in the tables above."""

    backend: str
    base: str
    precision: str
    adaptive: bool
    threads: int

    @property
    def name(self) -> str:
        """For messages and ``-k``."""
        ascent = "adaptive" if self.adaptive else "plain"
        return f"{self.backend}-{self.base}-{self.precision}-{ascent}-{self.threads} threads"


def trajectories(part: str) -> Iterator[Trajectory]:
    """Those whose name contains ``part``."""
    for values in itertools.product(("native", "reference"), BASES, PRECISIONS, (False, True), (1, 2)):
        trajectory = Trajectory(*values)
        if part in trajectory.name:
            yield trajectory


def run(trajectory: Trajectory) -> dict[str, Tensor]:
    """Trains; returns the tensors that two versions must agree on."""
    from fastsam import FastSAM

    torch.set_num_threads(trajectory.threads)
    generator = torch.Generator().manual_seed(1)
    dtype, precision = PRECISIONS[trajectory.precision]
    base, options = BASES[trajectory.base]

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    params = [random(shape).requires_grad_() for shape in SHAPES]
    groups = [
        {"params": params[:3]},
        {"params": params[3:6], "rho": 0.5, "lr": 0.03, "adaptive": not trajectory.adaptive},
        {"params": params[6:], "weight_decay": 0.1},
    ]
    optimizer = FastSAM(
        groups,
        base=base,
        rho=0.1,
        adaptive=trajectory.adaptive,
        backend=trajectory.backend,
        lr=0.01,
        **precision,
        **options,
    )
    results: dict[str, Tensor] = {}
    for step in range(STEPS):
        noise = [random(shape) for shape in SHAPES]
        for phase in ("first", "second"):
            for i, param in enumerate(params):
                # One parameter has no gradient in one pass of some steps; one step's norm is not finite.
                absent = (i, step, phase) in {(5, 1, "first"), (0, 2, "second"), (4, 3, "first")}
                param.grad = None if absent else param.detach() * noise[i]
            if step == 2 and phase == "first":
                params[6].grad[0, 0] = torch.inf
            optimizer.first_step() if phase == "first" else optimizer.second_step()
            results |= {f"parameter {i} after {phase} pass {step}": p.detach().clone() for i, p in enumerate(params)}
    for i, param in enumerate(params):
        entries = optimizer.state.get(param, {})
        results |= {f"{key} of {i}": value for key, value in entries.items() if isinstance(value, Tensor)}
    return results


def record(part: str, path: Path) -> None:
    """Writes the results of this process's ``fastsam``."""
    import fastsam

    assert Path(fastsam.__file__).parents[1].resolve() == Path(os.environ["PYTHONPATH"]).resolve(), fastsam.__file__
    torch.save({trajectory.name: run(trajectory) for trajectory in trajectories(part)}, path)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    a, b = (t.contiguous().view(integers[t.element_size()]) for t in (a, b))
    return torch.equal(a, b)


def differences(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """What the results of one trajectory do not agree on."""
    missing = [f"{key} in one version only" for key in before.keys() ^ after.keys()]
    return missing + [key for key in before if key in after and not same_bits(before[key], after[key])]


def main() -> None:
    """Runs both versions and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a folder that holds fastsam/")
    parser.add_argument("after", type=Path, metavar="AFTER", help="another one")
    parser.add_argument("-k", default="", metavar="PART", help="trajectories whose name contains PART")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.record is not None:
        record(options.k, options.record)
        return
    results = []
    with tempfile.TemporaryDirectory() as folder:
        versions = options.before, options.after
        for number, version in enumerate(versions):
            file = Path(folder) / f"{number}.pt"
            arguments = [*map(str, versions), "-k", options.k, "--record", str(file)]
            environment = os.environ | {"PYTHONPATH": str(version.resolve())}
            subprocess.run([sys.executable, __file__, *arguments], env=environment, check=True)
            results.append(torch.load(file))
    before, after = results
    if not before:
        raise SystemExit(f"no trajectory's name contains {options.k!r}")
    different = {name: found for name in before if (found := differences(before[name], after[name]))}
    for name, found in different.items():
        print(f"{name}: {len(found)} of {len(before[name])} tensors differ, the first is {found[0]}")
    print(f"{len(before) - len(different)} of {len(before)} trajectories have the same bits")
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
