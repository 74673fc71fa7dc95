"""LoRA and other adapters: few trainable parameters among many frozen ones, which cost nothing."""

from collections import Counter

import internals
import pytest
import torch
from checks import assert_same_bits
from registry import METHODS
from torch import nn
from trajectory import detached

from fastsam import FastSAM
from fastsam.backends import observe

pytestmark = [pytest.mark.face, pytest.mark.usefixtures("one_thread")]


class LoRA(nn.Module):
    """A frozen layer, and a low-rank update of it that begins as zero (Hu et al., arXiv:2106.09685)."""

    def __init__(self, size, rank=2):
        super().__init__()
        self.frozen = nn.Linear(size, size).requires_grad_(False)
        self.a, self.b = nn.Parameter(0.1 * torch.randn(rank, size)), nn.Parameter(torch.zeros(size, rank))

    def forward(self, x):
        return self.frozen(x) + x @ self.a.T @ self.b.T


def make(device, **options):
    torch.manual_seed(1)
    model = nn.Sequential(LoRA(32), nn.Tanh(), LoRA(32)).to(device)
    x = torch.randn(8, 32).to(device)
    return model, x


def train(model, params, x, backend, method, steps=3):
    """FastSAM after some steps, and how often each operation was called."""
    optimizer = FastSAM(params, torch.optim.AdamW, rho=0.1, lr=0.01, method=method, backend=backend)
    calls = Counter()

    def closure():
        optimizer.zero_grad()
        model(x).square().mean().backward()

    def count(name, call):
        calls[name] += 1
        return call()

    with observe(count):
        for _ in range(steps):
            optimizer.step(closure)
    return optimizer, calls


@pytest.mark.parametrize("name", ["sam", "gsam", "friendly", "vasso", "zsharp"])
def test_frozen_parameters_cost_nothing(backend, device, name):
    """No row in a table, no backup, no state, no call more; the result is that of the adapters alone, bit for bit."""
    method = METHODS[name].method
    whole, x = make(device)
    alone, _ = make(device)
    frozen = [p for p in whole.parameters() if not p.requires_grad]
    before = detached(frozen)
    adapters = [p for p in alone.parameters() if p.requires_grad]
    one, calls = train(whole, whole.parameters(), x, backend, method)
    other, expected = train(alone, adapters, x, backend, method)
    assert calls == expected
    assert_same_bits([p.detach() for p in whole.parameters() if p.requires_grad], detached(adapters))
    assert_same_bits(detached(frozen), before)
    assert not any(p in one.state for p in frozen)
    for optimizer in (one, other):
        assert sum(len(table.params) for table in optimizer._engine.tables) == len(adapters)
        kept = sum(t.numel() * t.element_size() for t in internals.backups(optimizer))
        assert kept == sum(p.numel() * p.element_size() for p in adapters)


def test_adapter_that_begins_with_zero_gradient(device):
    """LoRA's A has a zero gradient in the first step; VaSSO's average of it goes on as everybody's."""
    model, x = make(device)
    optimizer, _ = train(model, model.parameters(), x, "auto", METHODS["vasso"].method, steps=1)
    a = [module.a for module in model if isinstance(module, LoRA)]
    assert all(not optimizer.state[p]["fastsam_average"].any() for p in a)
    grads = []

    def closure():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        grads.append([p.grad.clone() for p in a])

    optimizer.step(closure)
    for p, grad in zip(a, grads[0], strict=True):
        torch.testing.assert_close(optimizer.state[p]["fastsam_average"], 0.9 * grad, rtol=1e-6, atol=0)
