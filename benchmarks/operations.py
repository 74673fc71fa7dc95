"""All that the benchmarks know of the package's inside: its operations, its chunk sizes, how launches are stubbed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from benchmarks.device import Device, Unavailable
from fastsam import backends
from fastsam.backends import native, native_table, triton_gpu
from fastsam.doctor.self_check import Outcome, check_backend
from fastsam.runtime import streams

UPDATE = "restore_and_update_"
# Bytes per fp32 parameter that an operation cannot do without: everything is read once and written once.
BYTES = {"grad_norm": 4, "perturb_": 16, "restore_": 8}
UPDATE_BYTES = {"SGD": 20, "AdamW": 28}

# FastSAM's backends, slowest first; the last are the ones with kernels of their own.
BACKENDS = ("foreach", "triton", "native")
KERNELS = BACKENDS[1:]


def operation_bytes(operation: str, base: str) -> int:
    """What an operation cannot do without, in bytes per fp32 parameter."""
    return UPDATE_BYTES[base] if operation == UPDATE else BYTES[operation]


def sam_bytes(base: str) -> int:
    """The same for a SAM step with the base's update in it."""
    return BYTES["grad_norm"] + BYTES["perturb_"] + UPDATE_BYTES[base]


def obstacle(backend: str, device_type: str) -> str:
    """Why a backend cannot run on a device, or an empty text."""
    try:
        backends.load(backend, device_type)
    except backends.BackendUnavailable as reason:
        return str(reason)
    return ""


def fastest(device_type: str) -> str:
    """The backend that "auto" takes."""
    return next(name for name in reversed(BACKENDS) if not obstacle(name, device_type))


def compare_with_reference(backend: str, device_type: str) -> Outcome:
    """The five operations of a backend over awkward tensors, beside ``reference``'s: ``outcome.ok``, ``.where``."""
    return check_backend(backend, torch.device(device_type))


class OperationClock:
    """Times operations where FastSAM calls them, in the time of a device."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._marks: dict[str, list[tuple[Any, Any]]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """A block whose operations are timed."""
        self._marks = {}
        with backends.observe(self._time):
            yield

    def seconds(self) -> dict[str, float]:
        """By operation, of the last block; the device must be idle."""
        return {
            name: sum(self._device.seconds(start, end) for start, end in marks) for name, marks in self._marks.items()
        }

    def _time(self, name: str, run: Callable[[], Any]) -> Any:
        start = self._device.mark()
        result = run()
        self._marks.setdefault(name, []).append((start, self._device.mark()))
        return result


@contextlib.contextmanager
def chunk_size(elements: int | None) -> Iterator[None]:
    """A block in which GPU tables are cut into chunks of so many elements; None: of as many as the package likes."""
    if elements is None:
        yield
        return

    with (
        mock.patch.object(triton_gpu, "gpu_chunk_size", return_value=elements),
        mock.patch.object(native_table, "gpu_chunk_size", return_value=elements),
    ):
        yield


@contextlib.contextmanager
def stubbed_launches(backend: str) -> Iterator[None]:
    """A block in which a backend's path for CUDA runs over CPU tensors, as far as the launches, which do nothing.

    Left out beside the kernels is what only CUDA has: pinned memory, and the question whether a graph is captured.
    """
    path = {"native": _stubbed_native, "triton": _stubbed_triton}[backend]
    with contextlib.ExitStack() as stack:
        path(stack)
        backends.resolve.cache_clear()
        stack.callback(backends.resolve.cache_clear)
        yield


class _Operators:
    """In the place of ``torch.ops.fastsam``."""

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(default=do_nothing)


def do_nothing(*args: Any, **options: Any) -> None:
    """A launch that is none."""


def _stubbed_native(stack: contextlib.ExitStack) -> None:
    if reason := obstacle("native", "cpu"):
        raise Unavailable(reason)
    stack.enter_context(mock.patch.object(native, "_ops", _Operators()))
    stack.enter_context(mock.patch.object(native, "_load_update", do_nothing))
    stack.enter_context(mock.patch.object(native, "_view", lambda table: table.attached(native_table.CudaTable)))
    stack.enter_context(mock.patch.object(streams, "is_capturing", do_nothing))


def _stubbed_triton(stack: contextlib.ExitStack) -> None:
    if reason := triton_gpu.find_obstacle():
        raise Unavailable(reason)
    kernels = triton_gpu.kernels
    stack.enter_context(mock.patch.object(triton_gpu, "unsupported_reason", _no_reason))
    stack.enter_context(mock.patch.object(kernels, "interpreted", False))
    stack.enter_context(mock.patch.object(kernels.Kernel, "prepare", _prepared))
    stack.enter_context(mock.patch.object(streams, "is_capturing", do_nothing))


class _Launches:
    """In the place of a compiled kernel."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return do_nothing


_LAUNCHES = _Launches()


# Plain functions: a mock takes as long as a tenth of a step.
def _prepared(*_: Any) -> _Launches:
    return _LAUNCHES


def _no_reason(_: Any) -> str:
    return ""
