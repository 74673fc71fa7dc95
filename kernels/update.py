"""Descent: ``w <- backup``, alone or with a base's update, in one pass over a table of tensors.

With float32 masters, these are updated, and ``w`` is what they round to.
"""

import triton
import triton.language as tl

from fastsam import spec

from .maths import adam, power, sgd, times
from .rounding import DRAW_METHOD_STATE, DRAW_STATE, DRAW_WEIGHT, is_rounding, random_numbers, rounded, stored, widened
from .walk import (
    BACKUP,
    FIRST_GRAD,
    GRAD,
    MASTER,
    METHOD_STATE,
    PARAM,
    STATE,
    STEP,
    element_address,
    is_last_to_finish,
    read_chunk,
    read_number,
    read_option,
    read_step,
    walk,
)

NO_UPDATE: tl.constexpr = tl.constexpr(int(spec.Update.NONE))
SGD: tl.constexpr = tl.constexpr(int(spec.Update.SGD))
NONE: tl.constexpr = tl.constexpr(spec.NONE)
A: tl.constexpr = tl.constexpr(int(spec.DescentCoefficients.A))
B: tl.constexpr = tl.constexpr(int(spec.DescentCoefficients.B))
KEEP_X: tl.constexpr = tl.constexpr(int(spec.DescentCoefficients.KEEP_X))
KEEP_FIRST: tl.constexpr = tl.constexpr(int(spec.DescentCoefficients.KEEP_FIRST))
KEEP_STATE: tl.constexpr = tl.constexpr(int(spec.DescentCoefficients.KEEP_STATE))
DECOUPLED_X: tl.constexpr = tl.constexpr(int(spec.DescentCoefficients.DECOUPLED_X))
DECOUPLED_Y: tl.constexpr = tl.constexpr(int(spec.DescentCoefficients.DECOUPLED_Y))
COLUMNS: tl.constexpr = tl.constexpr(len(spec.DescentCoefficients))
STATE_SLOTS: tl.constexpr = tl.constexpr(spec.STATE_SLOTS)

# Tensors whose steps are advanced at a time.
STEPS_BLOCK: tl.constexpr = tl.constexpr(1024)


# ---- weights and state at a load and a store ----


@triton.jit
def _restore_element(pointers, at, mask, arguments, sums, CONSTANTS: tl.constexpr):
    param_ptr, backup_ptr = pointers
    backup = tl.load(backup_ptr + at, mask=mask)
    tl.store(param_ptr + at, rounded(backup, param_ptr.dtype.element_ty), mask=mask)
    return sums


@triton.jit
def _load_weights(param_ptr, source_ptr, at, is_perturbed, mask, OPMATH: tl.constexpr):
    """The weights that the update starts from; a master follows a parameter that was written since."""
    source = widened(tl.load(source_ptr + at, mask=mask), OPMATH)
    if source_ptr.dtype == param_ptr.dtype:
        return source
    else:
        # What was perturbed is not its master's rounding, and not read. The interpreter cannot spread a truth value.
        follows = tl.full(at.shape, is_perturbed, tl.int32) == 0
        param = tl.load(param_ptr + at, mask=follows if mask is None else follows & mask)
        return tl.where(follows & (is_rounding(param, source) == 0), widened(param, OPMATH), source)


@triton.jit
def _store_weights(param_ptr, source_ptr, at, weights, rng, mask):
    if source_ptr.dtype != param_ptr.dtype:
        tl.store(source_ptr + at, weights, mask=mask)
    tl.store(param_ptr + at, stored(weights, param_ptr.dtype.element_ty, rng, DRAW_WEIGHT, at), mask=mask)


@triton.jit
def _load_state(pointers, at, mask, SLOTS: tl.constexpr, OPMATH: tl.constexpr):
    state = ()
    for slot in tl.static_range(SLOTS):
        state = state + (widened(tl.load(pointers[slot] + at, mask=mask), OPMATH),)  # noqa: RUF005
    return state


