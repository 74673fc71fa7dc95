"""Methods that ascend by a part of the gradient: some of its tensors or elements, or what is left without its mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastsam.arguments import check
from fastsam.distributed import placed_like, whole_of
from fastsam.methods.direction import Direction
from fastsam.methods.method import TINY, AscentTerms, Dots, Facts, Method
from fastsam.spec import AscentForm


@dataclass(frozen=True)
class ESAM(Method):
    r"""Efficient SAM's stochastic weight perturbation: ``e = rho / beta * g / ||g||`` for a random part of the tensors.

    Each tensor is perturbed with the probability beta, others in each step; the norm is over all. Du et al., ICLR 2022,
    https://arxiv.org/abs/2110.03141, section 3.1; as in the authors' code, whole tensors are drawn. The selection of
    samples (there, section 3.2) is in :func:`fastsam.closures.esam_closures`.

    Args:
        beta: in (0, 1].
        seed: of the random choice, which is the same on every device and backend.
    """

    beta: float = 0.6
    seed: int = 0
    counts_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check("beta", self.beta, "in (0, 1]", 0 < self.beta <= 1)
        check("seed", self.seed, "a whole number >= 0", isinstance(self.seed, int) and self.seed >= 0)

    def ascent_form(self, further: bool) -> AscentForm:
        return AscentForm()

    def ascent_terms(self, dots: Dots, facts: Facts, further: bool) -> AscentTerms:
        chosen = facts.uniform(self.seed) < self.beta
        return AscentTerms(torch.where(chosen, facts.rho / self.beta, 0.0) / (dots.total[0].sqrt() + TINY))


@dataclass(frozen=True)
class ZSharp(Direction):
    r"""Ascends by the gradient's outliers: in each tensor, the elements with ``|z|`` beyond its q-quantile.

    ``z = (g - mean) / std`` over a tensor, and the others of ``d = g`` are 0. Yun 2025,
    https://arxiv.org/abs/2505.02369. Where no element is beyond (a tensor of one element, equal
    elements), the whole gradient of that tensor counts. Written in plain PyTorch: it needs memory for d.
    """

    q: float = 0.95
    depends_on_length: ClassVar[bool] = False
    uses_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check("q", self.q, "in [0, 1)", 0 <= self.q < 1)

    def direction(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        # A quantile is one of the whole tensor, of which a rank may hold a part.
        return [placed_like(p, self._outliers(whole_of(g))) for p, g in zip(params, grads, strict=True)]

    def _outliers(self, grad: Tensor) -> Tensor:
        if grad.numel() < 2:
            return grad
        # The std only scales z: what is beyond the quantile does not depend on it.
        wide = grad.float() if grad.dtype.itemsize < 4 else grad
        distances = (wide - wide.mean()).abs()
        # torch.quantile takes at most 2^24 elements, and sorts them all.
        beyond = distances > distances.flatten().kthvalue(int(self.q * (grad.numel() - 1)) + 1).values
        return torch.where(beyond | ~beyond.any(), grad, 0)


@dataclass(frozen=True)
class GCSAM(Direction):
    r"""Ascends by the centralized gradient: each output unit's mean is subtracted from tensors of two and more dims.

    Hassan et al. 2025, https://arxiv.org/abs/2501.11584, with the gradient centralization of Yong et al., ECCV 2020,
    https://arxiv.org/abs/2004.01461. Only the ascent is centralized; for the descent use a base that does
    so. Written in plain PyTorch: it needs memory for d.
    """

    depends_on_length: ClassVar[bool] = False
    uses_shapes: ClassVar[bool] = True

    def direction(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        return [g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g for g in grads]
