"""Parameters trained beside torch.optim, however their memory moves."""

import pytest
import torch
from checks import values

from fastsam import FastSAM
from fastsam.precision import Precision
from fastsam.tables import Member, TensorTable


def make_table(params, groups=None, precision=Precision()):  # noqa: B008
    groups = groups or [0] * len(params)
    dtype = params[0].dtype.to_real() if params[0].is_complex() else params[0].dtype
    return TensorTable(params[0].device, dtype, [Member(i, p, groups[i]) for i, p in enumerate(params)], precision)


def make_params(*shapes, dtype=torch.float32, device="cpu"):
    return [values(shape, dtype, device, i).requires_grad_() for i, shape in enumerate(shapes)]


# ---- what has changed ----


def other_memory(param):
    param.data = param.data.clone()


def other_dtype(param):
    param.data = param.data.double()


def transposed(param):
    param.data = param.data.t()


def other_shape(param):
    param.data = param.data.reshape(2, 8)


def moved_by_an_element(param):
    memory = torch.zeros(17)
    memory[1:] = param.detach().flatten()
    param.data = memory[1:].view(4, 4)


def resized(param):
    param.data.resize_(5, 5)


def shared(param):
    param.share_memory_()


CHANGES = [other_memory, other_dtype, transposed, other_shape, moved_by_an_element, resized, shared]


def step_with(optimizer, params, grads):
    """A step whose two passes both have ``grads``."""

    def closure():
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad

    optimizer.step(closure)


# ---- nothing stale is written to ----


BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
}
every_base = pytest.mark.parametrize(("base", "options"), BASES.values(), ids=BASES)


class Beside:
    """FastSAM with rho = 0 and, beside it, torch.optim on float64 copies: whether it still trains what it should."""

    def __init__(self, backend, base, options, *shapes):
        self.params = make_params(*shapes)
        self.fast = FastSAM(self.params, base, rho=torch.tensor(0.0), backend=backend, **options)
        self.copies = [p.detach().double().requires_grad_() for p in self.params]
        self.torch = base(self.copies, foreach=False, **options)
        self.count = 0

    def step(self):
        self.count += 1
        grads = [values(p.shape, p.dtype, p.device, 50 * self.count + i) for i, p in enumerate(self.params)]
        step_with(self.fast, self.params, grads)
        for one, grad in zip(self.copies, grads, strict=True):
            one.grad = grad.double()
        self.torch.step()
        for param, one in zip(self.params, self.copies, strict=True):
            # In float32 rounding errors add up over the steps, and one that was cast keeps them.
            torch.testing.assert_close(param.detach().double(), one.detach(), rtol=4e-6, atol=4e-6)
            for name, expected in self.torch.state[one].items():
                ours = self.fast.state[param][name].double()
                torch.testing.assert_close(ours, expected.double(), rtol=2e-5, atol=2e-5)
