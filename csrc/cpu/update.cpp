// restore_and_update_ on the CPU: w <- update(backup, A * x + B * y, state) in one pass.
#include <array>
#include <cmath>
#include <type_traits>

#include "forms.h"
#include "operations.h"

namespace fastsam::cpu {
namespace {

// ---- loops over one block ----

template <typename scalar_t>
using Slots = std::array<scalar_t*, kStateSlots>;

template <int kSlots, typename scalar_t, typename Step, typename Rounding>
FASTSAM_MULTIVERSION void update_weights(scalar_t* __restrict__ result, const scalar_t* __restrict__ param,
                                         const scalar_t* __restrict__ grad, scalar_t* __restrict__ slot0,
                                         scalar_t* __restrict__ slot1, scalar_t* __restrict__ slot2, int64_t length,
                                         const Step step, Rounding rounding) {
  using T = opmath_t<scalar_t>;
  for (int64_t i = 0; i < length; ++i) {
    const T w = static_cast<T>(param[i]);
    T state0 = 0, state1 = 0, state2 = 0;
    if constexpr (kSlots > 0) state0 = static_cast<T>(slot0[i]);
    if constexpr (kSlots > 1) state1 = static_cast<T>(slot1[i]);
    if constexpr (kSlots > 2) state2 = static_cast<T>(slot2[i]);
    const T advanced = step.template advance<kSlots>(w, static_cast<T>(grad[i]), state0, state1, state2);
    if constexpr (kSlots > 0) slot0[i] = rounding(state0, 1, i);
    if constexpr (kSlots > 1) slot1[i] = rounding(state1, 2, i);
    if constexpr (kSlots > 2) slot2[i] = rounding(state2, 3, i);
    result[i] = rounding(step.apply(w, state0, advanced), 0, i);
  }
}

// Which state a tensor has says which update it is: SGD's with or without momentum, Adam's with or without amsgrad. The
// block's state begins at `start`.
template <typename scalar_t, typename T, typename Rounding>
void update_block(scalar_t* result, const scalar_t* param, const scalar_t* grad, const Slots<scalar_t>& state,
                  int64_t start, int64_t length, const SgdStep<T>& step, const Rounding& rounding) {
  scalar_t* const none = nullptr;
  if (state[0] == nullptr) {
    update_weights<0>(result, param, grad, none, none, none, length, step, rounding);
  } else {
    update_weights<1>(result, param, grad, state[0] + start, none, none, length, step, rounding);
  }
}

template <typename scalar_t, typename T, typename Rounding>
void update_block(scalar_t* result, const scalar_t* param, const scalar_t* grad, const Slots<scalar_t>& state,
                  int64_t start, int64_t length, const AdamStep<T>& step, const Rounding& rounding) {
  scalar_t* const none = nullptr;
  scalar_t *const exp_avg = state[0] + start, *const exp_avg_sq = state[1] + start;
  if (state[2] == nullptr) {
    update_weights<2>(result, param, grad, exp_avg, exp_avg_sq, none, length, step, rounding);
  } else {
    update_weights<3>(result, param, grad, exp_avg, exp_avg_sq, state[2] + start, length, step, rounding);
  }
}

// result <- a * x + b * y
template <typename T>
FASTSAM_MULTIVERSION void combine(T* __restrict__ result, const T* x, const T* y, int64_t length, T a, T b) {
  for (int64_t i = 0; i < length; ++i) result[i] = times(a, x[i]) + times(b, y[i]);
}

// result <- of_x * x + of_first * first + of_state * state
template <typename T>
FASTSAM_MULTIVERSION void keep(T* __restrict__ result, const T* x, const T* first, const T* state, int64_t length,
                               T of_x, T of_first, T of_state) {
  for (int64_t i = 0; i < length; ++i) {
    result[i] = times(of_x, x[i]) + times(of_first, first[i]) + times(of_state, state[i]);
  }
}

// ---- the descent's form in one chunk ----

// What takes the gradient's place. Of a tensor that has not all that the form names, it is the gradient.
template <typename scalar_t>
struct Direction {
  using T = opmath_t<scalar_t>;
  Elements<scalar_t> x, y, first_grad, method_state;
  DescentCoefficients of{1, 0, 0, 0, 1, 0, 0};
  bool takes_part = false, keeps = false, decoupled = false;

  Direction(const TensorTable& table, const Descent* descent, const Chunk& chunk) : x(table, kGrad, chunk) {
    if (descent == nullptr || !x) return;
    y = Elements<scalar_t>(table, descent->y, chunk);
    first_grad = Elements<scalar_t>(table, kFirstGrad, chunk);
    method_state = Elements<scalar_t>(table, kMethodState, chunk);
    takes_part = (descent->y == kNone || y) && (!descent->keeps || (first_grad && method_state));
    if (!takes_part) return;
    of = descent->coefficients[chunk.tensor];
    keeps = descent->keeps, decoupled = descent->decoupled;
  }

  // One block: what is read of it. Nothing is written before all of it is made.
  struct Block {
    alignas(64) T x_buffer[kBlock], y_buffer[kBlock], direction[kBlock], shift[kBlock];
    const T *x, *y;
  };

