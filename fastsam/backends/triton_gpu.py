"""The Triton backend: each operation one launch per table, with no upload in the steady state."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsam.backends import Request
from fastsam.backends.device_table import DeviceTable, gpu_chunk_size
from fastsam.runtime import streams
from fastsam.spec import (
    PERTURBATION,
    Ascent,
    AscentForm,
    AscentOptions,
    BaseOptions,
    Descent,
    DescentForm,
    Map,
    Update,
)
from fastsam.tables import TensorTable

OLDEST_TRITON = (3, 4)
OLDEST_CAPABILITY = (8, 0)
_INSTALL = "pip install 'triton>=3.4' (a build of PyTorch for GPUs brings its own)"


def find_obstacle() -> str:
    """Why the kernels cannot be imported here, or an empty text."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); {_INSTALL}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than 3.4; {_INSTALL}"
    return ""


_obstacle = find_obstacle()
if not _obstacle:
    from fastsam.backends import triton_kernels as kernels

    CHUNK_SIZE = kernels.CHUNK_SIZE


def unsupported_reason(request: Request) -> str:
    if _obstacle:
        return _obstacle
    if not request.own_grad_dtype:
        return "the Triton kernels read gradients of their parameters' dtype only"
    if request.device_type == "cpu":
        return (
            ""
            if kernels.interpreted
            else (
                "Triton's kernels run on GPUs; on the CPU only in its interpreter, for tests: set TRITON_INTERPRET=1 "
                "before fastsam is imported"
            )
        )
    if request.device_type != "cuda":
        return f"the Triton kernels are for CUDA and ROCm devices, not for {request.device_type!r}"
    if kernels.interpreted:
        return "Triton's interpreter (TRITON_INTERPRET=1) cannot read the memory of a GPU; unset it"
    return find_gpu_obstacle()


@functools.cache
def find_gpu_obstacle() -> str:
    """Why Triton cannot compile for the GPUs of this machine, or an empty text."""
    from triton.runtime import driver

    try:
        driver.active.get_current_target()  # builds Triton's own extension, with a C compiler
    except Exception as error:
        return f"Triton cannot compile here ({type(error).__name__}: {error}); it needs a C compiler at run time"
    if torch.version.hip is None:
        for index in range(torch.cuda.device_count()):
            if (capability := torch.cuda.get_device_capability(index)) < OLDEST_CAPABILITY:
                return (
                    f"Triton needs compute capability 8.0, and {torch.cuda.get_device_name(index)} "
                    f"has {'.'.join(map(str, capability))}; use backend='foreach'"
                )
    return ""


# ---- the five operations ----


def grad_norm(tables: Sequence[TensorTable], options: Sequence[AscentOptions]) -> Tensor:
    views = [table.attached(_View) for table in tables]
    counts = [min(len(view.copy.chunks), kernels.NORM_PROGRAMS) for view in views]
    total = sum(counts)
    partials, norm = views[0].norm_memory(total)
    with views[0].copy.counting() as finished:
        first = 0
        for table, view, programs in zip(tables, views, counts, strict=True):
            addresses, packed = view.copy.read(table, options)
            chunks = view.copy.chunks
            arguments = packed, partials, norm, finished, len(table.params), len(chunks), first, total
            kernels.norm(view.kind).launch(table.device, programs, addresses, chunks, *arguments)
            first += programs
    return norm


def dots(table: TensorTable, form: AscentForm | DescentForm, coefficients: Tensor) -> Tensor:
    view = table.attached(_View)
    addresses, _ = view.copy.read(table)
    # Whatever else a descent's form names, its dots are of x and y alone.
    form = form if isinstance(form, AscentForm) else DescentForm(form.y)
    read = coefficients if isinstance(form, AscentForm) and form.map != Map.IDENTITY else None
    count = len(table.params)
    result = view.new_dots(count)
    with view.copy.counting():
        arguments = view.copy.bounds, view.product_memory(), result, view.copy.tensor_counters, count
        chunks = view.copy.chunks
        kernels.dots(view.kind, form).launch(table.device, len(chunks), addresses, chunks, read, *arguments)
    return result


