"""Parameters on several devices."""

import math

import pytest
import torch

from fastsam import FastSAM


@pytest.mark.gpu
def test_one_norm_over_every_device():
    params = [torch.ones(4, device=device, requires_grad=True) for device in ("cpu", "cuda", "cpu")]
    optimizer = FastSAM(params, rho=0.5, lr=0.1)
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    optimizer.first_step()
    for param in params:
        torch.testing.assert_close(param.detach().cpu(), torch.full((4,), 1 + 0.5 * 2 / math.sqrt(48)))
    optimizer.restore()
    assert all(bool((p == 1).all()) for p in params)
