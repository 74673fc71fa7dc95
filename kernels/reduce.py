"""Reductions over tables of tensors: ``||g||_2`` and dot products, in float64, added in a fixed order.

Programs write partial sums; the last program to finish adds them up, so that each reduction is one launch.
"""

import triton
import triton.language as tl

from .maths import ADAPTIVE, mapped
from .perturb import COLUMNS, NONE, PERTURBATION, SCALE, TERM
from .rounding import widened
from .walk import (
    BACKUP,
    GRAD,
    PARAM,
    element_address,
    is_last_to_finish,
    read_chunk,
    read_number,
    walk,
)

# Partials that are added up at a time.
PARTIALS_BLOCK: tl.constexpr = tl.constexpr(1024)

# The bits of a float32, moved to where a float64 has them, are its value times _NARROW_SCALE, and of an infinite or
# undefined one at least _NARROW_INFINITY. Sums below _NARROW_LEAST (squares of 2**-80) may have lost bits in float32.
_NARROW_SCALE: tl.constexpr = tl.constexpr(2.0**-896)
_NARROW_INFINITY: tl.constexpr = tl.constexpr(2.0**-768)
_NARROW_LEAST: tl.constexpr = tl.constexpr(2.0**-976)


@triton.jit
def _sum_of_partials(partials_ptr, count, STRIDE: tl.constexpr):
    sums = tl.zeros([PARTIALS_BLOCK], tl.float64)
    for start in range(0, count, PARTIALS_BLOCK):
        at = start + tl.arange(0, PARTIALS_BLOCK)
        # .cg: from where all programs see the same memory, not from this one's cache.
        sums += tl.load(partials_ptr + STRIDE * at, mask=at < count, other=0.0, cache_modifier=".cg")
    return tl.sum(sums)


@triton.jit
def _loaded(pointer, at, mask):
    # The tail's masked elements add nothing.
    return tl.load(pointer + at, mask=mask, other=None if mask is None else 0.0)


# ---- the norm ----


@triton.jit
def _square_element(pointers, at, mask, arguments, sums, CONSTANTS: tl.constexpr):
    param_ptr, grad_ptr = pointers
    ADAPTIVE: tl.constexpr = CONSTANTS[0]
    # In float64, so that 1e25 has a square.
    term = widened(_loaded(grad_ptr, at, mask), tl.float64)
    if ADAPTIVE:
        term *= widened(_loaded(param_ptr, at, mask), tl.float64)
    return (sums[0] + term * term,)


@triton.jit
def _narrow_square_element(pointers, at, mask, arguments, sums, CONSTANTS: tl.constexpr):
    """Adds squares of 16-bit numbers, times ``_NARROW_SCALE``: exact in float32, whose bits, moved, are a float64's.

    That is cheaper than a conversion, of which a multiprocessor makes 16 in a clock, or 2.
    """
    term = widened(_loaded(pointers[0], at, mask), tl.float32)
    bits = (term * term).to(tl.uint32, bitcast=True).to(tl.uint64) << 29
    return (sums[0] + bits.to(tl.float64, bitcast=True),)


