// restore_and_sgd_ and restore_and_adam_ on CUDA: w <- update(backup, g, state) in one pass.
#include "launch.cuh"
#include "multi_tensor.cuh"
#include "operations.h"
#include "power.cuh"
#include "restore.cuh"

namespace fastsam::cuda {
namespace {

// Functors read w (or its backup), the gradient and the state, and write w and the state. The gradient, the backup and
// the state are not read again before the next step; w is, by the next forward pass.
template <typename scalar_t, bool kMomentum>
struct SgdFunctor {
  static constexpr int kReads = kMomentum ? 3 : 2, kWrites = kMomentum ? 2 : 1;
  static constexpr unsigned kStreamedReads = ~0u, kStreamedWrites = ~1u;
  SgdStep<opmath_t<scalar_t>> step;

  __device__ void operator()(const scalar_t (&read)[kReads], scalar_t (&written)[kWrites]) const {
    using T = opmath_t<scalar_t>;
    const T param = static_cast<T>(read[0]), grad = static_cast<T>(read[1]);
    if constexpr (kMomentum) {
      T momentum_buffer = static_cast<T>(read[2]);
      written[0] = static_cast<scalar_t>(step.update(param, grad, momentum_buffer));
      written[1] = static_cast<scalar_t>(momentum_buffer);
    } else {
      written[0] = static_cast<scalar_t>(step.update(param, grad));
    }
  }
};

template <typename scalar_t, bool kAmsgrad>
struct AdamFunctor {
  static constexpr int kReads = kAmsgrad ? 5 : 4, kWrites = kAmsgrad ? 4 : 3;
  static constexpr unsigned kStreamedReads = ~0u, kStreamedWrites = ~1u;
  AdamStep<opmath_t<scalar_t>> step;

