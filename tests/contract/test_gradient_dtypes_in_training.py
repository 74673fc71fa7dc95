"""Gradients of another dtype than their parameter's: their range, and as training has them."""

import oracle
import pytest
import torch
from checks import assert_same_bits, assert_within, values
from exact_steps import assert_updated, every_base, every_param_dtype, make_optimizer, make_param, needs_grad_dtype
from problem import FUSED_BASES, Problem, give_grad
from torch import nn
from torch.nn.utils import clip_grad_norm_

from fastsam import FastSAM

pytestmark = pytest.mark.face

# ---- range ----


@every_param_dtype
@pytest.mark.parametrize("size", [1e25, 1e-25], ids=str)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_squares_that_float32_cannot_hold(backend, device, dtype, size, adaptive):
    """A gradient of 1e25 has a direction; beside one of 1e-25 the 1e-12 in the denominator decides the length."""
    grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    param = make_param((40, 25), dtype, device)
    if size < 1:
        with torch.no_grad():
            param.mul_(0 if not adaptive else 1)  # so that a perturbation of 1e-13 shows
    start = param.detach().clone()
    grad = values((40, 25), torch.float64, device, 1).mul_(size).to(grad_dtype)
    optimizer = FastSAM([param], rho=2.0, lr=0.0, adaptive=adaptive, backend=backend)
    give_grad(param, grad)
    optimizer.first_step()
    norm = oracle.norm([start], [grad], [adaptive])
    assert 20 * size < norm < 100 * size
    assert_within(param.detach(), oracle.perturbed(start, grad, norm, 2.0, adaptive), start)
    if size > 1 and not adaptive:
        e, g = (param.detach().double() - start.double()).flatten(), grad.double().flatten()
        assert float(e.norm()) == pytest.approx(2.0, rel=0.01)
        assert float(e @ g / (e.norm() * g.norm())) > 0.999


@pytest.mark.parametrize("size", [1e25, 1e-25], ids=str)
def test_low_precision_gradients_as_large_and_as_small(backend, device, size):
    """bfloat16 has float32's range: its own gradients reach there too."""
    param = torch.zeros(1000, dtype=torch.bfloat16, device=device, requires_grad=True)
    grad = values((1000,), torch.float64, device, 1).mul_(size).bfloat16()
    optimizer = FastSAM([param], rho=2.0, lr=0.0, backend=backend)
    param.grad = grad
    optimizer.first_step()
    norm = oracle.norm([param], [grad], [False])
    assert_within(param.detach(), oracle.perturbed(torch.zeros_like(param), grad, norm, 2.0), torch.zeros_like(param))
    assert param.detach().count_nonzero() == 1000


@every_base
def test_gradients_beyond_float16(backend, device, base):
    """A float16 parameter's float32 gradients, scaled by 2**20: no Inf on the way, and none of the small ones lost."""
    params = [make_param((200,), torch.float16, device, i) for i in range(2)]
    optimizer = make_optimizer(backend, base, params, rho=0.5)
    start = [p.detach().clone() for p in params]
    grads = [values(p.shape, torch.float32, device, 7 + i) for i, p in enumerate(params)]
    grads[1][:100] *= 1e-9
    for param, grad in zip(params, grads, strict=True):
        give_grad(param, grad * 2.0**20)
    optimizer.first_step(zero_grad=False)
    norm = oracle.norm(start, grads, [False] * 2)
    for param, w, g in zip(params, start, grads, strict=True):
        assert_within(param.detach(), oracle.perturbed(w, g, norm, 0.5), w)
    optimizer.grad_scale = torch.tensor(2.0**20, device=device)
    optimizer.found_inf = torch.tensor(0.0, device=device)
    optimizer.second_step()
    del optimizer.grad_scale, optimizer.found_inf
    for param, w, g in zip(params, start, grads, strict=True):
        assert_updated(optimizer, param, w, g, {}, 1)
        assert param.isfinite().all()


# ---- as training has them ----


