// restore_and_update_ on CUDA: w <- update(backup, g, state) in one pass.
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

// ---- what stands in the gradient's place ----

template <typename T>
struct DescentStep {
  T a, b, keep_x, keep_first, keep_state, decoupled_x, decoupled_y;

  __device__ __forceinline__ T gradient(T x, T y) const { return times(a, x) + times(b, y); }
  __device__ __forceinline__ T decoupled(T x, T y) const { return times(decoupled_x, x) + times(decoupled_y, y); }
  __device__ __forceinline__ T kept(T x, T first, T state) const {
    return times(keep_x, x) + times(keep_first, first) + times(keep_state, state);
  }
};

// A chunk's tensors of a descent. What lacks one of those that the form names takes no part.
template <typename scalar_t, typename stored_t>
struct DescentPlace {
  Source<scalar_t> y;
  scalar_t* first;
  stored_t* method_state;
  bool takes_part;
};

template <typename scalar_t, typename stored_t, typename Arguments>
__device__ __forceinline__ DescentPlace<scalar_t, stored_t> find_descent(const Arguments& args,
                                                                         const DescentArguments& descent,
                                                                         const DeviceChunk& chunk) {
  constexpr bool kMasters = !std::is_same_v<scalar_t, stored_t>;
  DescentPlace<scalar_t, stored_t> place{find_source<scalar_t, kMasters>(args, descent.y, chunk),
                                         element_pointer<scalar_t>(args.table, kFirstGrad, chunk),
                                         element_pointer<stored_t>(args.table, kMethodState, chunk), true};
  if (descent.y != kNone && !place.y.is_present()) place.takes_part = false;
  if (descent.keeps && (place.first == nullptr || place.method_state == nullptr)) place.takes_part = false;
  if (!place.takes_part) place.y = {nullptr, nullptr};
  if (!place.takes_part || !descent.keeps) place.method_state = nullptr;
  return place;
}

template <typename T>
__device__ __forceinline__ DescentStep<T> make_descent(const DescentArguments& descent, int64_t tensor,
                                                       bool takes_part) {
  if (!takes_part) return {T(1), T(0), T(0), T(0), T(1), T(0), T(0)};
  const DescentCoefficients given = descent.coefficients[tensor];
  const bool has_y = descent.y != kNone, decoupled = descent.decoupled;
  return {static_cast<T>(given.a),
          static_cast<T>(has_y ? given.b : 0),
          static_cast<T>(given.keep_x),
          static_cast<T>(given.keep_first),
          static_cast<T>(given.keep_state),
          static_cast<T>(decoupled ? given.decoupled_x : 0),
          static_cast<T>(decoupled && has_y ? given.decoupled_y : 0)};
}

// ---- functors ----

// Results are numbered: the weights, the slots of the state, what a method keeps.
constexpr int kMethodResult = kMethodStateDraw - kWeightDraw;

template <typename scalar_t, typename Base, typename Rounding>
struct UpdateFunctor : FunctorTraits {
  static constexpr int kSlots = Base::kSlots;
  using Tensors = Counts<2 + kSlots, 1 + kSlots>;
  static constexpr bool kOptional = true;
  static constexpr unsigned kStreamedReads = ~0u, kStreamedWrites = ~1u;
  Base base;
  Rounding rounding;

  // read: w or its backup, the gradient, the state; written: w, the state
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    using T = opmath_t<scalar_t>;
    T state[kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) state[k] = static_cast<T>(element.read[2 + k]);
    const T w = base.update(static_cast<T>(element.read[0]), static_cast<T>(element.read[1]), state);
    element.written[0] = rounding(w, 0, element.number);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) element.written[1 + k] = rounding(state[k], 1 + k, element.number);
  }
};

template <typename scalar_t, typename Base>
struct UpdateMasterFunctor : FunctorTraits {
  static constexpr int kSlots = Base::kSlots;
  using Tensors = Counts<2, 1, 1 + kSlots, 1 + kSlots>;
  static constexpr bool kOptional = true;
  static constexpr unsigned kStreamedReads = ~0u;
  Base base;
  bool climbed;

