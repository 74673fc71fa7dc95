"""Kernels around the random numbers and the rounding, whose bits are else seen only behind an update's arithmetic."""

import triton
import triton.language as tl

from fastsam.kernels.rounding import random_bits, random_numbers, stochastically_rounded


@triton.jit
def random_bits_kernel(bits_ptr, seed_ptr, position_ptr, step_ptr, start_ptr, DRAW: tl.constexpr, COUNT: tl.constexpr):
    """What is drawn for ``COUNT`` elements from ``start`` on, as int64."""
    rng = random_numbers(tl.load(seed_ptr), tl.load(position_ptr), tl.load(step_ptr), tl.load(start_ptr))
    at = tl.arange(0, COUNT)
    tl.store(bits_ptr + at, random_bits(rng, DRAW, at).to(tl.int64))


@triton.jit
def stochastic_rounding_kernel(rounded_ptr, value_ptr, bits_ptr, count, BLOCK: tl.constexpr):
    """``rounded[i]`` is ``value[i]`` (float32), rounded by ``bits[i]`` (int64, 32 of them)."""
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        bits = tl.load(bits_ptr + at, mask=at < count, other=0).to(tl.uint32)
        value = tl.load(value_ptr + at, mask=at < count, other=0.0)
        result = stochastically_rounded(value, bits, rounded_ptr.dtype.element_ty)
        tl.store(rounded_ptr + at, result, mask=at < count)
