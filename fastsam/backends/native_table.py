"""What the compiled operators are handed of a table: on the CPU the table itself, on CUDA the device's copy as well.

A table keeps its view, so that a view does not keep the table: it is given the table to read it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsam.backends.device_table import STEP_ROWS, DeviceTable, Options, gpu_chunk_size
from fastsam.spec import ROWS, DescentForm, Update
from fastsam.tables import TensorTable

# 256 KiB of float32: small enough to share out evenly, large enough for the prefetchers (at 64 KiB and less, walking
# chunks backward costs perturb_ up to a half).
CHUNK_SIZE = 65536
SMALLEST_CUDA_CHUNK = 4096

Arguments = tuple[Tensor, Tensor, Tensor, int, torch.dtype, Tensor | None, Tensor | None, bool]
"""Of every operator, in the order of csrc/ops.cpp: addresses, tensors, chunks, chunk_size, dtype, device_addresses,
positions, masters."""


class HostTable:
    """For operators that run on the CPU.

    Attributes:
        norm: the result of ``grad_norm``, float64, 0-dim.
        norm_partials, dot_partials: what each chunk adds to a reduction.
        counting: None: nothing is counted here.
    """

    counting = None

    def __init__(self, table: TensorTable) -> None:
        positions = table.random_places() if table.stochastic else None
        chunks = table.chunks(CHUNK_SIZE)
        cut = chunks, CHUNK_SIZE
        self._arguments = table.addresses, table.tensors, *cut, table.dtype, None, positions, table.has_masters
        self._packed: dict[type, tuple[Options | None, list[tuple[float, ...]] | None, Tensor]] = {}
        self.norm = torch.empty((), dtype=torch.float64, device="cpu")
        self.norm_partials = torch.empty(len(chunks), dtype=torch.float64, device="cpu")
        self.dot_partials = torch.empty((len(chunks), 3), dtype=torch.float64, device="cpu")

    def read(self, table: TensorTable, options: Options = ()) -> tuple[Arguments, Tensor]:
        """The table and its options, float64 ``(groups, fields)``, made anew only when a number has changed."""
        if not options:
            return self._arguments, table.addresses
        kind = type(options[0])
        same, known, packed = self._packed.get(kind, (None, None, table.addresses))
        if options is same:
            return self._arguments, packed
        numbers = [tuple(map(float, group)) for group in options]
        if known != numbers:
            packed = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        # A tensor is read anew.
        is_fixed = not any(isinstance(value, Tensor) for group in options for value in group)
        self._packed[kind] = options if is_fixed else None, numbers, packed
        return self._arguments, packed


class CudaTable:
    """For operators that run on CUDA. Addresses of tensors that live for one step are not copied: they are arguments.

    Attributes:
        norm: the result of ``grad_norm``, float64, 0-dim.
        norm_partials, dot_partials: what each chunk adds to a reduction.
        counting: what the blocks of a launch count themselves by, back to 0; and the number of each tensor's chunks.
    """

    def __init__(self, table: TensorTable) -> None:
        self._chunk_size = gpu_chunk_size(table, SMALLEST_CUDA_CHUNK)
        self._copy = DeviceTable(table, self._chunk_size, rows=[row for row in range(ROWS) if row not in STEP_ROWS])
        chunks = len(self._copy.chunks)
        self.norm = torch.empty((), dtype=torch.float64, device=table.device)
        self.norm_partials = torch.empty(chunks, dtype=torch.float64, device=table.device)
        self.dot_partials = torch.empty((chunks, 3), dtype=torch.float64, device=table.device)
        counts = self._copy.bounds.diff().to(torch.int32)
        self.counting = torch.stack([torch.zeros_like(counts), counts])
        self._prepared: set[tuple[Update, bool]] = set()

    def read(self, table: TensorTable, options: Options = ()) -> tuple[Arguments, Tensor]:
        """The table with its copy, and its options as the device reads them."""
        copy = self._copy
        addresses, packed = copy.read(table, options)
        cut, precision = (copy.chunks, self._chunk_size), (copy.positions, table.has_masters)
        return (table.addresses, table.tensors, *cut, table.dtype, addresses, *precision), packed

    def prepares(self, update: Update, form: DescentForm | None) -> bool:
        """Whether the kernel of such an update is to be loaded: the first time that this is asked."""
        key = update, form is not None
        is_new = key not in self._prepared
        self._prepared.add(key)
        return is_new
