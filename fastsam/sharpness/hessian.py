"""The Hessian's spectrum: its largest eigenvalues, its trace, its density, from matrix-vector products alone.

SciPy's ARPACK finds eigenvalues; hessian-eigenthings estimates trace and density.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsam.arguments import check, check_count
from fastsam.sharpness import vectors
from fastsam.sharpness.objective import LossFunction, Objective
from fastsam.sharpness.products import HessianProducts
from fastsam.sharpness.vectors import Vector

REQUIREMENTS = ("hessian-eigenthings", "scipy", "matplotlib")
"""What the sharpness measures import beyond torch, as in pyproject.toml's extra."""


@dataclass(frozen=True)
class Eigenvalues:
    """The k largest eigenvalues of a Hessian, largest first.

    Attributes:
        values: ``(k,)`` float64.
        residuals: ``(k,)``: ``||H v - lambda v||`` for the unit vectors v that were found.
        vectors: the v, as one tensor per parameter that requires a gradient; empty if they were not asked for.
        products: how many matrix-vector products it took.
    """

    values: Tensor
    residuals: Tensor
    vectors: list[Vector]
    products: int


@dataclass(frozen=True)
class Trace:
    """An estimate of a Hessian's trace with its standard error."""

    value: float
    standard_error: float

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class SpectralDensity:
    """The density of a Hessian's eigenvalues.

    Attributes:
        grid, density: ``(g,)`` float64: the density, smoothed by a Gaussian of width ``sigma``; its integral is 1.
        nodes, weights: ``(runs, steps)`` float64: the quadrature itself; each run's weights add up to 1, unused places
            have weight 0. ``(weights * nodes**j).sum(1)`` estimates the j-th moment, ``trace(H^j) / n``.
        sigma: see above.
    """

    grid: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor
    sigma: float


