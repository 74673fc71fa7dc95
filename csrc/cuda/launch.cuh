// Launches over a table: one block per chunk, and as few launches as the gradients' addresses take.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "multi_tensor.cuh"
#include "operations.h"

namespace fastsam::cuda {

// Which launch comes first; within one, a kernel sees to it.
enum class Order { kForward, kBackward };

template <typename Arguments>
void launch(const Call& call, const char* operation, void (*kernel)(Arguments), Arguments& arguments,
            int64_t chunk_count) {
  void* pointers[] = {&arguments};
  const dim3 blocks(static_cast<unsigned>(std::max<int64_t>(chunk_count, 1)));
  const cudaError_t error = cudaLaunchKernel(kernel, blocks, dim3(kThreads), pointers, 0, call.stream);
  STD_TORCH_CHECK(error == cudaSuccess, "fastsam: ", operation,
                  " cannot be launched on CUDA: ", cudaGetErrorString(error));
}

template <int64_t kCapacity, typename Extra, typename KernelFor>
void launch_in_runs(const Call& call, const char* operation, Order order, const Extra& extra,
                    const KernelFor& kernel_for) {
  auto launches = plan_launches(call.table, kCapacity);
  if (order == Order::kBackward) std::reverse(launches.begin(), launches.end());
  for (const Launch& run : launches) {
    Arguments<Extra, kCapacity> arguments;
    pack_arguments(call.table, call.device, run, extra, arguments);
    launch(call, operation, kernel_for(std::integral_constant<int64_t, kCapacity>{}), arguments, run.chunk_count);
  }
}

// `kernel_for(capacity)` is the kernel whose arguments hold so many addresses, an integral_constant.
template <typename Extra, typename KernelFor>
void launch_over_tensors(const Call& call, const char* operation, Order order, const Extra& extra,
                         const KernelFor& kernel_for) {
  if (call.table.tensor_count <= kFewTensors) {
    launch_in_runs<kFewTensors>(call, operation, order, extra, kernel_for);
  } else {
    launch_in_runs<kManyTensors>(call, operation, order, extra, kernel_for);
  }
}

}  // namespace fastsam::cuda
