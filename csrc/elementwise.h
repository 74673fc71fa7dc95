// The mathematics of one element of each operation, written once and compiled for the CPU and for CUDA.
//
// Arithmetic is in opmath_t (float for fp16, bf16 and fp32; double for fp64); the loops convert at the load and round
// once, at the store. Nothing here knows of addresses, chunks or threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "spec.h"

namespace fastsam {

using bfloat16 = c10::BFloat16;
using half = c10::Half;

template <typename scalar_t>
struct OpMath {
  using type = float;
};
template <>
struct OpMath<double> {
  using type = double;
};
template <typename scalar_t>
using opmath_t = typename OpMath<scalar_t>::type;

// std::bit_cast for the host and for CUDA: PyTorch's own is for the host alone in some releases.
template <typename To, typename From>
FASTSAM_HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, from);
}

// condition ? yes : no, of unsigned words. Without a branch, which would keep loops scalar: `?:` between floating-point
// results is one.
template <typename word_t>
FASTSAM_HOST_DEVICE word_t select(bool condition, word_t yes, word_t no) {
  const word_t mask = -static_cast<word_t>(condition);
  return (yes & mask) | (no & ~mask);
}

FASTSAM_HOST_DEVICE double select(bool condition, double yes, double no) {
  return bit_cast<double>(select(condition, bit_cast<uint64_t>(yes), bit_cast<uint64_t>(no)));
}

// ---- the ascent (Foret et al. 2021, eq. 2; adaptive: Kwon et al. 2021 with T = |w|; spec.py for all forms) ----

// rho / (||g|| + 1e-12), signed; 0 where the norm is not finite, which every caller takes as "leave w alone".
FASTSAM_HOST_DEVICE double ascent_scale(double norm, const AscentOptions& options) {
  const double scale = options.rho / (norm + 1e-12);
  // x - x is 0 for every finite x, and NaN for NaN and Inf.
  return norm - norm == 0 ? (options.maximize != 0 ? -scale : scale) : 0.0;
}

// The square that an element adds to ||g||^2 (adaptive: || |w| g ||^2), in double so that 1e25 has a square.
FASTSAM_HOST_DEVICE double norm_square(double param, double grad, bool adaptive) {
  const double term = adaptive ? param * grad : grad;
  return term * term;
}

// A factor of 0 selects: 0 * inf would be NaN.
template <typename T>
FASTSAM_HOST_DEVICE T times(T factor, T value) {
  return factor != 0 ? factor * value : T(0);
}

// base^exponent for a base >= 0 that a float can be, to 1e-12 of it: what the loops over pow() cannot have, vectors.
// 2^(exponent * log2(base)), with base = m * 2^k and m in [sqrt(1/2), sqrt(2)); 0 counts as 2^-1023.
FASTSAM_HOST_DEVICE_CALL double vector_power(double base, double exponent) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcd, kBias = uint64_t{1024} << 52, kTwoTo52 = 0x4330000000000000;
  constexpr double kLn2 = 0.6931471805599453, kRounding = 0x1.8p52;
  const auto bits = bit_cast<uint64_t>(base);
  const uint64_t biased = (bits - kSqrtHalf + kBias) >> 52;
  const double k = bit_cast<double>(biased | kTwoTo52) - (0x1p52 + 1024);
  const auto m = bit_cast<double>(bits - (biased << 52) + kBias);
  // log(m) = 2 artanh(s)
  const double s = (m - 1) / (m + 1), z = s * s;
  double series = 0;
  for (int i = 17; i > 0; i -= 2) series = series * z + 1.0 / i;
  const double wanted = exponent * (k + 2 / kLn2 * s * series);
  const double log2 = select(wanted < -1000, -1000.0, select(wanted > 1023, 1023.0, wanted));
  // The low bits of the sum are the nearest whole number.
  const double sum = log2 + kRounding, f = (log2 - (sum - kRounding)) * kLn2;
  double power = 1;
  for (int i = 12; i > 0; --i) power = power * f * (1.0 / i) + 1;
  // base - base: NaN for NaN and Inf
  return bit_cast<double>(bit_cast<uint64_t>(power) + (bit_cast<uint64_t>(sum) << 52)) + (base - base);
}

