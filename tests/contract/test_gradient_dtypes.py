"""Gradients of another dtype than their parameter's: as exact as they are, on every backend and in every operation.

They come from ``param.grad_dtype`` where torch has it, from accumulation outside autograd, or from a cast of ``.data``.
"""

import oracle
import pytest
import torch
from checks import DTYPE_IDS, DTYPES, Canaries, assert_same_bits, assert_within, values
from fuzz_machine import MOMENTS, updated
from problem import BASES, FUSED_BASES, Problem, give_grad
from torch import nn
from torch.nn.utils import clip_grad_norm_

from fastsam import FastSAM, methods

pytestmark = pytest.mark.face

every_base = pytest.mark.parametrize("base", FUSED_BASES)
every_param_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)
every_grad_dtype = pytest.mark.parametrize("grad_dtype", DTYPES, ids=[f"{name}-grads" for name in DTYPE_IDS])
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)

needs_grad_dtype = pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no grad_dtype")


def make_param(shape, dtype, device, seed=0):
    return values(shape, dtype, device, seed).requires_grad_()


def take_steps(optimizer, params, dtypes, *, steps=3):
    """Steps with gradients of ``dtypes``, each checked against the oracle on the exact gradients."""
    canaries = Canaries()
    group = optimizer.param_groups[0]
    for step in range(1, steps + 1):
        first, second = (
            [
                canaries.around(values(p.shape, dtype, p.device, 1000 * step + 100 * i + n))
                for n, (p, dtype) in enumerate(zip(params, dtypes, strict=True))
            ]
            for i in (1, 2)
        )
        start = [p.detach().clone() for p in params]
        state = [{k: v.clone() for k, v in optimizer.state.get(p, {}).items()} for p in params]
        for param, grad in zip(params, first, strict=True):
            give_grad(param, grad)
        optimizer.first_step()
        norm = oracle.norm(start, first, [group["adaptive"]] * len(params))
        for param, w, g in zip(params, start, first, strict=True):
            perturbed = oracle.perturbed(w, g, norm, group["rho"], group["adaptive"])
            assert_within(param.detach(), perturbed, w, f"perturbation {step}")
        for param, grad in zip(params, second, strict=True):
            give_grad(param, grad)
        optimizer.second_step()
        for param, w, g, old in zip(params, start, second, state, strict=True):
            assert_updated(optimizer, param, w, g, old, step)
        canaries.assert_alive()


def assert_updated(optimizer, param, w, g, old, step):
    """Weights and state of one parameter are the oracle's after its update number ``step``, from ``w`` and ``old``."""
    base = type(optimizer.base_optimizer)
    weights, moments, terms = updated(base, optimizer.param_groups[0], w, g.double(), old, step)
    assert_within(param.detach(), weights, w, f"update {step}", terms["w"])
    for name, want in moments.items():
        live = optimizer.state[param][name]
        assert live.dtype == param.dtype
        assert_within(live, want, old.get(name, torch.zeros_like(w)), f"{name} {step}", terms[MOMENTS[name]])


def make_optimizer(backend, base, params, **options):
    cls, base_options = BASES[base]
    return FastSAM(params, cls, backend=backend, **{**base_options, **options})


# ---- every pair of dtypes ----


@every_base
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
@every_grad_dtype
@every_param_dtype
def test_every_pair_of_dtypes(backend, device, base, dtype, grad_dtype, adaptive):
    params = [make_param(shape, dtype, device, i) for i, shape in enumerate([(33, 9), (), (130,), (0,), (5, 1)])]
    optimizer = make_optimizer(backend, base, params, adaptive=adaptive, rho=0.5)
    take_steps(optimizer, params, [grad_dtype] * len(params))


@every_base
@low_precision
def test_dtypes_mixed_and_changed(backend, device, base, dtype):
    """Some gradients are of another dtype, then all, then none, then others: each step by the gradients it has."""
    params = [make_param((7, 19), dtype, device, i) for i in range(4)]
    optimizer = make_optimizer(backend, base, params, rho=0.5)
    take_steps(optimizer, params, [dtype] * 4, steps=1)
    state = {p: {k: v.clone() for k, v in entries.items()} for p, entries in optimizer.state.items()}
    assert all(v.dtype in (dtype, torch.float32) for entries in state.values() for v in entries.values())
    low = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    mixes = ([torch.float32, dtype, low, torch.float64], [torch.float32] * 4, [dtype] * 4, [low] * 4)
    for number, mix in enumerate(mixes, 2):
        take_one_step(optimizer, params, mix, number)