@triton.jit
def _store_state(pointers, at, state, rng, mask, SLOTS: tl.constexpr):
    for slot in tl.static_range(SLOTS):
        value = stored(state[slot], pointers[slot].dtype.element_ty, rng, DRAW_STATE + slot, at)
        tl.store(pointers[slot] + at, value, mask=mask)


# ---- the options of the base updates ----


@triton.jit
def _grad_factor(grad_scale_ptr, maximize):
    inverse = 1.0 / tl.load(grad_scale_ptr).to(tl.float64)
    return tl.where(maximize != 0, -inverse, inverse)


@triton.jit
def _read_sgd_options(options_ptr, first, grad_scale_ptr, step, OPMATH: tl.constexpr):
    momentum, dampening = read_number(options_ptr, first + 1), read_number(options_ptr, first + 2)
    # On a tensor's first step the buffer becomes the gradient: 0 * buffer would keep what an unwritten one holds, so
    # buffers start as zeros.
    grad_weight = tl.where(step == 0, 1.0, 1.0 - dampening)
    grad_factor = _grad_factor(grad_scale_ptr, read_number(options_ptr, first + 5))
    return (
        read_option(options_ptr, first).to(OPMATH),
        momentum.to(OPMATH),
        grad_weight.to(OPMATH),
        read_number(options_ptr, first + 3).to(OPMATH),
        grad_factor.to(OPMATH),
        read_number(options_ptr, first + 4) != 0,
    )


@triton.jit
def _read_adam_options(options_ptr, first, grad_scale_ptr, step, OPMATH: tl.constexpr):
    lr = read_option(options_ptr, first)
    beta1, beta2 = read_option(options_ptr, first + 1), read_option(options_ptr, first + 2)
    weight_decay, is_decoupled = read_number(options_ptr, first + 4), read_number(options_ptr, first + 5) != 0
    grad_factor = _grad_factor(grad_scale_ptr, read_number(options_ptr, first + 7))
    count = step.to(tl.float64) + 1.0
    # Bias corrections in float64: 1 - 0.999 has 14 bits left in float32.
    return (
        (lr / (1.0 - power(beta1, count, OPMATH))).to(OPMATH),
        (1.0 - beta1).to(OPMATH),
        beta2.to(OPMATH),
        (1.0 - beta2).to(OPMATH),
        read_number(options_ptr, first + 3).to(OPMATH),
        tl.where(is_decoupled, 0.0, weight_decay).to(OPMATH),
        tl.where(is_decoupled, 1.0 - lr * weight_decay, 1.0).to(OPMATH),
        (1.0 / tl.sqrt(1.0 - power(beta2, count, OPMATH))).to(OPMATH),
        grad_factor.to(OPMATH),
    )


# ---- what a method puts in the gradient's place ----


@triton.jit
def _read_coefficients(coefficients_ptr, tensor, takes_part, OPMATH: tl.constexpr, Y: tl.constexpr):
    """The row of coefficients; of a tensor that has no part, those that leave the gradient as it is."""
    row_ptr = coefficients_ptr + tensor * COLUMNS
    return (
        tl.where(takes_part, tl.load(row_ptr + A), 1.0).to(OPMATH),
        tl.where(takes_part & (Y != NONE), tl.load(row_ptr + B), 0.0).to(OPMATH),
        tl.load(row_ptr + KEEP_X).to(OPMATH),
        tl.load(row_ptr + KEEP_FIRST).to(OPMATH),
        tl.load(row_ptr + KEEP_STATE).to(OPMATH),
        tl.where(takes_part, tl.load(row_ptr + DECOUPLED_X), 0.0).to(OPMATH),
        tl.where(takes_part & (Y != NONE), tl.load(row_ptr + DECOUPLED_Y), 0.0).to(OPMATH),
    )


