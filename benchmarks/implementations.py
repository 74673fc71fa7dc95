"""What is measured side by side: each implementation's optimizer part of one step, as a function without arguments."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastsam import FastSAM
from fastsam.backends import FASTEST_FIRST, Backend, resolve
from fastsam.tensor_table import TensorTable

LOOP = "loop"
PEER = "pytorch_optimizer.SAM"
FUSED_BASE = "one fused base step"
# FastSAM's, slowest first; the last is the one that the speed table speaks of.
BACKENDS = ("foreach", "triton", "native")

# Gradients are made up: the learning rate only has to keep the weights finite.
BASES: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 1e-3, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-3}),
}
RHO = 0.05

# FastSAM's name of the base's update.
UPDATE = {"SGD": "restore_and_sgd_", "AdamW": "restore_and_adam_"}
OPERATIONS = ("grad_norm", "perturb_", "restore_", *UPDATE.values())


class LoopSAM:
    """SAM as most projects write it: davda54/sam's algorithm, one tensor at a time.

    With every operation of https://github.com/davda54/sam, ``1.0 * grad`` where it is not adaptive included.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        base: type[Optimizer],
        *,
        rho: float = RHO,
        adaptive: bool = False,
        **base_kwargs: Any,
    ) -> None:
        self.base_optimizer = base(params, **base_kwargs)
        self._rho, self._adaptive = rho, adaptive
        self._old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        scale = self._rho / (self._grad_norm() + 1e-12)
        for p in self._params():
            self._old[p] = p.data.clone()
            p.add_((torch.pow(p, 2) if self._adaptive else 1.0) * p.grad * scale)

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self._params():
            p.data = self._old[p]
        self.base_optimizer.step()

    def _grad_norm(self) -> Tensor:
        norms = [((torch.abs(p) if self._adaptive else 1.0) * p.grad).norm(p=2) for p in self._params()]
        return torch.norm(torch.stack(norms), p=2)

    def _params(self) -> list[Tensor]:
        return [p for group in self.base_optimizer.param_groups for p in group["params"] if p.grad is not None]


class TimedBackend:
    """A backend whose operations are timed where the optimizer calls them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._tables: list[TensorTable] = []
        self.seconds: dict[str, float] = {}

    def attach(self, optimizer: FastSAM) -> None:
        optimizer._backend = lambda table: self  # type: ignore[method-assign, assignment, return-value]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in OPERATIONS:
            raise AttributeError(name)
        operation = getattr(self._backend, name)

        def timed(tables: Any, *args: Any) -> Any:
            if name == "grad_norm":
                self._tables = list(tables)
                self.seconds.clear()
            start = time.perf_counter()
            result = operation(tables, *args)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed

    def restore_once_more(self) -> None:
        """``restore_``, which a step does not call: it brings the weights from before the last step back."""
        for table in self._tables:
            with torch.no_grad():
                self.restore_(table)


class Implementation(NamedTuple):
    """What a round visits."""

    step: Callable[[], Any]
    timed: TimedBackend | None = None


def build(name: str, params: list[Tensor], base: str) -> Implementation:
    """The implementation ``name`` over ``params``: ``LOOP``, ``PEER``, ``FUSED_BASE`` or one of ``BACKENDS``."""
    base_class, options = BASES[base]
    if name == FUSED_BASE:
        return Implementation(base_class(params, fused=True, **options).step)
    if name == LOOP:
        return Implementation(_both_phases(LoopSAM(params, base_class, **options)))
    if name == PEER:
        from pytorch_optimizer import SAM

        return Implementation(_both_phases(SAM(params, base_class, rho=RHO, **options)))
    optimizer = FastSAM(params, base_class, rho=RHO, backend=name, **options)
    timed = TimedBackend(resolve(name, params[0].device.type))
    timed.attach(optimizer)
    return Implementation(_both_phases(optimizer, zero_grad=False), timed)


def _both_phases(optimizer: Any, **first_step_options: Any) -> Callable[[], None]:
    def step() -> None:
        optimizer.first_step(**first_step_options)
        optimizer.second_step()

    return step


def names(device_type: str = "cpu") -> list[str]:
    """What there is to measure on a device, in the order of a round."""
    peer_is_here = importlib.util.find_spec("pytorch_optimizer") is not None
    # Those that "auto" would take: on a CPU not Triton, whose interpreter is for tests.
    backends = [name for name in BACKENDS if name in FASTEST_FIRST[device_type]]
    return [LOOP, *([PEER] if peer_is_here else []), *backends, FUSED_BASE]
