"""Launches the Triton kernels of kernels/: each operation one launch per table, with no upload in the steady state.

Programs take one chunk each. The kernels are compiled once per dtype and precision: counts, addresses and
hyperparameters are data.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastsam.backends import AdamOptions, BackendUnavailable, ClimbOptions, SGDOptions
from fastsam.backends.combination import Climb, Combination, Descent, Map
from fastsam.backends.device_table import DeviceTable, fit_chunk_size, is_capturing, refuse_capture
from fastsam.backends.scalars import opmath_dtype
from fastsam.tables import GRAD, TensorTable

OLDEST_TRITON = (3, 4)
_INSTALL = "pip install 'triton>=3.4' (a build of PyTorch for GPUs brings its own)"


def find_obstacle() -> str:
    """Why the kernels cannot be used here, or an empty text."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported ({error}); {_INSTALL}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_TRITON:
        return f"triton {triton.__version__} is older than 3.4; {_INSTALL}"
    return ""


_obstacle, _interpreted = find_obstacle(), False
if not _obstacle:
    import triton.language as tl

    from fastsam.kernels.address import INTERPRETED
    from fastsam.kernels.combination import dots_kernel, perturb_by_kernel, sum_partials_kernel
    from fastsam.kernels.norm import grad_norm_kernel
    from fastsam.kernels.perturb import perturb_kernel
    from fastsam.kernels.update import restore_and_adam_kernel, restore_and_sgd_kernel, restore_kernel

    _interpreted = INTERPRETED.value
    _LANGUAGE_DTYPES = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }

WARPS = 4
# The most that Adam needs. Left to itself, NVIDIA's assembler holds small kernels to 40, and spills. With a second
# gradient it needs more in float64.
REGISTERS, MOST_REGISTERS = 128, 192
# What a program reads of one tensor at a time: two accesses of 16 bytes for each of 4 warps of 32 threads. The
# interpreter's time goes with the number of blocks, but most tensors of tests are small.
BLOCK_BYTES = 32768 if _interpreted else 4096

_NVIDIA = torch.version.hip is None

# The most elements that a program gets; a small table is cut finer.
CHUNK_SIZE = 65536
SMALLEST_CHUNK = CHUNK_SIZE if _interpreted else 4096


def compile_options(dtype: torch.dtype, *, combined: bool = False, nvidia: bool = _NVIDIA) -> dict[str, Any]:
    """What Triton is told beside the kernels' arguments."""
    # Fusion is said, not left to a default that changes from one Triton to the next: the same bits under all of them.
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    if nvidia:
        options["maxnreg"] = MOST_REGISTERS if combined and dtype == torch.float64 else REGISTERS
    return options


def check(device_type: str) -> None:
    if _obstacle:
        raise BackendUnavailable(_obstacle)
    if device_type == "cpu" and not _interpreted:
        raise BackendUnavailable(
            "Triton's kernels run on GPUs; on the CPU only in its interpreter, for tests: set TRITON_INTERPRET=1 "
            "before fastsam is imported"
        )
    if device_type == "cuda" and _interpreted:
        raise BackendUnavailable("Triton's interpreter (TRITON_INTERPRET=1) cannot read the memory of a GPU; unset it")
    if device_type not in ("cpu", "cuda"):
        raise BackendUnavailable(f"the Triton kernels are for CUDA and ROCm devices, not for {device_type!r}")


def chunk_size(elements: int) -> int:
    """How many elements a program gets at most, of a table of so many: a power of two."""
    return fit_chunk_size(elements, SMALLEST_CHUNK, CHUNK_SIZE)


