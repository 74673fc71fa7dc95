// restore_and_sgd_ and restore_and_adam_ on the CPU: w <- update(backup, g, state) in one pass.
#include <cmath>
#include <type_traits>

#include "masters.h"
#include "multi_tensor.h"
#include "operations.h"

namespace fastsam::cpu {
namespace {

// value_t: of gradients and results, scalar_t; or opmath_t where they are not a tensor's, but of a combination.
template <typename scalar_t, typename value_t, typename Rounding>
FASTSAM_HOST_DEVICE value_t stored(opmath_t<scalar_t> weight, const Rounding& rounding, int64_t i) {
  if constexpr (std::is_same_v<value_t, scalar_t>) {
    return rounding(weight, 0, i);
  } else {
    return weight;
  }
}

template <typename scalar_t, typename value_t, typename Rounding>
FASTSAM_MULTIVERSION void sgd(value_t* __restrict__ result, const scalar_t* __restrict__ param,
                              const value_t* __restrict__ grad, int64_t length, const SgdStep<opmath_t<scalar_t>> step,
                              Rounding rounding) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = 0; i < length; ++i) {
    result[i] = stored<scalar_t, value_t>(step.update(static_cast<T>(param[i]), static_cast<T>(grad[i])), rounding, i);
  }
}

template <typename scalar_t, typename value_t, typename Rounding>
FASTSAM_MULTIVERSION void sgd_momentum(value_t* __restrict__ result, const scalar_t* __restrict__ param,
                                       const value_t* __restrict__ grad, scalar_t* __restrict__ momentum_buffer,
                                       int64_t length, const SgdStep<opmath_t<scalar_t>> step, Rounding rounding) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = 0; i < length; ++i) {
    T buffer = static_cast<T>(momentum_buffer[i]);
    result[i] =
        stored<scalar_t, value_t>(step.update(static_cast<T>(param[i]), static_cast<T>(grad[i]), buffer), rounding, i);
    momentum_buffer[i] = rounding(buffer, 1, i);
  }
}

template <typename scalar_t, typename value_t, typename Rounding>
FASTSAM_MULTIVERSION void adam(value_t* __restrict__ result, const scalar_t* __restrict__ param,
                               const value_t* __restrict__ grad, scalar_t* __restrict__ exp_avg,
                               scalar_t* __restrict__ exp_avg_sq, int64_t length,
                               const AdamStep<opmath_t<scalar_t>> step, Rounding rounding) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = 0; i < length; ++i) {
    const T w = static_cast<T>(param[i]);
    T mean = static_cast<T>(exp_avg[i]), square = static_cast<T>(exp_avg_sq[i]);
    step.moments(w, static_cast<T>(grad[i]), mean, square);
    exp_avg[i] = rounding(mean, 1, i);
    exp_avg_sq[i] = rounding(square, 2, i);
    result[i] = stored<scalar_t, value_t>(step.update(w, mean, square), rounding, i);
  }
}

template <typename scalar_t, typename value_t, typename Rounding>
FASTSAM_MULTIVERSION void amsgrad(value_t* __restrict__ result, const scalar_t* __restrict__ param,
                                  const value_t* __restrict__ grad, scalar_t* __restrict__ exp_avg,
                                  scalar_t* __restrict__ exp_avg_sq, scalar_t* __restrict__ max_exp_avg_sq,
                                  int64_t length, const AdamStep<opmath_t<scalar_t>> step, Rounding rounding) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = 0; i < length; ++i) {
    const T w = static_cast<T>(param[i]);
    T mean = static_cast<T>(exp_avg[i]), square = static_cast<T>(exp_avg_sq[i]);
    step.moments(w, static_cast<T>(grad[i]), mean, square);
    const T largest = step.larger(static_cast<T>(max_exp_avg_sq[i]), square);
    exp_avg[i] = rounding(mean, 1, i);
    exp_avg_sq[i] = rounding(square, 2, i);
    max_exp_avg_sq[i] = rounding(largest, 3, i);
    result[i] = stored<scalar_t, value_t>(step.update(w, mean, largest), rounding, i);
  }
}

// A tensor's part in a combination. What has not all that the form names keeps its gradient: a is 1, b is 0.
template <typename scalar_t>
struct Combined {
  using T = opmath_t<scalar_t>;
  T a = 1, b = 0, keep_x = 0, keep_taken = 0, keep_kept = 1, extra_x = 0, extra_y = 0;
  const scalar_t* y = nullptr;
  const scalar_t* taken = nullptr;
  scalar_t* kept = nullptr;

