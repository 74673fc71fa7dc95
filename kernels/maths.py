"""Arithmetic of one element: selecting products, and what tl leaves imprecise (square root, division, powers)."""

import triton
import triton.language as tl

from fastsam.spec import Map

POWER: tl.constexpr = tl.constexpr(int(Map.POWER))
ADAPTIVE: tl.constexpr = tl.constexpr(int(Map.ADAPTIVE))

# How many numbers a word of binary places can tell apart.
_WORD: tl.constexpr = tl.constexpr(2.0**64)


@triton.jit
def times(factor, value):
    """``factor * value``, and 0 where the factor is 0, whatever the value is."""
    # Selected: 0 * inf would be NaN.
    return tl.where(factor == 0, 0.0, factor * value).to(value.dtype)


@triton.jit
def mapped(x, param, scale, term, MAP: tl.constexpr):
    """The spec's ``Map`` of x."""
    if MAP == POWER:
        # In float64, where exp2 and log2 have digits to spare.
        size = tl.abs(scale.to(tl.float64) * x.to(tl.float64))
        result = tl.exp2(term.to(tl.float64) * tl.log2(tl.where(size == 0, 1.0, size)))
        return tl.where(size == 0, 0.0, tl.where(x < 0, -result, result)).to(x.dtype)
    elif MAP == ADAPTIVE:
        normalizer = scale * tl.abs(param) + term
        return normalizer * normalizer * x
    else:
        return x


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
def power(base, exponent, DTYPE: tl.constexpr):
    """``base ** exponent`` in float64, for ``0 <= base < 1`` and whole exponents from 1 on.

    For arithmetic in float64 it is correctly rounded, as good as always: in ``1 - power`` an error of one unit grows
    with what cancels.
    """
    if tl.float64 == DTYPE:
        return _fraction_power(base, exponent.to(tl.int64))
    else:
        # log2(0) is -inf, and 2 ** -inf is 0.
        return tl.exp2(exponent * tl.log2(base))


@triton.jit
def _fraction_power(base, exponent):
    # Integers are the same everywhere. Floating-point numbers of twice the width would need products that no compiler
    # fuses with sums.
    square = (base * _WORD).to(tl.uint64)
    square_rest = square ^ square
    power, rest = square, square_rest
    exponent -= 1
    while exponent > 0:
        if (exponent & 1) != 0:
            power, rest = _fraction_product(power, rest, square, square_rest)
        square, square_rest = _fraction_product(square, square_rest, square, square_rest)
        exponent >>= 1
    # The lowest bit stands for all that follow, so that rounding knows on which side of the middle they are.
    return (power | (rest != 0).to(tl.uint64)).to(tl.float64) * (1 / _WORD)


@triton.jit
def _fraction_product(a, a_rest, b, b_rest):
    """The product of two numbers from 0 to 1, each in two words of binary places, but for the last few places."""
    first, second = tl.umulhi(a, b_rest), tl.umulhi(a_rest, b)
    part = a * b + first
    rest = part + second
    carry = (part < first).to(tl.uint64) + (rest < second).to(tl.uint64)
    return tl.umulhi(a, b) + carry, rest
