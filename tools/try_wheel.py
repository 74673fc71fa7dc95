"""Trains 100 steps with an installed FastSAM: ``python try_wheel.py BACKEND``, in any folder.

Fails if the package is this checkout's, or if the training does not work.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import fastsam
import fastsam.kernels

CHECKOUT = Path(__file__).resolve().parents[1]


def train(backend: str) -> list[float]:
    """Returns the losses of a small network that learns whether two numbers have the same sign."""
    torch.manual_seed(0)
    x = torch.randn(512, 8)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
    optimizer = fastsam.FastSAM(model.parameters(), rho=0.05, lr=0.1, momentum=0.9, backend=backend)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return [optimizer.step(closure).item() for _ in range(100)]


def main(backend: str) -> None:
    """Trains and prints what was used."""
    for module, folder in ((fastsam, "fastsam"), (fastsam.kernels, "kernels")):
        if Path(module.__file__).resolve().parent == CHECKOUT / folder:
            sys.exit(f"{module.__name__} is the checkout's")
    losses = train(backend)
    versions = f"Python {sys.version.split()[0]}, torch {torch.__version__}, fastsam {fastsam.__version__}"
    print(f"{versions}, backend {backend}: loss {losses[0]:.3f} -> {losses[-1]:.3f} in 100 steps")
    if not losses[-1] < 0.2:
        sys.exit("the training does not work")


if __name__ == "__main__":
    main(*sys.argv[1:])
