"""Ascent: ``w += rho * g / (||g|| + 1e-12)`` over a table of tensors, keeping ``w`` in ``backup``."""

import triton
import triton.language as tl

from .address import (
    BACKUP,
    GRAD,
    NARROW,
    PARAM,
    element_address,
    pointer,
    read_chunk,
    read_number,
    read_option,
    whole_blocks,
    wide_pointer,
)
from .arithmetic import rounded


@triton.jit
def _climb_scale(norm, rho, maximize):
    """``rho / (norm + 1e-12)``, signed; 0 where the norm is not finite, which says "leave w alone"."""
    scale = rho / (norm + 1e-12)
    return tl.where(norm < float("inf"), tl.where(maximize != 0, -scale, scale), 0.0)


@triton.jit
def _climbed(param, grad, scale, ADAPTIVE: tl.constexpr):
    step = scale * grad
    if ADAPTIVE:
        step = step * param * param
    return param + step


@triton.jit
def _perturb_block(param_ptr, backup_ptr, grad_ptr, scale, mask, ADAPTIVE: tl.constexpr):
    param = tl.load(param_ptr, mask=mask)
    tl.store(backup_ptr, param, mask=mask)
    grad = tl.load(grad_ptr, mask=mask).to(scale.dtype)
    climbed = rounded(_climbed(param.to(scale.dtype), grad, scale, ADAPTIVE), param.dtype)
    # A zero scale selects: 0 * inf would be NaN.
    tl.store(param_ptr, tl.where(scale == 0, param, climbed), mask=mask)


@triton.jit
def _perturb_chunk(
    param_address,
    backup_address,
    grad_address,
    length,
    scale,
    DTYPE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    whole = whole_blocks(length, param_address | backup_address | grad_address, BLOCK)
    param_ptr, backup_ptr = wide_pointer(param_address, DTYPE), wide_pointer(backup_address, DTYPE)
    grad_ptr = wide_pointer(grad_address, DTYPE)
    for start in range(0, whole, BLOCK):
        at = start + lanes
        _perturb_block(param_ptr + at, backup_ptr + at, grad_ptr + at, scale, None, ADAPTIVE)
    param_ptr, backup_ptr = pointer(param_address, DTYPE), pointer(backup_address, DTYPE)
    grad_ptr = pointer(grad_address, DTYPE)
    lanes = tl.arange(0, BLOCK // NARROW)
    for start in range(whole, length, BLOCK // NARROW):
        at = start + lanes
        _perturb_block(param_ptr + at, backup_ptr + at, grad_ptr + at, scale, at < length, ADAPTIVE)


@triton.jit(
    do_not_specialize=["tensor_count"],
    do_not_specialize_on_alignment=["addresses_ptr", "chunks_ptr", "options_ptr", "norm_ptr"],
)
def perturb_kernel(
    addresses_ptr,
    chunks_ptr,
    options_ptr,
    norm_ptr,
    tensor_count,
    DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per chunk.

    Args:
        addresses_ptr: int64 ``(ROWS, tensor_count)``.
        chunks_ptr: int64 ``(chunks, CHUNK_FIELDS)``.
        options_ptr: ``(groups, FIELDS)`` entries: rho, adaptive, maximize.
        norm_ptr: float64, ``||g||``.
        tensor_count: of the table.
        DTYPE: of the table.
        OPMATH: of the arithmetic.
        FIELDS: options per group.
        BLOCK: elements that are walked at a time.
    """
    # Backward: the gradients that the norm read last are still in the cache.
    tensor, start, length, group = read_chunk(chunks_ptr, tl.num_programs(0) - 1 - tl.program_id(0))
    param = element_address(addresses_ptr, PARAM, tensor, tensor_count, start, DTYPE)
    grad = element_address(addresses_ptr, GRAD, tensor, tensor_count, start, DTYPE)
    backup = element_address(addresses_ptr, BACKUP, tensor, tensor_count, start, DTYPE)
    if (grad != 0) & (backup != 0):
        rho = read_option(options_ptr, group * FIELDS)
        maximize = read_number(options_ptr, group * FIELDS + 2)
        scale = _climb_scale(tl.load(norm_ptr), rho, maximize).to(OPMATH)
        if read_number(options_ptr, group * FIELDS + 1) != 0:
            _perturb_chunk(param, backup, grad, length, scale, DTYPE, True, BLOCK)
        else:
            _perturb_chunk(param, backup, grad, length, scale, DTYPE, False, BLOCK)
