// grad_norm on the CPU: sums of squares in double, per chunk, then over the chunks in their order.
#include "multi_tensor.h"
#include "operations.h"

namespace fastsam::cpu {
namespace {

constexpr int64_t kLanes = 32;

// Many running sums, enough to hide the latency of an addition, in an order that no instruction set changes.
template <typename scalar_t>
FASTSAM_MULTIVERSION double sum_squares(const scalar_t* __restrict__ param, const scalar_t* __restrict__ grad,
                                        int64_t length, bool adaptive) {
  using T = opmath_t<scalar_t>;
  double sums[kLanes] = {};
  int64_t i = 0;
  if (adaptive) {
    for (; i + kLanes <= length; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] += norm_square(static_cast<T>(param[i + lane]), static_cast<T>(grad[i + lane]), true);
      }
    }
  } else {
    for (; i + kLanes <= length; i += kLanes) {
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        sums[lane] += norm_square(0, static_cast<T>(grad[i + lane]), false);
      }
    }
  }
  for (int64_t lane = 0; i < length; ++i, ++lane) {
    sums[lane] += norm_square(static_cast<T>(param[i]), static_cast<T>(grad[i]), adaptive);
  }
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace

double square_sum(const TensorTable& table, ScalarType dtype, const ClimbOptions* options, double* partials) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    for_each_chunk(table, Order::kForward, [&](const Chunk& chunk, int64_t index) {
      const bool climbs = table.has(kGrad, chunk.tensor) && table.has(kBackup, chunk.tensor);
      partials[index] = climbs ? sum_squares(table.pointer<scalar_t>(kParam, chunk.tensor) + chunk.start,
                                             table.pointer<scalar_t>(kGrad, chunk.tensor) + chunk.start, chunk.length,
                                             options[table.groups[chunk.tensor]].adaptive)
                               : 0;
    });
  });
  double total = 0;
  for (int64_t i = 0; i < table.chunk_count; ++i) total += partials[i];
  return total;
}

}  // namespace fastsam::cpu