def block_size(dtype: torch.dtype, *, plain: bool = True, nvidia: bool = _NVIDIA) -> int:
    """How many elements a program walks at a time.

    ``plain``: to nearest, without masters, and the gradient is no combination of a narrow dtype's tensors.
    """
    size = BLOCK_BYTES // dtype.itemsize
    # Masters, random numbers and second tensors take registers. AMD has enough, and twice as many threads.
    return min(size // 2 if nvidia and not plain else size, CHUNK_SIZE // 2)


def check_methods(device_type: str) -> None:
    """Runs every method where it runs at all."""


def grad_norm(tables: Sequence[TensorTable], options: Sequence[ClimbOptions]) -> Tensor:
    copies = [_device_table(table) for table in tables]
    counts = [len(copy.chunks) for copy in copies]
    partials, norm = _reduction_memory(tables[0], sum(counts))
    with copies[0].counting() as finished:
        for position, (table, copy) in enumerate(zip(tables, copies, strict=True)):
            addresses, packed = copy.read(table, options)
            first = sum(counts[:position])
            arguments = packed, partials, finished, norm, len(table.params), first, sum(counts)
            dtype = _LANGUAGE_DTYPES[table.dtype]
            constants = {"DTYPE": dtype, "FIELDS": len(options[0]), "BLOCK": block_size(table.dtype)}
            _launch(grad_norm_kernel, table, (addresses, copy.chunks, *arguments), constants)
    return norm


def perturb_(table: TensorTable, norm: Tensor, options: Sequence[ClimbOptions]) -> None:
    copy = _device_table(table)
    addresses, packed = copy.read(table, options)
    # Without random numbers, no step count is read.
    steps = table.steps if table.stochastic else None
    arguments = addresses, copy.chunks, packed, norm, copy.positions, steps, len(table.params)
    constants = _precision(table, stochastic=table.stochastic) | _arithmetic(table, options)
    _launch(perturb_kernel, table, arguments, constants)


def dots(table: TensorTable, combination: Combination) -> Tensor:
    form, weights = combination
    copy = _device_table(table)
    addresses, _ = copy.read(table)
    climbing = isinstance(form, Climb)
    x, mapping = (form.x, form.map) if isinstance(form, Climb) else (GRAD, Map.IDENTITY)
    bounds, partials = _products_memory(table, copy)
    constants = _combination_constants(table) | {"X": x, "Y": form.y, "MAP": int(mapping), "CLIMBING": climbing}
    _launch(dots_kernel, table, (addresses, copy.chunks, weights, partials, len(table.params)), constants)
    result = torch.empty((len(table.params), 3), dtype=torch.float64, device=table.device)
    with _on(table.device):
        sum_partials_kernel[(len(table.params),)](bounds, partials, result, **compile_options(table.dtype))
    return result


def perturb_by_(table: TensorTable, combination: Combination) -> None:
    form, weights = combination
    assert isinstance(form, Climb)
    copy = _device_table(table)
    addresses, _ = copy.read(table)
    constants = _combination_constants(table) | {"X": form.x, "Y": form.y, "MAP": int(form.map)}
    _launch(perturb_by_kernel, table, (addresses, copy.chunks, weights, len(table.params)), constants)


def _combination_constants(table: TensorTable) -> dict[str, Any]:
    opmath = _LANGUAGE_DTYPES[opmath_dtype(table.dtype)]
    return {"DTYPE": _LANGUAGE_DTYPES[table.dtype], "OPMATH": opmath, "BLOCK": _combined_block(table)}


def _combined_block(table: TensorTable) -> int:
    return block_size(table.dtype, plain=table.dtype.itemsize > 2)


def restore_(table: TensorTable) -> None:
    copy = _device_table(table)
    addresses, _ = copy.read(table)
    arguments = addresses, copy.chunks, len(table.params)
    _launch(restore_kernel, table, arguments, _precision(table, stochastic=False))


def restore_and_sgd_(
    table: TensorTable,
    options: Sequence[SGDOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None = None,
) -> None:
    _update(restore_and_sgd_kernel, table, options, grad_scale, found_inf, combination)


def restore_and_adam_(
    table: TensorTable,
    options: Sequence[AdamOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None = None,
) -> None:
    _update(restore_and_adam_kernel, table, options, grad_scale, found_inf, combination)


def _update(
    kernel: Any,
    table: TensorTable,
    options: Sequence[SGDOptions] | Sequence[AdamOptions],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    combination: Combination | None,
) -> None:
    copy = _device_table(table)
    addresses, packed = copy.read(table, options)
    grad_scale = copy.no_scale if grad_scale is None else grad_scale
    found_inf = copy.no_overflow if found_inf is None else found_inf
    # Masters round to nearest.
    stochastic = table.stochastic and not table.has_masters
    positions = copy.positions if stochastic else None
    constants = _precision(table, stochastic=stochastic) | _arithmetic(table, options)
    weights = None
    if combination is not None:
        form, weights = combination
        assert isinstance(form, Descent)
        constants |= {"Y": form.y, "KEEPS": form.keeps, "BLOCK": _combined_block(table)}
    with copy.counting() as finished:
        arguments = packed, table.steps, grad_scale, found_inf, finished, positions, weights, len(table.params)
        _launch(kernel, table, (addresses, copy.chunks, *arguments), constants, combined=weights is not None)


def _precision(table: TensorTable, *, stochastic: bool) -> dict[str, Any]:
    """What a kernel is compiled for; ``stochastic``: it is given positions, and draws random numbers."""
    kept = torch.float32 if table.has_masters else table.dtype
    return {
        "DTYPE": _LANGUAGE_DTYPES[table.dtype],
        "KEPT": _LANGUAGE_DTYPES[kept],
        "BLOCK": block_size(table.dtype, plain=not (stochastic or table.has_masters)),
    }


def _arithmetic(table: TensorTable, options: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    return {"OPMATH": _LANGUAGE_DTYPES[opmath_dtype(table.dtype)], "FIELDS": len(options[0])}


def _launch(
    kernel: Any, table: TensorTable, arguments: tuple[Any, ...], constants: dict[str, Any], *, combined: bool = False
) -> None:
    """One program per chunk (``arguments[1]``); ``combined``: by a combination."""
    with _on(table.device):
        kernel[(len(arguments[1]),)](*arguments, **constants, **compile_options(table.dtype, combined=combined))


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    if _interpreted:
        # What its interpreter does with tensors is no more PyTorch's business than what a kernel does.
        return torch._C._DisableTorchDispatch()
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def _device_table(table: TensorTable) -> DeviceTable:
    if "device table" not in table.cache:
        size = chunk_size(sum(value.numel() for value in table.values))
        table.cache["device table"] = DeviceTable(table, size)
    copy: DeviceTable = table.cache["device table"]
    return copy


def _reduction_memory(table: TensorTable, count: int) -> tuple[Tensor, Tensor]:
    """Float64: one partial for each of ``count`` chunks, and the norm."""
    memory = table.cache.get("reduction memory")
    if memory is None or len(memory[0]) != count:
        if is_capturing(table.device):
            refuse_capture("fastsam has not seen these parameters before")
        partials = torch.empty(count, dtype=torch.float64, device=table.device)
        memory = table.cache["reduction memory"] = partials, torch.empty((), dtype=torch.float64, device=table.device)
    partials, norm = memory
    return partials, norm


def _products_memory(table: TensorTable, copy: DeviceTable) -> tuple[Tensor, Tensor]:
    """The first chunk of each tensor and, at the end, of none, int64; and three float64 partials for each chunk."""
    if "products memory" not in table.cache:
        if is_capturing(table.device):
            refuse_capture("fastsam has not measured these parameters before")
        size = chunk_size(sum(value.numel() for value in table.values))
        counts = torch.tensor([0, *(-(-value.numel() // size) for value in table.values)], dtype=torch.int64)
        partials = torch.empty((len(copy.chunks), 3), dtype=torch.float64, device=table.device)
        table.cache["products memory"] = counts.cumsum(0).to(table.device), partials
    memory: tuple[Tensor, Tensor] = table.cache["products memory"]
    return memory
