// base ** exponent for whole exponents from 1 on and bases from 0 to 1, as good as always correctly rounded. CUDA's pow
// is off by up to one unit in the last place; in 1 - power that grows with what cancels, to a thousand units and more.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastsam::cuda {

// A sum of two doubles, the second one below half a unit of the first: twice the digits. The intrinsics are for
// products that no compiler fuses with a sum.
struct LongDouble {
  double value;
  double rest;
};

__device__ __forceinline__ LongDouble product(const LongDouble& a, const LongDouble& b) {
  const double value = __dmul_rn(a.value, b.value);
  const double cross = __fma_rn(a.value, b.rest, __dmul_rn(a.rest, b.value));
  const double rest = __dadd_rn(__fma_rn(a.value, b.value, -value), cross);
  const double sum = __dadd_rn(value, rest);
  return {sum, __dadd_rn(rest, __dadd_rn(value, -sum))};
}

__device__ inline double whole_power(double base, int64_t exponent) {
  LongDouble power{1, 0}, square{base, 0};
  for (; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) != 0) power = product(power, square);
    square = product(square, square);
  }
  return power.value;
}

}  // namespace fastsam::cuda
