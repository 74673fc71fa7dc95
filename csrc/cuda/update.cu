// restore_and_update_ on CUDA: w <- update(backup, g, state) in one pass.
#include "descent.cuh"
#include "launch.cuh"
#include "power.cuh"
#include "restore.cuh"
#include "rounding.cuh"

namespace fastsam::cuda {
namespace {

// ---- base updates: (w, gradient, state in kSlots slots) -> w and state ----

template <typename T>
struct SgdBase {
  static constexpr int kSlots = 1;  // momentum, if there is any
  using Options = SgdOptions;
  SgdStep<T> step;
  bool has_momentum;

  __device__ __forceinline__ static SgdBase make(const SgdOptions& options, double steps_before, double inv_grad_scale,
                                                 bool has_last_slot) {
    return {{options, inv_grad_scale, steps_before == 0}, has_last_slot};
  }

  __device__ __forceinline__ T update(T param, T grad, T (&state)[kSlots]) const {
    return has_momentum ? step.update(param, grad, state[0]) : step.update(param, grad);
  }
};

template <typename T>
__device__ __forceinline__ double power_for(double beta, double step) {
  return std::is_same_v<T, double> ? whole_power(beta, static_cast<int64_t>(step)) : pow(beta, step);
}

template <typename T>
struct AdamBase {
  static constexpr int kSlots = 3;  // the last one with amsgrad
  using Options = AdamOptions;
  AdamStep<T> step;
  bool has_largest;

  __device__ __forceinline__ static AdamBase make(const AdamOptions& options, double steps_before,
                                                  double inv_grad_scale, bool has_last_slot) {
    const double step = steps_before + 1.0;
    return {{options, power_for<T>(options.beta1, step), power_for<T>(options.beta2, step), inv_grad_scale},
            has_last_slot};
  }

  __device__ __forceinline__ T update(T param, T grad, T (&state)[kSlots]) const {
    step.moments(param, grad, state[0], state[1]);
    state[2] = has_largest ? step.larger(state[2], state[1]) : state[1];
    return step.update(param, state[0], state[2]);
  }
};

// ---- the functor ----

// Results are numbered: the weights, the slots of the state, and what a method keeps.
constexpr int kMethodResult = kMethodStateDraw - kWeightDraw;

// What is kept from step to step, the method's state included, comes last of what is read and written. With masters it
// is wide, behind the master, and all of that is rounded to nearest.
template <typename scalar_t, typename Base, typename Rounding, bool kMasters, bool kDescent>
struct UpdateFunctor : FunctorTraits {
  static constexpr int kSlots = Base::kSlots, kKept = kSlots + kDescent, kGrads = kDescent ? 3 : 1;
  using Tensors = std::conditional_t<kMasters, Counts<1 + kGrads, 1, 1 + kKept + kDescent, 1 + kKept>,
                                     Counts<1 + kGrads + kKept, 1 + kKept>>;
  using T = opmath_t<scalar_t>;
  static constexpr bool kOptional = true;
  Base base;
  Rounding rounding;
  DescentStep<T> descent;
  bool is_perturbed, wide_y;

  // read: w (its backup, if it is perturbed; nothing, if its master is), the gradient, y, the first gradient, what is
  // kept; wide: the master, what is kept, y. written: w, what is kept; wide: the master, what is kept
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    const auto kept = [&](int k) {
      if constexpr (kMasters) return element.wide_read[1 + k];
      if constexpr (!kMasters) return static_cast<T>(element.read[1 + kGrads + k]);
    };
    const auto keep = [&](int k, T value, int result) {
      if constexpr (kMasters) {
        element.wide_written[1 + k] = value;
      } else {
        element.written[1 + k] = rounding(value, result, element.number);
      }
    };
    T w = static_cast<T>(element.read[0]), state[kSlots];
    if constexpr (kMasters)
      w = is_perturbed ? element.wide_read[0] : master_value(element.wide_read[0], element.read[0]);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) state[k] = kept(k);
    const T x = static_cast<T>(element.read[1]);
    if constexpr (kDescent) {
      T y = static_cast<T>(element.read[2]);
      if constexpr (kMasters) y = wide_y ? element.wide_read[1 + kKept] : y;
      w = base.update(w, descent.gradient(x, y), state) - descent.decoupled(x, y);
      keep(kSlots, descent.kept(x, static_cast<T>(element.read[3]), kept(kSlots)), kMethodResult);
    } else {
      w = base.update(w, x, state);
    }
    if constexpr (kMasters) {
      element.wide_written[0] = w;
      element.written[0] = static_cast<scalar_t>(w);
    } else {
      element.written[0] = rounding(w, 0, element.number);
    }
#pragma unroll
    for (int k = 0; k < kSlots; ++k) keep(k, state[k], 1 + k);
  }
};

