// perturb_ and restore_ on the CPU: backup <- w; w <- w + e(w), and back.
#include "multi_tensor.h"
#include "operations.h"

namespace fastsam::cpu {
namespace {

template <typename scalar_t>
FASTSAM_MULTIVERSION void climb(scalar_t* __restrict__ param, const scalar_t* __restrict__ grad, int64_t length,
                                opmath_t<scalar_t> scale, bool adaptive) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = 0; i < length; ++i) {
    param[i] = static_cast<scalar_t>(climbed<T>(static_cast<T>(param[i]), static_cast<T>(grad[i]), scale, adaptive));
  }
}

}  // namespace

void perturb_(const TensorTable& table, ScalarType dtype, const ClimbOptions* options, double norm) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const bool stream = should_stream(table, sizeof(scalar_t));
    // Backward: the gradients that the norm read last are still in the cache.
    for_each_chunk(table, Order::kBackward, [&](const Chunk& chunk, int64_t) {
      if (!table.has(kGrad, chunk.tensor) || !table.has(kBackup, chunk.tensor)) return;
      scalar_t* param = table.pointer<scalar_t>(kParam, chunk.tensor) + chunk.start;
      scalar_t* backup = table.pointer<scalar_t>(kBackup, chunk.tensor) + chunk.start;
      const scalar_t* grad = table.pointer<scalar_t>(kGrad, chunk.tensor) + chunk.start;
      const ClimbOptions& group = options[table.groups[chunk.tensor]];
      const auto scale = static_cast<opmath_t<scalar_t>>(climb_scale(norm, group));
      for_each_block(chunk.length, [&](int64_t start, int64_t length) {
        store_block(backup + start, param + start, length * sizeof(scalar_t), stream);
        // A zero scale selects: 0 * inf would be NaN.
        if (scale != 0) climb(param + start, grad + start, length, scale, group.adaptive);
      });
    });
  });
}

void restore_(const TensorTable& table, ScalarType dtype) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const bool stream = should_stream(table, sizeof(scalar_t));
    for_each_chunk(table, Order::kForward, [&](const Chunk& chunk, int64_t) {
      if (!table.has(kBackup, chunk.tensor)) return;
      store_block(table.pointer<scalar_t>(kParam, chunk.tensor) + chunk.start,
                  table.pointer<scalar_t>(kBackup, chunk.tensor) + chunk.start, chunk.length * sizeof(scalar_t),
                  stream);
    });
  });
}

}  // namespace fastsam::cpu