  // read: w unless its master has climbed, the gradient, the master, the state; written: w, the master, the state
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    float state[kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) state[k] = element.wide_read[1 + k];
    const float from = climbed ? element.wide_read[0] : master_value(element.wide_read[0], element.read[0]);
    const float w = base.update(from, static_cast<float>(element.read[1]), state);
    element.written[0] = static_cast<scalar_t>(w);
    element.wide_written[0] = w;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) element.wide_written[1 + k] = state[k];
  }
};

template <typename scalar_t, typename Base, typename Rounding>
struct DescentFunctor : FunctorTraits {
  static constexpr int kSlots = Base::kSlots;
  using Tensors = Counts<5 + kSlots, 2 + kSlots>;
  static constexpr bool kOptional = true;
  Base base;
  Rounding rounding;
  DescentStep<opmath_t<scalar_t>> descent;

  // read: w or its backup, the gradient, y, the first gradient, the method's state, the state; written: w, the method's
  // state, the state
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    using T = opmath_t<scalar_t>;
    T state[kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) state[k] = static_cast<T>(element.read[5 + k]);
    const T x = static_cast<T>(element.read[1]), y = static_cast<T>(element.read[2]);
    const T w = base.update(static_cast<T>(element.read[0]), descent.gradient(x, y), state);
    const T kept = descent.kept(x, static_cast<T>(element.read[3]), static_cast<T>(element.read[4]));
    element.written[0] = rounding(w - descent.decoupled(x, y), 0, element.number);
    element.written[1] = rounding(kept, kMethodResult, element.number);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) element.written[2 + k] = rounding(state[k], 1 + k, element.number);
  }
};

template <typename scalar_t, typename Base>
struct DescentMasterFunctor : FunctorTraits {
  static constexpr int kSlots = Base::kSlots;
  using Tensors = Counts<4, 1, 3 + kSlots, 2 + kSlots>;
  static constexpr bool kOptional = true;
  Base base;
  DescentStep<float> descent;
  bool climbed, wide_y;

  // read: w unless its master has climbed, the gradient, y, the first gradient; the master, y, the method's state, the
  // state; written: w; the master, the method's state, the state
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    float state[kSlots];
#pragma unroll
    for (int k = 0; k < kSlots; ++k) state[k] = element.wide_read[3 + k];
    const auto x = static_cast<float>(element.read[1]);
    const float y = wide_y ? element.wide_read[1] : static_cast<float>(element.read[2]);
    const float from = climbed ? element.wide_read[0] : master_value(element.wide_read[0], element.read[0]);
    const float w = base.update(from, descent.gradient(x, y), state) - descent.decoupled(x, y);
    element.written[0] = static_cast<scalar_t>(w);
    element.wide_written[0] = w;
    element.wide_written[1] = descent.kept(x, static_cast<float>(element.read[3]), element.wide_read[2]);
#pragma unroll
    for (int k = 0; k < kSlots; ++k) element.wide_written[2 + k] = state[k];
  }
};

// ---- chunks ----

// Where one chunk of a tensor that is updated lies. What climbed comes from its backup: with masters, from the master.
template <typename scalar_t, typename stored_t>
struct Place {
  scalar_t* param;
  const stored_t* backup;
  scalar_t* grad;
  stored_t* master;
  stored_t* state[3];
  DescentPlace<scalar_t, stored_t> descent;
};

template <typename Functor, typename scalar_t, typename stored_t>
__device__ __forceinline__ void walk_update(const Functor& functor, const Place<scalar_t, stored_t>& at, int length,
                                            std::false_type) {
  Operands<scalar_t, typename Functor::Tensors> operands;
  operands.read[1] = at.grad;
  operands.written[0] = at.param;
  if constexpr (std::is_same_v<scalar_t, stored_t>) {
    operands.read[0] = at.backup == nullptr ? at.param : at.backup;
#pragma unroll
    for (int k = 0; k < Functor::kSlots; ++k) operands.read[2 + k] = operands.written[1 + k] = at.state[k];
  } else {
    operands.read[0] = at.backup == nullptr ? at.param : nullptr;
    operands.wide_read[0] = operands.wide_written[0] = at.master;
#pragma unroll
    for (int k = 0; k < Functor::kSlots; ++k) operands.wide_read[1 + k] = operands.wide_written[1 + k] = at.state[k];
  }
  walk(functor, operands, length);
}

