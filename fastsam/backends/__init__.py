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

from fastsam.spec import Ascent, AscentForm, AscentOptions, BaseOptions, Descent, DescentForm, Update
from fastsam.tables import TensorTable

logger = logging.getLogger("fastsam")

BACKENDS = ("reference", "foreach", "native", "triton")

OPERATIONS = ("grad_norm", "dots", "perturb_", "restore_", "restore_and_update_")

_MODULES = {name: f"fastsam.backends.{name}" for name in BACKENDS} | {"triton": "fastsam.backends.triton_gpu"}

# What "auto" tries, fastest first; on any other device the last resort runs everywhere.
FASTEST_FIRST = {"cpu": ("native", "foreach"), "cuda": ("native", "triton", "foreach")}
ANYWHERE = ("foreach",)


class BackendUnavailable(RuntimeError):
    """A backend cannot run on a device; the message says why and what would help."""


class Request(NamedTuple):
    """What a backend is asked to run."""

    device_type: str
    own_grad_dtype: bool = True
    """Whether the gradients have their parameters' dtype."""


class Backend(Protocol):
    """The five operations over tensor tables. Options come as one entry per parameter group.

    No function waits for an accelerator, and every result is the same bits for the same input.
    """

    @staticmethod
    def unsupported_reason(request: Request) -> str:
        """Why the backend cannot run ``request``, and what would help; empty if it can."""

    @staticmethod
    def grad_norm(tables: Sequence[TensorTable], options: Sequence[AscentOptions]) -> Tensor:
        """The L2 norm over the gradients of the perturbed parameters of all tables, which are on one device.

        Returns:
            0-dim float64 on that device: ``||g||_2``, with ``|w| * g`` in place of ``g`` in adaptive groups. Not finite
            exactly if a gradient is not (or the squares of float64 gradients overflow).
        """

    @staticmethod
    def dots(table: TensorTable, form: AscentForm | DescentForm, coefficients: Tensor) -> Tensor:
        """Dot products of the tensors that a form names.

        Args:
            table: the table.
            form: an ascent's, or a descent's (whose x is the gradient, with the identity map).
            coefficients: the form's; of an ascent's, the map's columns are read.

        Returns:
            Float64 ``(n, 3)``: ``<map(x), x>, <x, y>, <y, y>`` of each parameter; zeros where it has no part.
        """

    @staticmethod
    def prepare_update(table: TensorTable, update: Update, form: DescentForm | None) -> None:
        """Compiles and loads what :meth:`restore_and_update_` will run after an ascent; called before the first write.

        To do so takes memory, which may have run out when the weights are perturbed.
        """

    @staticmethod
    def perturb_(table: TensorTable, ascent: Ascent) -> None:
        """Moves the perturbed parameters uphill.

        A first ascent: ``backup <- w; w <- w + A * map(x) + B * y``; A = 0 and B = 0 leave ``w`` as it is. If this
        raises, every ``w`` is as it was. By a norm, ``A = rho / (norm + 1e-12)``, negative with ``maximize``, 0 if the
        norm is not finite; adaptive groups move by ``A * w^2 * g``.

        A further ascent (y is PERTURBATION) only reads the backup: ``w <- backup + A * map(x) + B * (w - backup)``;
        A = 0 and B = 1 leave ``w`` as it is. If it raises, :meth:`restore_` brings the weights back.

        With masters: where ``round(master)`` is not ``w``, ``master <- w`` first (in a first ascent); the master is the
        backup, and e is computed from ``w``. A stochastic table rounds what it stores in ``w`` stochastically.
        """

    @staticmethod
    def restore_(table: TensorTable) -> None:
        """``w <- backup`` for every perturbed parameter, bit for bit; with masters ``w <- round(master)``."""

    @staticmethod
    def restore_and_update_(
        table: TensorTable,
        update: Update,
        options: Sequence[BaseOptions],
        descent: Descent | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """``w <- update(backup, A * x + B * y, state)`` for every parameter with a gradient; the others are restored.

        With masters: ``master <- update(master, ...); w <- round(master)``, starting from ``w`` where that was not
        perturbed and is not ``round(master)``. A stochastic table without masters rounds all that it stores
        stochastically, each of weights, state slots and method state by random numbers of its own.

        Args:
            table: its state rows are ``momentum_buffer`` (absent without momentum), or ``exp_avg, exp_avg_sq,
                max_exp_avg_sq`` (amsgrad).
            update: NONE restores only, and prepares the gradients for the base's own step: where the descent says so
                they become ``A * x + B * y``, and the first-pass gradient what a decoupled form subtracts from ``w``.
            options: of the parameter groups; empty for NONE.
            descent: what takes the gradient's place; None: the gradient.
            grad_scale: if given, gradients are divided by it (``torch.amp.GradScaler``'s scale).
            found_inf: if given and not 0, weights are restored and state and masters stay as they are, bit for bit.
        """


def check_name(name: str) -> None:
    """Raises ValueError if there is no backend of that name."""
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, BACKENDS))}, got {name!r}")


def load(name: str, device_type: str, own_grad_dtype: bool = True) -> Backend:
    """The backend ``name``.

    Raises:
        ValueError: there is no backend of that name.
        BackendUnavailable: it cannot run on ``device_type``, or with such gradients (see :class:`Request`).
    """
    check_name(name)
    try:
        backend = cast(Backend, importlib.import_module(_MODULES[name]))
    except ModuleNotFoundError as missing:
        raise BackendUnavailable(f"backend {name!r} is not part of this installation ({missing})") from None
    if reason := backend.unsupported_reason(Request(device_type, own_grad_dtype)):
        raise BackendUnavailable(reason)
    return backend


@functools.cache
def resolve(name: str, device_type: str, own_grad_dtype: bool = True) -> Backend:
    """The module that runs the operations on ``device_type``: a named one, or the fastest that can ("auto").

    A named backend runs or raises, with one exception: gradients of another dtype than their parameters are read by
    ``foreach`` where it cannot read them.
    """
    if name != "auto":
        backend = load(name, device_type)
        can_read = not backend.unsupported_reason(Request(device_type, own_grad_dtype))
        return backend if can_read else load("foreach", device_type, own_grad_dtype)
    for candidate in FASTEST_FIRST.get(device_type, ANYWHERE):
        try:
            return load(candidate, device_type, own_grad_dtype)
        except BackendUnavailable as reason:
            # Only what a user can mend is worth a warning: on CUDA other backends are still as fast.
            is_warning = device_type == "cpu" and own_grad_dtype
            level = logging.WARNING if is_warning else logging.INFO
            logger.log(level, "backend %r skipped on %s: %s", candidate, device_type, reason)
    raise BackendUnavailable(f"no backend can run on {device_type!r}")


def operations(name: str, device_type: str, own_grad_dtype: bool = True) -> Backend:
    """As :func:`resolve`, with the observer of :func:`observe` between, if there is one."""
    # Not own_grad_dtype=True: the cache would take it for another question, and log its answer once more.
    backend = resolve(name, device_type) if own_grad_dtype else resolve(name, device_type, False)
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
        if name not in OPERATIONS:
            return cast(Callable[..., Any], operation)
        return lambda *args, **options: self._observer(name, functools.partial(operation, *args, **options))


def grad_norms(
    backends: Sequence[Backend], tables: Sequence[TensorTable], options: Sequence[AscentOptions]
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