def take_one_step(optimizer, params, dtypes, number):
    """Like ``take_steps``, as step ``number``; the first pass's gradients are the second's, in reverse order."""
    group = optimizer.param_groups[0]
    grads = [
        values(p.shape, d, p.device, 100 * number + i) for i, (p, d) in enumerate(zip(params, dtypes, strict=True))
    ]
    start = [p.detach().clone() for p in params]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    passes = []

    def closure():
        passes.append(grads[::-1] if not passes else grads)
        for param, grad in zip(params, passes[-1], strict=True):
            give_grad(param, grad)
        if len(passes) == 2:
            norm = oracle.norm(start, grads, [False] * len(params))
            for param, w, g in zip(params, start, passes[0], strict=True):
                assert_within(param.detach(), oracle.perturbed(w, g, norm, group["rho"]), w, f"perturbation {number}")

    optimizer.step(closure)
    for param, w, g, old in zip(params, start, grads, state, strict=True):
        assert_updated(optimizer, param, w, g, old, number)


@every_base
def test_the_second_pass_has_other_dtypes_than_the_first(backend, device, base):
    params = [make_param((300,), torch.bfloat16, device, i) for i in range(2)]
    for first, second in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        optimizer = make_optimizer(backend, base, params, rho=0.5)
        start = [p.detach().clone() for p in params]
        for i, param in enumerate(params):
            give_grad(param, values(param.shape, first, device, i))
        optimizer.first_step()
        assert all((p.detach() != w).any() for p, w in zip(params, start, strict=True))
        grads = [values(p.shape, second, device, 9 + i) for i, p in enumerate(params)]
        for param, grad in zip(params, grads, strict=True):
            give_grad(param, grad)
        optimizer.second_step()
        for param, w, g in zip(params, start, grads, strict=True):
            assert_updated(optimizer, param, w, g, {}, 1)


@pytest.mark.parametrize("wide_pass", [1, 2])
def test_a_method_that_needs_both_gradients(backend, device, wide_pass):
    """What it takes from the first pass may be of another dtype than what the second brings."""
    gamma, lr = 0.75, 0.25
    param = make_param((300,), torch.bfloat16, device)
    method = methods.WSAM(gamma, decouple=False)
    optimizer = FastSAM([param], backend=backend, rho=0.5, lr=lr, method=method)
    dtypes = [torch.float32 if number == wide_pass else torch.bfloat16 for number in (1, 2)]
    for step in range(2):
        w = param.detach().clone()
        first, second = (values(w.shape, dtype, device, 10 * step + i) for i, dtype in enumerate(dtypes))
        give_grad(param, first.clone())
        optimizer.first_step()
        give_grad(param, second.clone())
        optimizer.second_step()
        weight = gamma / (1 - gamma)
        at_w, at_perturbed = lr * (1 - weight) * first.double(), lr * weight * second.double()
        assert_within(param.detach(), w.double() - at_w - at_perturbed, w, f"{step}", at_w.abs() + at_perturbed.abs())


@every_base
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@low_precision
def test_masters_train_as_float32_parameters_do(backend, device, base, dtype, rounding):
    """With float32 gradients of their own they are fully that: the model alone sees the rounding."""
    low = [make_param((33, 9), torch.bfloat16, device, i).detach().to(dtype).requires_grad_() for i in range(2)]
    full = [p.detach().float().requires_grad_() for p in low]
    trained = make_optimizer(backend, base, low, rho=0.5, master_weights=True, rounding=rounding, rounding_seed=7)
    expected = make_optimizer("reference" if backend == "reference" else "foreach", base, full, rho=0.5)
    for step in range(3):
        for phase in ("first_step", "second_step"):
            for i, (param, other) in enumerate(zip(low, full, strict=True)):
                grad = values(param.shape, torch.float32, device, 10 * step + 2 * i + (phase == "second_step"))
                give_grad(param, grad)
                other.grad = grad.clone()
            getattr(trained, phase)()
            getattr(expected, phase)()
        for param, other in zip(low, full, strict=True):
            assert_same_bits(trained.state[param]["fastsam_master"], other.detach(), "master")
            assert_same_bits(param.detach(), other.detach().to(dtype))
            for name, value in expected.state[other].items():
                assert_same_bits(trained.state[param][name], value, name)


def test_parameters_of_every_dtype_have_one_norm(backend, device):
    """Over tables that different backends may have worked on."""
    params = [make_param((40, 3), dtype, device, i) for i, dtype in enumerate(DTYPES)]
    grads = [values((40, 3), torch.float32, device, 9 + i) for i in range(len(params))]
    optimizer = FastSAM(params, rho=0.5, lr=0.1, backend=backend)
    start = [p.detach().clone() for p in params]
    for param, grad in zip(params, grads, strict=True):
        give_grad(param, grad)
    optimizer.first_step(zero_grad=False)
    norm = oracle.norm(start, grads, [False] * len(params))
    for param, w, g in zip(params, start, grads, strict=True):
        assert_within(param.detach(), oracle.perturbed(w, g, norm, 0.5), w)
    optimizer.restore()
    assert_same_bits([p.detach() for p in params], start)