// ---- chunks ----

// Where one chunk of a tensor that is updated lies. What was perturbed comes from its backup; with masters, from these.
template <typename scalar_t, typename stored_t>
struct Place {
  scalar_t* param;
  const stored_t* backup;
  scalar_t* grad;
  stored_t* master;
  stored_t* state[3];
  DescentPlace<scalar_t, stored_t> descent;
};

template <bool kMasters, bool kDescent, typename Functor, typename scalar_t, typename stored_t>
__device__ __forceinline__ void walk_update(const Functor& functor, const Place<scalar_t, stored_t>& at, int length) {
  constexpr int kSlots = Functor::kSlots;
  Operands<scalar_t, typename Functor::Tensors> operands;
  operands.written[0] = at.param;
  operands.read[1] = at.grad;
  if constexpr (kDescent) {
    operands.read[2] = at.descent.y.narrow;
    operands.read[3] = at.descent.method_state == nullptr ? nullptr : at.descent.first;
  }
  const auto kept = [&](int k) { return k < kSlots ? at.state[k] : at.descent.method_state; };
  if constexpr (kMasters) {
    operands.read[0] = at.backup == nullptr ? at.param : nullptr;
    operands.wide_read[0] = operands.wide_written[0] = at.master;
#pragma unroll
    for (int k = 0; k < Functor::kKept; ++k) operands.wide_read[1 + k] = operands.wide_written[1 + k] = kept(k);
    if constexpr (kDescent) operands.wide_read[1 + Functor::kKept] = at.descent.y.wide;
  } else {
    operands.read[0] = at.backup == nullptr ? at.param : at.backup;
    constexpr int kFirst = 1 + Functor::kGrads;
#pragma unroll
    for (int k = 0; k < Functor::kKept; ++k) operands.read[kFirst + k] = operands.written[1 + k] = kept(k);
  }
  walk(functor, operands, length);
}

template <typename scalar_t, typename stored_t, typename Arguments>
__device__ __forceinline__ Place<scalar_t, stored_t> find_place(const Arguments& args, const DeviceChunk& chunk) {
  const DeviceTable& table = args.table;
  return {element_pointer<scalar_t>(table, kParam, chunk),
          element_pointer<stored_t>(table, kBackup, chunk),
          grad_pointer<scalar_t>(args, chunk),
          element_pointer<stored_t>(table, kMaster, chunk),
          {element_pointer<stored_t>(table, kState0, chunk), element_pointer<stored_t>(table, kState1, chunk),
           element_pointer<stored_t>(table, kState2, chunk)},
          {}};
}

// ---- kernels ----

// One more update for every tensor of the launch that has a gradient, where its updates are counted.
template <typename Arguments>
__device__ __forceinline__ void advance_steps(const Arguments& args) {
  const int64_t* counts = args.table.addresses + kStep * args.table.tensor_count + args.launch.first_tensor;
  for (int64_t i = threadIdx.x; i < args.launch.tensor_count; i += kThreads) {
    if (args.grads[i] != 0 && counts[i] != 0) *reinterpret_cast<float*>(counts[i]) += 1;
  }
}

// Adam in double needs most registers; beside a method's tensors, for sm_100 and sm_120, up to 180.
template <typename scalar_t, template <typename> typename Base>
constexpr bool kIsDoubleAdam = sizeof(scalar_t) == 8 && Base<scalar_t>::kSlots > 1;

