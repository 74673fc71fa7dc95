"""Mixup: training on mixtures of two images and of their labels (Zhang et al., ICLR 2018)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mixture(NamedTuple):
    """A batch of images, each with two labels: ``share`` of the first and the rest of the second."""

    images: Tensor
    labels: Tensor
    others: Tensor
    share: float

    def loss(self, model: nn.Module) -> Tensor:
        """The cross-entropy of the soft label. Both passes of a step must be of one mixture."""
        output = model(self.images)
        loss = F.cross_entropy(output, self.labels)
        if self.share == 1:
            return loss
        return self.share * loss + (1 - self.share) * F.cross_entropy(output, self.others)

    def split(self, size: int) -> list[Mixture]:
        """Its parts of ``size`` images."""
        parts = zip(self.images.split(size), self.labels.split(size), self.others.split(size), strict=True)
        return [Mixture(*part, self.share) for part in parts]


def plain(images: Tensor, labels: Tensor) -> Mixture:
    """The batch itself."""
    return Mixture(images, labels, labels, 1.0)


def mix(images: Tensor, labels: Tensor, alpha: float, generator: torch.Generator) -> Mixture:
    """Each image with another one of the batch; the share is drawn from Beta(alpha, alpha), once for the batch."""
    order = torch.randperm(len(labels), generator=generator)
    # x / (x + y) of two Gamma variables is a Beta variable; torch draws Gamma variables from a given generator.
    first, second = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    share = first / (first + second)
    return Mixture(share * images + (1 - share) * images[order], labels, labels[order], share)