def test_complex_parameters(backend, device):
    param = make_param((6, 5), torch.complex64, device)
    start, grad = param.detach().clone(), values((6, 5), torch.complex128, device, 3)
    optimizer = FastSAM([param], rho=0.5, lr=0.1, backend=backend)
    give_grad(param, grad)
    optimizer.first_step(zero_grad=False)
    real = torch.view_as_real
    norm = oracle.norm([real(start)], [real(grad)], [False])
    assert_within(real(param.detach()), oracle.perturbed(real(start), real(grad), norm, 0.5), real(start))
    optimizer.second_step()
    assert_within(real(param.detach()), real(start).double() - 0.1 * real(grad), real(start))


def test_a_real_gradient_of_a_complex_parameter_is_refused(backend, device):
    param = make_param((3,), torch.complex64, device)
    start = param.detach().clone()
    optimizer = FastSAM([param], lr=0.1, backend=backend)
    give_grad(param, torch.ones(3, device=device))
    with pytest.raises(RuntimeError, match=r"parameter 0 \(shape \(3,\)\): its gradient has dtype torch.float32"):
        optimizer.first_step()
    assert not optimizer.perturbed
    assert_same_bits(param.detach(), start)


# ---- gaps, canaries, faults ----


@low_precision
def test_strided_parameters_and_gradients(backend, device, dtype):
    canaries = Canaries()
    param = canaries.around(values((9, 7), dtype, device), strides=(20, 2)).requires_grad_()
    transposed = canaries.around(values((9, 7), torch.float32, device, 1), strides=(1, 9))
    start = param.detach().clone()
    optimizer = FastSAM([param], rho=0.5, lr=0.1, momentum=0.9, backend=backend)
    give_grad(param, transposed)
    optimizer.first_step(zero_grad=False)
    norm = oracle.norm([start], [transposed], [False])
    assert_within(param.detach(), oracle.perturbed(start, transposed, norm, 0.5), start)
    optimizer.second_step()
    assert_within(param.detach(), start.double() - 0.1 * transposed.double(), start)
    canaries.assert_alive()


@every_base
@low_precision
def test_what_is_not_finite_does_not_spread(backend, device, base, dtype):
    """What a low-precision gradient could not hold is finite here; an Inf is one in every dtype."""
    params = [make_param((50,), dtype, device, i) for i in range(2)]
    optimizer = make_optimizer(backend, base, params, rho=0.5)
    start = [p.detach().clone() for p in params]
    for bad in (torch.inf, torch.nan):
        grads = [values(p.shape, torch.float32, device, i) for i, p in enumerate(params)]
        grads[1][7] = bad
        for param, grad in zip(params, grads, strict=True):
            give_grad(param, grad)
        optimizer.first_step()
        assert optimizer.perturbed
        assert_same_bits([p.detach() for p in params], start)
        optimizer.restore()


@every_base
def test_the_gradients_dtype_is_free_again_in_the_next_step(backend, device, base):
    """Wide gradients once leave nothing behind: the steps after them are those of an optimizer that never saw any."""
    one, two = ([make_param((300,), torch.bfloat16, device, i) for i in range(2)] for _ in range(2))
    seen, unseen = (make_optimizer(backend, base, params, rho=0.5) for params in (one, two))
    for param in one:
        give_grad(param, values(param.shape, torch.float32, device, 5))
    seen.first_step()
    seen.restore()
    for step in range(2):
        for params, optimizer in ((one, seen), (two, unseen)):

            def closure(params=params, step=step):
                for i, param in enumerate(params):
                    param.grad = values(param.shape, torch.bfloat16, device, 10 * step + i)

            optimizer.step(closure)
        assert_same_bits([p.detach() for p in one], [p.detach() for p in two])


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
    """Beside the same with bfloat16 gradients: near it, and not it."""
    wide, narrow = LowPrecision(device, wide=True), LowPrecision(device, wide=False)
    optimizers = [problem.optimizer(backend, lr=0.5) for problem in (wide, narrow)]
    before = wide.loss().item()
    for _ in range(5):
        for problem, optimizer in zip((wide, narrow), optimizers, strict=True):
            problem.step(optimizer)
    assert wide.loss().item() < before
    torch.testing.assert_close(wide.weights(), narrow.weights(), rtol=0.1, atol=0.1)


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
