"""Gradients of another dtype than their parameter's: as exact as they are, on every backend and in every operation.

They come from ``param.grad_dtype`` where torch has it, from accumulation outside autograd, or from a cast of ``.data``.
"""

import oracle
import pytest
import torch
from checks import DTYPES, Canaries, assert_same_bits, assert_within, values
from exact_steps import (
    assert_updated,
    every_base,
    every_grad_dtype,
    every_param_dtype,
    low_precision,
    make_optimizer,
    make_param,
    take_steps,
)
from problem import give_grad

from fastsam import FastSAM, methods

pytestmark = pytest.mark.face

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
