"""Which sharpness does SAM minimize? Full batches: the largest eigenvalue; single samples: the trace.

    python examples/which_sharpness.py [--output which-sharpness.png]

Wen, Ma and Li (ICLR 2023, https://arxiv.org/abs/2211.05729) prove that near a manifold of minimisers SAM drifts along
it: with full batches towards a small lambda_1, with batches of one sample (1-SAM) towards a small trace of the Hessian.
Here the manifold is a line: two samples have the losses ``f_k(u) * v_k^2 / 2``, so that every ``(u, 0, 0)`` is a
minimiser of loss 0, and the Hessian of their mean there has the eigenvalues ``f_1(u) / 2`` and ``f_2(u) / 2``. With
``f_1 = e^u`` and ``f_2 = 4 e^(-4u)`` the larger one is smallest at u = ln(4) / 5, and their sum at u = ln(16) / 5.
Gradient descent without SAM stays near where it reaches the line.

Needs matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import math

import torch

from fastsam import FastSAM

STEPS = 10_000
EVERY = 100
LR, RHO = 0.1, 0.1
START = (1.0, 0.3, 0.3)
SMALLEST_LARGEST, SMALLEST_TRACE = math.log(4) / 5, math.log(16) / 5

RULES = {"SAM, full batch": (RHO, False), "1-SAM": (RHO, True), "gradient descent": (0.0, False)}


def losses(point: torch.Tensor) -> torch.Tensor:
    """The losses of the two samples at ``(u, v_1, v_2)``."""
    u, v = point[0], point[1:]
    return torch.stack([u.exp(), 4 * (-4 * u).exp()]) * v.square() / 2


def eigenvalues(u: float) -> tuple[float, float]:
    """Of the mean loss's Hessian at ``(u, 0, 0)``, beside 0."""
    return math.exp(u) / 2, 2 * math.exp(-4 * u)


def train(rho: float, single: bool, steps: int = STEPS) -> list[float]:
    """u after every ``EVERY`` steps; ``single``: each step sees one sample, drawn at random."""
    point = torch.nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = FastSAM([point], rho=rho, lr=LR)
    drawn = torch.randint(2, (steps,), generator=torch.Generator().manual_seed(0)).tolist()
    path = [point[0].item()]
    for step in range(steps):

        def closure(step: int = step) -> torch.Tensor:
            optimizer.zero_grad()
            loss = losses(point)[drawn[step]] if single else losses(point).mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        if (step + 1) % EVERY == 0:
            path.append(point[0].item())
    return path


def draw(paths: dict[str, list[float]], output: str) -> None:
    """The eigenvalues along the line, and u over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), dpi=140, layout="constrained")
    positions = [i / 100 for i in range(-10, 121)]
    left.plot(positions, [max(eigenvalues(u)) for u in positions], color="#D55E00", label="largest eigenvalue")
    left.plot(positions, [sum(eigenvalues(u)) for u in positions], color="#0072B2", label="trace")
    left.set(title="Sharpness along the line of minimisers", xlabel="u", ylim=(0, 3))
    for colour, (name, path) in zip(("#D55E00", "#0072B2", "#999999"), paths.items(), strict=False):
        right.plot([EVERY * i for i in range(len(path))], path, color=colour, label=name)
    right.axhline(SMALLEST_LARGEST, color="#D55E00", linestyle=":")
    right.axhline(SMALLEST_TRACE, color="#0072B2", linestyle=":")
    right.set(title="Where they drift (dotted: smallest lambda_1, smallest trace)", xlabel="step", ylabel="u")
    left.legend(frameon=False)
    right.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.75))
    for axes in (left, right):
        axes.grid(alpha=0.25)
    figure.savefig(output)


def main() -> None:
    """Trains with each rule, prints where it ends, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="which-sharpness.png")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    print(f"lambda_1 is smallest at u = {SMALLEST_LARGEST:.3f}, the trace at u = {SMALLEST_TRACE:.3f}")
    paths = {}
    for name, rule in RULES.items():
        paths[name] = train(*rule)
        print(f"{name:17} ends at u = {paths[name][-1]:.3f}")
    draw(paths, output)
    print(f"the paths: {output}")


if __name__ == "__main__":
    main()
