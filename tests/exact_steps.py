"""Steps with gradients of given dtypes, each checked against the oracle on the exact gradients."""

import oracle
import pytest
import torch
from checks import DTYPE_IDS, DTYPES, Canaries, assert_within, values
from fuzz_machine import MOMENTS, updated
from problem import BASES, FUSED_BASES, give_grad

from fastsam import FastSAM

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
