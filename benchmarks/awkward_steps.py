"""A few steps of FastSAM over awkward tensors, for a checker that makes every access slow.

python -m benchmarks.awkward_steps DEVICE BACKEND...
"""

from __future__ import annotations

import itertools
import sys

import torch

from benchmarks.implementations import BASES, RHO
from fastsam import FastSAM

# Empty, one element, odd tails, and more than one chunk.
SHAPES = ((0,), (), (1,), (127,), (33, 31), (4097,), (65537,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STEPS = 2


def steps(device: str, backend: str, base: str, dtype: torch.dtype, adaptive: bool) -> None:
    """Some updates, one perturbation that is given up, and a check that weights and state are finite."""
    base_class, options = BASES[base]
    params = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in SHAPES]
    optimizer = FastSAM(params, base_class, rho=RHO, adaptive=adaptive, backend=backend, **options)
    for _ in range(STEPS):
        for phase in (optimizer.first_step, optimizer.restore, optimizer.first_step, optimizer.second_step):
            for param in params:
                param.grad = torch.randn(param.shape, device=device).to(dtype)
            phase()
    state = [t for entries in optimizer.state.values() for t in entries.values() if isinstance(t, torch.Tensor)]
    assert all(bool(tensor.isfinite().all()) for tensor in [*params, *state]), (backend, base, dtype, adaptive)


def main(device: str, *backends: str) -> None:
    for case in itertools.product(backends, BASES, DTYPES):
        steps(device, *case, adaptive=False)
    for case in itertools.product(backends, BASES, DTYPES[:1]):
        steps(device, *case, adaptive=True)
    print(
        f"{', '.join(backends)} on {device}: {len(BASES)} bases, {len(DTYPES)} dtypes, {STEPS} steps each", flush=True
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
