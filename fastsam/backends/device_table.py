"""What kernels read from device memory: a table's addresses, its chunks, the options; sent up only when they change."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastsam.runtime import streams
from fastsam.spec import ROWS, TENSOR_OPTIONS, Row
from fastsam.tables import TensorTable

# Rows that may change from one captured step to the next: what they hold lives for one step.
STEP_ROWS = (Row.GRAD, Row.FIRST_GRAD, Row.DIRECTION)

# Bytes of each tensor in a chunk: 8,192 elements of float32, the best of 4,096 to 65,536 on an H200. Larger ones leave
# multiprocessors idle at the end, smaller ones cost look-ups. Beyond so many, chunks grow: their table is read, too.
GPU_CHUNK_BYTES, MOST_GPU_CHUNKS = 2**15, 2**18

# Copies of options on the device, at most: those sent last.
MOST_OPTIONS = 16

_NUMBERS = frozenset({int, float, bool})

Options = Sequence[Any]
"""One NamedTuple per parameter group."""


class DeviceTable:
    """The device's copies of one table, and the memory that operations on it need. Nothing here waits for the device.

    Args:
        table: the table.
        chunk_size: elements of a chunk, at most.
        rows: which of the table's addresses the kernels read here.

    Attributes:
        chunks: int64 ``(count, 4)``: tensor, first element, length, parameter group. There is a row, of length 0, even
            if no tensor has an element.
        bounds: int64 ``(n + 1,)``: the first chunk of each tensor.
        positions: int64 ``(2 * n,)``, the table's ``random_places()``; None where nothing is rounded stochastically.
        tensor_counters: int32 ``(n,)``, 0, for programs to count themselves by, to be used within :meth:`counting`.
    """

    def __init__(self, table: TensorTable, chunk_size: int, rows: Iterable[int] = range(ROWS)) -> None:
        # The table itself is not kept: it keeps this, and a ring of the two would hold the backups' memory.
        self._device = table.device
        if streams.is_capturing(self._device):
            streams.refuse_capture("fastsam has not seen these parameters before")
        self._read_rows = tuple(rows)
        self._uploads = Uploads(self._device)
        count = len(table.params)
        chunks, bounds = _cut(table, chunk_size)
        places = table.random_places() if table.stochastic else torch.empty(0, dtype=torch.int64, device="cpu")
        sent = self._uploads.send(torch.cat([chunks.flatten(), bounds, places.flatten()]))
        self.chunks = sent[: chunks.numel()].view_as(chunks)
        self.bounds = sent[chunks.numel() : chunks.numel() + count + 1]
        self.positions = sent[-2 * count :] if table.stochastic else None
        self._counters = torch.zeros(1 + count, dtype=torch.int32, device=self._device)
        self._finished, self.tensor_counters = self._counters[0], self._counters[1:]
        self._was_cut_off = False
        self._rows = torch.zeros(table.addresses.shape, dtype=torch.int64, device=self._device)
        self._versions = [-1] * ROWS
        # What each address was when it was last not 0: a graph may read these.
        self._known = torch.zeros_like(table.addresses)
        self._plain: dict[str, tuple[Options | None, list[Any], bytes]] = {}
        # Several contents of each kind: the ascents of one step differ in their seeds.
        self._options: dict[str, dict[bytes, Tensor]] = {}
        self._tensor_options: dict[tuple[str, int, str], Tensor] = {}
        self._converted: dict[tuple[str, int, str], Tensor] = {}

    @property
    def uploads(self) -> int:
        """How many copies were sent up, for tests."""
        return self._uploads.count

    @contextmanager
    def counting(self) -> Iterator[Tensor]:
        """For the launches of one operation: an int32, 0, by which their programs count themselves, back to 0.

        An exception between or during them (a Ctrl-C, say) leaves the count anywhere; the next operation resets it.
        """
        was_cut_off, self._was_cut_off = self._was_cut_off, True
        if was_cut_off:
            self._counters.zero_()
        yield self._finished
        # What is captured has not happened yet.
        self._was_cut_off = was_cut_off and streams.is_capturing(self._device)

    def read(self, table: TensorTable, options: Options = ()) -> tuple[Tensor, Tensor]:
        """The addresses, int64 ``(ROWS, n)``, and the options, two words for each of ``(groups, fields)``.

        Raises:
            RuntimeError: under capture, if parameters or state are at addresses that no step outside has seen.
        """
        words = self._pack(options)
        name = type(options[0]).__name__ if options else ""
        if streams.is_capturing(self._device):
            return self._read_in_graph(table, name, words)
        self._uploads.make_room_for_graphs(table.addresses.numel())
        self._send_rows(table)
        return self._rows, self._send_options(name, words) if options else self._rows

    # ---- addresses ----

    def _changed_rows(self, table: TensorTable) -> list[int]:
        return [row for row in self._read_rows if table.versions[row] != self._versions[row]]

    def _send_rows(self, table: TensorTable) -> None:
        changed = self._changed_rows(table)
        if not changed:
            return
        if self._uploads.is_kept(self._rows):
            self._rows = self._rows.clone()
        sent = slice(changed[0], changed[-1] + 1)
        self._uploads.write(table.addresses[sent], self._rows[sent])
        if any(row not in STEP_ROWS for row in changed):
            torch.where(table.addresses != 0, table.addresses, self._known, out=self._known)
        self._versions = list(table.versions)

    # ---- options ----

    def _pack(self, options: Options) -> bytes:
        """A number and an address for each option. Tensors on the table's device are read there, when a kernel runs."""
        if not options:
            return b""
        name = type(options[0]).__name__
        same, known, words = self._plain.get(name, (None, [], b""))
        if options is same:
            return words
        values = [value for group in options for value in group]
        # Numbers do not change: the same objects are the same numbers.
        if len(known) == len(values) and all(map(is_, known, values)):
            return words
        if all(type(value) in _NUMBERS for value in values):
            fields = [0.0] * (2 * len(values))  # an address of 0 has the bits of 0.0
            fields[::2] = values
            self._plain[name] = options, values, array("d", fields).tobytes()
            return self._plain[name][2]
        self._plain.pop(name, None)
        entries = [
            self._entry(value, (name, group, key))
            for group, mine in enumerate(options)
            for key, value in zip(mine._fields, mine, strict=True)
        ]
        return b"".join(struct.pack("=dq", *entry) for entry in entries)

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

    def _send_options(self, name: str, words: bytes) -> Tensor:
        known = self._options.setdefault(name, {})
        if words in known:
            return known[words]
        numbers = _as_tensor(words)
        # Taken out first: until the new copy is sent, it may hold anything.
        oldest = known.pop(next(iter(known))) if len(known) == MOST_OPTIONS else None
        if oldest is None or oldest.shape != numbers.shape or self._uploads.is_kept(oldest):
            known[words] = self._uploads.send(numbers)
        else:
            known[words] = self._uploads.write(numbers, oldest)
        return known[words]

    # ---- CUDA graphs ----

    def _read_in_graph(self, table: TensorTable, name: str, words: bytes) -> tuple[Tensor, Tensor]:
        rows, options = self._rows, self._options.get(name, {}).get(words)
        if changed := self._changed_rows(table):
            self._check_for_graph(table, changed)
            rows = self._uploads.send_in_graph(table.addresses)
        if words and options is None:
            options = self._uploads.send_in_graph(_as_tensor(words))
        # What is read now is what the graph is to read, for good; with what the table may let go of.
        state = [table.rows[row] for row in range(ROWS) if row not in STEP_ROWS]
        self._uploads.keep(rows, options, state, tuple(self._tensor_options.values()))
        return rows, rows if options is None else options

    def _check_for_graph(self, table: TensorTable, changed: list[int]) -> None:
        rows = [row for row in changed if row not in STEP_ROWS]
        now = table.addresses[rows]
        if not torch.equal(now, torch.where(now == 0, now, self._known[rows])):
            streams.refuse_capture("parameters, backups or state are not where they were")