@triton.jit
def _update_method_state(first_ptr, method_state_ptr, at, x, coefficients, rng, mask):
    total = times(coefficients[2], x) + times(coefficients[3], widened(tl.load(first_ptr + at, mask=mask), x.dtype))
    total += times(coefficients[4], widened(tl.load(method_state_ptr + at, mask=mask), x.dtype))
    dtype: tl.constexpr = method_state_ptr.dtype.element_ty
    tl.store(method_state_ptr + at, stored(total, dtype, rng, DRAW_METHOD_STATE, at), mask=mask)


@triton.jit
def _update_element(pointers, at, mask, arguments, sums, CONSTANTS: tl.constexpr):
    """``w <- update(source, A * x + B * y, state) - decoupled``, and the method's state; x is the gradient."""
    param_ptr, source_ptr, grad_ptr, y_ptr, first_ptr, method_state_ptr = pointers[:6]
    options, is_perturbed, rng, coefficients, takes_part = arguments
    UPDATE: tl.constexpr = CONSTANTS[0]
    SLOTS: tl.constexpr = CONSTANTS[1]
    Y: tl.constexpr = CONSTANTS[2]
    KEEPS: tl.constexpr = CONSTANTS[3]
    DECOUPLED: tl.constexpr = CONSTANTS[4]
    opmath: tl.constexpr = options[0].dtype
    param = _load_weights(param_ptr, source_ptr, at, is_perturbed, mask, opmath)
    x = widened(tl.load(grad_ptr + at, mask=mask), opmath)
    y = x if Y == NONE else widened(tl.load(y_ptr + at, mask=mask), opmath)
    state = _load_state(pointers[6:], at, mask, SLOTS, opmath)
    grad = x if len(coefficients) == 0 else times(coefficients[0], x) + times(coefficients[1], y)
    if UPDATE == SGD:
        param, state = sgd(param, grad, state, options, SLOTS == 1)
    else:
        param, state = adam(param, grad, state, options, SLOTS == 3)
    if DECOUPLED:
        param -= times(coefficients[5], x) + times(coefficients[6], y)
    if KEEPS:  # noqa: SIM102 (compile time, then run time)
        if takes_part:
            _update_method_state(first_ptr, method_state_ptr, at, x, coefficients, rng, mask)
    _store_state(pointers[6:], at, state, rng, mask, SLOTS)
    _store_weights(param_ptr, source_ptr, at, param, rng, mask)
    return sums


@triton.jit
def _prepare_element(pointers, at, mask, coefficients, sums, CONSTANTS: tl.constexpr):
    """For an unfused base: the gradient becomes ``A * x + B * y``, the first one the decoupled part."""
    grad_ptr, y_ptr, first_ptr, method_state_ptr = pointers
    Y: tl.constexpr = CONSTANTS[0]
    KEEPS: tl.constexpr = CONSTANTS[1]
    DECOUPLED: tl.constexpr = CONSTANTS[2]
    opmath: tl.constexpr = coefficients[0].dtype
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    x = widened(tl.load(grad_ptr + at, mask=mask), opmath)
    y = x if Y == NONE else widened(tl.load(y_ptr + at, mask=mask), opmath)
    if KEEPS:
        _update_method_state(first_ptr, method_state_ptr, at, x, coefficients, (), mask)
    tl.store(grad_ptr + at, rounded(times(coefficients[0], x) + times(coefficients[1], y), dtype), mask=mask)
    if DECOUPLED:
        decoupled = times(coefficients[5], x) + times(coefficients[6], y)
        tl.store(first_ptr + at, rounded(decoupled, dtype), mask=mask)
    return sums


# ---- the kernel ----


@triton.jit
def _moment_addresses(addresses_ptr, tensor, tensor_count, start, STATE_DTYPE: tl.constexpr, MOMENTS: tl.constexpr):
    """Of the state slots, as many as the update has; 0 for the others."""
    moments = ()
    for slot in tl.static_range(STATE_SLOTS):
        if slot < MOMENTS:
            address = element_address(addresses_ptr, STATE + slot, tensor, tensor_count, start, STATE_DTYPE)
        else:
            address = tl.zeros_like(start)
        moments = moments + (address,)  # noqa: RUF005
    return moments


