"""Draws docs/two-minima.png: a loss with a narrow and a wide minimum, and the loss that SAM minimizes.

python docs/two_minima.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from fastsam import FastSAM

RHO = 0.3


def loss(w):
    """A narrow well at -1, a slightly shallower wide one at 1."""
    return 1.2 - torch.exp(-(((w + 1) / 0.17) ** 2)) - 0.92 * torch.exp(-(((w - 1) / 0.7) ** 2)) + 0.05 * w**2


def perturb(at):
    """Returns w + e(w), as FastSAM perturbs."""
    weight = torch.nn.Parameter(at.clone())
    optimizer = FastSAM([weight], rho=RHO, lr=0.1, backend="foreach")
    loss(weight).backward()
    optimizer.first_step()
    return weight.detach()


def largest_loss(w):
    """Returns the largest loss within rho of each w."""
    return loss(w[:, None] + torch.linspace(-RHO, RHO, 601)).amax(1)


def draw(file):
    """Draws both losses, their lowest points, and FastSAM's perturbation at two points."""
    w = torch.linspace(-1.9, 2.4, 800)
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for values, color, label in (
        (loss(w), "tab:orange", "loss at w"),
        (largest_loss(w), "tab:blue", f"largest loss within rho = {RHO} of w"),
    ):
        lowest = values.argmin()
        axes.plot(w, values, color=color, label=label)
        axes.plot(w[lowest], values[lowest], "o", color=color, markersize=8)
    for start in torch.tensor([-0.93, 1.35]):
        end = perturb(start)
        axes.annotate("", (end, loss(end)), (start, loss(start)), arrowprops={"arrowstyle": "->"})
    axes.set(xlabel="w", ylabel="loss", yticks=[])
    axes.legend(loc="upper left", bbox_to_anchor=(0.36, 1.0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    draw(Path(__file__).with_name("two-minima.png"))
