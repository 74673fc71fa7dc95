"""To the arithmetic's dtype at a load, and back at a store: to nearest, or stochastically.

The random words are those of every backend: integer functions of the seed, the tensor's position and step, the word's
number and the element; two draws share a word. Where rounding is to nearest, ``rng`` is empty.
"""

import triton
import triton.language as tl
from triton.language import core  # has add and mul in Triton 3.4, too

from fastsam.spec import RANDOM_WORDS, Draw

from .walk import INTERPRETED

# What random numbers are drawn for. State slot k draws with DRAW_STATE + k.
DRAW_ASCENT: tl.constexpr = tl.constexpr(int(Draw.ASCENT))
DRAW_WEIGHT: tl.constexpr = tl.constexpr(int(Draw.WEIGHT))
DRAW_STATE: tl.constexpr = tl.constexpr(int(Draw.STATE))
DRAW_METHOD_STATE: tl.constexpr = tl.constexpr(int(Draw.METHOD_STATE))
_WORDS: tl.constexpr = tl.constexpr(RANDOM_WORDS)

# Bits of an fp32 without its sign; the largest finite bfloat16 and float16 and the smallest normal float16 as such.
_MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
_LARGEST_BFLOAT16: tl.constexpr = tl.constexpr(0x7F7F0000)
_LARGEST_FLOAT16: tl.constexpr = tl.constexpr(0x477FE000)
_SMALLEST_NORMAL_FLOAT16: tl.constexpr = tl.constexpr(0x38800000)


@triton.jit
def widened(value, DTYPE: tl.constexpr):
    """``value`` in ``DTYPE``, which has all numbers of its own dtype."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        # The interpreter's own cast makes other numbers of subnormal ones.
        bits = value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(DTYPE)
    else:
        return value.to(DTYPE)


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """``value`` in ``DTYPE``, to the nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE and value.dtype != DTYPE:
        # The interpreter's own cast cuts bits off.
        bits = value.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        not_a_number = ((bits >> 16) | 0x40).to(tl.uint16)
        return tl.where(value == value, nearest, not_a_number).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def stored(value, DTYPE: tl.constexpr, rng, DRAW: tl.constexpr, at):
    """``value`` as it is stored: rounded by the numbers of ``DRAW`` for the elements ``at`` of the chunk of ``rng``."""
    if len(rng) == 0:
        return rounded(value, DTYPE)
    else:
        return stochastically_rounded(value, random_bits(rng, DRAW, at), DTYPE)


@triton.jit
def random_numbers(seed, position, step, start):
    """What the random numbers of one chunk have in common, which begins at element ``start`` (64 bits)."""
    seed = seed.to(tl.uint32)
    step = step.to(tl.uint32)
    word = position.to(tl.uint32) * _WORDS
    low_key, high_key = _mixed(_mixed(seed ^ 0x9E3779B9) ^ step), _mixed(seed ^ 0xC2B2AE35)
    far = core.mul((start >> 32).to(tl.uint32), 0x9E3779B1, sanitize_overflow=False)
    return low_key, high_key, step, word, start.to(tl.uint32), far


@triton.jit
def random_bits(rng, DRAW: tl.constexpr, at):
    """32 random bits for each of the elements ``at`` of a chunk, which no multiple of 2**32 divides."""
    low_key, high_key, step, word, first, far = rng
    word += DRAW // 2
    low_key, high_key = _mixed(low_key ^ word), _mixed(_mixed(high_key ^ word) ^ step)
    bits = _mixed(_mixed((first + at.to(tl.uint32)) ^ low_key) ^ core.add(high_key, far, sanitize_overflow=False))
    if DRAW % 2 == 1:
        # The second draw of the word: the compiler computes what both have in common once.
        bits = (bits >> 16) | (bits << 16)
    return bits


@triton.jit
def _mixed(bits):
    """lowbias32: a bijection whose results look random (C. Wellons, https://nullprogram.com/blog/2018/07/31/)."""
    bits ^= bits >> 16
    bits = core.mul(bits, 0x7FEB352D, sanitize_overflow=False)
    bits ^= bits >> 15
    bits = core.mul(bits, 0x846CA68B, sanitize_overflow=False)
    return bits ^ (bits >> 16)


@triton.jit
def is_rounding(param, master):
    """Where a parameter is what its float32 master rounds to, bit for bit; elsewhere it was written since."""
    return rounded(master, param.dtype).to(tl.int16, bitcast=True) == param.to(tl.int16, bitcast=True)


@triton.jit
def stochastically_rounded(value, random, DTYPE: tl.constexpr):
    """float32 ``value`` as one of its two neighbours in ``DTYPE``, on average itself; to nearest where one is infinite.

    Args:
        value: float32.
        random: uint32, of which a float16 takes 13 bits (24 below its normal numbers) and a bfloat16 16.
        DTYPE: bfloat16 or float16.
    """
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & _MAGNITUDE
    if tl.bfloat16 == DTYPE:
        largest: tl.constexpr = _LARGEST_BFLOAT16
        drawn = (magnitude + (random >> 16)) & 0xFFFF0000
    else:
        largest: tl.constexpr = _LARGEST_FLOAT16
        normal = (magnitude + (random >> 19)) & 0xFFFFE000
        # A float16 below its normal numbers is a multiple of 2**-24.
        units = tl.abs(value) * 16777216.0
        whole = tl.floor(units)
        rises = (random >> 8).to(tl.float32) * (1 / 16777216) < units - whole
        tiny = tl.where(rises, whole + 1.0, whole) * (1 / 16777216)
        drawn = tl.where(magnitude < _SMALLEST_NORMAL_FLOAT16, tiny.to(tl.uint32, bitcast=True), normal)
    drawn = (drawn | (bits ^ magnitude)).to(tl.float32, bitcast=True)
    # What was drawn is in DTYPE already.
    return rounded(tl.where(magnitude > largest, value, drawn), DTYPE)
