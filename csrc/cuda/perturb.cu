// perturb_ and restore_ on CUDA: backup <- w; w <- w + e(w), and back.
#include <atomic>

#include "launch.cuh"
#include "restore.cuh"
#include "rounding.cuh"

namespace fastsam::cuda {
namespace {

// ---- plain SAM: e = scale * g, adaptive: scale * g * w * w ----

struct PerturbArguments {
  const DeviceOption* options;
  const double* norm;
};

template <typename scalar_t, typename Rounding>
struct PerturbFunctor : FunctorTraits {
  using Tensors = Counts<2, 2>;
  AscentStep<opmath_t<scalar_t>> step;
  Rounding rounding;

  // read: w, the gradient; written: the backup, w
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    using T = opmath_t<scalar_t>;
    const T w = static_cast<T>(element.read[0]), grad = static_cast<T>(element.read[1]);
    const T value = step.template perturbed<Map::kIdentity, false, scalar_t>(w, w, grad, 0);
    const scalar_t moved = rounding(value, 0, element.number);
    element.written[0] = element.read[0];
    element.written[1] = step.stays(false) ? element.read[0] : moved;
  }
};

template <typename scalar_t, typename Rounding>
struct PerturbMasterFunctor : FunctorTraits {
  using Tensors = Counts<2, 1, 1, 1>;
  static constexpr bool kKeepsWide = true;
  AscentStep<float> step;
  Rounding rounding;

  // read: w, the gradient, and the master; written: w, and the master where w is not its rounding any more
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    const auto w = static_cast<float>(element.read[0]), grad = static_cast<float>(element.read[1]);
    const float master = master_value(element.wide_read[0], element.read[0]);
    const float value = step.template perturbed<Map::kIdentity, false, scalar_t>(master, w, grad, 0);
    const scalar_t moved = rounding(value, 0, element.number);
    element.wide_written[0] = master;
    element.written[0] = step.stays(false) ? element.read[0] : moved;
  }
};

template <typename scalar_t, bool kStochastic, bool kMasters, int64_t kCapacity>
__global__ void __launch_bounds__(kThreads, kStochastic || kMasters ? kMedium : kLight)
    perturb_kernel(const __grid_constant__ Arguments<PerturbArguments, kCapacity> args) {
  const DeviceTable& table = args.table;
  // Backward: the gradients that the norm read last are still in the cache.
  const DeviceChunk chunk = read_chunk(table, args.launch, gridDim.x - 1 - blockIdx.x);
  auto* grad = grad_pointer<scalar_t>(args, chunk);
  using stored_t = std::conditional_t<kMasters, float, scalar_t>;
  auto* backup = element_pointer<stored_t>(table, kBackup, chunk);
  if (grad == nullptr || backup == nullptr) return;
  auto* param = element_pointer<scalar_t>(table, kParam, chunk);
  const auto functor = once_per_block([&] {
    const auto options = read_options<AscentOptions>(args.extra.options, chunk.group);
    const AscentStep<opmath_t<scalar_t>> step(options, *args.extra.norm);
    const auto rounding = make_rounding<scalar_t, kStochastic, kAscentDraw, 1>(table, chunk, options.rounding_seed);
    using Rounding = std::remove_const_t<decltype(rounding)>;
    if constexpr (kMasters) {
      return PerturbMasterFunctor<scalar_t, Rounding>{{}, step, rounding};
    } else {
      return PerturbFunctor<scalar_t, Rounding>{{}, step, rounding};
    }
  });
  if constexpr (kMasters) {
    walk<scalar_t>(functor, {{param, grad}, {param}, {backup}, {backup}}, chunk.length);
  } else {
    walk<scalar_t>(functor, {{param, grad}, {backup, param}, {}, {}}, chunk.length);
  }
}

// ---- by coefficients: e = a * map(x) + b * y ----

struct FormArguments {
  const DeviceOption* options;
  Form form;
};

template <typename scalar_t, typename Rounding, Map map>
struct FormFunctor : FunctorTraits {
  using Tensors = Counts<3, 2>;
  static constexpr bool kOptional = true;
  AscentStep<opmath_t<scalar_t>> step;
  Rounding rounding;
  bool again, stays;  // again: y is the perturbation

  // read: w, x, and y or the backup; written: w, and the backup if that is not read
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    using T = opmath_t<scalar_t>;
    const T w = static_cast<T>(element.read[0]), other = static_cast<T>(element.read[2]);
    const T value = step.template perturbed<map, true, scalar_t>(again ? other : w, w, static_cast<T>(element.read[1]),
                                                                 again ? w - other : other);
    const scalar_t moved = rounding(value, 0, element.number);
    element.written[0] = stays ? element.read[0] : moved;
    element.written[1] = element.read[0];
  }
};

template <typename scalar_t, typename Rounding, Map map>
struct FormMasterFunctor : FunctorTraits {
  using Tensors = Counts<3, 1, 3, 1>;
  static constexpr bool kOptional = true, kKeepsWide = true;
  AscentStep<float> step;
  Rounding rounding;
  bool again, stays, wide_x, wide_y;

  // read: w, x, y; the master, wide x, wide y; written: w; the master if the ascent is the first
  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    const auto& wide = element.wide_read;
    const auto w = static_cast<float>(element.read[0]);
    const float master = again ? wide[0] : master_value(wide[0], element.read[0]);
    const float x = wide_x ? wide[1] : static_cast<float>(element.read[1]);
    const float y = wide_y ? wide[2] : static_cast<float>(element.read[2]);
    const float value = step.template perturbed<map, true, scalar_t>(master, w, x, again ? w - master : y);
    const scalar_t moved = rounding(value, 0, element.number);
    element.wide_written[0] = master;
    element.written[0] = stays ? element.read[0] : moved;
  }
};

