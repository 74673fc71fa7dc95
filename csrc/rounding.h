// How a result becomes what is stored: rounded to nearest, or stochastically, up or down so that the mean is right.
//
// A random word is a function of what it is for: seed, step, tensor, word and element. It has no state, costs a few
// integer operations, and is the same on every backend. All arithmetic on words wraps at 32 bits.
#pragma once

#include <cstdint>

#include "elementwise.h"

namespace fastsam {

// Those that are narrower than what they are computed in: they can be rounded stochastically, and have fp32 masters.
template <typename scalar_t>
constexpr bool kIsNarrow = sizeof(scalar_t) < sizeof(opmath_t<scalar_t>);

// ---- random numbers ----

// lowbias32 (Chris Wellons, https://nullprogram.com/blog/2018/07/31/): every bit of x changes every bit of the result.
FASTSAM_HOST_DEVICE uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// What one random word has in common for all elements of a tensor in one step.
struct RandomKey {
  uint32_t low;
  uint32_t high;

  FASTSAM_HOST_DEVICE static RandomKey make(uint32_t seed, uint32_t step, uint32_t position, uint32_t word) {
    const uint32_t number = position * kRandomWords + word;
    return {mix(mix(mix(seed ^ 0x9e3779b9u) ^ step) ^ number), mix(mix(mix(seed ^ 0xc2b2ae35u) ^ number) ^ step)};
  }

  // For elements whose numbers have the upper 32 bits of `element`.
  FASTSAM_HOST_DEVICE RandomKey at(int64_t element) const {
    return {low, high + static_cast<uint32_t>(static_cast<uint64_t>(element) >> 32) * 0x9e3779b1u};
  }

  FASTSAM_HOST_DEVICE uint32_t bits(uint32_t element) const { return mix(mix(element ^ low) ^ high); }
};

// Two draws share a word, of which the second turns the halves round: 16 bits decide nearly every rounding.
FASTSAM_HOST_DEVICE uint32_t bits_of_draw(uint32_t word, uint32_t draw) {
  return select(draw % 2 == 0, word, word >> 16 | word << 16);
}

// ---- rounding by a random number ----

// x lies between two neighbours, and gets the one that is farther from 0 for as large a share of all `random` as x is
// close to it. What is not finite, or might not be afterwards, is rounded to nearest, ties to even.
FASTSAM_HOST_DEVICE bfloat16 round_stochastically(float x, uint32_t random, bfloat16) {
  const uint32_t bits = bit_cast<uint32_t>(x), size = bits & 0x7fffffffu;
  const uint32_t rounded = (bits + (random >> 16)) >> 16, nearest = static_cast<bfloat16>(x).x;
  return {static_cast<uint16_t>(size < 0x7f7f0000u ? rounded : nearest), bfloat16::from_bits()};
}

FASTSAM_HOST_DEVICE half round_stochastically(float x, uint32_t random, half) {
  const uint32_t bits = bit_cast<uint32_t>(x), size = bits & 0x7fffffffu;
  // A float's bits, with 13 less in the fraction and 112 less in the exponent. From 2^16 on everything is infinite.
  const uint32_t capped = size < 0x47800000u ? size : 0x47800000u;
  const uint32_t added = select(size < 0x477fe000u, random >> 19, 0xfffu + ((size >> 13) & 1));
  const uint32_t normal = ((capped + added) >> 13) - (112u << 10);
  // Below 2^-14, numbers are 2^-24 apart. x, counted in those, and 24 random bits are exact in a float.
  const bool is_subnormal = size < 0x38800000u;
  const float count = bit_cast<float>(select(is_subnormal, size, 0u)) * 0x1p24f;
  const auto whole = static_cast<int32_t>(count), share = static_cast<int32_t>(random >> 8);
  const bool up = static_cast<float>(share) * 0x1p-24f < count - static_cast<float>(whole);
  const uint32_t subnormal = static_cast<uint32_t>(whole) + static_cast<uint32_t>(up);
  const uint32_t rounded = select(size > 0x7f800000u, 0x7e00u, select(is_subnormal, subnormal, normal));
  return {static_cast<uint16_t>(rounded | (bits ^ size) >> 16), half::from_bits()};
}

// ---- what the loops call: (value, which of the element's results, number of the element) -> what is stored ----

template <typename scalar_t>
struct Nearest {
  FASTSAM_HOST_DEVICE scalar_t operator()(opmath_t<scalar_t> value, int, int64_t) const {
    return static_cast<scalar_t>(value);
  }

  FASTSAM_HOST_DEVICE Nearest at(int64_t) const { return *this; }
};

// Result k has draw kDraw + k: of an update, result 0 are the weights, and result 1 + k is slot k of the state.
template <typename scalar_t, uint32_t kDraw, int kResults>
struct Stochastic {
  static constexpr int kWords = static_cast<int>((kDraw + kResults - 1) / 2 - kDraw / 2) + 1;
  RandomKey keys[kWords];
  int64_t offset;
  uint32_t first;

  // offset: of the tensor's first element in the whole parameter, of which the tensor may be a shard.
  FASTSAM_HOST_DEVICE static Stochastic make(double seed, float steps, int64_t position, int64_t offset) {
    Stochastic rounding{};
    rounding.offset = offset;
    for (int word = 0; word < kWords; ++word) {
      rounding.keys[word] =
          RandomKey::make(static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<int64_t>(steps)),
                          static_cast<uint32_t>(position), kDraw / 2 + word);
    }
    return rounding;
  }

  FASTSAM_HOST_DEVICE scalar_t operator()(float value, int result, int64_t element) const {
    const uint32_t draw = kDraw + result;
    const uint32_t word = keys[draw / 2 - kDraw / 2].bits(first + static_cast<uint32_t>(element));
    return round_stochastically(value, bits_of_draw(word, draw), scalar_t{});
  }

  // For elements that are counted from `element` of the tensor on. They must not reach over a multiple of 2^32.
  FASTSAM_HOST_DEVICE Stochastic at(int64_t element) const {
    Stochastic rounding = *this;
    for (RandomKey& key : rounding.keys) key = key.at(offset + element);
    rounding.first = static_cast<uint32_t>(offset + element);
    return rounding;
  }
};

// ---- fp32 masters ----

// The value that the master of `param` has: its own while param is its rounding, else that of param, which is the
// truth.
template <typename scalar_t>
FASTSAM_HOST_DEVICE float master_value(float master, scalar_t param) {
  return static_cast<scalar_t>(master).x == param.x ? master : static_cast<float>(param);
}

}  // namespace fastsam
