"""From float32 to 16 bits in plain PyTorch: stochastic rounding, and masters that follow their parameters.

A random word is a hash of (seed, step, parameter, word, element) in integer arithmetic: the same on every device and
backend, nothing is stored, and no order matters. Two draws (``spec.Draw``) share a word. Elements are counted over the
whole parameter, of which a rank may hold a shard: sharding does not change the numbers. The mixing function is
lowbias32 (Chris Wellons, https://nullprogram.com/blog/2018/07/31/).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastsam.distributed import Place
from fastsam.spec import RANDOM_WORDS
from fastsam.tables import TensorTable
from fastsam.tables.memory import same_order

# Elements whose random numbers are made at a time; on the CPU so few that they stay in its cache.
PIECE, PIECE_ON_CPU = 2**22, 2**17

_MASK = 0xFFFFFFFF

Word = TypeVar("Word", int, Tensor)
"""A number of 32 bits; in a tensor, of dtype int64."""


def mix(x: Word) -> Word:
    """32 bits, each of which depends on all those of ``x``."""
    x = x ^ (x >> 16)
    # The product may overflow 64 bits: the 32 lower ones are right.
    x = x * 0x7FEB352D & _MASK
    x = x ^ (x >> 15)
    x = x * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def make_keys(seed: int, step: Word, position: Word | int, word: int) -> tuple[Word, Word]:
    """What one random word has in common for all elements of a parameter.

    Args:
        seed: of the parameter group.
        step: the updates that the parameter has had.
        position: of the parameter over the flattened parameter groups.
        word: which of an element's, 0 ... ``RANDOM_WORDS`` - 1.
    """
    number: Any = position * RANDOM_WORDS + word & _MASK
    return mix(mix(step ^ mix(seed ^ 0x9E3779B9)) ^ number), mix(step ^ mix(mix(seed ^ 0xC2B2AE35) ^ number))


def random_words(keys: tuple[Tensor, Tensor], place: Place, start: int, count: int) -> Tensor:
    """For the elements ``start ... start + count - 1`` of a shard, in memory order, at ``place`` in its parameter."""
    low, high = place.offset + start & _MASK, place.offset + start >> 32
    if place.axes or low + count > 2**32:
        elements = place.elements(start, count, keys[0].device)
        return mix(mix(elements & _MASK ^ keys[0]) ^ (keys[1] + (elements >> 32) * 0x9E3779B1 & _MASK))
    elements = torch.arange(low, low + count, dtype=torch.int64, device=keys[0].device)
    return mix(mix(elements ^ keys[0]) ^ (keys[1] + high * 0x9E3779B1 & _MASK))


def words_of_draw(words: Tensor, draw: int) -> Tensor:
    """The random words as ``draw`` takes them: the second of two draws that share them turns their halves round."""
    return words if draw % 2 == 0 else words >> 16 | (words & 0xFFFF) << 16


def round_stochastically(x: Tensor, words: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 ``x`` in ``dtype``: one of its two neighbours there, with ``x`` as the expected value.

    A value that ``dtype`` has is not changed. What is not finite, or may round to what is not, is rounded to nearest.

    Args:
        x: the values.
        words: a random number of 32 bits for each.
        dtype: bfloat16 or float16.
    """
    bits = x.view(torch.int32).to(torch.int64) & _MASK
    magnitude = bits & 0x7FFFFFFF
    if dtype == torch.bfloat16:
        largest = 0x7F7F0000
        rounded = _from_bits(bits + (words >> 16) & 0xFFFF0000)
    else:
        largest = 0x477FE000
        normal = _from_bits(bits + (words >> 19) & 0xFFFFE000)
        # Below 2**-14 all float16 are multiples of 2**-24.
        multiple = x.abs() * 2.0**24
        whole = multiple.floor()
        whole += ((words >> 8).to(torch.float32) * 2.0**-24 < multiple - whole).to(torch.float32)
        rounded = torch.where(magnitude >= 0x38800000, normal, torch.copysign(whole * 2.0**-24, x))
    return torch.where(magnitude >= largest, x, rounded).to(dtype)


def _from_bits(bits: Tensor) -> Tensor:
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)


def followed_master(master: Tensor, param: Tensor) -> Tensor:
    """The master, or the parameter where that is not the master's rounding: something else has written to it."""
    differs = master.to(param.dtype).view(torch.int16) != param.view(torch.int16)
    return torch.where(differs, param.to(torch.float32), master)


def piece_size(device: torch.device) -> int:
    """How many elements are handled at a time."""
    return PIECE_ON_CPU if device.type == "cpu" else PIECE


def pieces(count: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """First elements and lengths of the pieces into which ``count`` elements are cut."""
    size = piece_size(device)
    for start in range(0, count, size):
        yield start, min(size, count - start)


def round_for(table: TensorTable, i: int, x: Tensor, draw: int, seed: int) -> Tensor:
    """float32 ``x``, to be stored for parameter ``i`` of a stochastic table, in the table's dtype."""
    like = table.values[i]
    result = torch.empty_like(like)
    if not same_order(x, like):
        x = torch.empty_like(like, dtype=x.dtype).copy_(x)
    keys = make_keys(seed, _updates(table, i), table.positions[i], draw // 2)
    for start, count in pieces(x.numel(), x.device):
        piece, target = (t.as_strided((count,), (1,), t.storage_offset() + start) for t in (x, result))
        words = words_of_draw(random_words(keys, table.places[i], start, count), draw)
        target.copy_(round_stochastically(piece, words, table.dtype))
    return result


def round_all(table: TensorTable, indices: Sequence[int], xs: Sequence[Tensor], draw: int, seed: int) -> list[Tensor]:
    """:func:`round_for`, for some parameters."""
    return [round_for(table, i, x, draw, seed) for i, x in zip(indices, xs, strict=True)]


def _updates(table: TensorTable, i: int) -> Tensor:
    """The number of updates that a parameter has had, as a word."""
    step = table.steps[i]
    return torch.ones((), dtype=torch.int64, device=table.device) if step is None else step.to(torch.int64)
