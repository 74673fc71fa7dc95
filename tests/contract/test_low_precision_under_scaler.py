"""float16 and bfloat16 parameters under a GradScaler."""

import pytest
import torch
from checks import assert_same_bits
from problem import Problem
from registry import every_base, every_fused_base, low_dtypes
from scaled_loops import plain_step, scaled_backward, scaled_step, scaler_for

pytestmark = [pytest.mark.face, pytest.mark.usefixtures("one_thread")]


# ---- low-precision parameters ----


class LowPrecision(Problem):
    """A model of low-precision parameters; its loss is a float32."""

    def __init__(self, device, dtype):
        super().__init__(device)
        self.model.to(dtype)
        self.x, self.y = self.x.to(dtype), self.y.to(dtype)

    def loss(self):
        return (self.model(self.x) - self.y).float().square().mean()


@every_fused_base
@low_dtypes
def test_low_precision_parameters_under_scaler(backend, device, base, dtype):
    """The scaler itself unscales no float16 gradients; the update divides by the scale in float32."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        pytest.skip("PyTorch's scaler looks for infinities in no bfloat16 gradients on CUDA")
    one, two = LowPrecision(device, dtype), LowPrecision(device, dtype)
    scaled, plain = one.optimizer(backend, base), two.optimizer(backend, base)
    scaler = scaler_for(device, init_scale=16.0)
    for _ in range(3):
        scaled_step(one, scaled, scaler)
        plain_step(two, plain)
        tolerance = 4 * torch.finfo(dtype).eps  # small gradients of the unscaled loop are subnormal
        torch.testing.assert_close(one.weights(), two.weights(), rtol=tolerance, atol=tolerance)
    assert scaler.get_scale() == 16.0


@every_fused_base
def test_float16_gradients_that_overflow(backend, device, base):
    """Beyond 65,504 they are Inf, in both passes: skipped, and the scale comes down to where they fit."""
    problem = LowPrecision(device, torch.float16)
    optimizer = problem.optimizer(backend, base)
    scaler = scaler_for(device, init_scale=2.0**20)
    start = problem.weights()
    scaled_step(problem, optimizer, scaler)
    assert scaler.get_scale() == 2.0**19
    assert_same_bits(problem.weights(), start)
    while scaler.get_scale() > 2.0**10:
        scale = scaler.get_scale()
        scaled_step(problem, optimizer, scaler)
        if scaler.get_scale() == scale:
            break
    assert 2.0**10 < scale < 2.0**19
    assert all((w != s).any() and w.isfinite().all() for w, s in zip(problem.weights(), start, strict=True))


@every_base
def test_float16_gradients_are_not_unscaled_by_scaler(backend, device, base):
    """torch refuses it; the perturbation can be given up."""
    problem = LowPrecision(device, torch.float16)
    optimizer = problem.optimizer(backend, base)
    scaler = scaler_for(device)
    start = problem.weights()
    scaled_backward(problem, scaler)
    optimizer.first_step()
    scaled_backward(problem, scaler)
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)
    optimizer.restore()
    assert_same_bits(problem.weights(), start)
