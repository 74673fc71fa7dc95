"""What is measured side by side: each implementation's optimizer part of one step, as a function without arguments."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.plain import CompiledSAM, ListSAM
from fastsam import FastSAM
from fastsam.backends import FASTEST_FIRST, Backend, resolve
from fastsam.tables import TensorTable

LOOP = "loop"
PEER = "pytorch_optimizer.SAM"
LISTS = "lists"
LISTS_ON_HOST = "lists, scale on the host"
COMPILED = "compiled lists"
FUSED_BASE = "one fused base step"
HALF_BATCH = "FastSAM, ascent_closure on half the batch"
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


class HostClock:
    """Marks in the host's time: on the CPU an operation is over when it returns."""

    @staticmethod
    def mark() -> float:
        return time.perf_counter()

    @staticmethod
    def seconds(start: float, end: float) -> float:
        return end - start


class TimedBackend:
    """A backend whose operations are timed where the optimizer calls them.

    Args:
        backend: the backend.
        clock: its ``mark()`` is called around every operation, ``seconds(start, end)`` when the times are read.

    Attributes:
        active: whether the optimizer's next steps are timed.
    """

    def __init__(self, backend: Backend, clock: Any = HostClock) -> None:
        self._backend, self._clock = backend, clock
        self.active = True
        self._tables: list[TensorTable] = []
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """By operation, of the last step."""
        return {name: sum(self._clock.seconds(*marks) for marks in pairs) for name, pairs in self._marks.items()}

    def attach(self, optimizer: FastSAM) -> None:
        def chosen(table: TensorTable) -> Any:
            return self if self.active else self._backend

        optimizer._backend = chosen  # type: ignore[method-assign]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in OPERATIONS:
            raise AttributeError(name)
        operation = getattr(self._backend, name)

        def timed(tables: Any, *args: Any) -> Any:
            if name == "grad_norm":
                self._tables = list(tables)
                self._marks.clear()
            start = self._clock.mark()
            result = operation(tables, *args)
            self._marks.setdefault(name, []).append((start, self._clock.mark()))
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


def build(name: str, params: list[Tensor], base: str, clock: Any = HostClock, **compile_options: Any) -> Implementation:
    """The implementation ``name`` over ``params``: one of the names at the top of this file.

    Args:
        name: ``LOOP``, ``PEER``, ``LISTS``, ``LISTS_ON_HOST``, ``COMPILED``, ``FUSED_BASE`` or one of ``BACKENDS``.
        params: the parameters; they must have gradients when a step is taken.
        base: one of ``BASES``.
        clock: what a backend's operations are timed by.
        compile_options: ``COMPILED``'s.
    """
    base_class, options = BASES[base]
    if name == FUSED_BASE:
        return Implementation(base_class(params, fused=True, **options).step)
    if name == LOOP:
        return Implementation(_both_phases(LoopSAM(params, base_class, **options)))
    if name == PEER:
        from pytorch_optimizer import SAM

        return Implementation(_both_phases(SAM(params, base_class, rho=RHO, **options)))
    if name in (LISTS, LISTS_ON_HOST):
        lists = ListSAM(params, base_class, rho=RHO, scale_on_host=name == LISTS_ON_HOST, **options)
        return Implementation(_both_phases(lists))
    if name == COMPILED:
        return Implementation(_both_phases(CompiledSAM(params, base_class, rho=RHO, **compile_options, **options)))
    optimizer = FastSAM(params, base_class, rho=RHO, backend=name, **options)
    timed = TimedBackend(resolve(name, params[0].device.type), clock)
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
