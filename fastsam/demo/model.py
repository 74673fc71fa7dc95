"""The demo's network: small enough for a laptop's CPU, large enough to memorize wrong labels."""

from __future__ import annotations

import torch
from torch import nn


def make_cnn(seed: int) -> nn.Module:
    """Builds a CNN of six convolutions with batch norm, for images of shape (n, 1, 8, 8); 82,000 parameters.

    Args:
        seed: of the initial weights; the global random state is not changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *_convolution(1, 16),
            nn.MaxPool2d(2),
            *_convolution(16, 32),
            *_convolution(32, 32),
            *_convolution(32, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            *_convolution(64, 64),
            nn.Flatten(),
            nn.Linear(64 * 2 * 2, 10),
        )


def _convolution(channels_in: int, channels_out: int) -> list[nn.Module]:
    convolution = nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False)
    return [convolution, nn.BatchNorm2d(channels_out), nn.ReLU()]
