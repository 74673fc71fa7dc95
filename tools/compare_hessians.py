"""Compares libraries for Hessian spectra on the demo's network: eigenvalues, traces, times.

    pip install curvlinops-for-pytorch==3.0.1
    python tools/compare_hessians.py

Prints what each finds on 100 of the demo's images at the initial weights, with batch norm in eval and in train mode.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import curvlinops
import hessian_eigenthings
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.nn import functional as F

from fastsam import sharpness
from fastsam.demo.data import load_noisy_digits
from fastsam.demo.model import make_cnn

K, TOLERANCE, PRODUCTS = 3, 1e-3, 30


def report(name: str, compute: Callable[[], Any]) -> None:
    """Prints a result and its time on the CPU; or the error."""
    start = time.process_time()
    try:
        result = compute()
    except RuntimeError as error:
        result = f"RuntimeError: {str(error)[:90]}"
    print(f"  {name:42} {time.process_time() - start:5.1f} s  {result}", flush=True)


def main() -> None:
    """Prints the comparison."""
    torch.set_num_threads(1)
    data = load_noisy_digits(0.4, 0)
    batches = [(data.train_images[:100], data.train_labels[:100])]
    for train in (False, True):
        model = make_cnn(0).train(train)
        params = list(model.parameters())
        theirs = hessian_eigenthings.HessianOperator(
            model, batches, hessian_eigenthings.supervised_loss(F.cross_entropy)
        )
        linear = curvlinops.HessianLinearOperator(
            model, nn.CrossEntropyLoss(), params, batches, check_deterministic=False
        )
        scipy = {"k": K, "which": "LA", "tol": TOLERANCE, "return_eigenvectors": False}
        lanczos = {"k": K, "which": "LA", "seed": 0}
        print("train mode" if train else "eval mode")
        report("fastsam.sharpness", lambda: _ours(model, batches, train))  # noqa: B023
        report("curvlinops, SciPy", lambda: sorted(eigsh(linear.to_scipy(), **scipy), reverse=True))  # noqa: B023
        report("hessian-eigenthings", lambda: _lanczos(theirs, **lanczos))  # noqa: B023
        report("hessian-eigenthings, 40 iterations", lambda: _lanczos(theirs, max_iter=40, **lanczos))  # noqa: B023
        report("hessian-eigenthings, trace and its error", lambda: _trace(theirs))  # noqa: B023
        report("curvlinops, trace", lambda: curvlinops.hutchpp_trace(linear, PRODUCTS).item())  # noqa: B023


def _ours(model: nn.Module, batches: Any, train: bool) -> list[float]:
    found = sharpness.hessian_eigenvalues(model, F.cross_entropy, batches, K, tol=TOLERANCE, train=train)
    return found.values.tolist()


def _lanczos(operator: Any, **settings: Any) -> list[float]:
    return hessian_eigenthings.lanczos(operator, **settings).eigenvalues.tolist()


def _trace(operator: Any) -> tuple[float, float]:
    found = hessian_eigenthings.trace(operator, num_matvecs=PRODUCTS, seed=0)
    return found.estimate, found.stderr


if __name__ == "__main__":
    main()