  Combined(const TensorTable& table, const Descent& descent, const Chunk& chunk) {
    const auto at = [&](Role role) {
      scalar_t* first = table.pointer<scalar_t>(role, chunk.tensor);
      return first == nullptr ? nullptr : first + chunk.start;
    };
    const scalar_t* second = descent.y == kNothing ? nullptr : at(static_cast<Role>(descent.y));
    const bool has_kept = at(kTaken) != nullptr && at(kKept) != nullptr;
    if ((descent.y != kNothing && second == nullptr) || (descent.keeps && !has_kept)) return;
    const double* weights = descent.weights + kWeightColumns * chunk.tensor;
    a = static_cast<T>(weights[kWeightA]);
    if (second != nullptr) {
      y = second;
      b = static_cast<T>(weights[kWeightB]);
    }
    if (descent.keeps) {
      taken = at(kTaken), kept = at(kKept);
      keep_x = static_cast<T>(weights[kKeepX]);
      keep_taken = static_cast<T>(weights[kKeepTaken]);
      keep_kept = static_cast<T>(weights[kKeepKept]);
    }
    if (descent.decoupled) {
      extra_x = static_cast<T>(weights[kExtraX]);
      extra_y = static_cast<T>(weights[kExtraY]);
    }
  }
};

// result <- a * x + b * y
template <typename scalar_t, typename T>
FASTSAM_MULTIVERSION void combine(T* __restrict__ result, const scalar_t* x, const scalar_t* y, int64_t length, T a,
                                  T b) {
  for (int64_t i = 0; i < length; ++i) {
    result[i] = times(a, static_cast<T>(x[i])) + times(b, static_cast<T>(y[i]));
  }
}

template <typename scalar_t>
FASTSAM_MULTIVERSION void keep(const scalar_t* __restrict__ x, const scalar_t* __restrict__ taken,
                               scalar_t* __restrict__ kept, int64_t length, opmath_t<scalar_t> of_x,
                               opmath_t<scalar_t> of_taken, opmath_t<scalar_t> of_kept) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = 0; i < length; ++i) {
    kept[i] = static_cast<scalar_t>(times(of_x, static_cast<T>(x[i])) + times(of_taken, static_cast<T>(taken[i])) +
                                    times(of_kept, static_cast<T>(kept[i])));
  }
}

// result <- param - extra, rounded
template <typename scalar_t, typename T>
FASTSAM_MULTIVERSION void go_beyond(scalar_t* __restrict__ result, const T* __restrict__ param,
                                    const T* __restrict__ extra, int64_t length) {
  for (int64_t i = 0; i < length; ++i) result[i] = static_cast<scalar_t>(param[i] - extra[i]);
}

// One block to come. What lies behind a tensor is not read.
template <typename scalar_t>
void prefetch(const scalar_t* next) {
  for (int64_t i = 0; i < kBlock; i += 64 / sizeof(scalar_t)) __builtin_prefetch(next + i);
}

// One block of an update that takes a combination in the gradient's place.
template <typename scalar_t, typename Block>
void update_block(scalar_t* result, const Combined<scalar_t>& combined, const Block& block, const scalar_t* source,
                  const scalar_t* x, int64_t element, int64_t start, int64_t length) {
  using T = opmath_t<scalar_t>;
  alignas(64) T direction[kBlock], updated[kBlock], extra[kBlock];
  const scalar_t* y = combined.y == nullptr ? x : combined.y + start;
  combine(direction, x, y, length, combined.a, combined.b);
  block(updated, source, direction, element, length);
  combine(extra, x, y, length, combined.extra_x, combined.extra_y);
  go_beyond(result, updated, extra, length);
  if (combined.kept != nullptr) {
    // Streams that are visited in bursts, with much between them: the hardware gives them up.
    prefetch(combined.taken + start + kBlock);
    prefetch(combined.kept + start + kBlock);
    keep(x, combined.taken + start, combined.kept + start, length, combined.keep_x, combined.keep_taken,
         combined.keep_kept);
  }
}

// Restores what has no gradient; hands every other block to update(chunk, rounding_for)(result, param, grad, element,
// length), and stores its result.
template <typename scalar_t, typename Update>
void update_chunks(const TensorTable& table, const Descent* descent, const Update& update) {
  const bool stream = should_stream(table, sizeof(scalar_t));
  for_each_chunk(table, Order::kForward, [&](const Chunk& chunk, int64_t) {
    if (!table.has(kGrad, chunk.tensor)) return restore_chunk<scalar_t>(table, chunk, stream);
    scalar_t* param = table.pointer<scalar_t>(kParam, chunk.tensor) + chunk.start;
    const bool climbed = table.has(kBackup, chunk.tensor);
    const scalar_t* source = climbed ? table.pointer<scalar_t>(kBackup, chunk.tensor) + chunk.start : param;
    const scalar_t* grad = table.pointer<scalar_t>(kGrad, chunk.tensor) + chunk.start;
    const auto block = update(chunk);
    if (descent != nullptr) {
      const Combined<scalar_t> combined(table, *descent, chunk);
      for_each_block(chunk.length, [&](int64_t start, int64_t length) {
        alignas(64) scalar_t result[kBlock];
        update_block(result, combined, block, source + start, grad + start, chunk.start + start, start, length);
        store_block(param + start, result, length * sizeof(scalar_t), stream);
      });
      return;
    }
    for_each_block(chunk.length, [&](int64_t start, int64_t length) {
      alignas(64) scalar_t result[kBlock];
      block(result, source + start, grad + start, chunk.start + start, length);
      store_block(param + start, result, length * sizeof(scalar_t), stream);
    });
  });
}