class Uploads:
    """Copies of host memory on one device, which may be captured into CUDA graphs.

    Every upload goes through pinned memory of its own, which PyTorch's host allocator hands out again only when the
    copy is done. A copy that is captured into a CUDA graph happens at each replay: it has a source and a target of its
    own. What a graph reads is not written again and lives as long as this object.
    """

    def __init__(self, device: torch.device) -> None:
        self.count = 0
        self._device = device
        # Memory for captured copies, made beforehand: a capture cannot pin any.
        self._spare = torch.empty(0, dtype=torch.int64, device="cpu")
        self._in_graphs: dict[bytes, Tensor] = {}
        self._kept: list[Any] = []
        self._kept_tensors: set[int] = set()

    def send(self, source: Tensor) -> Tensor:
        """A new copy of ``source`` (int64)."""
        return self.write(source, torch.empty(source.shape, dtype=torch.int64, device=self._device))

    def write(self, source: Tensor, target: Tensor) -> Tensor:
        """Makes ``target`` a copy of ``source``."""
        if self._device.type != "cpu":
            source = self._staging(source.numel()).view_as(source).copy_(source)
        self.count += 1
        return target.copy_(source, non_blocking=True)

    def _staging(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=self._device.type != "cpu")

    def make_room_for_graphs(self, words: int) -> None:
        """For uploads of a step that may be captured next; to be called outside of a capture."""
        if len(self._spare) < 2 * words:
            self._spare = self._staging(8 * words)

    def send_in_graph(self, source: Tensor) -> Tensor:
        """A copy of ``source`` for the graph that is being captured; one for each content."""
        key = source.numpy().tobytes()
        if key not in self._in_graphs:
            target = torch.zeros(source.shape, dtype=torch.int64, device=self._device)
            count = source.numel()
            if count <= len(self._spare):
                staging, self._spare = self._spare[:count].view_as(source), self._spare[count:]
                target.copy_(staging.copy_(source), non_blocking=True)
                self.keep(staging)
            else:
                # As arguments of kernels: more of them than a copy, but nothing on the host has to be kept.
                torch._foreach_add_(list(target.view(-1).unbind()), source.flatten().tolist())
            self._in_graphs[key] = target
            self.count += 1
        return self._in_graphs[key]

    def keep(self, *objects: Any) -> None:
        """Keeps what graphs read from being written or let go of."""
        self._kept.append(objects)
        self._kept_tensors.update(map(id, objects))

    def is_kept(self, tensor: Tensor) -> bool:
        """Whether a graph reads ``tensor``."""
        return id(tensor) in self._kept_tensors