  // The gradient's place; scratch for it is in the block.
  const T* direction(Block& block, int64_t start, int64_t length) const {
    block.x = x.load(block.x_buffer, start, length);
    if (!takes_part) return block.x;
    block.y = y ? y.load(block.y_buffer, start, length) : block.x;
    combine(block.direction, block.x, block.y, length, static_cast<T>(of.a), second(of.b));
    return block.direction;
  }

  // What w moves by past the base.
  const T* shift(Block& block, int64_t length) const {
    combine(block.shift, block.x, block.y, length, static_cast<T>(of.decoupled_x), second(of.decoupled_y));
    return block.shift;
  }

  // The method's state follows; after direction() and shift(), which may read it.
  template <typename Rounding>
  void keep_state(const Block& block, int64_t start, int64_t length, const Rounding& rounding) const {
    if (!keeps) return;
    alignas(64) T first_buffer[kBlock], state_buffer[kBlock], kept[kBlock];
    // Read in bursts with much between them, which the hardware prefetcher does not follow.
    first_grad.prefetch(start);
    method_state.prefetch(start);
    keep(kept, block.x, first_grad.load(first_buffer, start, length), method_state.load(state_buffer, start, length),
         length, static_cast<T>(of.keep_x), static_cast<T>(of.keep_first), static_cast<T>(of.keep_state));
    method_state.store(kept, start, length, 0, rounding);
  }

 private:
  T second(double coefficient) const { return y ? static_cast<T>(coefficient) : T(0); }
};

// ---- one chunk ----

template <typename scalar_t, typename Step, typename Rounding>
struct ChunkUpdate {
  using T = opmath_t<scalar_t>;
  const TensorTable& table;
  const Chunk& chunk;
  Step step;
  Rounding rounding;
  bool bypass_cache;

  // Plain SAM's. Without masters.
  void update_stored() const {
    const auto at = [&](int64_t row) {
      return table.has(row, chunk.tensor) ? table.template pointer<scalar_t>(row, chunk.tensor) + chunk.start : nullptr;
    };
    scalar_t* const param = at(kParam);
    const scalar_t *const backup = at(kBackup), *const source = backup != nullptr ? backup : param;
    const scalar_t* const grad = at(kGrad);
    const Slots<scalar_t> state{at(kState0), at(kState1), at(kState2)};
    for_each_block(chunk.length, [&](int64_t start, int64_t length) {
      alignas(64) scalar_t result[kBlock];
      update_block(result, source + start, grad + start, state, start, length, step, rounding.at(chunk.start + start));
      store_block(param + start, result, length * sizeof(scalar_t), bypass_cache);
    });
  }

  template <typename StateRounding>
  void update_loaded(const Direction<scalar_t>& direction, const StateRounding& state_rounding) const {
    const Row origin = table.has_masters ? kMaster : table.has(kBackup, chunk.tensor) ? kBackup : kParam;
    const Elements<scalar_t> param(table, kParam, chunk), source(table, origin, chunk);
    std::array<Elements<scalar_t>, kStateSlots> state;
    // A table may have more rows than this base has state.
    for (int k = 0; k < Step::kMostSlots; ++k) state[k] = Elements<scalar_t>(table, kState0 + k, chunk);
    for_each_block(chunk.length, [&](int64_t start, int64_t length) {
      typename Direction<scalar_t>::Block block;
      alignas(64) T buffers[kStateSlots + 1][kBlock], result[kBlock];
      const auto here = rounding.at(chunk.start + start);
      follow_param(param, source, start, length);
      Slots<T> slots{};
      for (int k = 0; k < kStateSlots; ++k) {
        if (state[k]) slots[k] = state[k].load(buffers[k], start, length);
      }
      const T* grad = direction.direction(block, start, length);
      update_block(result, source.load(buffers[kStateSlots], start, length), grad, slots, 0, length, step,
                   Nearest<T>{});
      if (direction.decoupled) subtract(result, result, direction.shift(block, length), length);
      direction.keep_state(block, start, length, state_rounding.at(chunk.start + start));
      for (int k = 0; k < kStateSlots; ++k) {
        if (state[k]) state[k].store(slots[k], start, length, 1 + k, here);
      }
      store_weights(param, source, result, start, length, here);
    });
  }

 private:
  // A master that was not perturbed follows its parameter first.
  void follow_param(const Elements<scalar_t>& param, const Elements<scalar_t>& master, int64_t start,
                    int64_t length) const {
    if constexpr (kIsNarrow<scalar_t>) {
      if (table.has_masters && !table.has(kBackup, chunk.tensor)) {
        follow(master.load(nullptr, start, length), param.stored() + start, length);
      }
    }
  }

