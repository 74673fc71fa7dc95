"""Training steps whose demands on a GPU are counted: launches, uploads, waits."""

import pytest
import torch

from fastsam import FastSAM, methods

METHODS = {
    "SAM": methods.SAM(),
    "SAM(p=4)": methods.SAM(p=4),
    "SAM(inner_steps=2)": methods.SAM(inner_steps=2),
    "ASAM": methods.ASAM(),
    "AMP": methods.AMP(),
    "AWP": methods.AWP(),
    "GSAM": methods.GSAM(),
    "WSAM": methods.WSAM(),
    "LookSAM": methods.LookSAM(k=2),
    "FriendlySAM": methods.FriendlySAM(),
    "MomentumSAM": methods.MomentumSAM(),
    "RandomSAM": methods.RandomSAM(),
}
BASES = {"SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), "AdamW": (torch.optim.AdamW, {"lr": 0.1})}

PRECISIONS = {
    "float32": {},
    "stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "masters": {"dtype": torch.bfloat16, "master_weights": True},
}

every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
every_precision = pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS)


class Steps:
    """A small model's training steps."""

    def __init__(self, backend, base=BASES["SGD"], dtype=torch.float32, **arguments):
        kind, options = base
        self.params = [torch.nn.Parameter(torch.ones(size, dtype=dtype)) for size in (3, 2000, 5)]
        self.optimizer = FastSAM(self.params, kind, backend=backend, **options, **arguments)
        self.alive = []

    def closure(self, fresh=False):
        for param in self.params:
            if param.grad is None or fresh:
                self.alive.append(param.grad)
                param.grad = torch.ones_like(param)
        return torch.zeros(())

    def __call__(self, closures=0):
        if closures:
            self.optimizer.step(closures=[self.closure] * closures)
        else:
            self.optimizer.step(self.closure)
