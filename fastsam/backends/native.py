"""Calls the compiled operators of csrc/: the operations as single passes over a table of addresses."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsam.backends.native_table import CudaTable, HostTable
from fastsam.spec import (
    NONE,
    Ascent,
    AscentForm,
    AscentOptions,
    BaseOptions,
    Descent,
    DescentForm,
    Map,
    Row,
    Update,
)
from fastsam.tables import TensorTable

if TYPE_CHECKING:
    from fastsam.backends import Request

try:
    importlib.import_module("fastsam._C")  # registers torch.ops.fastsam
    _missing = ""
except ImportError as error:
    _missing = str(error)

_ops: Any = torch.ops.fastsam

_NO_FORM = DescentForm(NONE)

# torch::headeronly::ScalarType.
_DTYPES = {torch.float16: 5, torch.float32: 6, torch.float64: 7, torch.bfloat16: 15}


def unsupported_reason(request: Request) -> str:
    """Why the compiled operators cannot run ``request``, and what would help; empty if they can."""
    device_type = request.device_type
    if _missing:
        return (
            f"fastsam was installed without its compiled extension ({_missing}) and is several times slower; reinstall "
            "with a C++ compiler, in a checkout: pip install --no-build-isolation --no-deps ."
        )
    if device_type == "cuda" and (obstacle := _load_cuda()):
        return obstacle
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastsam::perturb_", device_type.upper()):
        return f"the compiled extension has no kernels for {device_type!r}"
    if not request.own_grad_dtype:
        return "the compiled kernels read gradients of their parameters' dtype only; backend 'foreach' reads others"
    return ""


def cuda_library() -> Path:
    """Where the CUDA kernels are, if they were compiled."""
    return Path(__file__).parents[1] / "_C_cuda.abi3.so"


@functools.cache
def _cuda_functions() -> ctypes.CDLL:
    """What the library of the CUDA kernels has beside its operators. Each returns why it could not, or None."""
    library = ctypes.CDLL(str(cuda_library()))
    for function in (library.fastsam_cuda_obstacle, library.fastsam_cuda_load_update):
        function.restype = ctypes.c_char_p
    return library


@functools.cache
def _load_cuda() -> str:
    """Registers the CUDA kernels; why they cannot run on a GPU of this machine, or an empty text."""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without CUDA"
    if not cuda_library().exists():
        return (
            "fastsam was installed without its CUDA kernels; reinstall with nvcc, in a checkout: "
            "FASTSAM_BUILD=cuda pip install --no-build-isolation --no-deps ."
        )
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    try:
        find_obstacle = _cuda_functions().fastsam_cuda_obstacle
    except OSError as error:
        return f"the CUDA kernels cannot be loaded ({error})"
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            obstacle: bytes | None = find_obstacle()
        if obstacle:
            return f"the CUDA kernels cannot run on {torch.cuda.get_device_name(index)} ({obstacle.decode()})"
    return ""


def grad_norm(tables: Sequence[TensorTable], options: Sequence[AscentOptions]) -> Tensor:
    views = [_view(table) for table in tables]
    norm, finished = views[0].norm, views[0].counting
    for position, (table, view) in enumerate(zip(tables, views, strict=True)):
        arguments, packed = view.read(table, options)
        first, last = position == 0, position == len(tables) - 1
        _ops.grad_norm_.default(*arguments, packed, view.norm_partials, norm, finished, first, last)
    return norm


def dots(table: TensorTable, form: AscentForm | DescentForm, coefficients: Tensor) -> Tensor:
    view = _view(table)
    arguments, _ = view.read(table)
    x, how = (form.x, form.map) if isinstance(form, AscentForm) else (Row.GRAD, Map.IDENTITY)
    is_ascent = isinstance(form, AscentForm)
    result = torch.empty((len(table.params), 3), dtype=torch.float64, device=table.device)
    _ops.dots_.default(*arguments, coefficients, x, form.y, how, is_ascent, view.dot_partials, result, view.counting)
    return result


def prepare_update(table: TensorTable, update: Update, form: DescentForm | None) -> None:
    view = _view(table)
    if isinstance(view, CudaTable) and view.prepares(update, form):
        _load_update(table, update, form is not None)


def _load_update(table: TensorTable, update: Update, has_descent: bool) -> None:
    dtype, count = _DTYPES[table.dtype], ctypes.c_int64(len(table.params))
    flags = map(ctypes.c_bool, (table.stochastic, table.has_masters, has_descent))
    load = _cuda_functions().fastsam_cuda_load_update
    with torch.cuda.device(table.device):
        obstacle: bytes | None = load(dtype, ctypes.c_int64(update), count, *flags)
    if obstacle:
        raise RuntimeError(obstacle.decode())


def perturb_(table: TensorTable, ascent: Ascent) -> None:
    arguments, packed = _view(table).read(table, ascent.options)
    _ops.perturb_.default(*arguments, packed, ascent.norm, ascent.coefficients, *ascent.form)


def restore_(table: TensorTable) -> None:
    arguments, _ = _view(table).read(table)
    _ops.restore_.default(*arguments)


def restore_and_update_(
    table: TensorTable,
    update: Update,
    options: Sequence[BaseOptions],
    descent: Descent | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    view = _view(table)
    arguments, packed = view.read(table, options)
    coefficients, form = (None, _NO_FORM) if descent is None else (descent.coefficients, descent.form)
    scaler = grad_scale, found_inf
    _ops.restore_and_update_.default(*arguments, update, packed, *scaler, view.counting, coefficients, *form)


def _view(table: TensorTable) -> HostTable | CudaTable:
    """The table as the operators for its device take it."""
    return table.attached(HostTable) if table.device.type == "cpu" else table.attached(CudaTable)
