// perturb_ and restore_ on CUDA: backup <- w; w <- w + e(w), and back.
#include "launch.cuh"
#include "multi_tensor.cuh"
#include "operations.h"
#include "restore.cuh"

namespace fastsam::cuda {
namespace {

struct PerturbArguments {
  const DeviceOption* options;
  const double* norm;
};

template <typename scalar_t>
struct PerturbFunctor {
  static constexpr int kReads = 2, kWrites = 2;
  // The first pass's gradient is done with; the backup is not read before the second pass.
  static constexpr unsigned kStreamedReads = 0b10, kStreamedWrites = 0b01;
  opmath_t<scalar_t> scale;
  bool adaptive;

  // read: w, the gradient; written: the backup, w
  __device__ void operator()(const scalar_t (&read)[2], scalar_t (&written)[2]) const {
    using T = opmath_t<scalar_t>;
    written[0] = read[0];
    const T moved = climbed<T>(static_cast<T>(read[0]), static_cast<T>(read[1]), scale, adaptive);
    // A zero scale selects: 0 * inf would be NaN.
    written[1] = scale == 0 ? read[0] : static_cast<scalar_t>(moved);
  }
};

template <typename scalar_t, int64_t kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocks)
    perturb_kernel(const __grid_constant__ Arguments<PerturbArguments, kCapacity> args) {
  const DeviceTable& table = args.table;
  // Backward: the gradients that the norm read last are still in the cache.
  const DeviceChunk chunk = read_chunk(table, args.launch, gridDim.x - 1 - blockIdx.x);
  auto* grad = element_pointer<scalar_t>(args.grads[chunk.tensor - args.launch.first_tensor], chunk);
  auto* backup = element_pointer<scalar_t>(table, kBackup, chunk);
  if (grad == nullptr || backup == nullptr) return;
  auto* param = element_pointer<scalar_t>(table, kParam, chunk);
  const auto functor = once_per_block([&] {
    const auto options = read_options<ClimbOptions>(args.extra.options, chunk.group);
    const double scale = climb_scale(*args.extra.norm, options);
    return PerturbFunctor<scalar_t>{static_cast<opmath_t<scalar_t>>(scale), options.adaptive};
  });
  walk(functor, Operands<scalar_t, 2, 2>{{param, grad}, {backup, param}}, chunk.length);
}

struct RestoreArguments {
  DeviceTable table;
  Launch launch;
};

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads, kBlocks) restore_kernel(const __grid_constant__ RestoreArguments args) {
  restore_chunk<scalar_t>(args.table, read_chunk(args.table, args.launch, blockIdx.x));
}

}  // namespace

void perturb_(const Call& call, const DeviceOption* options, const double* norm) {
  dispatch(call.dtype, [&](auto type) {
    using scalar_t = decltype(type);
    launch_over_tensors(call, "perturb_", Order::kBackward, PerturbArguments{options, norm},
                        [](auto capacity) { return &perturb_kernel<scalar_t, decltype(capacity)::value>; });
  });
}

void restore_(const Call& call) {
  // Without gradients there is nothing that one launch could not hold.
  RestoreArguments arguments{call.device, plan_launches(call.table, call.table.tensor_count).front()};
  dispatch(call.dtype, [&](auto type) {
    launch(call, "restore_", &restore_kernel<decltype(type)>, arguments, arguments.launch.chunk_count);
  });
}

const char* find_obstacle() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, restore_kernel<float>);
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();  // it is no later call's error
  return cudaGetErrorString(error);
}

}  // namespace fastsam::cuda
