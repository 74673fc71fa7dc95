"""What the compiled operators are handed of a table: on the CPU the table itself, on CUDA the device's copy as well.

A table keeps its view, so that a view does not keep the table: it is given the table to read it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from fastsam.backends.device_table import DeviceTable, Options, fit_chunk_size
from fastsam.tables import GRAD, ROWS, TensorTable

SMALLEST_CUDA_CHUNK = 4096

Arguments = tuple[Tensor, Tensor, Tensor, int, torch.dtype, Tensor | None, Tensor | None, bool]
"""Of every operator, in the order of csrc/ops.cpp: addresses, tensors, chunks, chunk_size, dtype, device_addresses,
positions, masters."""


class HostTable:
    """For operators that run on the CPU."""

    def __init__(self, table: TensorTable, chunk_size: int) -> None:
        positions = torch.tensor(table.positions, dtype=torch.int64) if table.stochastic else None
        cut = table.chunks(chunk_size), chunk_size
        self._arguments = table.addresses, table.tensors, *cut, table.dtype, None, positions, table.has_masters
        self._packed: dict[type, tuple[list[tuple[float, ...]], Tensor]] = {}

    def read(self, table: TensorTable, options: Options = ()) -> tuple[Arguments, Tensor]:
        """The table and its options, float64 ``(groups, fields)``, made anew only when a number has changed."""
        if not options:
            return self._arguments, table.addresses
        numbers = [tuple(map(float, group)) for group in options]
        known, packed = self._packed.get(type(options[0]), (None, table.addresses))
        if known != numbers:
            packed = torch.tensor(numbers, dtype=torch.float64)
            self._packed[type(options[0])] = numbers, packed
        return self._arguments, packed

    def counting(self) -> AbstractContextManager[None]:
        """Nothing is counted here."""
        return nullcontext()


class CudaTable:
    """For operators that run on CUDA. The gradients' addresses are not copied: they travel with each launch."""

    def __init__(self, table: TensorTable, chunk_size: int) -> None:
        elements = sum(value.numel() for value in table.values)
        self._chunk_size = fit_chunk_size(elements, SMALLEST_CUDA_CHUNK, chunk_size)
        self._copy = DeviceTable(table, self._chunk_size, rows=[row for row in range(ROWS) if row != GRAD])

    def read(self, table: TensorTable, options: Options = ()) -> tuple[Arguments, Tensor]:
        """The table with its copy, and its options as the device reads them."""
        copy = self._copy
        addresses, packed = copy.read(table, options)
        cut, precision = (copy.chunks, self._chunk_size), (copy.positions, table.has_masters)
        return (table.addresses, table.tensors, *cut, table.dtype, addresses, *precision), packed

    def counting(self) -> AbstractContextManager[Tensor]:
        """What the blocks of an operation count themselves by."""
        return self._copy.counting()