def prepare_update(table: TensorTable, update: Update, form: DescentForm | None) -> None:
    kernels.update(table.attached(_View).kind, update, form).prepare(table.device)


def perturb_(table: TensorTable, ascent: Ascent) -> None:
    view = table.attached(_View)
    if ascent.form.y != PERTURBATION:
        # As the update, so that the weights can be restored.
        kernels.update(view.kind, Update.NONE, None).prepare(table.device)
    kernel = kernels.perturb(view.kind, ascent.form if ascent.norm is None else None)
    reads_options = "options_ptr" not in kernel.absent
    addresses, packed = view.copy.read(table, ascent.options if reads_options else ())
    chunks, options = view.copy.chunks, packed if reads_options else None
    arguments = ascent.norm, ascent.coefficients, view.copy.positions, len(table.params)
    kernel.launch(table.device, len(chunks), addresses, chunks, options, *arguments)


def restore_(table: TensorTable) -> None:
    _restore(table, None)


def restore_and_update_(
    table: TensorTable,
    update: Update,
    options: Sequence[BaseOptions],
    descent: Descent | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    if update == Update.NONE:
        _restore(table, descent)
        return
    view = table.attached(_View)
    form, coefficients = (None, None) if descent is None else descent
    kernel = kernels.update(view.kind, update, form)
    addresses, packed = view.copy.read(table, options)
    chunks, positions = view.copy.chunks, None if "positions_ptr" in kernel.absent else view.copy.positions
    grad_scale = view.no_scale if grad_scale is None else grad_scale
    found_inf = view.no_overflow if found_inf is None else found_inf
    with view.copy.counting() as finished:
        arguments = packed, grad_scale, found_inf, coefficients, positions, finished, len(table.params)
        kernel.launch(table.device, len(chunks), addresses, chunks, *arguments)


def _restore(table: TensorTable, descent: Descent | None) -> None:
    """Restores, and prepares the gradients where there is a descent."""
    view = table.attached(_View)
    form, coefficients = (None, None) if descent is None else descent
    kernel = kernels.update(view.kind, Update.NONE, form)
    addresses, _ = view.copy.read(table, ())
    chunks = view.copy.chunks
    arguments = None, None, None, coefficients, None, None, len(table.params)
    kernel.launch(table.device, len(chunks), addresses, chunks, *arguments)


class _View:
    """What the backend keeps beside a table.

    Attributes:
        kind: what kernels are compiled for.
        copy: the device's copy of the table.
        no_scale: float32, 1: the gradients' scale without a scaler.
        no_overflow: float32, 0.
    """

    def __init__(self, table: TensorTable) -> None:
        self._device = table.device
        self.kind = kernels.kind_of(table)
        self.copy = DeviceTable(table, gpu_chunk_size(table, CHUNK_SIZE))
        self.no_scale = torch.ones((), dtype=torch.float32, device=self._device)
        self.no_overflow = torch.zeros((), dtype=torch.float32, device=self._device)
        self._has_empty = any(value.numel() == 0 for value in table.values)
        self._norm: tuple[Tensor, Tensor] | None = None
        self._products: Tensor | None = None

    def norm_memory(self, count: int) -> tuple[Tensor, Tensor]:
        """Float64: one partial for each of ``count`` programs, and the norm."""
        if self._norm is None or len(self._norm[0]) != count:
            self._norm = self._new(count), self._new()
        return self._norm

    def product_memory(self) -> Tensor:
        """Float64: three partials for each chunk."""
        if self._products is None:
            self._products = self._new(len(self.copy.chunks), 3)
        return self._products

    def new_dots(self, count: int) -> Tensor:
        """Float64 ``(count, 3)``: the programs of each tensor write a row, and a tensor without elements has none."""
        make = torch.zeros if self._has_empty else torch.empty
        return make((count, 3), dtype=torch.float64, device=self._device)

    def _new(self, *shape: int) -> Tensor:
        if streams.is_capturing(self._device):
            streams.refuse_capture("fastsam has not reduced over these parameters before")
        return torch.empty(shape, dtype=torch.float64, device=self._device)