template <typename scalar_t>
FASTSAM_HOST_DEVICE double signed_power(double x, double exponent) {
  if constexpr (std::is_same_v<scalar_t, double>) {
    return x == 0 ? 0 : std::copysign(std::pow(std::fabs(x), exponent), x);
  } else {
    return select(x == 0, 0.0, std::copysign(vector_power(std::fabs(x), exponent), x));
  }
}

// scalar_t: the tensors', of which x is one.
template <Map map, typename scalar_t, typename T>
FASTSAM_HOST_DEVICE T mapped(T x, T param, T scale, T term) {
  if constexpr (map == Map::kPower) {
    return static_cast<T>(signed_power<scalar_t>(static_cast<double>(scale) * x, term));
  } else if constexpr (map == Map::kAdaptive) {
    const T normalizer = scale * std::fabs(param) + term;
    return normalizer * normalizer * x;
  } else {
    return x;
  }
}

// w <- from + A * map(x) + B * y
template <typename T>
struct AscentStep {
  T a, b, scale, term;
  bool adaptive;  // of plain SAM: A * x * w^2

  // By the norm: plain SAM.
  FASTSAM_HOST_DEVICE AscentStep(const AscentOptions& options, double norm)
      : a(static_cast<T>(ascent_scale(norm, options))), b(0), scale(0), term(0), adaptive(options.adaptive != 0) {}

  // Without y, its coefficient counts as 0.
  FASTSAM_HOST_DEVICE AscentStep(const AscentCoefficients& coefficients, bool has_y)
      : a(static_cast<T>(coefficients.a)),
        b(has_y ? static_cast<T>(coefficients.b) : T(0)),
        scale(static_cast<T>(coefficients.scale)),
        term(static_cast<T>(coefficients.term)),
        adaptive(false) {}

  // Whether w stays exactly as it is; again: y is the perturbation. Selected: 0 * inf would be NaN.
  FASTSAM_HOST_DEVICE bool stays(bool again) const { return a == 0 && b == (again ? T(1) : T(0)); }

  // from: w, its backup or its master. scalar_t: see mapped. Not for a step that stays.
  template <Map map, bool has_y, typename scalar_t>
  FASTSAM_HOST_DEVICE T perturbed(T from, T param, T x, T y) const {
    if constexpr (map == Map::kIdentity && !has_y) {
      const T step = a * x;
      return from + (adaptive ? step * param * param : step);
    } else {
      return from + (times(a, mapped<map, scalar_t>(x, param, scale, term)) + times(b, y));
    }
  }
};

// ---- base updates: torch.optim's for-loops, one element ----

template <typename T>
struct SgdStep {
  static constexpr int kMostSlots = 1;
  T lr, momentum, grad_weight, weight_decay, grad_factor;
  bool nesterov;

  FASTSAM_HOST_DEVICE SgdStep(const SgdOptions& options, double inv_grad_scale, bool first)
      : lr(static_cast<T>(options.lr)),
        // On a tensor's first step the buffer is the gradient: 0 * buffer would keep what an unwritten one holds, so
        // buffers start as zeros.
        momentum(static_cast<T>(options.momentum)),
        grad_weight(static_cast<T>(first ? 1.0 : 1.0 - options.dampening)),
        weight_decay(static_cast<T>(options.weight_decay)),
        grad_factor(static_cast<T>(options.maximize != 0 ? -inv_grad_scale : inv_grad_scale)),
        nesterov(options.nesterov != 0) {}

  FASTSAM_HOST_DEVICE T direction(T param, T grad) const {
    const T unscaled = grad * grad_factor;
    // Selected, not multiplied by zero: 0 * inf is NaN.
    return weight_decay != 0 ? unscaled + weight_decay * param : unscaled;
  }

