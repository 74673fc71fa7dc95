"""What a perturbation is worth where the weights are bfloat16: the table in docs/mixed-precision.md.

python -m benchmarks.low_precision        25 million weights; needs 1 GiB, takes seconds
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from fastsam import FastSAM

SIGMA, RHO = 0.02, 0.05


def perturbed_by(weights: Tensor, grad: Tensor, master: Tensor | None = None, **options: Any) -> Tensor:
    """``e``, float64: what ``weights`` really move by; ``master``: where they have one with bits of its own."""
    param = weights.clone().requires_grad_()
    optimizer = FastSAM([param], lr=0.1, **options)
    if master is not None:
        optimizer.state[param]["fastsam_master"] = master.clone()
    param.grad = grad.clone()
    optimizer.first_step()
    return param.detach().double() - weights.double()


def rows(count: int, backend: str, rho: float = RHO) -> list[tuple[str, float, float, float]]:
    """For each way of keeping ``count`` weights: its name, length of e, cosine with g, e along g / norm(g)."""
    generator = torch.Generator().manual_seed(0)
    master, g = (torch.randn(count, generator=generator) for _ in range(2))
    master *= SIGMA
    w, grad = master.bfloat16(), g.bfloat16()
    direction = grad.double() / grad.double().norm()
    options = {"backend": backend, "rho": rho}
    ways = {
        'rounding="nearest"': perturbed_by(w, grad, **options),
        'rounding="stochastic"': perturbed_by(w, grad, **options, rounding="stochastic", rounding_seed=0),
        "master_weights=True": perturbed_by(w, grad, master, **options, master_weights=True),
    }
    return [(name, float(e.norm()), float(e @ direction / e.norm()), float(e @ direction)) for name, e in ways.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=25_000_000, help="how many weights (default: %(default)s)")
    parser.add_argument("--backend", default="native", help="FastSAM's backend (default: %(default)s)")
    options = parser.parse_args()
    print(f"{options.count:,} bfloat16 weights of sigma {SIGMA}, rho {RHO}, backend {options.backend}")
    for name, length, cosine, projection in rows(options.count, options.backend):
        share = projection / RHO
        print(f"{name:24} length {length:.4f}  cosine {cosine:.3f}  along g {projection:.4f}: {share:.2%} of rho")


if __name__ == "__main__":
    main()
