"""The demo's network: small enough for a laptop's CPU, large enough to memorize wrong labels."""

from __future__ import annotations

import torch
from torch import nn


def make_cnn(seed: int, batch_norm: bool = True) -> nn.Module:
    """Builds a CNN of six convolutions, for images of shape (n, 1, 8, 8); 82,000 parameters.

    Args:
        seed: of the initial weights; the global random state is not changed.
        batch_norm: after each convolution; without it, convolutions have biases.
    """

    def convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
        layer = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=not batch_norm)
        return [layer, *([nn.BatchNorm2d(channels_out)] if batch_norm else []), nn.ReLU()]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *convolution(1, 16),
            nn.MaxPool2d(2),
            *convolution(16, 32),
            *convolution(32, 32),
            *convolution(32, 32),
            nn.MaxPool2d(2),
            *convolution(32, 64),
            *convolution(64, 64),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, 10),
        )
