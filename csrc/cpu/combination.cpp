// dots and perturb_by_ on the CPU: what methods beyond SAM measure, and how they climb.
#include <cmath>

#include "multi_tensor.h"
#include "operations.h"

namespace fastsam::cpu {
namespace {

constexpr int64_t kLanes = 32;

enum class Second { kNothing, kTensor, kDistance };

// What y is: nothing, a tensor, or the way from `other`, a backup, to the weights. In the arithmetic's precision.
template <Second second, typename scalar_t>
FASTSAM_HOST_DEVICE opmath_t<scalar_t> second_of(const scalar_t* param, const scalar_t* other, int64_t i) {
  using T = opmath_t<scalar_t>;
  if constexpr (second == Second::kNothing) return T(0);
  if constexpr (second == Second::kTensor) return static_cast<T>(other[i]);
  return static_cast<T>(param[i]) - static_cast<T>(other[i]);
}

template <Map map, Second second, typename scalar_t>
FASTSAM_MULTIVERSION void sum_products(const scalar_t* x, const scalar_t* param, const scalar_t* other, int64_t length,
                                       double scale, double term, double* result) {
  double sums[3][kLanes] = {};
  const auto add = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    const double value = static_cast<opmath_t<scalar_t>>(x[i]);
    const double y = second_of<second>(param, other, i);
    sums[0][lane] +=
        mapped<map, scalar_t>(value, static_cast<double>(static_cast<opmath_t<scalar_t>>(param[i])), scale, term) *
        value;
    if constexpr (second != Second::kNothing) {
      sums[1][lane] += value * y;
      sums[2][lane] += y * y;
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int64_t lane = 0; i < length; ++i, ++lane) add(i, lane);
  for (int64_t product = 0; product < 3; ++product) {
    result[product] = 0;
    for (const double sum : sums[product]) result[product] += sum;
  }
}

template <Map map, Second second, typename scalar_t>
FASTSAM_MULTIVERSION void climb(scalar_t* param, const scalar_t* backup, const scalar_t* x, const scalar_t* other,
                                int64_t length, const double* weights) {
  using T = opmath_t<scalar_t>;
  const T a = static_cast<T>(weights[kWeightA]), b = static_cast<T>(weights[kWeightB]);
  const T scale = static_cast<T>(weights[kMapScale]), term = static_cast<T>(weights[kMapTerm]);
  // A first ascent begins at the weights: their backup has just been streamed past the cache.
  constexpr bool again = second == Second::kDistance;
  // AWP's second tensor are the weights themselves, element for element: no turn reads what another writes.
#if !defined(__clang__)
#pragma GCC ivdep
#endif
  for (int64_t i = 0; i < length; ++i) {
    const T w = static_cast<T>(param[i]);
    const T e = times(a, mapped<map, scalar_t>(static_cast<T>(x[i]), w, scale, term)) +
                times(b, second_of<second>(param, other, i));
    param[i] = static_cast<scalar_t>((again ? static_cast<T>(backup[i]) : w) + e);
  }
}

// Calls body.operator()<map, second>().
template <Map map, typename Body>
void with_second(Second second, const Body& body) {
  switch (second) {
    case Second::kNothing:
      return body.template operator()<map, Second::kNothing>();
    case Second::kTensor:
      return body.template operator()<map, Second::kTensor>();
    case Second::kDistance:
      return body.template operator()<map, Second::kDistance>();
  }
}

template <typename Body>
void with_form(Map map, Second second, const Body& body) {
  switch (map) {
    case Map::kIdentity:
      return with_second<Map::kIdentity>(second, body);
    case Map::kPower:
      return with_second<Map::kPower>(second, body);
    case Map::kAdaptive:
      return with_second<Map::kAdaptive>(second, body);
  }
}

// A chunk's tensors; `other` is what second_of reads.
template <typename scalar_t>
struct Operands {
  const scalar_t* x;
  const scalar_t* other;
  Second second;

  Operands(const TensorTable& table, const Climb& climb, const Chunk& chunk)
      : x(table.pointer<scalar_t>(static_cast<Role>(climb.x), chunk.tensor)), other(nullptr), second(Second::kNothing) {
    if (x != nullptr) x += chunk.start;
    if (climb.y == kNothing) return;
    const Role role = climb.y == kDistance ? kBackup : static_cast<Role>(climb.y);
    other = table.pointer<scalar_t>(role, chunk.tensor);
    if (other == nullptr) return;
    other += chunk.start;
    second = climb.y == kDistance ? Second::kDistance : Second::kTensor;
  }
};

}  // namespace

void dots(const TensorTable& table, ScalarType dtype, const Climb& climb, bool climbing, double* partials,
          double* result) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    for_each_chunk(table, Order::kForward, [&](const Chunk& chunk, int64_t index) {
      double* mine = partials + 3 * index;
      mine[0] = mine[1] = mine[2] = 0;
      const Operands<scalar_t> operands(table, climb, chunk);
      const bool takes_part =
          climbing ? table.has(kBackup, chunk.tensor) : climb.y == kNothing || operands.other != nullptr;
      if (operands.x == nullptr || !takes_part) return;
      const scalar_t* param = table.pointer<scalar_t>(kParam, chunk.tensor) + chunk.start;
      const double* weights = climb.weights + kWeightColumns * chunk.tensor;
      with_form(climb.map, operands.second, [&]<Map map, Second second>() {
        sum_products<map, second>(operands.x, param, operands.other, chunk.length, weights[kMapScale],
                                  weights[kMapTerm], mine);
      });
    });
  });
  std::fill(result, result + 3 * table.tensor_count, 0.0);
  for (int64_t i = 0; i < table.chunk_count; ++i) {
    double* sums = result + 3 * read_chunk(table, i).tensor;
    for (int64_t product = 0; product < 3; ++product) sums[product] += partials[3 * i + product];
  }
}

void perturb_by_(const TensorTable& table, ScalarType dtype, const Climb& form) {
  const bool again = form.y == kDistance;
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const bool stream = should_stream(table, sizeof(scalar_t));
    // Backward: what the dots read last is still in the cache.
    for_each_chunk(table, Order::kBackward, [&](const Chunk& chunk, int64_t) {
      if (!table.has(kBackup, chunk.tensor)) return;
      scalar_t* param = table.pointer<scalar_t>(kParam, chunk.tensor) + chunk.start;
      scalar_t* backup = table.pointer<scalar_t>(kBackup, chunk.tensor) + chunk.start;
      const Operands<scalar_t> operands(table, form, chunk);
      const double* weights = form.weights + kWeightColumns * chunk.tensor;
      const bool stays = weights[kWeightA] == 0 && weights[kWeightB] == (again ? 1 : 0);
      for_each_block(chunk.length, [&](int64_t start, int64_t length) {
        if (!again) store_block(backup + start, param + start, length * sizeof(scalar_t), stream);
        if (operands.x == nullptr || stays) return;
        with_form(form.map, operands.second, [&]<Map map, Second second>() {
          const scalar_t* other = operands.other == nullptr ? nullptr : operands.other + start;
          climb<map, second>(param + start, backup + start, operands.x + start, other, length, weights);
        });
      });
    });
  });
}

}  // namespace fastsam::cpu
