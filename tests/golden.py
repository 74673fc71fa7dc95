"""Stochastic rounding in plain Python: the random numbers that every backend draws, and what they make of a number."""

import math
import struct

import pytest
import torch

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])

EDGES = {
    torch.bfloat16: [0.0, 1.0, 1 + 2**-9, 0.3, 3.3e38, 3.38953139e38, 3.39e38, 1e-38, 1e-40, 1e-45, 9.2e-41, math.inf],
    torch.float16: [
        *(0.0, 1.0, 1 + 2**-12, 0.3, 65503.9, 65504.0, 65504.1, 65519.9, 65520.0, 1e6, math.inf),
        *(2**-14, 2**-14 * 1.0001, 2**-14 * 0.9999, 2**-24, 2**-25, 1.7 * 2**-24, 1e-20, 1e-45, 1023.7 * 2**-24),
    ],
}

# (seed, step, position, draw, element): the random number.
GOLDEN = {
    (0, 0, 0, 0, 0): 0x465C91D4,
    (0, 0, 0, 0, 1): 0xC5296C64,
    (0, 0, 0, 1, 0): 0x91D4465C,
    (0, 0, 1, 0, 0): 0x60D73C01,
    (0, 1, 0, 0, 0): 0x0B97EFFF,
    (1, 0, 0, 0, 0): 0xA49C0D40,
    (0xFFFFFFFF, 16777216, 1999, 4, 0xFFFFFFFF): 0x849645ED,
    (0xDEADBEEF, 123456, 77, 3, 0x1_0000_0000): 0x22663180,
    (42, 7, 3, 2, 0x3_0000_0005): 0xE97F2FF4,
}


def mix(x):
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def random_number(seed, step, position, draw, element):
    """The contract, in plain Python."""
    number = (8 * position + draw // 2) % 2**32
    k0 = mix(mix(mix(seed ^ 0x9E3779B9) ^ step) ^ number)
    k1 = mix(mix(mix(seed ^ 0xC2B2AE35) ^ number) ^ step)
    word = mix(mix(element % 2**32 ^ k0) ^ (k1 + (element >> 32) * 0x9E3779B1) % 2**32)
    return word if draw % 2 == 0 else word // 2**16 + word % 2**16 * 2**16


def rounded(x, r, dtype):
    """The neighbour of ``x`` in ``dtype`` that the random number ``r`` chooses."""
    word = struct.unpack("<I", struct.pack("<f", x))[0]
    if dtype == torch.bfloat16:
        if word % 2**31 >= 0x7F7F0000:
            return float(torch.tensor(x).to(dtype))
        return struct.unpack("<f", struct.pack("<I", (word + (r >> 16)) & 0xFFFF0000))[0]
    if not abs(x) < 65504:
        return float(torch.tensor(x).to(dtype))
    if abs(x) >= 2**-14:
        return struct.unpack("<f", struct.pack("<I", (word + (r >> 19)) & 0xFFFFE000))[0]
    whole = math.floor(abs(x) * 2**24)
    whole += (r >> 8) / 2**24 < abs(x) * 2**24 - whole
    return math.copysign(whole / 2**24, x)


def expect(xs, dtype, *key):
    """float32 ``xs``, in memory order, as they are stored by the draw of ``key`` (all but the element)."""
    numbers = [rounded(x, random_number(*key, i), dtype) for i, x in enumerate(xs.flatten().tolist())]
    return torch.tensor(numbers, dtype=torch.float64).to(dtype).view(xs.shape)
