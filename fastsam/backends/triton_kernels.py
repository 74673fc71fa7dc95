"""Which Triton kernels there are: what each is compiled for, with which options, and how it is launched.

A :class:`Kernel` is one specialisation. Counts, addresses and hyperparameters are data: for them, nothing is compiled.
``tools/compile_kernels.py`` compiles the same objects ahead of time.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl

from fastsam.backends.scalars import opmath_dtype
from fastsam.kernels.perturb import perturb_kernel
from fastsam.kernels.reduce import dots_kernel, grad_norm_kernel
from fastsam.kernels.update import restore_and_update_kernel
from fastsam.kernels.walk import INTERPRETED
from fastsam.spec import (
    STATE_SLOTS,
    AdamOptions,
    AscentForm,
    AscentOptions,
    DescentForm,
    Map,
    Row,
    SGDOptions,
    Update,
)
from fastsam.tables import TensorTable

interpreted: bool = INTERPRETED.value

WARPS = 4
# The most registers of a thread. Left to itself, NVIDIA's assembler holds small kernels to 40, and spills. With 128,
# four programs fit on a multiprocessor of 65,536 registers, with 168 three.
REGISTERS, MOST_REGISTERS = 128, 168
# Enough for Adam in float32 without a method, and twice as many programs fit on a multiprocessor.
ADAM_REGISTERS = 80
# What a program reads of one tensor at a time: two accesses of 16 bytes for each of 4 warps of 32 threads. The
# interpreter's time goes with the number of blocks, but most tensors of tests are small.
BLOCK_BYTES = 32768 if interpreted else 4096

# Elements of a chunk, at least.
CHUNK_SIZE = 65536 if interpreted else 8192
# Programs of the norm, at most: they share the chunks, so that few partial sums are left to the last one.
NORM_PROGRAMS = 4096

IS_NVIDIA = torch.version.hip is None

POINTERS = {
    "addresses_ptr": torch.int64,
    "chunks_ptr": torch.int64,
    "options_ptr": torch.int64,
    "positions_ptr": torch.int64,
    "bounds_ptr": torch.int64,
    "coefficients_ptr": torch.float64,
    "partials_ptr": torch.float64,
    "norm_ptr": torch.float64,
    "result_ptr": torch.float64,
    "grad_scale_ptr": torch.float32,
    "found_inf_ptr": torch.float32,
    "finished_ptr": torch.int32,
}
"""The dtypes of the kernels' arguments; the others are int32."""

_LANGUAGE_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

_UPDATE_OPTIONS: dict[Update, Any] = {Update.SGD: SGDOptions, Update.ADAM: AdamOptions}
_MOMENTS = {Update.NONE: 0, Update.SGD: 1, Update.ADAM: STATE_SLOTS}


class Kind(NamedTuple):
    """What tables differ in, to a compiler."""

    dtype: torch.dtype
    stochastic: bool = False
    masters: bool = False
    nvidia: bool = IS_NVIDIA

    @property
    def state_dtype(self) -> torch.dtype:
        """Of backups (with masters, these are the backups), state, masters and method state."""
        return torch.float32 if self.masters else self.dtype


class Kernel:
    """A kernel with all that it is compiled for.

    Args:
        function: the JIT function.
        kind: of the table.
        constants: its own compile-time arguments.
        absent: the pointers that are None.
        plain: whether it needs few registers; else it walks half as many elements at a time.
        registers: the most of a thread.
    """

    def __init__(
        self,
        function: Any,
        kind: Kind,
        constants: dict[str, Any],
        absent: frozenset[str] = frozenset(),
        *,
        plain: bool = True,
        registers: int = REGISTERS,
    ) -> None:
        self.function, self.kind, self.absent = function, kind, absent
        self.name: str = function.__name__
        dtypes = {"DTYPE": kind.dtype, "STATE_DTYPE": kind.state_dtype, "OPMATH": opmath_dtype(kind.dtype)}
        size = BLOCK_BYTES // kind.dtype.itemsize
        # AMD has enough registers, and twice as many threads.
        self.block = size // 2 if kind.nvidia and not plain else size
        known = {name: _LANGUAGE_DTYPES[dtype] for name, dtype in dtypes.items()} | {"BLOCK": self.block} | constants
        self.arguments = [name for name in function.arg_names if name.endswith(("_ptr", "_count", "_partial"))]
        self.constants = {name: known[name] for name in function.arg_names if name not in self.arguments}
        # Fusion is said, not left to a default that changes from one Triton to the next: the same bits under all.
        self.options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": True}
        if kind.nvidia:
            self.options["maxnreg"] = registers
        self._compiled: dict[int | None, Any] = {}

    def prepare(self, device: torch.device) -> Any:
        """Compiles the kernel and loads it onto ``device``, unless it is there."""
        compiled = self._compiled.get(device.index)
        if compiled is None and not interpreted:
            mocks = [None if name in self.absent else POINTERS.get(name, 2) for name in self.arguments]
            with on(device):
                compiled = self.function.warmup(*mocks, grid=(1,), **self.constants, **self.options)
                compiled[1, 1, 1]  # loads it
            self._compiled[device.index] = compiled
        return compiled

    def launch(self, device: torch.device, programs: int, *arguments: Any) -> None:
        """Runs so many programs."""
        if interpreted:
            # What the interpreter does with tensors is no more PyTorch's business than what a kernel does.
            with torch._C._DisableTorchDispatch():
                self.function[(programs,)](*arguments, **self.constants)
            return
        compiled = self.prepare(device)
        with on(device):
            # Past the look-up by arguments, which costs more than the launch: there is nothing left to choose by.
            compiled[programs, 1, 1](*arguments, *self.constants.values())


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments are on."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return nullcontext()