  __device__ void operator()(const scalar_t (&read)[kReads], scalar_t (&written)[kWrites]) const {
    using T = opmath_t<scalar_t>;
    const T param = static_cast<T>(read[0]);
    T exp_avg = static_cast<T>(read[2]), exp_avg_sq = static_cast<T>(read[3]);
    step.moments(param, static_cast<T>(read[1]), exp_avg, exp_avg_sq);
    T second_moment = exp_avg_sq;
    if constexpr (kAmsgrad) {
      second_moment = step.larger(static_cast<T>(read[4]), exp_avg_sq);
      written[3] = static_cast<scalar_t>(second_moment);
    }
    written[0] = static_cast<scalar_t>(step.update(param, exp_avg, second_moment));
    written[1] = static_cast<scalar_t>(exp_avg);
    written[2] = static_cast<scalar_t>(exp_avg_sq);
  }
};

// Where one chunk of a tensor that is updated lies.
template <typename scalar_t>
struct Place {
  scalar_t* param;
  const scalar_t* source;  // the backup of what has climbed
  const scalar_t* grad;
  scalar_t* state[3];
};

template <typename scalar_t>
__device__ __forceinline__ void update_chunk(const SgdStep<opmath_t<scalar_t>>& step, const Place<scalar_t>& at,
                                             int length) {
  if (at.state[0] == nullptr) {
    const SgdFunctor<scalar_t, false> functor{step};
    return walk(functor, Operands<scalar_t, 2, 1>{{at.source, at.grad}, {at.param}}, length);
  }
  const SgdFunctor<scalar_t, true> functor{step};
  walk(functor, Operands<scalar_t, 3, 2>{{at.source, at.grad, at.state[0]}, {at.param, at.state[0]}}, length);
}

template <typename scalar_t>
__device__ __forceinline__ void update_chunk(const AdamStep<opmath_t<scalar_t>>& step, const Place<scalar_t>& at,
                                             int length) {
  scalar_t *exp_avg = at.state[0], *exp_avg_sq = at.state[1], *max_exp_avg_sq = at.state[2];
  if (max_exp_avg_sq == nullptr) {
    const AdamFunctor<scalar_t, false> functor{step};
    return walk(functor,
                Operands<scalar_t, 4, 3>{{at.source, at.grad, exp_avg, exp_avg_sq}, {at.param, exp_avg, exp_avg_sq}},
                length);
  }
  const AdamFunctor<scalar_t, true> functor{step};
  walk(functor,
       Operands<scalar_t, 5, 4>{{at.source, at.grad, exp_avg, exp_avg_sq, max_exp_avg_sq},
                                {at.param, exp_avg, exp_avg_sq, max_exp_avg_sq}},
       length);
}

__device__ inline double inverse_scale(const float* grad_scale) {
  return grad_scale == nullptr ? 1 : 1.0 / *grad_scale;
}

// What is the same for all elements of a chunk.
template <typename T>
__device__ __forceinline__ SgdStep<T> make_step(const SgdOptions& options, double steps_before, double inv_grad_scale) {
  return {options, inv_grad_scale, steps_before == 0};
}

template <typename T>
__device__ __forceinline__ double power_for(double beta, double step) {
  return std::is_same_v<T, double> ? whole_power(beta, static_cast<int64_t>(step)) : pow(beta, step);
}

template <typename T>
__device__ __forceinline__ AdamStep<T> make_step(const AdamOptions& options, double steps_before,
                                                 double inv_grad_scale) {
  const double step = steps_before + 1.0;
  return {options, power_for<T>(options.beta1, step), power_for<T>(options.beta2, step), inv_grad_scale};
}

// One more update for every tensor of the launch that has a gradient.
template <typename Arguments>
__device__ __forceinline__ void advance_steps(const Arguments& args) {
  for (int64_t i = threadIdx.x; i < args.launch.tensor_count; i += kThreads) {
    if (args.grads[i] != 0) args.extra.steps[args.launch.first_tensor + i] += 1;
  }
}

template <typename scalar_t, typename Options, int64_t kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocks)
    restore_and_update_kernel(const __grid_constant__ Arguments<Update, kCapacity> args) {
  const DeviceTable& table = args.table;
  const Update& update = args.extra;
  const DeviceChunk chunk = read_chunk(table, args.launch, blockIdx.x);
  const bool commits = update.found_inf == nullptr || *update.found_inf == 0;
  const auto step = once_per_block([&] {
    return make_step<opmath_t<scalar_t>>(read_options<Options>(update.options, chunk.group), update.steps[chunk.tensor],
                                         inverse_scale(update.grad_scale));
  });
  // The first thread, which read the count, has drawn its ticket since: when all have, the counts may change.
  const Ticket ticket(update.finished);
  const auto* grad = element_pointer<scalar_t>(args.grads[chunk.tensor - args.launch.first_tensor], chunk);
  if (grad == nullptr || !commits) {
    restore_chunk<scalar_t>(table, chunk);
  } else {
    auto* param = element_pointer<scalar_t>(table, kParam, chunk);
    const auto* backup = element_pointer<scalar_t>(table, kBackup, chunk);
    const Place<scalar_t> place{
        param,
        backup == nullptr ? param : backup,
        grad,
        {element_pointer<scalar_t>(table, kState0, chunk), element_pointer<scalar_t>(table, kState1, chunk),
         element_pointer<scalar_t>(table, kState2, chunk)}};
    update_chunk(step, place, chunk.length);
  }
  if (ticket.is_last() && commits) advance_steps(args);
}

template <typename Options>
void launch_update(const Call& call, const char* operation, const Update& update) {
  dispatch(call.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    launch_over_tensors(call, operation, Order::kForward, update, [](auto capacity) {
      return &restore_and_update_kernel<scalar_t, Options, decltype(capacity)::value>;
    });
  });
}

}  // namespace

void restore_and_sgd_(const Call& call, const Update& update) {
  launch_update<SgdOptions>(call, "restore_and_sgd_", update);
}

void restore_and_adam_(const Call& call, const Update& update) {
  launch_update<AdamOptions>(call, "restore_and_adam_", update);
}

}  // namespace fastsam::cuda
