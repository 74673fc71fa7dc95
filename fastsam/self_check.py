"""Does a backend compute what it should? A few steps of small problems, compared element by element."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam.optimizer import FastSAM

# In units of eps * max(|w|, |dw|) per element and step: what correct roundings in another order may add up to.
TOLERANCE = 4.0

# A scalar, an empty tensor, and sizes around those in which loops are cut; the last two have rho = 0.02.
SHAPES = ((), (1,), (3, 5), (0,), (127,), (4, 3, 3, 3), (65537,), (33, 31))
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
BASES: tuple[tuple[type[Optimizer], dict[str, Any]], ...] = (
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 1e-2}),
)
STEPS = 3
NAN_STEP = 1  # in which the first gradients hold a NaN


@dataclass
class Outcome:
    """What a check found.

    Attributes:
        error: the largest, in units of eps * max(|w|, |dw|); infinite where bits had to be equal and were not.
        where: the case and the tensor of that error.
        steps: how many were compared.
    """

    error: float = 0.0
    where: str = ""
    steps: int = 0

    @property
    def ok(self) -> bool:
        """Whether every error is within the tolerance."""
        return self.error <= TOLERANCE

    def add(self, error: float, where: str) -> None:
        """Keeps the error if it is the largest; not a number counts as infinite."""
        error = math.inf if math.isnan(error) else error
        if error > self.error:
            self.error, self.where = error, where


class Paper:
    """SAM as Foret et al.'s equation 2 has it (adaptive: Kwon et al.), around torch.optim's loop over tensors."""

    def __init__(self, groups: list[dict[str, Any]], base: type[Optimizer], adaptive: bool, **options: Any) -> None:
        self.base_optimizer = base(groups, foreach=False, **options)
        self._adaptive = adaptive
        self._backups: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def first_step(self) -> None:
        """Climbs, unless a gradient is not finite."""
        members = [(p, group["rho"]) for group in self.base_optimizer.param_groups for p in group["params"]]
        self._backups = [(p, p.clone()) for p, _ in members]
        scales = [p.double().abs() if self._adaptive else torch.ones_like(p, dtype=torch.float64) for p, _ in members]
        grads = [scale * p.grad.double() for (p, _), scale in zip(members, scales, strict=True)]
        norm = torch.stack([grad.square().sum() for grad in grads]).sum().sqrt()
        if norm.isfinite():
            for (p, rho), scale, grad in zip(members, scales, grads, strict=True):
                p.copy_(p.double() + rho * scale * grad / (norm + 1e-12))

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back."""
        for p, backup in self._backups:
            p.copy_(backup)

    def second_step(self) -> None:
        """Puts the weights back and updates them."""
        self.restore()
        self.base_optimizer.step()


def check_backend(name: str, device: torch.device) -> Outcome:
    """Compares a backend with ``reference``, and ``reference`` with :class:`Paper`; whatever it raises goes through."""
    outcome = Outcome()
    dtypes = [dtype for dtype in DTYPES if (device.type, dtype) != ("mps", torch.float64)]
    for dtype, (base, options), adaptive in itertools.product(dtypes, BASES, (False, True)):
        label = f"{str(dtype).removeprefix('torch.')}, {base.__name__}{', adaptive' if adaptive else ''}"
        params = _make_tensors(dtype, device, seed=0)
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
        weights = _values(params)
        state = {name: _values(tensors) for name, tensors in _state(fastsam.base_optimizer, params).items()}
        for phase in ("first", "second"):
            grads = _make_tensors(params[0].dtype, params[0].device, seed=1 + 2 * step + (phase == "second"))
            if phase == "first" and step == NAN_STEP:
                grads[-1].view(-1)[-1] = math.nan
            for p, copy, grad in zip(params, copies, grads, strict=True):
                p.grad, copy.grad = grad.clone(), grad.to(copy.dtype, copy=True)
            if phase == "second":
                break
            fastsam.first_step(zero_grad=False)
            expected.first_step()
            _compare(outcome, f"{where}, climb", params, copies, weights, 0.0 if step == NAN_STEP else eps)
            fastsam.restore()
            expected.restore()
            _compare(outcome, f"{where}, restore", params, weights, weights, 0.0)
            fastsam.first_step()
            expected.first_step()
        fastsam.second_step()
        expected.second_step()
        _compare(outcome, f"{where}, update", params, copies, weights, eps)
        theirs_state = _state(expected.base_optimizer, copies)
        for name, tensors in _state(fastsam.base_optimizer, params).items():
            before = state.get(name) or [torch.zeros_like(tensor) for tensor in tensors]
            _compare(outcome, f"{where}, {name}", tensors, theirs_state[name], before, eps)
        _synchronise((params, fastsam), (copies, expected))
        outcome.steps += 1


def _compare(
    outcome: Outcome, where: str, actual: list[Tensor], expected: list[Tensor], before: list[Tensor], eps: float
) -> None:
    """Errors in units of ``eps * max(|w|, |dw|)``; with ``eps`` 0 the bits must be equal."""
    for index, (a, e, b) in enumerate(zip(*map(_values, (actual, expected, before)), strict=True)):
        name = f"{where}, tensor {index} of shape {tuple(a.shape)}"
        if a.numel() == 0 or (torch.equal(a, e) and torch.equal(a.signbit(), e.signbit())):
            continue
        if eps == 0.0:
            outcome.add(math.inf, name)
            continue
        unit = eps * torch.maximum(b.abs(), (e - b).abs())
        error = (a - e).abs()
        outcome.add(torch.where(error == 0, 0.0, error / unit).max().item(), name)


def _synchronise(mine: tuple[list[Tensor], FastSAM], theirs: tuple[list[Tensor], Any]) -> None:
    """Lets the next step start from identical weights and states: errors of several steps are not to add up."""
    (params, fastsam), (copies, expected) = mine, theirs
    pairs: Iterator[tuple[Tensor, Tensor]] = zip(copies, params, strict=True)
    states = _state(fastsam.base_optimizer, params), _state(expected.base_optimizer, copies)
    with torch.no_grad():
        for copy, p in itertools.chain(pairs, *(zip(states[1][n], states[0][n], strict=True) for n in states[0])):
            copy.copy_(p)


def _state(optimizer: Optimizer, params: list[Tensor]) -> dict[str, list[Tensor]]:
    """The state tensors by name, in the order of the parameters; empty before the first update."""
    names = optimizer.state[params[0]]
    return {name: [optimizer.state[p][name] for p in params] for name in names if isinstance(names[name], Tensor)}


def _values(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", torch.float64, copy=True) for tensor in tensors]


def _make_tensors(dtype: torch.dtype, device: torch.device, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_(seed == 0) for shape in SHAPES]


def _groups(params: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": params[:-2], "rho": 0.1}, {"params": params[-2:], "rho": 0.02}]