def kind_of(table: TensorTable) -> Kind:
    return Kind(table.dtype, table.stochastic, table.has_masters)


@functools.cache
def norm(kind: Kind) -> Kernel:
    return Kernel(grad_norm_kernel, kind, {"FIELDS": len(AscentOptions._fields)})


@functools.cache
def dots(kind: Kind, form: AscentForm | DescentForm) -> Kernel:
    is_ascent = isinstance(form, AscentForm)
    x, mapping = (form.x, form.map) if isinstance(form, AscentForm) else (Row.GRAD, Map.IDENTITY)
    absent = frozenset() if mapping != Map.IDENTITY else frozenset({"coefficients_ptr"})
    constants = _rows(kind, x, form.y) | {"MAP": int(mapping), "ASCENT": is_ascent}
    reads_wide = kind.state_dtype in (_row_dtype(kind, x), _row_dtype(kind, form.y))
    registers = _registers(kind if reads_wide else kind._replace(masters=False), form)
    return Kernel(dots_kernel, kind, constants, absent, plain=kind.dtype.itemsize > 2, registers=registers)


@functools.cache
def perturb(kind: Kind, form: AscentForm | None) -> Kernel:
    """``form`` None: by the norm."""
    absent = {"coefficients_ptr"} if form is None else {"norm_ptr"}
    plain = not (kind.stochastic or kind.masters) and (form is None or kind.dtype.itemsize > 2)
    if not kind.stochastic:
        absent |= {"positions_ptr"} | (set() if form is None else {"options_ptr"})
    form = AscentForm() if form is None else form
    constants = {"FIELDS": len(AscentOptions._fields), "MAP": int(form.map)} | _rows(kind, form.x, form.y)
    return Kernel(perturb_kernel, kind, constants, frozenset(absent), plain=plain, registers=_registers(kind, form))


@functools.cache
def update(kind: Kind, base: Update, form: DescentForm | None) -> Kernel:
    """``base`` NONE, ``form`` None: restores."""
    draws = kind.stochastic and not kind.masters and base != Update.NONE
    absent = set() if draws else {"positions_ptr"}
    if form is None:
        absent |= {"coefficients_ptr"}
    if base == Update.NONE:
        absent |= {"options_ptr", "grad_scale_ptr", "found_inf_ptr", "finished_ptr"}
    plain = not (draws or kind.masters) and (form is None or kind.dtype.itemsize > 2)
    registers = _registers(kind, form)
    if base == Update.ADAM and form is None and kind.dtype == torch.float32:
        registers = ADAM_REGISTERS
    form = DescentForm() if form is None else form
    constants = {
        "FIELDS": 0 if base == Update.NONE else len(_UPDATE_OPTIONS[base]._fields),
        "UPDATE": int(base),
        "MOMENTS": _MOMENTS[base],
        "KEEPS": form.keeps,
        "DECOUPLED": form.decoupled,
        "RELAXED": not kind.nvidia,
    }
    constants |= _rows(kind, Row.GRAD, form.y)
    return Kernel(restore_and_update_kernel, kind, constants, frozenset(absent), plain=plain, registers=registers)


def _rows(kind: Kind, x: int, y: int) -> dict[str, Any]:
    dtypes = {"X_DTYPE": _row_dtype(kind, x), "Y_DTYPE": _row_dtype(kind, y)}
    return {"X": int(x), "Y": int(y)} | {name: _LANGUAGE_DTYPES[dtype] for name, dtype in dtypes.items()}


def _row_dtype(kind: Kind, row: int) -> torch.dtype:
    of_state = row in range(Row.STATE, Row.STATE + STATE_SLOTS) or row in (Row.BACKUP, Row.MASTER, Row.METHOD_STATE)
    return kind.state_dtype if of_state else kind.dtype


def _registers(kind: Kind, form: AscentForm | DescentForm | None) -> int:
    # A form's second tensor is too much for the others where each number takes two registers (float64), and where
    # numbers of 16 and of 32 bits are held at the same time (masters).
    is_wide = kind.dtype == torch.float64 or kind.masters
    return MOST_REGISTERS if form is not None and is_wide else REGISTERS
