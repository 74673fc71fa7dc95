"""Calls the compiled operators of csrc/: the operations as single passes over a table of addresses."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsam.backends import AdamOptions, BackendUnavailable, ClimbOptions, SGDOptions
from fastsam.backends.combination import Climb, Combination, Descent, Map
from fastsam.backends.native_table import CudaTable, HostTable
from fastsam.tables import GRAD, TensorTable

# 256 KiB of float32: small enough to share out evenly, large enough for the prefetchers (at 64 KiB and less, walking
# chunks backward costs perturb_ up to a half).
CHUNK_SIZE = 65536

try:
    importlib.import_module("fastsam._C")  # registers torch.ops.fastsam
    _missing = ""
except ImportError as error:
    _missing = str(error)

_ops: Any = torch.ops.fastsam
_tables: dict[str, type[HostTable | CudaTable]] = {"cpu": HostTable, "cuda": CudaTable}


def check(device_type: str) -> None:
    if _missing:
        raise BackendUnavailable(
            f"fastsam was installed without its compiled extension ({_missing}) and is several times slower; reinstall "
            "with a C++ compiler: pip install --no-build-isolation --no-deps fastsam-optim"
        )
    if device_type == "cuda" and (obstacle := _load_cuda()):
        raise BackendUnavailable(obstacle)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastsam::perturb_", device_type.upper()):
        raise BackendUnavailable(f"the compiled extension has no kernels for {device_type!r}")


def cuda_library() -> Path:
    """Where the CUDA kernels are, if they were compiled."""
    return Path(__file__).parents[1] / "_C_cuda.abi3.so"


@functools.cache
def _load_cuda() -> str:
    """Registers the CUDA kernels; why they cannot run on the current device, or an empty text."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA"
    if not cuda_library().exists():
        return (
            "fastsam was installed without its CUDA kernels; reinstall with nvcc: "
            "FASTSAM_BUILD=cuda pip install --no-build-isolation --no-deps fastsam-optim"
        )
    try:
        find_obstacle = ctypes.CDLL(str(cuda_library())).fastsam_cuda_obstacle
    except OSError as error:
        return f"the CUDA kernels cannot be loaded ({error})"
    find_obstacle.restype = ctypes.c_char_p
    obstacle: bytes | None = find_obstacle()
    return f"the CUDA kernels cannot run on this device ({obstacle.decode()})" if obstacle else ""


def check_methods(device_type: str) -> None:
    if device_type != "cpu":
        raise BackendUnavailable(
            f"backend 'native' runs plain SAM only on {device_type!r}; for other methods use 'triton' or 'foreach'"
        )


def grad_norm(tables: Sequence[TensorTable], options: Sequence[ClimbOptions]) -> Tensor:
    norm = _kept(tables[0], "norm", ())
    with _view(tables[0]).counting() as finished:
        for position, table in enumerate(tables):
            arguments, packed = _view(table).read(table, options)
            _, _, chunks, *_ = arguments
            partials = _kept(table, "partials", (len(chunks),))
            first, last = position == 0, position == len(tables) - 1
            _ops.grad_norm_(*arguments, packed, partials, norm, finished, first, last)
    return norm


def perturb_(table: TensorTable, norm: Tensor, options: Sequence[ClimbOptions]) -> None:
    arguments, packed = _view(table).read(table, options)
    _ops.perturb_(*arguments, packed, norm, table.steps if table.stochastic else None)


def dots(table: TensorTable, combination: Combination) -> Tensor:
    form, weights = combination
    arguments, _ = _view(table).read(table)
    climbing = isinstance(form, Climb)
    x, mapping = (form.x, form.map) if isinstance(form, Climb) else (GRAD, Map.IDENTITY)
    partials = _kept(table, "partials of dots", (len(arguments[2]), 3))
    result = torch.empty((len(table.params), 3), dtype=torch.float64)
    _ops.dots(*arguments, weights, x, form.y, int(mapping), climbing, partials, result)
    return result


def perturb_by_(table: TensorTable, combination: Combination) -> None:
    form, weights = combination
    assert isinstance(form, Climb)
    arguments, _ = _view(table).read(table)
    _ops.perturb_by_(*arguments, weights, form.x, form.y, int(form.map))


def restore_(table: TensorTable) -> None:
    arguments, _ = _view(table).read(table)
    _ops.restore_(*arguments)


def restore_and_sgd_(
    table: TensorTable,
    options: Sequence[SGDOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None = None,
) -> None:
    operator = _ops.restore_and_sgd_ if combination is None else _ops.restore_and_sgd_by_
    _update(operator, table, options, grad_scale, found_inf, combination)


def restore_and_adam_(
    table: TensorTable,
    options: Sequence[AdamOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None = None,
) -> None:
    operator = _ops.restore_and_adam_ if combination is None else _ops.restore_and_adam_by_
    _update(operator, table, options, grad_scale, found_inf, combination)


def _update(
    operator: Callable[..., None],
    table: TensorTable,
    options: Sequence[SGDOptions] | Sequence[AdamOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None,
) -> None:
    view = _view(table)
    arguments, packed = view.read(table, options)
    combined: tuple[Any, ...] = ()
    if combination is not None:
        form, weights = combination
        assert isinstance(form, Descent)
        combined = weights, form.y, form.keeps, form.decoupled
    with view.counting() as finished:
        operator(*arguments, packed, table.steps, grad_scale, found_inf, finished, *combined)


def _view(table: TensorTable) -> HostTable | CudaTable:
    """The table as the operators for its device take it."""
    if "native table" not in table.cache:
        table.cache["native table"] = _tables[table.device.type](table, CHUNK_SIZE)
    view: HostTable | CudaTable = table.cache["native table"]
    return view


def _kept(table: TensorTable, key: str, shape: tuple[int, ...]) -> Tensor:
    """Float64 memory that the table keeps from step to step."""
    if key not in table.cache:
        table.cache[key] = torch.empty(shape, dtype=torch.float64, device=table.device)
    tensor: Tensor = table.cache[key]
    return tensor