template <typename scalar_t, template <typename> typename Base, bool kHasMore>
constexpr int kUpdateBlocks = kHasMore && kIsDoubleAdam<scalar_t, Base>                     ? kHeaviest
                              : kHasMore || kIsDoubleAdam<scalar_t, Base>                   ? kHeavy
                              : std::is_same_v<scalar_t, float> && Base<float>::kSlots == 1 ? kLight
                                                                                            : kMedium;

template <typename scalar_t, template <typename> typename Base, bool kStochastic, bool kMasters, bool kDescent,
          int64_t kCapacity>
__global__ void __launch_bounds__(kThreads, kUpdateBlocks<scalar_t, Base, kStochastic || kMasters || kDescent>)
    restore_and_update_kernel(const __grid_constant__ Arguments<UpdateArguments, kCapacity> args) {
  using stored_t = std::conditional_t<kMasters, float, scalar_t>;
  using T = opmath_t<scalar_t>;
  using BaseOfT = Base<T>;
  const UpdateArguments& update = args.extra;
  const DeviceChunk chunk = read_chunk(args.table, args.launch, blockIdx.x);
  const bool commits = update.found_inf == nullptr || *update.found_inf == 0;
  Place<scalar_t, stored_t> place = find_place<scalar_t, stored_t>(args, chunk);
  if constexpr (kDescent) place.descent = find_descent<scalar_t, stored_t>(args, update.descent, chunk);
  const auto functor = once_per_block([&] {
    const float step = read_step(args.table, chunk);
    const double inv_grad_scale = update.grad_scale == nullptr ? 1 : 1.0 / *update.grad_scale;
    const auto options = read_options<typename BaseOfT::Options>(update.options, chunk.group);
    const auto base = BaseOfT::make(options, step, inv_grad_scale, place.state[BaseOfT::kSlots - 1] != nullptr);
    constexpr int kResults = kDescent ? kMethodResult + 1 : 1 + BaseOfT::kSlots;
    const auto rounding =
        make_rounding<stored_t, kStochastic, kWeightDraw, kResults>(args.table, chunk, options.rounding_seed);
    using Rounding = std::remove_const_t<decltype(rounding)>;
    DescentStep<T> descent{};
    if constexpr (kDescent) descent = make_descent<T>(update.descent, chunk.tensor, place.descent.takes_part);
    return UpdateFunctor<scalar_t, BaseOfT, Rounding, kMasters, kDescent>{
        {}, base, rounding, descent, place.backup != nullptr, place.descent.y.wide != nullptr};
  });
  // The first thread, which read the count, has drawn its ticket since: when all have, the counts may change.
  const Ticket ticket(update.finished);
  if (place.grad == nullptr || !commits) {
    restore_chunk<scalar_t, kMasters>(args.table, chunk);
  } else {
    walk_update<kMasters, kDescent>(functor, place, chunk.length);
  }
  if (ticket.is_last(gridDim.x) && commits) advance_steps(args);
}

// ---- before a base's own step: w <- backup, g <- a * x + b * y ----

template <typename scalar_t, bool kMasters>
struct PrepareFunctor : FunctorTraits {
  using Tensors = std::conditional_t<kMasters, Counts<3, 3, 3, 1>, Counts<5, 4>>;
  static constexpr bool kOptional = true;
  DescentStep<opmath_t<scalar_t>> descent;
  bool wide_y;

  // read: the gradient, y, the first gradient, [the backup, the method's state]; with masters wide: the master, y, the
  // method's state; written: w, the gradient, the first gradient, the method's state, which with masters is wide
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    using T = opmath_t<scalar_t>;
    const T x = static_cast<T>(element.read[0]), first = static_cast<T>(element.read[2]);
    T y = static_cast<T>(element.read[1]);
    if constexpr (kMasters) {
      y = wide_y ? element.wide_read[1] : y;
      element.written[0] = static_cast<scalar_t>(element.wide_read[0]);
      element.wide_written[0] = descent.kept(x, first, element.wide_read[2]);
    } else {
      element.written[0] = element.read[3];
      element.written[3] = static_cast<scalar_t>(descent.kept(x, first, static_cast<T>(element.read[4])));
    }
    element.written[1] = static_cast<scalar_t>(descent.gradient(x, y));
    element.written[2] = static_cast<scalar_t>(descent.decoupled(x, y));
  }
};