  // An update is in two parts, as Adam's: the state advances and may be stored, then the weights follow from what
  // advance() returned. kSlots is the number of state tensors: 0, or 1 with momentum.
  template <int kSlots>
  FASTSAM_HOST_DEVICE T advance(T param, T grad, T& momentum_buffer, T&, T&) const {
    const T step = direction(param, grad);
    if constexpr (kSlots == 0) return step;
    const T buffer = momentum * momentum_buffer + grad_weight * step;
    momentum_buffer = buffer;
    return nesterov ? step + momentum * buffer : buffer;
  }

  FASTSAM_HOST_DEVICE T apply(T param, T, T step) const { return param - lr * step; }

  FASTSAM_HOST_DEVICE T update(T param, T grad) const {
    T none = 0;
    return apply(param, none, advance<0>(param, grad, none, none, none));
  }

  FASTSAM_HOST_DEVICE T update(T param, T grad, T& momentum_buffer) const {
    T none = 0;
    return apply(param, none, advance<1>(param, grad, momentum_buffer, none, none));
  }
};

template <typename T>
struct AdamStep {
  static constexpr int kMostSlots = 3;
  T grad_weight, beta2, square_weight, eps, step_size, root_correction, coupled_decay, decay_factor, grad_factor;

  // Powers: beta ** step, with step counted from 1; bias corrections in double (1 - 0.999^1 has 14 bits left in float).
  FASTSAM_HOST_DEVICE AdamStep(const AdamOptions& options, double beta1_power, double beta2_power,
                               double inv_grad_scale)
      : grad_weight(static_cast<T>(1.0 - options.beta1)),
        beta2(static_cast<T>(options.beta2)),
        square_weight(static_cast<T>(1.0 - options.beta2)),
        eps(static_cast<T>(options.eps)),
        step_size(static_cast<T>(options.lr / (1.0 - beta1_power))),
        root_correction(static_cast<T>(sqrt(1.0 - beta2_power))),
        coupled_decay(static_cast<T>(options.decoupled != 0 ? 0.0 : options.weight_decay)),
        decay_factor(static_cast<T>(options.decoupled != 0 ? 1.0 - options.lr * options.weight_decay : 1.0)),
        grad_factor(static_cast<T>(options.maximize != 0 ? -inv_grad_scale : inv_grad_scale)) {}

  // exp_avg and exp_avg_sq become their new values; returns the second moment to divide by (before amsgrad's max).
  FASTSAM_HOST_DEVICE void moments(T param, T grad, T& exp_avg, T& exp_avg_sq) const {
    const T unscaled = grad * grad_factor;
    const T g = coupled_decay != 0 ? unscaled + coupled_decay * param : unscaled;
    // torch.lerp's two forms: exact at both ends.
    exp_avg = grad_weight < T(0.5) ? exp_avg + grad_weight * (g - exp_avg) : g - (g - exp_avg) * (T(1) - grad_weight);
    exp_avg_sq = beta2 * exp_avg_sq + square_weight * g * g;
  }

  // amsgrad's maximum; a NaN in either stays one, as in torch.maximum. No ||: its branch would keep loops scalar.
  FASTSAM_HOST_DEVICE static T larger(T previous, T square) {
    return ((previous > square) | (previous != previous)) ? previous : square;
  }

  FASTSAM_HOST_DEVICE T update(T param, T exp_avg, T second_moment) const {
    const T denominator = std::sqrt(second_moment) / root_correction + eps;
    return param * decay_factor - step_size * exp_avg / denominator;
  }

  // See SgdStep. kSlots is the number of state tensors: 2, or 3 with amsgrad.
  template <int kSlots>
  FASTSAM_HOST_DEVICE T advance(T param, T grad, T& exp_avg, T& exp_avg_sq, T& max_exp_avg_sq) const {
    moments(param, grad, exp_avg, exp_avg_sq);
    if constexpr (kSlots == 2) return exp_avg_sq;
    max_exp_avg_sq = larger(max_exp_avg_sq, exp_avg_sq);
    return max_exp_avg_sq;
  }

  FASTSAM_HOST_DEVICE T apply(T param, T exp_avg, T second_moment) const {
    return update(param, exp_avg, second_moment);
  }
};

}  // namespace fastsam