class LowPrecision(Problem):
    """A bfloat16 model that accumulates its gradients in float32."""

    def __init__(self, device, seed=1, *, wide):
        super().__init__(device, seed)
        self.model.bfloat16()
        self.x, self.y = self.x.bfloat16(), self.y.bfloat16()
        if wide:
            for param in self.params:
                param.grad_dtype = torch.float32

    def loss(self):
        return (self.model(self.x) - self.y).float().square().mean()


@needs_grad_dtype
@pytest.mark.parametrize("use", ["closure", "two-phase"])
@every_base
def test_gradients_accumulated_in_float32(backend, device, base, use):
    """256 micro-batches that add less than half a unit each to the first one's: in bfloat16 only that would count."""
    param = torch.ones(64, dtype=torch.bfloat16, device=device).requires_grad_()
    param.grad_dtype = torch.float32
    optimizer = make_optimizer(backend, base, [param], rho=0.5)
    seen = []

    def closure():
        for i in range(257):
            (param.float() * (256.0 if i == 0 else 1.0)).sum().backward()
        assert param.grad.dtype == torch.float32
        seen.append(param.detach().clone())
        assert param.grad.eq(512).all()

    if use == "closure":
        optimizer.step(closure)
    else:
        closure()
        optimizer.first_step()
        closure()
        optimizer.second_step()
    # A norm of 512 * 8, whose square root is exact.
    assert_within(seen[1], torch.full((64,), 1 + 0.5 / 8, device=device), seen[0])
    if base == "sgd":
        assert_within(param.detach(), torch.full((64,), 1 - 0.1 * 512, device=device), seen[0])


@needs_grad_dtype
@pytest.mark.parametrize("clip", [None, 0.1], ids=["no-clip", "clip"])
@pytest.mark.parametrize("base", [*FUSED_BASES])
def test_a_scaler_over_wide_gradients(backend, device, base, clip):
    """The scaler multiplies by a power of two: with float32 gradients it changes no bit."""
    one, two = (LowPrecision(device, wide=True) for _ in range(2))
    scaled, plain = (problem.optimizer(backend, base) for problem in (one, two))
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for _ in range(3):
        for problem, optimizer in ((one, scaled), (two, plain)):
            optimizer.zero_grad()
            for phase in (1, 2):
                loss = problem.loss()
                (scaler.scale(loss) if optimizer is scaled else loss).backward()
                if phase == 1:
                    optimizer.first_step()
            if clip is not None:
                if optimizer is scaled:
                    scaler.unscale_(optimizer)
                clip_grad_norm_(problem.params, clip)
            if optimizer is scaled:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.second_step()
        assert all(p.grad.dtype == torch.float32 for p in one.params)
        assert_same_bits(one.weights(), two.weights())


@needs_grad_dtype
def test_a_model_that_trains_on_wide_gradients(backend, device):
    """One backward pass gives them bfloat16's numbers: the same bits as with bfloat16 gradients."""
    wide, narrow = LowPrecision(device, wide=True), LowPrecision(device, wide=False)
    optimizers = [problem.optimizer(backend, lr=0.5) for problem in (wide, narrow)]
    before = wide.loss().item()
    for _ in range(5):
        for problem, optimizer in zip((wide, narrow), optimizers, strict=True):
            problem.step(optimizer)
    assert wide.loss().item() < before
    assert_same_bits(wide.weights(), narrow.weights())


def test_a_cast_of_the_data_leaves_gradients_of_the_old_dtype(backend, device):
    """``param.data = param.data.bfloat16()``, as some libraries do it, between a backward and a step."""
    param = nn.Parameter(values((100,), torch.float32, device))
    optimizer = FastSAM([param], rho=0.5, lr=0.1, backend=backend)
    param.grad = values((100,), torch.float32, device, 1)
    param.data = param.data.bfloat16()
    start, grad = param.detach().clone(), param.grad.clone()
    optimizer.first_step(zero_grad=False)
    optimizer.second_step()
    assert_within(param.detach(), start.double() - 0.1 * grad.double(), start)
