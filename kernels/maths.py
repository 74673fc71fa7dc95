"""The mathematics of one element: maps, base updates, and arithmetic that tl leaves imprecise."""

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


# ---- the base updates ----


@triton.jit
def _base_gradient(param, grad, grad_factor, weight_decay):
    """The gradient that a base descends by; ``grad_factor`` unscales it, and negates it to maximize."""
    unscaled = grad * grad_factor
    # Selected, not multiplied by zero: 0 * inf is NaN.
    return tl.where(weight_decay != 0, unscaled + weight_decay * param, unscaled)


@triton.jit
def sgd(param, grad, state, options, MOMENTUM: tl.constexpr):
    """SGD (Sutskever et al. 2013, as torch.optim.SGD has it): the new weight and momentum buffer."""
    lr, momentum, grad_weight, weight_decay, grad_factor, nesterov = options
    step = _base_gradient(param, grad, grad_factor, weight_decay)
    if MOMENTUM:
        buffer = momentum * state[0] + grad_weight * step
        step = tl.where(nesterov, step + momentum * buffer, buffer)
        return param - lr * step, (buffer,)
    else:
        return param - lr * step, ()


@triton.jit
def adam(param, grad, state, options, AMSGRAD: tl.constexpr):
    """Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980), AMSGrad, AdamW: the new weight and moments."""
    (lr, grad_weight, beta2, square_weight, eps, coupled_decay, decay_factor, inverse_root, grad_factor) = options
    g = _base_gradient(param, grad, grad_factor, coupled_decay)
    exp_avg, exp_avg_sq = state[0], state[1]
    # torch.lerp's two forms: exact at both ends.
    difference = g - exp_avg
    exp_avg = tl.where(grad_weight < 0.5, exp_avg + grad_weight * difference, g - difference * (1 - grad_weight))
    exp_avg_sq = beta2 * exp_avg_sq + square_weight * g * g
    if AMSGRAD:
        largest = state[2]
        # Written so that a NaN in either stays one, as in torch.maximum.
        keeps = (largest > exp_avg_sq) | (largest != largest)
        second_moment = tl.where(keeps, largest, exp_avg_sq)
    else:
        second_moment = exp_avg_sq
    denominator = square_root(second_moment) * inverse_root + eps
    param = param * decay_factor - quotient(lr * exp_avg, denominator)
    if AMSGRAD:
        return param, (exp_avg, exp_avg_sq, second_moment)
    else:
        return param, (exp_avg, exp_avg_sq)