  template <typename Here>
  void store_weights(const Elements<scalar_t>& param, const Elements<scalar_t>& source, const T* result, int64_t start,
                     int64_t length, const Here& here) const {
    if constexpr (std::is_same_v<scalar_t, T>) {
      store_block(param.stored() + start, result, length * sizeof(scalar_t), bypass_cache);
    } else {
      alignas(64) scalar_t rounded[kBlock];
      if (table.has_masters) source.store(result, start, length, 0, here);
      round_block<scalar_t>(rounded, result, length, 0, here);
      store_block(param.stored() + start, rounded, length * sizeof(scalar_t), bypass_cache);
    }
  }
};

template <typename T>
SgdStep<T> make_step(const SgdOptions& options, float count, double inv_grad_scale) {
  return {options, inv_grad_scale, count == 0};
}

template <typename T>
AdamStep<T> make_step(const AdamOptions& options, float count, double inv_grad_scale) {
  const double next = static_cast<double>(count) + 1.0;
  return {options, std::pow(options.beta1, next), std::pow(options.beta2, next), inv_grad_scale};
}

// Every chunk, by the algorithm that the options are of.
template <typename scalar_t, typename Options, typename RoundingFor, typename StateRoundingFor>
void update_chunks(const TensorTable& table, const Options* options, double inv_grad_scale, const Descent* descent,
                   const RoundingFor& rounding_for, const StateRoundingFor& state_rounding_for) {
  using T = opmath_t<scalar_t>;
  const bool bypass_cache = should_bypass_cache(table, sizeof(scalar_t));
  for_each_chunk(table, Order::kForward, {{kGrad}, sizeof(scalar_t)}, [&](const Chunk& chunk, int64_t) {
    const int64_t tensor = chunk.tensor;
    if (!table.has(kGrad, tensor)) return restore_chunk<scalar_t>(table, chunk, bypass_cache);
    const Options& group = options[table.groups[tensor]];
    const auto step = make_step<T>(group, table.step(tensor), inv_grad_scale);
    const auto rounding = rounding_for(tensor, group.rounding_seed);
    const ChunkUpdate<scalar_t, std::decay_t<decltype(step)>, std::decay_t<decltype(rounding)>> mine{
        table, chunk, step, rounding, bypass_cache};
    if (descent == nullptr && !table.has_masters) return mine.update_stored();
    const Direction<scalar_t> direction(table, descent, chunk);
    if (!table.has_masters && !direction.takes_part) return mine.update_stored();
    mine.update_loaded(direction, state_rounding_for(tensor, group.rounding_seed));
  });
}

template <typename Options>
void restore_and_update(const TensorTable& table, ScalarType dtype, const Options* options, double inv_grad_scale,
                        const Descent* descent) {
  constexpr int kResults = std::is_same_v<Options, SgdOptions> ? 2 : 4;
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    TensorTable mine = table;
    // Masters and state beside them are float32; the parameters are their masters' nearest.
    if (table.has_masters) mine.positions = nullptr;
    with_rounding<scalar_t, kWeightDraw, kResults>(mine, [&](const auto& rounding_for) {
      with_rounding<scalar_t, kMethodStateDraw, 1>(mine, [&](const auto& state_rounding_for) {
        update_chunks<scalar_t>(mine, options, inv_grad_scale, descent, rounding_for, state_rounding_for);
      });
    });
  });
}

// The base's own step follows: w <- backup, and what it reads becomes the descent's direction.
void restore_and_prepare(const TensorTable& table, ScalarType dtype, const Descent* descent) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    using T = opmath_t<scalar_t>;
    constexpr Nearest<scalar_t> nearest;
    const bool bypass_cache = should_bypass_cache(table, sizeof(scalar_t));
    for_each_chunk(table, Order::kForward, {{kGrad}, sizeof(scalar_t)}, [&](const Chunk& chunk, int64_t) {
      restore_chunk<scalar_t>(table, chunk, bypass_cache);
      const Direction<scalar_t> direction(table, descent, chunk);
      if (!direction.takes_part) return;
      for_each_block(chunk.length, [&](int64_t start, int64_t length) {
        typename Direction<scalar_t>::Block block;
        const T* grad = direction.direction(block, start, length);
        const T* shift = direction.decoupled ? direction.shift(block, length) : nullptr;
        direction.keep_state(block, start, length, nearest);
        if (shift != nullptr) direction.first_grad.store(shift, start, length, 0, nearest);
        direction.x.store(grad, start, length, 0, nearest);
      });
    });
  });
}

void advance_steps(const TensorTable& table) {
  for (int64_t tensor = 0; tensor < table.tensor_count; ++tensor) {
    if (table.has(kGrad, tensor) && table.has(kStep, tensor)) *table.pointer<float>(kStep, tensor) += 1;
  }
}

}  // namespace

void restore_and_update_(const TensorTable& table, ScalarType dtype, Update update, const void* options,
                         double inv_grad_scale, const Descent* descent) {
  switch (update) {
    case Update::kNone:
      return restore_and_prepare(table, dtype, descent);
    case Update::kSgd:
      restore_and_update(table, dtype, static_cast<const SgdOptions*>(options), inv_grad_scale, descent);
      break;
    case Update::kAdam:
      restore_and_update(table, dtype, static_cast<const AdamOptions*>(options), inv_grad_scale, descent);
      break;
  }
  advance_steps(table);
}

}  // namespace fastsam::cpu