struct PrepareArguments {
  DescentArguments descent;
};

template <typename scalar_t, bool kMasters, int64_t kCapacity>
__global__ void __launch_bounds__(kThreads, kHeavy)
    restore_and_prepare_kernel(const __grid_constant__ Arguments<PrepareArguments, kCapacity> args) {
  using stored_t = std::conditional_t<kMasters, float, scalar_t>;
  const DescentArguments& descent = args.extra.descent;
  const DeviceChunk chunk = read_chunk(args.table, args.launch, blockIdx.x);
  const Place<scalar_t, stored_t> place = find_place<scalar_t, stored_t>(args, chunk);
  const auto parts = find_descent<scalar_t, stored_t>(args, descent, chunk);
  if (place.grad == nullptr || !parts.takes_part) return restore_chunk<scalar_t, kMasters>(args.table, chunk);
  const PrepareFunctor<scalar_t, kMasters> functor{
      {}, make_descent<opmath_t<scalar_t>>(descent, chunk.tensor, true), parts.y.wide != nullptr};
  scalar_t* param = place.backup == nullptr ? nullptr : place.param;
  const scalar_t* first = parts.method_state == nullptr ? nullptr : parts.first;
  scalar_t* beyond = descent.decoupled ? parts.first : nullptr;
  if constexpr (kMasters) {
    walk<scalar_t>(functor,
                   {{place.grad, parts.y.narrow, first},
                    {param, place.grad, beyond},
                    {place.backup, parts.y.wide, parts.method_state},
                    {parts.method_state}},
                   chunk.length);
  } else {
    walk<scalar_t>(functor,
                   {{place.grad, parts.y.narrow, first, place.backup, parts.method_state},
                    {param, place.grad, beyond, parts.method_state},
                    {},
                    {}},
                   chunk.length);
  }
}

template <template <typename> typename Base>
void launch_update(const Call& call, const UpdateArguments& update) {
  const bool masters = call.table.has_masters;
  // Masters are rounded to nearest.
  dispatch_precision(
      call.dtype, call.device.positions != nullptr && !masters, masters, [&](auto type, auto stochastic, auto masters) {
        using scalar_t = decltype(type);
        if (update.descent.coefficients == nullptr) {
          launch_over_tensors(call, "restore_and_update_", Order::kForward, update, [](auto capacity) {
            constexpr bool kMasters = decltype(masters)::value;
            return &restore_and_update_kernel < scalar_t, Base, decltype(stochastic)::value && !kMasters, kMasters,
                   false, decltype(capacity)::value > ;
          });
        } else {
          launch_in_runs<kMethodTensors>(call, "restore_and_update_", Order::kForward, update, [](auto capacity) {
            constexpr bool kMasters = decltype(masters)::value;
            return &restore_and_update_kernel < scalar_t, Base, decltype(stochastic)::value && !kMasters, kMasters,
                   true, decltype(capacity)::value > ;
          });
        }
      });
}

void launch_prepare(const Call& call, const DescentArguments& descent) {
  if (descent.coefficients == nullptr) return restore_(call);
  dispatch_precision(call.dtype, false, call.table.has_masters, [&](auto type, auto, auto masters) {
    launch_in_runs<kMethodTensors>(
        call, "restore_and_update_", Order::kForward, PrepareArguments{descent}, [](auto capacity) {
          return &restore_and_prepare_kernel<decltype(type), decltype(masters)::value, decltype(capacity)::value>;
        });
  });
}

}  // namespace

void restore_and_update_(const Call& call, Update update, const UpdateArguments& arguments) {
  switch (update) {
    case Update::kNone:
      return launch_prepare(call, arguments.descent);
    case Update::kSgd:
      return launch_update<SgdBase>(call, arguments);
    case Update::kAdam:
      return launch_update<AdamBase>(call, arguments);
  }
}

}  // namespace fastsam::cuda