template <typename scalar_t, bool kStochastic, bool kMasters, Map map, int64_t kCapacity>
__global__ void __launch_bounds__(kThreads, kHeavy)
    perturb_by_form_kernel(const __grid_constant__ Arguments<FormArguments, kCapacity> args) {
  using T = opmath_t<scalar_t>;
  using stored_t = std::conditional_t<kMasters, float, scalar_t>;
  const DeviceTable& table = args.table;
  const Form& form = args.extra.form;
  // Backward: what the dot products read last is still in the cache.
  const DeviceChunk chunk = read_chunk(table, args.launch, gridDim.x - 1 - blockIdx.x);
  auto* backup = element_pointer<stored_t>(table, kBackup, chunk);
  if (backup == nullptr) return;
  auto* param = element_pointer<scalar_t>(table, kParam, chunk);
  const bool again = form.y == kPerturbation;
  const auto x = find_source<scalar_t, kMasters>(args, form.x, chunk);
  const auto y = find_source<scalar_t, kMasters>(args, form.y, chunk);
  const auto functor = once_per_block([&] {
    const AscentStep<T> step(form.coefficients[chunk.tensor], again || y.is_present());
    const bool stays = !x.is_present() || step.stays(again);
    const auto options = read_options<AscentOptions>(args.extra.options, chunk.group);
    const auto rounding = make_rounding<scalar_t, kStochastic, kAscentDraw, 1>(table, chunk, options.rounding_seed);
    using Rounding = std::remove_const_t<decltype(rounding)>;
    if constexpr (kMasters) {
      return FormMasterFunctor<scalar_t, Rounding, map>{
          {}, step, rounding, again, stays, x.wide != nullptr, y.wide != nullptr};
    } else {
      return FormFunctor<scalar_t, Rounding, map>{{}, step, rounding, again, stays};
    }
  });
  if constexpr (kMasters) {
    walk<scalar_t>(functor,
                   {{param, x.narrow, y.narrow}, {param}, {backup, x.wide, y.wide}, {again ? nullptr : backup}},
                   chunk.length);
  } else {
    walk<scalar_t>(functor, {{param, x.narrow, again ? backup : y.narrow}, {param, again ? nullptr : backup}, {}, {}},
                   chunk.length);
  }
}

// ---- back ----

struct RestoreArguments {
  DeviceTable table;
  Launch launch;
};

template <typename scalar_t, bool kMasters>
__global__ void __launch_bounds__(kThreads, kLight) restore_kernel(const __grid_constant__ RestoreArguments args) {
  restore_chunk<scalar_t, kMasters>(args.table, read_chunk(args.table, args.launch, blockIdx.x));
}

template <typename scalar_t>
auto* restore_kernel_for(const Call& call) {
  auto* kernel = &restore_kernel<scalar_t, false>;
  if constexpr (kIsNarrow<scalar_t>) {
    if (call.table.has_masters) kernel = &restore_kernel<scalar_t, true>;
  }
  return kernel;
}

template <typename scalar_t>
void launch_restore(const Call& call, const Launch& run) {
  RestoreArguments arguments{call.device, run};
  launch(call, "restore_", restore_kernel_for<scalar_t>(call), arguments, run.chunk_count);
}

}  // namespace

void perturb_(const Call& call, const DeviceOption* options, const double* norm) {
  dispatch_precision(call.dtype, call.device.positions != nullptr, call.table.has_masters,
                     [&](auto type, auto stochastic, auto masters) {
                       using scalar_t = decltype(type);
                       load("restore_", restore_kernel_for<scalar_t>(call));
                       const auto kernel_for = [](auto capacity) {
                         return &perturb_kernel<scalar_t, decltype(stochastic)::value, decltype(masters)::value,
                                                decltype(capacity)::value>;
                       };
                       launch_over_tensors(call, "perturb_", Order::kBackward, PerturbArguments{options, norm},
                                           kernel_for, [&](const Launch& run) { launch_restore<scalar_t>(call, run); });
                     });
}

void perturb_(const Call& call, const DeviceOption* options, const Form& form) {
  dispatch_precision(
      call.dtype, call.device.positions != nullptr, call.table.has_masters,
      [&](auto type, auto stochastic, auto masters) {
        using scalar_t = decltype(type);
        load("restore_", restore_kernel_for<scalar_t>(call));
        const auto undo = [&](const Launch& run) {
          // A further ascent is taken back by whoever takes back the first.
          if (form.y != kPerturbation) launch_restore<scalar_t>(call, run);
        };
        dispatch_map(form.map, [&](auto map) {
          launch_in_runs<kMethodTensors>(
              call, "perturb_", Order::kBackward, FormArguments{options, form},
              [](auto capacity) {
                return &perturb_by_form_kernel<scalar_t, decltype(stochastic)::value, decltype(masters)::value,
                                               decltype(map)::value, decltype(capacity)::value>;
              },
              undo);
        });
      });
}

void restore_(const Call& call) {
  // Without gradients there is nothing that one launch could not hold.
  dispatch(call.dtype, [&](auto type) {
    launch_restore<decltype(type)>(call, plan_launches(call.table, call.table.tensor_count).front());
  });
}

const char* find_obstacle() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, restore_kernel<float, false>);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is no later call's error
  return cudaGetErrorString(error);
}

}  // namespace fastsam::cuda
