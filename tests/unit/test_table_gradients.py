"""Gradients of every layout in tables; when they are let go."""

import gc
import weakref

import pytest
import torch
from beside import make_params, step_with
from checks import assert_same_bits, assert_within, values

from fastsam import FastSAM


def ordinary(shape, seed):
    return values(shape, torch.float32, seed=seed)


def transposed_grad(shape, seed):
    return values(shape[::-1], torch.float32, seed=seed).t()


def expanded_grad(shape, seed):
    return values((*shape[:1], 1), torch.float32, seed=seed).expand(shape)


def grad_with_gaps(shape, seed):
    return values((*shape, 2), torch.float32, seed=seed)[..., 0]


def grad_of_other_dtype(shape, seed):
    return values(shape, torch.float64, seed=seed)


@pytest.mark.parametrize("first", [ordinary, transposed_grad], ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "then", [ordinary, transposed_grad, expanded_grad, grad_with_gaps], ids=lambda make: make.__name__
)
def test_gradients_change_their_layout(backend, first, then):
    """Square ones: their shape says nothing."""
    param = values((6, 6), torch.float32).requires_grad_()
    optimizer = FastSAM([param], rho=torch.tensor(0.0), lr=0.1, backend=backend)
    w = param.detach().clone()
    for step, make in enumerate([first, first, then, then, first]):
        grad = make((6, 6), step)
        step_with(optimizer, [param], [grad])
        start, w = w, w.double() - 0.1 * grad.double()
        assert_within(param.detach(), w, start)
        w = param.detach().clone()


def test_a_gradient_turned_where_it_lies(backend):
    """``g.t()`` has the address, the shape and the dtype of ``g``."""
    param = values((6, 6), torch.float32).requires_grad_()
    optimizer = FastSAM([param], rho=torch.tensor(0.0), lr=0.1, backend=backend)
    grad = values((6, 6), torch.float32, seed=1)
    for turned in (grad, grad.t(), grad, grad.t()):
        start = param.detach().clone()
        step_with(optimizer, [param], [turned])
        assert turned.data_ptr() == grad.data_ptr()
        assert_within(param.detach(), start.double() - 0.1 * turned.double(), start)


def test_after_a_bad_gradient_training_goes_on(backend):
    """The gradients are not the usual ones once, an error says so, and then they are again."""
    params = make_params((3,), (4,))
    optimizer = FastSAM(params, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    good = [torch.ones(3), torch.ones(4)]
    step_with(optimizer, params, good)
    before = [p.detach().clone() for p in params]
    params[0].grad, params[1].grad = good[0], good[1].to_sparse()
    with pytest.raises(RuntimeError, match=r"parameter 1 \(shape \(4,\)\): sparse"):
        optimizer.first_step()
    assert not optimizer.perturbed
    assert_same_bits([p.detach() for p in params], before)
    step_with(optimizer, params, good)
    assert all(bool((p.detach() != w).all()) for p, w in zip(params, before, strict=True))


def test_gradients_are_let_go(backend):
    """Held by the table, they would double the memory of the next backward."""
    params = make_params((30,), (6, 6))
    optimizer = FastSAM(params, rho=0.1, lr=0.1, momentum=0.9, backend=backend)
    for _ in range(3):
        grads = [torch.ones(30), torch.ones(6, 6)]
        watched = [weakref.ref(g) for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        del grads, grad
        optimizer.first_step()
        gc.collect()
        assert [ref() for ref in watched] == [None, None]
        grads = [torch.ones(30), torch.ones(6, 6)]
        watched = [weakref.ref(g) for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        del grads, grad
        optimizer.second_step(zero_grad=True)
        gc.collect()
        assert [ref() for ref in watched] == [None, None]
