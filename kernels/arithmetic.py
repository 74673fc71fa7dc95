"""Arithmetic that tl leaves imprecise or to the hardware: rounding to a dtype, square root, division."""

import triton
import triton.language as tl

from .address import INTERPRETED


@triton.jit
def rounded(value, DTYPE: tl.constexpr):
    """``value`` in ``DTYPE``, to the nearest, ties to even."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        # The interpreter's own cast cuts bits off.
        bits = value.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        not_a_number = ((bits >> 16) | 0x40).to(tl.uint16)
        return tl.where(value == value, nearest, not_a_number).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def square_root(value):
    """Correctly rounded; ``tl.sqrt`` of float32 is not."""
    if value.dtype == tl.float32:
        return tl.sqrt_rn(value)
    else:
        return tl.sqrt(value)


@triton.jit
def quotient(dividend, divisor):
    """Correctly rounded; ``/`` of float32 is not."""
    if dividend.dtype == tl.float32:
        return tl.div_rn(dividend, divisor)
    else:
        return dividend / divisor


@triton.jit
def power(base, exponent):
    """``base ** exponent`` in float64, for ``0 <= base < 1`` and ``exponent > 0``."""
    # log2(0) is -inf, and 2 ** -inf is 0.
    return tl.exp2(exponent * tl.log2(base))