@triton.jit
def _plain_squares(grad, length, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """A chunk's sum of squares, not adaptive."""
    if DTYPE.primitive_bitwidth == 16:
        squares = walk(_narrow_square_element, (grad,), (DTYPE,), (), (), length, 1, BLOCK, 4)[0]
        if (squares >= _NARROW_LEAST) & (squares < _NARROW_INFINITY):
            squares *= 1 / _NARROW_SCALE
        else:
            squares = walk(_square_element, (grad, grad), (DTYPE, DTYPE), (), (False,), length, 1, BLOCK)[0]
        return squares
    else:
        return walk(_square_element, (grad, grad), (DTYPE, DTYPE), (), (False,), length, 1, BLOCK)[0]


@triton.jit
def _chunk_squares(
    addresses_ptr,
    chunks_ptr,
    options_ptr,
    chunk,
    tensor_count,
    DTYPE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A chunk's sum of squares."""
    tensor, start, length, group = read_chunk(chunks_ptr, chunk)
    param = element_address(addresses_ptr, PARAM, tensor, tensor_count, start, DTYPE)
    grad = element_address(addresses_ptr, GRAD, tensor, tensor_count, start, DTYPE)
    backup = tl.load(addresses_ptr + BACKUP * tensor_count + tensor)
    length = tl.where((grad != 0) & (backup != 0), length, 0)
    if read_number(options_ptr, group * FIELDS + 1) != 0:
        squares = walk(_square_element, (param, grad), (DTYPE, DTYPE), (), (True,), length, 1, BLOCK)[0]
    else:
        squares = _plain_squares(grad, length, DTYPE, BLOCK)
    return squares


@triton.jit(
    do_not_specialize=["tensor_count", "chunk_count", "first_partial", "partial_count"],
    do_not_specialize_on_alignment=[
        "addresses_ptr",
        "chunks_ptr",
        "options_ptr",
        "partials_ptr",
        "norm_ptr",
        "finished_ptr",
    ],
)
def grad_norm_kernel(
    addresses_ptr,
    chunks_ptr,
    options_ptr,
    partials_ptr,
    norm_ptr,
    finished_ptr,
    tensor_count,
    chunk_count,
    first_partial,
    partial_count,
    DTYPE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The chunks of one table, dealt out in turn; the last of all tables' programs writes the norm.

    Args:
        addresses_ptr: int64 ``(ROWS, tensor_count)``.
        chunks_ptr: int64 ``(chunk_count, CHUNK_FIELDS)``.
        options_ptr: ``(groups, FIELDS)`` entries: rho, adaptive, maximize, rounding_seed.
        partials_ptr: float64 ``(partial_count,)``, this table's from ``first_partial`` on: one of each program.
        norm_ptr: float64.
        finished_ptr: int32, 0: counts the programs of all tables.
        tensor_count: of this table.
        chunk_count: of this table.
        first_partial: the partial of this table's first program.
        partial_count: programs of all tables.
        DTYPE: of the table.
        FIELDS: options per group.
        BLOCK: elements that are walked at a time.
    """
    program = tl.program_id(0)
    partial = tl.full((), 0.0, tl.float64)
    for chunk in range(program, chunk_count, tl.num_programs(0)):
        partial += _chunk_squares(addresses_ptr, chunks_ptr, options_ptr, chunk, tensor_count, DTYPE, FIELDS, BLOCK)
    tl.store(partials_ptr + first_partial + program, partial)
    if is_last_to_finish(finished_ptr, partial_count):
        tl.store(norm_ptr, tl.sqrt(_sum_of_partials(partials_ptr, partial_count, 1)))


# ---- dot products ----


@triton.jit
def _product_element(pointers, at, mask, arguments, sums, CONSTANTS: tl.constexpr):
    x_ptr, y_ptr, param_ptr, backup_ptr = pointers
    scale, term = arguments
    OPMATH: tl.constexpr = CONSTANTS[0]
    Y: tl.constexpr = CONSTANTS[1]
    MAP: tl.constexpr = CONSTANTS[2]
    x = widened(_loaded(x_ptr, at, mask), tl.float64)
    param = _loaded(param_ptr, at, mask) if MAP == ADAPTIVE or Y == PERTURBATION else x
    squares = sums[0] + mapped(x, widened(param, tl.float64), scale, term, MAP) * x
    if Y == NONE:
        return squares, sums[1], sums[2]
    else:
        if Y == PERTURBATION:
            # In the arithmetic of the ascent, which reads the same difference.
            y = (widened(param, OPMATH) - widened(_loaded(backup_ptr, at, mask), OPMATH)).to(tl.float64)
        else:
            y = widened(_loaded(y_ptr, at, mask), tl.float64)
        return squares, sums[1] + x * y, sums[2] + y * y


@triton.jit(
    do_not_specialize=["tensor_count"],
    do_not_specialize_on_alignment=[
        "addresses_ptr",
        "chunks_ptr",
        "coefficients_ptr",
        "bounds_ptr",
        "partials_ptr",
        "result_ptr",
        "finished_ptr",
    ],
)
def dots_kernel(
    addresses_ptr,
    chunks_ptr,
    coefficients_ptr,
    bounds_ptr,
    partials_ptr,
    result_ptr,
    finished_ptr,
    tensor_count,
    DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    X: tl.constexpr,
    X_DTYPE: tl.constexpr,
    Y: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    MAP: tl.constexpr,
    ASCENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``<map(x), x>, <x, y>, <y, y>``, one program per chunk; the last of a tensor's programs adds up its chunks'.

    Args:
        addresses_ptr: int64 ``(ROWS, tensor_count)``.
        chunks_ptr: int64 ``(chunks, CHUNK_FIELDS)``.
        coefficients_ptr: float64 ``(tensor_count, COLUMNS)``, for the map; None: the map is the identity.
        bounds_ptr: int64 ``(tensor_count + 1,)``, the first chunk of each tensor.
        partials_ptr: float64 ``(chunks, 3)``.
        result_ptr: float64 ``(tensor_count, 3)``.
        finished_ptr: int32 ``(tensor_count,)``, 0: counts the programs of each tensor.
        tensor_count: of the table.
        DTYPE: of the table.
        STATE_DTYPE: float32 where there are masters, else ``DTYPE``: what backups are in.
        OPMATH: of the arithmetic.
        X: the row of x.
        X_DTYPE: of x: ``DTYPE`` or ``STATE_DTYPE``.
        Y: the row of y, NONE or PERTURBATION.
        Y_DTYPE: of y, in the same way.
        MAP: of x.
        ASCENT: of what is perturbed and has x, with y or not; else of what has x and y.
        BLOCK: elements that are walked at a time.
    """
    chunk = tl.program_id(0)
    tensor, start, length, _ = read_chunk(chunks_ptr, chunk)
    param = element_address(addresses_ptr, PARAM, tensor, tensor_count, start, DTYPE)
    backup = element_address(addresses_ptr, BACKUP, tensor, tensor_count, start, STATE_DTYPE)
    x = element_address(addresses_ptr, X, tensor, tensor_count, start, X_DTYPE)
    y = x
    if Y >= 0:
        y = element_address(addresses_ptr, Y, tensor, tensor_count, start, Y_DTYPE)
    takes_part = (x != 0) & (backup != 0) if ASCENT else (x != 0) & (y != 0)
    has_y = (y != 0) & takes_part
    scale = tl.full((), 0.0, tl.float64)
    term = scale
    if coefficients_ptr is not None:
        scale = tl.load(coefficients_ptr + tensor * COLUMNS + SCALE)
        term = tl.load(coefficients_ptr + tensor * COLUMNS + TERM)
    # Only the tensors that the form reads must be aligned.
    addresses = (
        x,
        tl.where(has_y, y, param if Y_DTYPE == DTYPE else backup) if Y >= 0 else tl.zeros_like(x),
        param if MAP == ADAPTIVE or Y == PERTURBATION else tl.zeros_like(x),
        backup if Y == PERTURBATION else tl.zeros_like(x),
    )
    square, product, other = walk(
        _product_element,
        addresses,
        (X_DTYPE, Y_DTYPE, DTYPE, STATE_DTYPE),
        (scale, term),
        (OPMATH, Y, MAP),
        tl.where(takes_part, length, 0),
        3,
        BLOCK,
    )
    row_ptr = partials_ptr + 3 * chunk
    tl.store(row_ptr, square)
    tl.store(row_ptr + 1, tl.where(has_y, product, 0.0))
    tl.store(row_ptr + 2, tl.where(has_y, other, 0.0))
    first = tl.load(bounds_ptr + tensor)
    count = (tl.load(bounds_ptr + tensor + 1) - first).to(tl.int32)
    # A table without elements has one chunk, which is no tensor's.
    if is_last_to_finish(finished_ptr + tensor, tl.maximum(count, 1)):
        for i in tl.static_range(3):
            total = _sum_of_partials(partials_ptr + 3 * first + i, count, 3)
            tl.store(result_ptr + 3 * tensor + i, total)
