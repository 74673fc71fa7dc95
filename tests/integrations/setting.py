"""What the tests of all clients share: a small model, its data, SAM written by hand, and the table of clients."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

RHO = 0.1
BATCH = 16
TOLERANCE = 1e-6
"""The largest difference of a weight after the training, in float32."""


_LIBRARIES = []


def define_torchvision_operators():
    """torchvision's wheel is built for CUDA; without two operators, which nothing here calls, it cannot be imported."""
    if torch.version.cuda is None and not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)  # a library's operators live as long as it does


def make_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 3))


def make_data(count=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 12, generator=generator), torch.randn(count, 3, generator=generator)


def make_loader(count=64, batch_size=BATCH):
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*make_data(count)), batch_size)


def mse(output, target):
    return (output.float() - target).square().mean()


class HandWrittenSAM:
    """Foret et al., equation 2, around a torch optimizer; nothing of the package."""

    def __init__(self, params, base=torch.optim.SGD, rho=RHO, **options):
        self.params = list(params)
        self.base = base(self.params, **(options or {"lr": 0.1, "momentum": 0.9}))
        self.rho = rho

    def step(self, add_gradients, *, clip=None):
        """``add_gradients`` runs a whole pass; ``clip`` clips the gradients of the second."""
        self.base.zero_grad()
        add_gradients()
        weights = [p.detach().clone() for p in self.params]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.params]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
        with torch.no_grad():
            for p, g in zip(self.params, grads, strict=True):
                p.add_(g, alpha=self.rho / (norm + 1e-12))
        self.base.zero_grad()
        add_gradients()
        if clip is not None:
            clip(self.params)
        with torch.no_grad():
            for p, w in zip(self.params, weights, strict=True):
                p.copy_(w)
        self.base.step()


def in_steps(batches, accumulate=1, epochs=1):
    """The micro-batches of each step; the last step of an epoch may have fewer."""
    return epochs * [batches[i : i + accumulate] for i in range(0, len(batches), accumulate)]


def train_by_hand(steps, *, model=None, divide_by=None, scale=1.0, clip=None, autocast=None, schedule=None, **options):
    """A model trained by hand-written SAM.

    ``steps`` are lists of micro-batches, of which each has the weight ``1 / (divide_by or their number)``. Losses are
    multiplied by ``scale``, gradients divided by it: 16-bit products round as they do under a GradScaler.
    """
    model = model or make_model()
    sam = HandWrittenSAM(model.parameters(), **options)
    schedule = schedule and schedule(sam.base)
    for micro_batches in steps:

        def add_gradients(micro_batches=micro_batches):
            for x, y in micro_batches:
                with autocast or nullcontext():
                    loss = mse(model(x), y)
                (scale * loss / (divide_by or len(micro_batches))).backward()
            for param in model.parameters():
                param.grad /= scale

        sam.step(add_gradients, clip=clip)
        if schedule:
            schedule.step()
    return model


def by_norm(limit):
    return lambda params: nn.utils.clip_grad_norm_(params, limit)


def by_value(limit):
    return lambda params: nn.utils.clip_grad_value_(params, limit)


def difference(model, expected):
    """Between two models, or lists of parameters."""
    ours, theirs = (list(m.parameters()) if isinstance(m, nn.Module) else list(m) for m in (model, expected))
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in zip(ours, theirs, strict=True))


class Table:
    """The rows that one test adds to the table of clients."""

    def __init__(self, record):
        self._record = record

    def compare(self, client, mode, model, expected, tolerance=TOLERANCE):
        """A row, and the test's verdict: ``model`` is trained as ``expected`` is."""
        self.add(client, mode, difference(model, expected), tolerance)

    def add(self, client, mode, error, tolerance=TOLERANCE):
        is_right = error <= tolerance  # False for NaN
        self._record("client", (client, mode, "yes" if is_right else "NO", f"{error:.1e}"))
        assert is_right, f"{client}, {mode}: differs from SAM by hand by {error:.2g}, more than {tolerance:.0e}"

    def not_run(self, client, mode, reason):
        self._record("client", (client, mode, "not run", reason))
        pytest.skip(reason)
