"""What kernels read from device memory: a table's addresses, its chunks, the options; sent up only when they change."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastsam.tables import GRAD, ROWS, TAKEN, TensorTable

# Uploads that may be captured into CUDA graphs (three in a step) before a step outside a capture makes room for more.
CAPTURED_UPLOADS = 12

# The most options that a group has: Adam's.
_MAX_FIELDS = 9

# The options that kernels read from a tensor on the device where there is one.
TENSOR_OPTIONS = frozenset({"rho", "lr", "beta1", "beta2"})

Options = Sequence[Any]
"""One NamedTuple per parameter group."""


class DeviceTable:
    """The device's copies of one table, and the memory that operations on it need. Nothing here waits for the device.

    Every upload goes through pinned memory of its own, which PyTorch's host allocator hands out again only when the
    copy is done. A copy that is captured into a CUDA graph happens at each replay: it has a source and a target of its
    own. What a graph reads is not written again and lives as long as the table.

    Args:
        table: the table.
        chunk_size: elements of a chunk, at most.
        rows: which of the table's addresses the kernels read here.

    Attributes:
        chunks: int64 ``(count, 4)``: tensor, first element, length, parameter group. There is a row, of length 0, even
            if no tensor has an element.
        positions: int64 ``(n,)``, the table's; None where nothing is rounded stochastically.
        no_scale: float32, 1: the gradients' scale without a scaler.
        no_overflow: float32, 0.
        uploads: how many copies were sent up, for tests.
    """

    def __init__(self, table: TensorTable, chunk_size: int, rows: Iterable[int] = range(ROWS)) -> None:
        # The table itself is not kept: it keeps this, and a ring of the two would hold the backups' memory.
        self._device = table.device
        if is_capturing(self._device):
            refuse_capture("fastsam has not seen these parameters before")
        self._read_rows = tuple(rows)
        cut = [
            (i, start, min(chunk_size, value.numel() - start), table.groups[i])
            for i, value in enumerate(table.values)
            for start in range(0, value.numel(), chunk_size)
        ]
        self.chunks = torch.empty((max(len(cut), 1), 4), dtype=torch.int64, device=self._device)
        self._finished = torch.zeros((), dtype=torch.int32, device=self._device)
        self._was_cut_off = False
        self.no_scale = torch.ones((), dtype=torch.float32, device=self._device)
        self.no_overflow = torch.zeros((), dtype=torch.float32, device=self._device)
        self.uploads = 0
        self._send(torch.tensor(cut or [(0, 0, 0, table.groups[0])], dtype=torch.int64), self.chunks)
        self.positions: Tensor | None = None
        if table.stochastic:
            self.positions = torch.empty(len(table.positions), dtype=torch.int64, device=self._device)
            self._send(torch.tensor(table.positions, dtype=torch.int64), self.positions)
        self._rows = torch.zeros(table.addresses.shape, dtype=torch.int64, device=self._device)
        self._versions = [-1] * ROWS
        self._options: dict[str, tuple[bytes, Tensor]] = {}
        self._tensor_options: dict[tuple[str, int, str], Tensor] = {}
        self._converted: dict[tuple[str, int, str], Tensor] = {}
        self._spare: list[Tensor] = []
        self._captured: list[tuple[Any, ...]] = []

    @contextmanager
    def counting(self) -> Iterator[Tensor]:
        """For the launches of one operation: an int32, 0, by which their programs count themselves, back to 0.

        An exception between or during them (a Ctrl-C, say) leaves the count anywhere; the next operation resets it.
        """
        was_cut_off, self._was_cut_off = self._was_cut_off, True
        if was_cut_off:
            self._finished.zero_()
        yield self._finished
        # What is captured has not happened yet.
        self._was_cut_off = was_cut_off and is_capturing(self._device)

    def read(self, table: TensorTable, options: Options = ()) -> tuple[Tensor, Tensor]:
        """The addresses, int64 ``(ROWS, n)``, and the options, two words for each of ``(groups, fields)``.

        Raises:
            RuntimeError: under capture, if anything but the gradients has changed since the last step outside.
        """
        words = self._pack(options)
        name = type(options[0]).__name__ if options else ""
        if is_capturing(self._device):
            return self._read_in_graph(table, name, words)
        self._make_room_for_graphs(table)
        self._send_rows(table)
        return self._rows, self._send_options(name, words) if options else self._rows

    def _changed_rows(self, table: TensorTable) -> list[int]:
        return [row for row in self._read_rows if table.versions[row] != self._versions[row]]

    def _send_rows(self, table: TensorTable) -> None:
        if changed := self._changed_rows(table):
            if self._is_captured(self._rows):
                self._rows = self._rows.clone()
            sent = slice(changed[0], changed[-1] + 1)
            self._send(table.addresses[sent], self._rows[sent])
            self._versions = list(table.versions)

    def _send_options(self, name: str, words: bytes) -> Tensor:
        sent, copy = self._options.get(name, (b"", self._rows))
        if sent != words:
            numbers = torch.frombuffer(bytearray(words), dtype=torch.int64)
            if len(sent) != len(words) or self._is_captured(copy):
                copy = torch.empty(numbers.shape, dtype=torch.int64, device=self._device)
            # Until the copy is sent, it may hold anything.
            self._options.pop(name, None)
            self._send(numbers, copy)
            self._options[name] = words, copy
        return copy

    def _send(self, source: Tensor, target: Tensor) -> None:
        if self._device.type != "cpu":
            source = self._staging(source.shape).copy_(source)
        target.copy_(source, non_blocking=True)
        self.uploads += 1

    def _staging(self, shape: Sequence[int]) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, pin_memory=self._device.type != "cpu")

    # ---- options ----

    def _pack(self, options: Options) -> bytes:
        """A number and an address for each option. Tensors on the table's device are read there, when a kernel runs."""
        fields = [
            field
            for group, values in enumerate(options)
            for name, value in zip(values._fields, values, strict=True)
            for field in self._entry(value, (type(values).__name__, group, name))
        ]
        return struct.pack("=" + "dq" * (len(fields) // 2), *fields)

    def _entry(self, value: Any, key: tuple[str, int, str]) -> tuple[float, int]:
        on_the_host = value.device.type == "cpu" != self._device.type if isinstance(value, Tensor) else True
        if on_the_host or key[-1] not in TENSOR_OPTIONS:
            return float(value), 0
        value = value.detach()
        if value.device != self._device or value.dtype not in (torch.float32, torch.float64):
            value = self._convert(value, key)
        # Kept, so that what is read at the address is this tensor.
        self._tensor_options[key] = value
        return 0.0, value.data_ptr() | (value.dtype == torch.float64)

    def _convert(self, value: Tensor, key: tuple[str, int, str]) -> Tensor:
        if key not in self._converted:
            self._converted[key] = torch.empty((), dtype=torch.float64, device=self._device)
        return self._converted[key].copy_(value.reshape(()), non_blocking=True)

    # ---- CUDA graphs ----

    def _make_room_for_graphs(self, table: TensorTable) -> None:
        if len(self._spare) < CAPTURED_UPLOADS:
            size = table.addresses.numel() + 2 * _MAX_FIELDS * (max(table.groups) + 1)
            self._spare += self._staging((CAPTURED_UPLOADS, size)).unbind()

    def _is_captured(self, copy: Tensor) -> bool:
        return any(copy is kept for entry in self._captured for kept in entry)

    def _read_in_graph(self, table: TensorTable, name: str, words: bytes) -> tuple[Tensor, Tensor]:
        sent, copy = self._options.get(name, (b"", self._rows))
        if self._changed_rows(table) or sent != words:
            return self._send_in_graph(table, words)
        # What is there is what the graph is to read, from now on for good.
        self._keep_for_graphs(table, self._rows, copy)
        return self._rows, copy

    def _keep_for_graphs(self, table: TensorTable, *read: Tensor) -> None:
        """With what a graph reads besides, and the table may let go of."""
        self._captured.append((*read, table.state, table.masters, tuple(self._tensor_options.values())))

    def _send_in_graph(self, table: TensorTable, words: bytes) -> tuple[Tensor, Tensor]:
        if any(row not in (GRAD, TAKEN) for row in self._changed_rows(table)):
            refuse_capture("parameters, backups or state are not where they were")
        if not self._spare:
            refuse_capture("too many steps were captured since")
        addresses = table.addresses.flatten()
        numbers = torch.frombuffer(bytearray(words), dtype=torch.int64) if words else addresses[:0]
        count = addresses.numel()
        staging = self._spare.pop()[: count + numbers.numel()]
        staging[:count], staging[count:] = addresses, numbers
        copy = torch.empty(staging.shape, dtype=torch.int64, device=self._device)
        copy.copy_(staging, non_blocking=True)
        self._keep_for_graphs(table, staging, copy)
        self.uploads += 1
        return copy[:count].view(ROWS, -1), copy[count:]


def is_capturing(device: torch.device) -> bool:
    """Whether work for ``device`` goes into a CUDA graph now."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_capture(reason: str) -> NoReturn:
    """Raises, and says what to do."""
    raise RuntimeError(
        f"this step cannot be captured into a CUDA graph: {reason}; run a step outside the capture first, and "
        "capture the one after it"
    )


def fit_chunk_size(elements: int, smallest: int, largest: int) -> int:
    """For a table of so many elements: a few thousand chunks, enough to keep every multiprocessor busy to the end."""
    size = min(smallest, largest)
    while size < largest and size * 4096 < elements:
        size *= 2
    return size