def _cut(table: TensorTable, chunk_size: int) -> tuple[Tensor, Tensor]:
    """The chunks, and the first chunk of each tensor."""
    sizes, groups = table.tensors
    counts = (sizes + (chunk_size - 1)) // chunk_size
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64, device="cpu"), counts.cumsum(0)])
    tensor = torch.repeat_interleave(counts)
    if len(tensor) == 0:
        return torch.tensor([[0, 0, 0, table.groups[0]]], dtype=torch.int64, device="cpu"), bounds
    start = (torch.arange(len(tensor), device="cpu") - bounds[tensor]) * chunk_size
    length = (sizes[tensor] - start).clamp(max=chunk_size)
    return torch.stack([tensor, start, length, groups[tensor]], dim=1), bounds


def _as_tensor(words: bytes) -> Tensor:
    return torch.frombuffer(bytearray(words), dtype=torch.int64)


def gpu_chunk_size(table: TensorTable, smallest: int) -> int:
    """Returns the chunk size in elements: ``smallest`` times a power of two.

    Beyond 4,096 chunks, enough to keep every multiprocessor busy, chunks grow with the table up to GPU_CHUNK_BYTES.
    """
    elements = sum(value.numel() for value in table.values)
    largest, size = GPU_CHUNK_BYTES // table.dtype.itemsize, smallest
    while (size < largest and size * 4096 < elements) or size * MOST_GPU_CHUNKS < elements:
        size *= 2
    return size