@triton.jit
def _advance_steps(addresses_ptr, tensor_count):
    """One more update for every tensor that has a gradient and a count."""
    for start in range(0, tensor_count, STEPS_BLOCK):
        at = start + tl.arange(0, STEPS_BLOCK)
        mask = at < tensor_count
        grad = tl.load(addresses_ptr + GRAD * tensor_count + at, mask=mask, other=0)
        step = tl.load(addresses_ptr + STEP * tensor_count + at, mask=mask, other=0)
        step_ptr, mask = step.to(tl.pointer_type(tl.float32)), (grad != 0) & (step != 0)
        tl.store(step_ptr, tl.load(step_ptr, mask=mask) + 1, mask=mask)


@triton.jit(
    do_not_specialize=["tensor_count"],
    do_not_specialize_on_alignment=[
        "addresses_ptr",
        "chunks_ptr",
        "options_ptr",
        "grad_scale_ptr",
        "found_inf_ptr",
        "coefficients_ptr",
        "positions_ptr",
        "finished_ptr",
    ],
)
def restore_and_update_kernel(
    addresses_ptr,
    chunks_ptr,
    options_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    coefficients_ptr,
    positions_ptr,
    finished_ptr,
    tensor_count,
    DTYPE: tl.constexpr,
    STATE_DTYPE: tl.constexpr,
    OPMATH: tl.constexpr,
    FIELDS: tl.constexpr,
    UPDATE: tl.constexpr,
    MOMENTS: tl.constexpr,
    Y: tl.constexpr,
    Y_DTYPE: tl.constexpr,
    KEEPS: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``w <- update(backup, A * x + B * y, state)``, or ``w <- backup`` without a gradient or after an overflow.

    One program per chunk; the last of them advances the steps. Without an update (NO_UPDATE), weights are restored, and
    gradients prepared for an unfused base.

    Args:
        addresses_ptr: int64 ``(ROWS, tensor_count)``.
        chunks_ptr: int64 ``(chunks, CHUNK_FIELDS)``.
        options_ptr: ``(groups, FIELDS)`` entries, in the order of the spec's SGDOptions or AdamOptions.
        grad_scale_ptr: float32, what gradients are divided by.
        found_inf_ptr: float32; not 0: nothing is updated.
        coefficients_ptr: float64 ``(tensor_count, COLUMNS)``; None: the gradient is used as it is.
        positions_ptr: int64 ``(2, tensor_count)``: in the flattened parameter groups, and of the first elements in
            the whole parameters; None: rounding is to nearest.
        finished_ptr: int32, 0.
        tensor_count: of the table.
        DTYPE: of the table.
        STATE_DTYPE: float32 where there are masters, else ``DTYPE``: what backups and state are in.
        OPMATH: of the arithmetic.
        FIELDS: options per group.
        UPDATE: which base update.
        MOMENTS: the most state slots that it has.
        Y: the row of y, or NONE.
        Y_DTYPE: of y: ``DTYPE`` or ``STATE_DTYPE``.
        KEEPS: whether the method keeps state.
        DECOUPLED: whether ``w`` also moves past the base update.
        BLOCK: elements that are walked at a time.
    """
    tensor, start, length, group = read_chunk(chunks_ptr, tl.program_id(0))
    param = element_address(addresses_ptr, PARAM, tensor, tensor_count, start, DTYPE)
    backup = element_address(addresses_ptr, BACKUP, tensor, tensor_count, start, STATE_DTYPE)
    grad = element_address(addresses_ptr, GRAD, tensor, tensor_count, start, DTYPE)
    absent = tl.zeros_like(param)
    y, first, method_state, takes_part = absent, absent, absent, grad != 0
    if Y != NONE:
        y = element_address(addresses_ptr, Y, tensor, tensor_count, start, Y_DTYPE)
        takes_part &= y != 0
    if KEEPS:
        first = element_address(addresses_ptr, FIRST_GRAD, tensor, tensor_count, start, DTYPE)
        method_state = element_address(addresses_ptr, METHOD_STATE, tensor, tensor_count, start, STATE_DTYPE)
        takes_part &= (first != 0) & (method_state != 0)
    elif DECOUPLED and UPDATE == NO_UPDATE:
        first = element_address(addresses_ptr, FIRST_GRAD, tensor, tensor_count, start, DTYPE)
    coefficients = ()
    if coefficients_ptr is not None:
        coefficients = _read_coefficients(coefficients_ptr, tensor, takes_part, OPMATH, Y)
    if UPDATE == NO_UPDATE:
        if backup != 0:
            walk(_restore_element, (param, backup), (DTYPE, STATE_DTYPE), (), (), length, 0, BLOCK)
        if coefficients_ptr is not None:  # noqa: SIM102
            if takes_part:
                addresses = grad, y, first, method_state
                dtypes: tl.constexpr = (DTYPE, Y_DTYPE, DTYPE, STATE_DTYPE)
                walk(_prepare_element, addresses, dtypes, coefficients, (Y, KEEPS, DECOUPLED), length, 0, BLOCK)
    else:
        is_committed = tl.load(found_inf_ptr) == 0
        if (grad != 0) & is_committed:
            source = tl.where(backup == 0, param, backup)
            if DTYPE != STATE_DTYPE:
                source = element_address(addresses_ptr, MASTER, tensor, tensor_count, start, STATE_DTYPE)
            step = read_step(addresses_ptr, tensor, tensor_count)
            if UPDATE == SGD:
                options = _read_sgd_options(options_ptr, group * FIELDS, grad_scale_ptr, step, OPMATH)
            else:
                options = _read_adam_options(options_ptr, group * FIELDS, grad_scale_ptr, step, OPMATH)
            rng = ()
            if positions_ptr is not None:
                # The seed is the last option.
                seed = read_number(options_ptr, group * FIELDS + FIELDS - 1)
                counted = start + tl.load(positions_ptr + tensor_count + tensor)
                rng = random_numbers(seed, tl.load(positions_ptr + tensor), step, counted)
            if KEEPS:
                method_state = tl.where(takes_part, method_state, 0)
                first = tl.where(takes_part, first, 0)
            if Y != NONE:
                # Memory of its dtype, where there is none.
                y = tl.where(takes_part, y, grad if Y_DTYPE == DTYPE else source)
            moments = _moment_addresses(addresses_ptr, tensor, tensor_count, start, STATE_DTYPE, MOMENTS)
            addresses = (param, source, grad, y, first, method_state) + moments  # noqa: RUF005 (Triton has no unpacking)
            dtypes: tl.constexpr = (
                DTYPE,
                STATE_DTYPE,
                DTYPE,
                Y_DTYPE,
                DTYPE,
                STATE_DTYPE,
                STATE_DTYPE,
                STATE_DTYPE,
                STATE_DTYPE,
            )
            arguments = options, (backup != 0).to(tl.int32), rng, coefficients, takes_part
            # Without its last moment: plain SGD, or Adam without amsgrad.
            if moments[MOMENTS - 1] != 0:
                constants: tl.constexpr = (UPDATE, MOMENTS, Y, KEEPS, DECOUPLED)
                walk(_update_element, addresses, dtypes, arguments, constants, length, 0, BLOCK)
            else:
                fewer: tl.constexpr = (UPDATE, MOMENTS - 1, Y, KEEPS, DECOUPLED)
                walk(_update_element, addresses, dtypes, arguments, fewer, length, 0, BLOCK)
        elif backup != 0:
            walk(_restore_element, (param, backup), (DTYPE, STATE_DTYPE), (), (), length, 0, BLOCK)
        is_last = is_last_to_finish(finished_ptr, tl.num_programs(0))
        if is_last & is_committed:
            _advance_steps(addresses_ptr, tensor_count)
