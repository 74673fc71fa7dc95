"""Ascent: ``backup <- w; w <- w + A * map(x) + B * y`` over a table of tensors; plain SAM's A is made here from a norm.

With float32 masters there is no backup: the ascent starts from the master, and its address is in the backup's row.
"""

import triton
import triton.language as tl

from fastsam import spec

from .maths import mapped, times
from .rounding import DRAW_ASCENT, is_rounding, random_numbers, stored, widened
from .walk import (
    BACKUP,
    PARAM,
    element_address,
    read_chunk,
    read_number,
    read_option,
    read_step,
    walk,
)

NONE: tl.constexpr = tl.constexpr(spec.NONE)
PERTURBATION: tl.constexpr = tl.constexpr(spec.PERTURBATION)
A: tl.constexpr = tl.constexpr(int(spec.AscentCoefficients.A))
B: tl.constexpr = tl.constexpr(int(spec.AscentCoefficients.B))
SCALE: tl.constexpr = tl.constexpr(int(spec.AscentCoefficients.SCALE))
TERM: tl.constexpr = tl.constexpr(int(spec.AscentCoefficients.TERM))
COLUMNS: tl.constexpr = tl.constexpr(len(spec.AscentCoefficients))

# Plain SAM's perturbations, beside the maps of the spec: A * g, and A * g * w * w (adaptive groups).
_PLAIN: tl.constexpr = tl.constexpr(-1)
_PLAIN_ADAPTIVE: tl.constexpr = tl.constexpr(-2)


@triton.jit
def _scale_by_norm(norm, rho, maximize):
    """``rho / (norm + 1e-12)``, signed; 0 where the norm is not finite, which says "leave w alone"."""
    scale = rho / (norm + 1e-12)
    return tl.where(norm < float("inf"), tl.where(maximize != 0, -scale, scale), 0.0)


@triton.jit
def _perturbation(x, y, param, coefficients, Y: tl.constexpr, MAP: tl.constexpr):
    a, b, scale, term = coefficients
    if MAP == _PLAIN:
        return a * x
    elif MAP == _PLAIN_ADAPTIVE:
        return a * x * param * param
    elif Y == NONE:
        return times(a, mapped(x, param, scale, term, MAP))
    else:
        return times(a, mapped(x, param, scale, term, MAP)) + times(b, y)


@triton.jit
def _perturb_element(pointers, at, mask, arguments, sums, CONSTANTS: tl.constexpr):
    param_ptr, backup_ptr, x_ptr, y_ptr = pointers
    coefficients, stays, rng = arguments
    Y: tl.constexpr = CONSTANTS[0]
    MAP: tl.constexpr = CONSTANTS[1]
    opmath: tl.constexpr = coefficients[0].dtype
    # All loads come before the first store: one latency, not two.
    param = tl.load(param_ptr + at, mask=mask)
    x = widened(tl.load(x_ptr + at, mask=mask), opmath)
    exact = widened(param, opmath)
    y = exact
    if Y >= 0:
        y = widened(tl.load(y_ptr + at, mask=mask), opmath)
    origin = exact
    if Y == PERTURBATION:
        origin = widened(tl.load(backup_ptr + at, mask=mask), opmath)
        y = exact - origin
    elif backup_ptr.dtype == param_ptr.dtype:
        tl.store(backup_ptr + at, param, mask=mask)
    else:
        master = tl.load(backup_ptr + at, mask=mask)
        is_edited = is_rounding(param, master) == 0
        origin = tl.where(is_edited, exact, master)
        tl.store(backup_ptr + at, origin, mask=is_edited if mask is None else is_edited & mask)
    perturbed = origin + _perturbation(x, y, exact, coefficients, Y, MAP)
    # Coefficients of 0 select: 0 * inf would be NaN.
    perturbed = tl.where(stays, param, stored(perturbed, param.dtype, rng, DRAW_ASCENT, at))
    tl.store(param_ptr + at, perturbed, mask=mask)
    return sums


@triton.jit
def _read_coefficients(coefficients_ptr, tensor, has_y, OPMATH: tl.constexpr, Y: tl.constexpr):
    """A, B, scale and term; and whether w stays as it is."""
    row_ptr = coefficients_ptr + tensor * COLUMNS
    a, b = tl.load(row_ptr + A), tl.where(has_y, tl.load(row_ptr + B), 0.0)
    stays = (a == 0) & (b == (1.0 if Y == PERTURBATION else 0.0))
    scale, term = tl.load(row_ptr + SCALE), tl.load(row_ptr + TERM)
    return (a.to(OPMATH), b.to(OPMATH), scale.to(OPMATH), term.to(OPMATH)), stays