// The same for fp32 masters: `update` is that of fp32 parameters. The parameters themselves are rounded from them.
template <typename scalar_t, typename Update>
void update_masters(const TensorTable& table, const Update& update) {
  const bool stream = should_stream(table, sizeof(scalar_t));
  for_each_chunk(table, Order::kForward, [&](const Chunk& chunk, int64_t) {
    if (!table.has(kGrad, chunk.tensor)) return restore_chunk<scalar_t>(table, chunk, stream);
    scalar_t* param = table.pointer<scalar_t>(kParam, chunk.tensor) + chunk.start;
    float* master = table.pointer<float>(kMaster, chunk.tensor) + chunk.start;
    const scalar_t* grad = table.pointer<scalar_t>(kGrad, chunk.tensor) + chunk.start;
    const bool climbed = table.has(kBackup, chunk.tensor);
    const auto block = update(chunk);
    for_each_block(chunk.length, [&](int64_t start, int64_t length) {
      alignas(64) float result[kBlock], wide_grad[kBlock];
      alignas(64) scalar_t rounded[kBlock];
      if (!climbed) follow(master + start, param + start, length);
      convert(wide_grad, grad + start, length);
      block(result, master + start, wide_grad, chunk.start + start, length);
      std::memcpy(master + start, result, length * sizeof(float));
      convert(rounded, result, length);
      store_block(param + start, rounded, length * sizeof(scalar_t), stream);
    });
  });
}

// make_update(stored_t{}, rounding_for) is an `update` for weights and state of type stored_t.
template <int kResults, typename MakeUpdate>
void restore_and_update(const TensorTable& table, ScalarType dtype, const float* steps, const Descent* descent,
                        const MakeUpdate& make_update) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    if constexpr (kIsNarrow<scalar_t>) {
      if (table.has_masters) {
        return update_masters<scalar_t>(table,
                                        make_update(float{}, [](int64_t, uint32_t) { return Nearest<float>{}; }));
      }
    }
    with_rounding<scalar_t, kResults>(table, steps, kUpdateDraw, [&](const auto& rounding_for) {
      update_chunks<scalar_t>(table, descent, make_update(scalar_t{}, rounding_for));
    });
  });
}

void advance_steps(const TensorTable& table, float* steps) {
  for (int64_t tensor = 0; tensor < table.tensor_count; ++tensor) {
    if (table.has(kGrad, tensor)) steps[tensor] += 1;
  }
}

}  // namespace

void restore_and_sgd_(const TensorTable& table, ScalarType dtype, const SgdOptions* options, float* steps,
                      double inv_grad_scale, const Descent* descent) {
  restore_and_update<2>(table, dtype, steps, descent, [&](auto type, const auto& rounding_for) {
    using stored_t = decltype(type);
    return [&](const Chunk& chunk) {
      const SgdOptions& group = options[table.groups[chunk.tensor]];
      const SgdStep<opmath_t<stored_t>> step(group, inv_grad_scale, steps[chunk.tensor] == 0);
      const auto rounding = rounding_for(chunk.tensor, group.rounding_seed);
      auto* momentum_buffer = table.pointer<stored_t>(kState0, chunk.tensor);
      return [=](auto* result, const stored_t* param, const auto* grad, int64_t element, int64_t length) {
        if (momentum_buffer == nullptr) {
          sgd(result, param, grad, length, step, rounding.at(element));
        } else {
          sgd_momentum(result, param, grad, momentum_buffer + element, length, step, rounding.at(element));
        }
      };
    };
  });
  advance_steps(table, steps);
}

void restore_and_adam_(const TensorTable& table, ScalarType dtype, const AdamOptions* options, float* steps,
                       double inv_grad_scale, const Descent* descent) {
  restore_and_update<4>(table, dtype, steps, descent, [&](auto type, const auto& rounding_for) {
    using stored_t = decltype(type);
    return [&](const Chunk& chunk) {
      const AdamOptions& group = options[table.groups[chunk.tensor]];
      const double count = static_cast<double>(steps[chunk.tensor]) + 1.0;
      const AdamStep<opmath_t<stored_t>> step(group, std::pow(group.beta1, count), std::pow(group.beta2, count),
                                              inv_grad_scale);
      const auto rounding = rounding_for(chunk.tensor, group.rounding_seed);
      auto* exp_avg = table.pointer<stored_t>(kState0, chunk.tensor);
      auto* exp_avg_sq = table.pointer<stored_t>(kState1, chunk.tensor);
      auto* max_exp_avg_sq = table.pointer<stored_t>(kState2, chunk.tensor);
      return [=](auto* result, const stored_t* param, const auto* grad, int64_t element, int64_t length) {
        const auto here = rounding.at(element);
        if (max_exp_avg_sq == nullptr) {
          adam(result, param, grad, exp_avg + element, exp_avg_sq + element, length, step, here);
        } else {
          amsgrad(result, param, grad, exp_avg + element, exp_avg_sq + element, max_exp_avg_sq + element, length, step,
                  here);
        }
      };
    };
  });
  advance_steps(table, steps);
}

}  // namespace fastsam::cpu