template <typename Functor, typename scalar_t, typename stored_t>
__device__ __forceinline__ void walk_update(const Functor& functor, const Place<scalar_t, stored_t>& at, int length,
                                            std::true_type) {
  Operands<scalar_t, typename Functor::Tensors> operands;
  const auto& descent = at.descent;
  operands.read[1] = at.grad;
  operands.read[2] = descent.y.narrow;
  operands.read[3] = descent.method_state == nullptr ? nullptr : descent.first;
  operands.written[0] = at.param;
  if constexpr (std::is_same_v<scalar_t, stored_t>) {
    operands.read[0] = at.backup == nullptr ? at.param : at.backup;
    operands.read[4] = operands.written[1] = descent.method_state;
#pragma unroll
    for (int k = 0; k < Functor::kSlots; ++k) operands.read[5 + k] = operands.written[2 + k] = at.state[k];
  } else {
    operands.read[0] = at.backup == nullptr ? at.param : nullptr;
    operands.wide_read[0] = operands.wide_written[0] = at.master;
    operands.wide_read[1] = descent.y.wide;
    operands.wide_read[2] = operands.wide_written[1] = descent.method_state;
#pragma unroll
    for (int k = 0; k < Functor::kSlots; ++k) operands.wide_read[3 + k] = operands.wide_written[2 + k] = at.state[k];
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

template <typename scalar_t, template <typename> typename Base, bool kHasMore>
constexpr int kUpdateBlocks = kHasMore                                                      ? kHeavy
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
        make_rounding<stored_t, kStochastic, kResults>(args.table, chunk, options.rounding_seed, kWeightDraw);
    using Rounding = std::remove_const_t<decltype(rounding)>;
    const bool climbed = place.backup != nullptr;
    if constexpr (kDescent) {
      const auto descent = make_descent<T>(update.descent, chunk.tensor, place.descent.takes_part);
      if constexpr (kMasters) {
        return DescentMasterFunctor<scalar_t, BaseOfT>{{}, base, descent, climbed, place.descent.y.wide != nullptr};
      } else {
        return DescentFunctor<scalar_t, BaseOfT, Rounding>{{}, base, rounding, descent};
      }
    } else if constexpr (kMasters) {
      return UpdateMasterFunctor<scalar_t, BaseOfT>{{}, base, climbed};
    } else {
      return UpdateFunctor<scalar_t, BaseOfT, Rounding>{{}, base, rounding};
    }
  });
  // The first thread, which read the count, has drawn its ticket since: when all have, the counts may change.
  const Ticket ticket(update.finished);
  if (place.grad == nullptr || !commits) {
    restore_chunk<scalar_t, kMasters>(args.table, chunk);
  } else {
    walk_update(functor, place, chunk.length, std::bool_constant<kDescent>{});
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
  const auto nothing_to_undo = [](const Launch&) {};
  // Masters are rounded to nearest.
  dispatch_precision(
      call.dtype, call.device.positions != nullptr && !masters, masters, [&](auto type, auto stochastic, auto masters) {
        using scalar_t = decltype(type);
        if (update.descent.coefficients == nullptr) {
          launch_over_tensors(
              call, "restore_and_update_", Order::kForward, update,
              [](auto capacity) {
                constexpr bool kMasters = decltype(masters)::value;
                return &restore_and_update_kernel < scalar_t, Base, decltype(stochastic)::value && !kMasters, kMasters,
                       false, decltype(capacity)::value > ;
              },
              nothing_to_undo);
        } else {
          launch_in_runs<kMethodTensors>(
              call, "restore_and_update_", Order::kForward, update,
              [](auto capacity) {
                constexpr bool kMasters = decltype(masters)::value;
                return &restore_and_update_kernel < scalar_t, Base, decltype(stochastic)::value && !kMasters, kMasters,
                       true, decltype(capacity)::value > ;
              },
              nothing_to_undo);
        }
      });
}

void launch_prepare(const Call& call, const DescentArguments& descent) {
  if (descent.coefficients == nullptr) return restore_(call);
  const auto nothing_to_undo = [](const Launch&) {};
  dispatch_precision(call.dtype, false, call.table.has_masters, [&](auto type, auto, auto masters) {
    launch_in_runs<kMethodTensors>(
        call, "restore_and_update_", Order::kForward, PrepareArguments{descent},
        [](auto capacity) {
          return &restore_and_prepare_kernel<decltype(type), decltype(masters)::value, decltype(capacity)::value>;
        },
        nothing_to_undo);
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
