"""Random directions of ascent, drawn for many tensors together: their number is not that of the launches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastsam.backends.rounding import make_keys, mix, piece_size, pieces, random_words
from fastsam.runtime.step_number import StepNumber
from fastsam.runtime.streams import send
from fastsam.spec import RANDOM_WORDS
from fastsam.tables import TensorTable
from fastsam.tables.memory import allocate_like

# The last two words of an element, which rounding does not use.
NOISE_WORDS = (RANDOM_WORDS - 2, RANDOM_WORDS - 1)


def draw_noise(tables: Sequence[TensorTable], seed: int, step: int) -> None:
    """Gives every parameter of every table a direction drawn from N(0, I).

    The numbers are hashes, as those of stochastic rounding are: the same for every device, backend and sharding. Each
    replay of a CUDA graph draws others.
    """
    for table in tables:
        number = table.attached(StepNumber).of(step)
        directions = allocate_like(table.values, zero=False)
        memory = [direction.as_strided((direction.numel(),), (1,)) for direction in directions]
        for batch in table.attached(_Batches):
            torch._foreach_copy_([memory[i] for i in batch.indices], batch.draw(seed, number))
        for i in table.attached(_Batches).others:
            keys = [make_keys(seed, number, table.positions[i], word) for word in NOISE_WORDS]
            for start, count in pieces(len(memory[i]), table.device):
                words = [random_words(key, table.places[i], start, count) for key in keys]
                memory[i][start : start + count] = _normal(words)
        table.set_directions([*directions])


class _Batches:
    """The tensors of a table, in runs that are drawn together; and ``others``, which are drawn one by one.

    Those are shards whose elements are not consecutive in the whole parameter, or lie beyond the first 2**32, and
    tensors that are larger than a run may be.
    """

    def __init__(self, table: TensorTable) -> None:
        most, run, size = piece_size(table.device), list[int](), 0
        self.others: list[int] = []
        self._batches: list[_Batch] = []
        for i, (value, place) in enumerate(zip(table.values, table.places, strict=True)):
            count = value.numel()
            if count > most or place.axes or place.offset + count > 2**32:
                self.others.append(i)
                continue
            if size + count > most:
                self._batches.append(_Batch(table, run))
                run, size = [], 0
            run.append(i)
            size += count
        if run:
            self._batches.append(_Batch(table, run))

    def __iter__(self) -> Iterator[_Batch]:
        return iter(self._batches)


class _Batch:
    """Some tensors of a table, all of whose elements are drawn together.

    Attributes:
        indices: of the tensors.
    """

    def __init__(self, table: TensorTable, indices: list[int]) -> None:
        self.indices = indices
        self._sizes = [table.values[i].numel() for i in indices]
        offsets = [table.places[i].offset for i in indices]
        # An element's number in its parameter is its number in the batch and that of its tensor's first element.
        firsts, start = [], 0
        for size, offset in zip(self._sizes, offsets, strict=True):
            firsts.append(offset - start)
            start += size
        rows = [self._sizes, firsts, [table.positions[i] for i in indices]]
        sent = send(torch.tensor(rows, dtype=torch.int64, device="cpu"), table.device)
        self._counts, self._firsts, self._positions = sent.unbind()
        self._total = start

    def draw(self, seed: int, step: Tensor) -> list[Tensor]:
        """Numbers from N(0, 1) for each tensor, float32, in memory order."""
        device = self._counts.device
        # With the size of its result given, this does not wait for the device.
        owner = torch.repeat_interleave(self._counts, output_size=self._total)
        elements = torch.arange(self._total, dtype=torch.int64, device=device) + self._firsts[owner]
        words = []
        for word in NOISE_WORDS:
            low, high = make_keys(seed, step, self._positions, word)
            words.append(mix(mix(elements ^ low[owner]) ^ high[owner]))
        return list(_normal(words).split(self._sizes))


def _normal(words: Sequence[Tensor]) -> Tensor:
    """Numbers from N(0, 1) by Box and Muller's method; in float64, so that rounding them hides how log and cos differ.

    Where a device has no float64 (MPS), they are those of float32.
    """
    dtype = torch.float32 if words[0].device.type == "mps" else torch.float64
    uniform = [(word.to(dtype) + 0.5) * 2.0**-32 for word in words]
    radius, angle = (-2 * uniform[0].log()).sqrt(), 2 * math.pi * uniform[1]
    return (radius * angle.cos()).to(torch.float32)