def hessian_eigenvalues(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    k: int = 5,
    *,
    by: str = "value",
    eigenvectors: bool = False,
    hvp: str = "autograd",
    tol: float | None = None,
    seed: int = 0,
    train: bool = False,
) -> Eigenvalues:
    """The k largest eigenvalues of the loss's Hessian, by implicitly restarted Lanczos iterations.

    Args:
        model, loss_fn, data, train: see :class:`~fastsam.sharpness.objective.Objective`.
        k: at most the number of parameters.
        by: ``"value"``, or ``"magnitude"``: very negative ones count, too.
        eigenvectors: also return the eigenvectors.
        hvp: how matrix-vector products are computed: ``"autograd"``, exactly, by double backward; or
            ``"finite_difference"`` of gradients, where double backward does not work (fused attention, compiled or
            sharded models).
        tol: relative accuracy; None: 1e-8 for float64 parameters, else 1e-4.
        seed: of the first vector.

    Raises:
        ValueError: an argument is out of range, or the loss at w is not finite.
        RuntimeError: no convergence within ARPACK's number of iterations.
    """
    check_count("k", k)
    check("by", by, "'value' or 'magnitude'", by in ("value", "magnitude"))
    products = _products(model, loss_fn, data, hvp, train)
    n = products.size
    check("k", k, f"at most the number of parameters, {n}", k <= n)
    if tol is None:
        tol = 1e-8 if all(p.dtype == torch.float64 for p in products.params) else 1e-4

    def solve(product: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor, int]:
        count = 0

        def counted(vector: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return product(vector)

        values, found = _largest(counted, n, k, by, tol, seed)
        residuals = torch.stack([(counted(v) - x * v).norm() for x, v in zip(values, found, strict=True)])
        return values, residuals, found, count

    with products.computing():
        values, residuals, found, count = products.solve(solve)
        as_lists = [vectors.unflatten(v, products.params) for v in found] if eigenvectors else []
    return Eigenvalues(values, residuals, as_lists, count)


def hessian_trace(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    samples: int = 99,
    method: str = "hutch++",
    hvp: str = "autograd",
    seed: int = 0,
    train: bool = False,
) -> Trace:
    """The trace of the loss's Hessian, from random vectors.

    Args:
        model, loss_fn, data, train: see :class:`~fastsam.sharpness.objective.Objective`.
        samples: matrix-vector products.
        method: ``"hutch++"`` (Meyer et al. 2021, https://arxiv.org/abs/2010.09649), which takes the largest eigenvalues
            out first, or ``"hutchinson"``.
        hvp: as for :func:`hessian_eigenvalues`.
        seed: of the random vectors.
    """
    check("samples", samples, ">= 6", samples >= 6)
    check("method", method, "'hutch++' or 'hutchinson'", method in ("hutch++", "hutchinson"))
    library = required("hessian_eigenthings")
    products = _products(model, loss_fn, data, hvp, train)

    def solve(product: Callable[[Tensor], Tensor]) -> Trace:
        operator = library.LambdaOperator(product, products.size, dtype=torch.float64)
        found = library.trace(operator, num_matvecs=samples, method=method, seed=seed)
        return Trace(found.estimate, found.stderr)

    with products.computing():
        return products.solve(solve)


def spectral_density(
    model: nn.Module,
    loss_fn: LossFunction | None,
    data: Any,
    *,
    runs: int = 4,
    steps: int = 40,
    sigma: float | None = None,
    hvp: str = "autograd",
    seed: int = 0,
    train: bool = False,
) -> SpectralDensity:
    """The density of the Hessian's eigenvalues, by stochastic Lanczos quadrature.

    Ubaru, Chen and Saad, SIAM J. Matrix Anal. Appl. 2017; for neural networks Ghorbani et al., ICML 2019,
    https://arxiv.org/abs/1901.10159.

    Args:
        model, loss_fn, data, train: see :class:`~fastsam.sharpness.objective.Objective`.
        runs: random first vectors, over which the density is averaged.
        steps: Lanczos iterations of each, the resolution; never more than there are parameters.
        sigma: the width of the Gaussian for smoothing; None: the spectrum's range / steps.
        hvp: as for :func:`hessian_eigenvalues`.
        seed: of the random vectors.
    """
    check_count("runs", runs)
    check_count("steps", steps)
    library = required("hessian_eigenthings")
    products = _products(model, loss_fn, data, hvp, train)

    def solve(product: Callable[[Tensor], Tensor]) -> SpectralDensity:
        operator = library.LambdaOperator(product, products.size, dtype=torch.float64)
        settings = {"num_runs": runs, "lanczos_steps": min(steps, products.size), "sigma": sigma, "seed": seed}
        found = library.spectral_density(operator, num_grid_points=1000, **settings)
        return SpectralDensity(
            found.grid, found.density, found.raw_eigenvalues.nan_to_num(0.0), found.raw_weights, found.sigma
        )

    with products.computing():
        return products.solve(solve)


def required(name: str) -> Any:
    """An optional module.

    Raises:
        ModuleNotFoundError: it is not installed; names what to install.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(f"{missing}; pip install {' '.join(REQUIREMENTS)}", name=missing.name) from None


def _products(model: nn.Module, loss_fn: LossFunction | None, data: Any, hvp: str, train: bool) -> HessianProducts:
    return HessianProducts(Objective(model, loss_fn, data, train=train), hvp)


def _largest(
    product: Callable[[Tensor], Tensor], n: int, k: int, by: str, tol: float, seed: int
) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, largest first, and their vectors as rows."""
    linalg = required("scipy.sparse.linalg")
    if k > n // 2:  # Lanczos iterations would build the whole space
        dense = torch.stack([product(column) for column in torch.eye(n, dtype=torch.float64)])
        values, columns = torch.linalg.eigh((dense + dense.T) / 2)
    else:
        start = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()
        operator = linalg.LinearOperator((n, n), matvec=lambda x: product(torch.from_numpy(x)).numpy(), dtype=float)
        which = "LA" if by == "value" else "LM"
        try:
            values, columns = map(torch.from_numpy, linalg.eigsh(operator, k=k, which=which, tol=tol, v0=start))
        except linalg.ArpackNoConvergence as error:
            raise RuntimeError(f"{error}; a larger tol than {tol:g} or a smaller k may converge") from None
    order = (values if by == "value" else values.abs()).argsort(descending=True)[:k]
    return values[order], columns.T[order].contiguous()
