"""The contract of the five operations, and which backend runs them on a device."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from fastsam.backends.combination import Combination
from fastsam.tensor_table import TensorTable

logger = logging.getLogger("fastsam")

BACKENDS = ("reference", "foreach", "native", "triton")

_MODULES = {name: f"fastsam.backends.{name}" for name in BACKENDS} | {"triton": "fastsam.backends.triton_gpu"}

# What "auto" tries, fastest first; on any other device the last resort runs everywhere.
FASTEST_FIRST = {"cpu": ("native", "foreach"), "cuda": ("native", "triton", "foreach")}
ANYWHERE = ("foreach",)

# Kernels read gradients of the parameters' dtype. Tables that have others are these backends' work.
_READ_ANY_GRADS = ("reference", "foreach")


class BackendUnavailable(RuntimeError):
    """A backend cannot run on a device; the message says why and what would help."""


class ClimbOptions(NamedTuple):
    """How one parameter group climbs. Numbers may be 0-dim tensors."""

    rho: float | Tensor
    adaptive: bool
    maximize: bool
    rounding_seed: int = 0


class SGDOptions(NamedTuple):
    """``torch.optim.SGD``'s options for one parameter group."""

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    rounding_seed: int = 0


class AdamOptions(NamedTuple):
    """``torch.optim.Adam``'s and ``AdamW``'s options for one parameter group."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool
    maximize: bool
    rounding_seed: int = 0


class Backend(Protocol):
    """The operations over tensor tables. Options come as one entry per parameter group.

    SAM needs five; :meth:`dots`, :meth:`perturb_by_` and a ``combination`` for the updates are for the other methods.

    No function waits for an accelerator, and every result is the same bits for the same input. Gradients have the
    table's dtype; :func:`backend_of` decides who gets tables that have others.
    """

    @staticmethod
    def check(device_type: str) -> None:
        """Raises :class:`BackendUnavailable` if the backend cannot run on ``device_type``."""

    @staticmethod
    def check_methods(device_type: str) -> None:
        """Raises :class:`BackendUnavailable` if it can run the five operations there, but no combinations."""

    @staticmethod
    def grad_norm(tables: Sequence[TensorTable], options: Sequence[ClimbOptions]) -> Tensor:
        """The L2 norm over the climbing gradients of all tables, which are on one device.

        Returns:
            0-dim float64 on that device: ``||g||_2``, with ``|w| * g`` in place of ``g`` in adaptive groups. Not finite
            exactly if a gradient is not (or the squares of float64 gradients overflow).
        """

    @staticmethod
    def perturb_(table: TensorTable, norm: Tensor, options: Sequence[ClimbOptions]) -> None:
        """``backup <- w; w <- w + rho * g / (norm + 1e-12)``; adaptive: ``w + rho * w^2 * g / (norm + 1e-12)``.

        With ``maximize`` the step is subtracted. A norm that is not finite leaves ``w`` as it is. If this raises, every
        ``w`` is as it was.

        With masters: where ``round(master)`` is not ``w``, ``master <- w``; then ``w <- round(master + e)``, with ``e``
        from ``w``. A stochastic table rounds what it stores in ``w`` stochastically.
        """

    @staticmethod
    def dots(table: TensorTable, combination: Combination) -> Tensor:
        """Float64 ``(n, 3)``: ``<map(x), x>, <x, y>, <y, y>`` of each parameter; zeros where it has no part."""

    @staticmethod
    def perturb_by_(table: TensorTable, combination: Combination) -> None:
        """``backup <- w; w <- w + A * map(x) + B * y``; a ``w`` whose A and B are 0 stays as it is.

        If y is DISTANCE, ``w <- backup + A * map(x) + B * (w - backup)``, and ``w`` stays where A is 0 and B is 1.
        If this raises without DISTANCE, every ``w`` is as it was.
        """

    @staticmethod
    def restore_(table: TensorTable) -> None:
        """``w <- backup`` for every climbing parameter, bit for bit; with masters ``w <- round(master)``."""

    @staticmethod
    def restore_and_sgd_(
        table: TensorTable,
        options: Sequence[SGDOptions],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        combination: Combination | None = None,
    ) -> None:
        """``w <- SGD(backup, g, momentum_buffer)`` for every parameter with a gradient, ``w <- backup`` for the others.

        With masters: ``master <- SGD(master, g, momentum_buffer); w <- round(master)``, starting from ``w`` where that
        has not climbed and is not ``round(master)``. A stochastic table without masters rounds all that it stores
        stochastically, each of weights and state slots by random numbers of its own.

        Args:
            table: its state slots are ``momentum_buffer`` (absent without momentum).
            options: of the parameter groups.
            grad_scale: if given, gradients are divided by it (``torch.amp.GradScaler``'s scale).
            found_inf: if given and not 0, weights are restored and state and masters stay as they are, bit for bit.
            combination: if given, ``A * x + B * y`` stands for the gradient; see ``combination.Descent``.
        """

    @staticmethod
    def restore_and_adam_(
        table: TensorTable,
        options: Sequence[AdamOptions],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        combination: Combination | None = None,
    ) -> None:
        """Like :meth:`restore_and_sgd_`, with Adam; slots: ``exp_avg, exp_avg_sq, max_exp_avg_sq`` (amsgrad)."""


def check_name(name: str) -> None:
    """Raises ValueError if there is no backend of that name."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def load(name: str, device_type: str, *, methods: bool = False) -> Backend:
    """The backend ``name``; with ``methods`` one that can run combinations.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailable: it cannot run on ``device_type``.
    """
    check_name(name)
    try:
        backend = cast(Backend, importlib.import_module(_MODULES[name]))
    except ModuleNotFoundError as missing:
        raise BackendUnavailable(f"backend {name!r} is not part of this installation ({missing})") from None
    backend.check(device_type)
    if methods:
        backend.check_methods(device_type)
    return backend


@functools.cache
def resolve(name: str, device_type: str, methods: bool = False) -> Backend:
    """The module that runs the operations on ``device_type``: a named one, or the fastest that can ("auto").

    Args:
        name: of the backend.
        device_type: of the parameters.
        methods: whether combinations are needed, as methods beyond plain SAM do.
    """
    if name != "auto":
        return load(name, device_type, methods=methods)  # runs or raises; never falls back
    for candidate in FASTEST_FIRST.get(device_type, ANYWHERE):
        try:
            return load(candidate, device_type, methods=methods)
        except BackendUnavailable as reason:
            # Only what a user can mend is worth a warning: on CUDA other backends are still as fast.
            level = logging.WARNING if device_type == "cpu" else logging.INFO
            logger.log(level, "backend %r skipped on %s: %s", candidate, device_type, reason)
    raise BackendUnavailable(f"no backend can run on {device_type!r}")


def backend_of(table: TensorTable, backend: Backend) -> Backend:
    """``backend``, or ``foreach`` where that cannot read the table's present gradients."""
    if not table.has_own_grads:
        able = [resolve(name, table.device.type) for name in _READ_ANY_GRADS]
        backend = backend if backend in able else able[-1]
    return backend if _observed is None else _observed(backend)


Observer = Callable[[str, Callable[[], Any]], Any]
"""Is given an operation's name and the call itself, without arguments; returns what that returns."""

_observed: Callable[[Backend], Backend] | None = None


@contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Within the block, ``observer`` makes every call of a backend's operation: to time it, say. One at a time."""
    global _observed
    known: dict[Backend, Backend] = {}  # tables of one backend go together: it must stay one object

    def observed(backend: Backend) -> Backend:
        return known.setdefault(backend, cast(Backend, _ObservedBackend(backend, observer)))

    _observed = observed
    try:
        yield
    finally:
        _observed = None


class _ObservedBackend:
    """A backend's operations, called by an observer."""

    def __init__(self, backend: Backend, observer: Observer) -> None:
        self._backend, self._observer = backend, observer

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = getattr(self._backend, name)
        return lambda *args, **options: self._observer(name, functools.partial(operation, *args, **options))


def grad_norms(
    backends: Sequence[Backend], tables: Sequence[TensorTable], options: Sequence[ClimbOptions]
) -> dict[torch.device, Tensor]:
    """The one norm over all tables (``backends``: of each), as a 0-dim float64 tensor on each of their devices."""
    together: dict[tuple[torch.device, Backend], list[TensorTable]] = {}
    for backend, table in zip(backends, tables, strict=True):
        together.setdefault((table.device, backend), []).append(table)
    norms = [backend.grad_norm(mine, options) for (_, backend), mine in together.items()]
    devices = [device for device, _ in together]
    if len(norms) == 1:
        return dict(zip(devices, norms, strict=True))
    # One device adds them up, in the tables' order; an accelerator where there is one, which nothing then waits for.
    home = next((device for device in devices if device.type != "cpu"), devices[0])
    total = torch.linalg.vector_norm(torch.stack([norm.to(home, non_blocking=True) for norm in norms]))
    return {device: total.to(device, non_blocking=device.type != "cpu") for device in devices}
