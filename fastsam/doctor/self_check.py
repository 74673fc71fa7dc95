"""Compares a backend with `reference`, element by element, over a few steps of small problems."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.doctor.paper import Paper
from fastsam.optimizer import FastSAM

# In units of eps * max(|w|, |dw|) per element and step: the largest effect of rounding in another order.
TOLERANCE = 4.0

# A scalar, an empty tensor, odd sizes; the last two have rho = 0.02. float32 has one more, which several threads share.
SHAPES = ((), (1,), (3, 5), (0,), (127,), (4, 3, 3, 3), (33, 31), (1025,))
LARGE = (65537,)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BASES: tuple[tuple[type[Optimizer], dict[str, Any]], ...] = (
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 1e-2}),
)
STEPS = 3
NAN_STEP = 1  # the first-pass gradients contain a NaN: nothing is perturbed
ABSENT_STEP = 2  # a tensor has no gradient in the second pass: it is restored and not updated


@dataclass
class Outcome:
    """The result of a check.

    Attributes:
        error: the largest error, in units of eps * max(|w|, |dw|); infinite if bits that must be equal differ.
        where: the case and the tensor with that error.
        steps: the number of steps compared.
    """

    error: float = 0.0
    where: str = ""
    steps: int = 0

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance."""
        return self.error <= TOLERANCE

    def add(self, error: float, where: str) -> None:
        """Records the error if it is the largest so far; NaN counts as infinite."""
        error = math.inf if math.isnan(error) else error
        if error > self.error:
            self.error, self.where = error, where


def check_backend(name: str, device: torch.device) -> Outcome:
    """Compares a backend with ``reference``, and ``reference`` with :class:`Paper`; exceptions propagate."""
    outcome = Outcome()
    dtypes = [dtype for dtype in DTYPES if (device.type, dtype) != ("mps", torch.float64)]
    for dtype, (base, options), adaptive in itertools.product(dtypes, BASES, (False, True)):
        label = f"{str(dtype).removeprefix('torch.')}, {base.__name__}{', adaptive' if adaptive else ''}"
        params = _make_weights(dtype, device)
        fastsam = FastSAM(_groups(params), base, adaptive=adaptive, backend=name, **options)
        expected: Any
        if name == "reference":
            exact = torch.promote_types(dtype, torch.float32)
            copies = [p.detach().to(exact, copy=True).requires_grad_() for p in params]
            expected = Paper(_groups(copies), base, adaptive, **options)
        else:
            copies = [p.detach().clone().requires_grad_() for p in params]
            expected = FastSAM(_groups(copies), base, adaptive=adaptive, backend="reference", **options)
        _compare_steps(outcome, label, (fastsam, params), (expected, copies))
    return outcome


def _compare_steps(
    outcome: Outcome, label: str, mine: tuple[FastSAM, list[Tensor]], theirs: tuple[Any, list[Tensor]]
) -> None:
    (fastsam, params), (expected, copies) = mine, theirs
    eps = torch.finfo(params[0].dtype).eps
    for step in range(STEPS):
        where = f"{label}, step {step}"
        weights, state = _values(params), _state(fastsam.base_optimizer, params)
        state = {name: _values(tensors) for name, tensors in state.items()}

        _set_grads(params, copies, seed=1 + 2 * step, nan=step == NAN_STEP)
        for optimizer in (fastsam, expected):
            optimizer.first_step(zero_grad=False)
        _compare(outcome, f"{where}, perturbation", params, copies, weights, 0.0 if step == NAN_STEP else eps)
        for optimizer in (fastsam, expected):
            optimizer.restore()
        _compare(outcome, f"{where}, restore", params, weights, weights, 0.0)

        for optimizer in (fastsam, expected):
            optimizer.first_step(zero_grad=False)
        grads = _set_grads(params, copies, seed=2 + 2 * step)
        if step == ABSENT_STEP:
            params[2].grad = copies[2].grad = None
        for optimizer in (fastsam, expected):
            optimizer.second_step()
        _compare(outcome, f"{where}, update", params, copies, weights, eps)
        after, after_expected = _state(fastsam.base_optimizer, params), _state(expected.base_optimizer, copies)
        for name, tensors in after.items():
            before = state.get(name) or _values([torch.zeros_like(tensor) for tensor in tensors])
            if name == "momentum_buffer":  # the gradient is added to it, where weight decay may cancel both
                before = [torch.maximum(b.abs(), g.abs()) for b, g in zip(before, grads, strict=True)]
            _compare(outcome, f"{where}, {name}", tensors, after_expected[name], before, eps)

        # The next step starts from identical weights and states, so that errors do not accumulate over steps.
        with torch.no_grad():
            for copy, p in itertools.chain(
                _pairs(copies, params), *(_pairs(after_expected[n], after[n]) for n in after)
            ):
                copy.copy_(p)
        outcome.steps += 1


def _pairs(first: list[Tensor], second: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(first, second, strict=True)


def _set_grads(params: list[Tensor], copies: list[Tensor], seed: int, nan: bool = False) -> list[Tensor]:
    grads = _make_tensors(params[0].dtype, params[0].device, seed)
    if nan:
        grads[-1].view(-1)[-1] = math.nan
    for p, copy, grad in zip(params, copies, grads, strict=True):
        p.grad, copy.grad = grad.clone(), grad.to(copy.dtype, copy=True)
    return _values(grads)


def _compare(
    outcome: Outcome, where: str, actual: list[Tensor], expected: list[Tensor], before: list[Tensor], eps: float
) -> None:
    """Errors in units of ``eps * max(|w|, |dw|)``; with ``eps`` 0 the bits must be equal."""
    tiny = torch.finfo(actual[0].dtype).tiny  # smaller numbers are evenly spaced, tiny * eps apart
    # The norm is summed in float64, in each backend's own order.
    norm_error = torch.finfo(torch.float64).eps * math.sqrt(sum(tensor.numel() for tensor in actual))
    for index, (a, e, b) in enumerate(zip(*map(_values, (actual, expected, before)), strict=True)):
        name = f"{where}, tensor {index} of shape {tuple(a.shape)}"
        if a.numel() == 0 or (torch.equal(a, e) and torch.equal(a.signbit(), e.signbit())):
            continue
        if eps == 0.0:
            outcome.add(math.inf, name)
            continue
        moved = (e - b).abs()
        unit = eps * torch.maximum(b.abs(), moved).clamp(min=tiny) + norm_error * moved
        error = (a - e).abs()
        outcome.add(torch.where(error == 0, 0.0, error / unit).max().item(), name)


def _state(optimizer: Optimizer, params: list[Tensor]) -> dict[str, list[Tensor]]:
    """The state tensors by name, in the order of the parameters; empty before the first update."""
    names = optimizer.state[params[0]]
    return {name: [optimizer.state[p][name] for p in params] for name in names if isinstance(names[name], Tensor)}


def _values(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", torch.float64, copy=True) for tensor in tensors]


def _make_weights(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Weights away from 0: where a weight and its step cancel, correct results may differ in most of their digits."""
    weights = _make_tensors(dtype, device, seed=0)
    return [(weight + weight.sign()).requires_grad_() for weight in weights]


def _make_tensors(dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (LARGE, *SHAPES) if dtype is torch.float32 else SHAPES
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def _groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:-2], "rho": 0.1}, {"params": params[-2:], "rho": 0.02}]
