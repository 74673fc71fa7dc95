"""Faults of torch.optim's fused optimizers that no other test would find, each with its issue."""

import math

import pytest
import torch
from checks import assert_within, values
from registry import low_dtypes

from fastsam import FastSAM


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@low_dtypes
@pytest.mark.parametrize("size", [8, 16, 32, 64, 4096])
def test_full_vectors_of_low_precision_are_updated(backend, device, dtype, size, momentum):
    """pytorch#191763: fused SGD on the CPU does nothing to them."""
    param = values((size,), dtype, device).requires_grad_()
    start, grad = param.detach().clone(), values((size,), dtype, device, 1)
    optimizer = FastSAM([param], rho=0.0, lr=0.5, momentum=momentum, backend=backend)
    for phase in (optimizer.first_step, optimizer.second_step):
        param.grad = grad
        phase()
    assert_within(param.detach(), start.double() - 0.5 * grad.double(), start)
    assert bool((param.detach() != start).all())


@pytest.mark.parametrize("where", ["first", "between", "last", "everywhere", "alone in its group"])
def test_empty_tensor_does_not_spoil_norm(backend, device, where):
    """pytorch#100701: one at a table boundary gave silently wrong norms."""
    full = [values((size,), torch.float32, device, size).requires_grad_() for size in (3, 70, 1)]
    empty = [torch.zeros(0, device=device, requires_grad=True) for _ in range(4)]
    params = {
        "first": [empty[0], *full],
        "between": [full[0], empty[0], full[1], full[2]],
        "last": [*full, empty[0]],
        "everywhere": [empty[0], full[0], empty[1], full[1], empty[2], full[2], empty[3]],
        "alone in its group": full,
    }[where]
    groups = [{"params": params}] + ([{"params": empty[:1]}] if where == "alone in its group" else [])
    optimizer = FastSAM(groups, rho=0.5, lr=0.1, backend=backend)
    originals = [p.detach().clone() for p in full]
    for param in (*full, *empty):
        param.grad = torch.full_like(param, 2.0)
    optimizer.first_step()
    size = 2 * math.sqrt(74)
    for param, w in zip(full, originals, strict=True):
        assert_within(param.detach(), w.double() + 0.5 * 2 / size, w)


def test_large_norm_of_float16_gradients_is_number(backend, device):
    """94,868 in float16 is infinity: nothing would be perturbed."""
    param = values((1000,), torch.float16, device).requires_grad_()
    start = param.detach().clone()
    optimizer = FastSAM([param], rho=10.0, lr=0.1, backend=backend)
    param.grad = torch.full_like(param, 3000.0)
    assert param.grad.norm().isinf()
    assert float(param.grad.double().norm()) == pytest.approx(94868, rel=1e-4)
    optimizer.first_step()
    assert_within(param.detach(), start.double() + 10 / math.sqrt(1000), start)
    assert not torch.equal(param.detach(), start)


# ---- the other SAMs ----