@triton.jit(
    do_not_specialize=["tensor_count"],
    do_not_specialize_on_alignment=[
        "addresses_ptr",
        "chunks_ptr",
        "options_ptr",
        "norm_ptr",
        "coefficients_ptr",
        "positions_ptr",
    ],
)
def perturb_kernel(
    addresses_ptr,
    chunks_ptr,
    options_ptr,
    norm_ptr,
    coefficients_ptr,
    positions_ptr,
    tensor_count,
    DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    FIELDS: tl.constexpr,
    X: tl.constexpr,
    X_DTYPE: tl.constexpr,
    Y: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    MAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk.

    Args:
        addresses_ptr: int64 ``(ROWS, tensor_count)``.
        chunks_ptr: int64 ``(chunks, CHUNK_FIELDS)``.
        options_ptr: ``(groups, FIELDS)`` entries: rho, adaptive, maximize, rounding_seed.
        norm_ptr: float64, ``||g||``; None: by coefficients.
        coefficients_ptr: float64 ``(tensor_count, COLUMNS)``; None: by the norm.
        positions_ptr: int64 ``(2, tensor_count)``: in the flattened parameter groups, and of the first elements in
            the whole parameters; None: rounding is to nearest.
        tensor_count: of the table.
        DTYPE: of the table.
        STATE_DTYPE: float32 where there are masters, else ``DTYPE``: what backups and state are in.
        OPMATH: of the arithmetic.
        FIELDS: options per group.
        X: the row of x.
        X_DTYPE: of x: ``DTYPE`` or ``STATE_DTYPE``.
        Y: the row of y, NONE, or PERTURBATION: the backup is only read.
        Y_DTYPE: of y, in the same way.
        MAP: of x.
        BLOCK: elements that are walked at a time.
    """
    # Backward: what the norm or the dots read last is still in the cache.
    tensor, start, length, group = read_chunk(chunks_ptr, tl.num_programs(0) - 1 - tl.program_id(0))
    param = element_address(addresses_ptr, PARAM, tensor, tensor_count, start, DTYPE)
    backup = element_address(addresses_ptr, BACKUP, tensor, tensor_count, start, STATE_DTYPE)
    x = element_address(addresses_ptr, X, tensor, tensor_count, start, X_DTYPE)
    # What has no x stays; what has no y has a B of 0. Memory of their dtype is read in their place.
    is_moved = x != 0
    x = tl.where(is_moved, x, param if X_DTYPE == DTYPE else backup)
    has_y = Y == PERTURBATION
    y = tl.zeros_like(x)
    if Y >= 0:
        y = element_address(addresses_ptr, Y, tensor, tensor_count, start, Y_DTYPE)
        has_y = y != 0
        y = tl.where(has_y, y, param if Y_DTYPE == DTYPE else backup)
    if backup != 0:
        rng = ()
        if positions_ptr is not None:
            seed = read_number(options_ptr, group * FIELDS + 3)
            step = read_step(addresses_ptr, tensor, tensor_count)
            counted = start + tl.load(positions_ptr + tensor_count + tensor)
            rng = random_numbers(seed, tl.load(positions_ptr + tensor), step, counted)
        addresses = param, backup, x, y
        dtypes: tl.constexpr = (DTYPE, STATE_DTYPE, X_DTYPE, Y_DTYPE)
        if norm_ptr is not None:
            rho, maximize = read_option(options_ptr, group * FIELDS), read_number(options_ptr, group * FIELDS + 2)
            a = _scale_by_norm(tl.load(norm_ptr), rho, maximize).to(OPMATH)
            arguments = (a, a, a, a), (a == 0) | (is_moved == 0), rng
            if read_number(options_ptr, group * FIELDS + 1) != 0:
                walk(_perturb_element, addresses, dtypes, arguments, (NONE, _PLAIN_ADAPTIVE), length, 0, BLOCK)
            else:
                walk(_perturb_element, addresses, dtypes, arguments, (NONE, _PLAIN), length, 0, BLOCK)
        else:
            coefficients, stays = _read_coefficients(coefficients_ptr, tensor, has_y, OPMATH, Y)
            arguments = coefficients, stays | (is_moved == 0), rng
            walk(_perturb_element, addresses, dtypes, arguments, (Y, MAP), length, 0, BLOCK)
