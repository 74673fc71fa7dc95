// Launches over a table: as few as the gradients' addresses take.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "operations.h"
#include "walk.cuh"

namespace fastsam::cuda {

// Which launch comes first; within one, a kernel sees to it.
enum class Order { kForward, kBackward };

// CUDA loads a kernel when it is first used, and to load it needs memory, which may have run out by then: what a step
// still needs when the weights are perturbed is loaded before.
template <typename Arguments>
void load(const char* operation, void (*kernel)(Arguments)) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  STD_TORCH_CHECK(error == cudaSuccess, "fastsam: ", operation,
                  " cannot be loaded on CUDA: ", cudaGetErrorString(error));
}

template <typename Arguments>
void launch(const Call& call, const char* operation, void (*kernel)(Arguments), Arguments& arguments, int64_t blocks) {
  void* pointers[] = {&arguments};
  const dim3 grid(static_cast<unsigned>(std::max<int64_t>(blocks, 1)));
  const cudaError_t error = cudaLaunchKernel(kernel, grid, dim3(kThreads), pointers, 0, call.stream);
  STD_TORCH_CHECK(error == cudaSuccess, "fastsam: ", operation,
                  " cannot be launched on CUDA: ", cudaGetErrorString(error));
}

inline void undo_nothing(const Launch&) {}

// `operation` is its name in messages; `extra` is in the arguments of every launch. `kernel_for(capacity)` is the
// kernel whose arguments hold so many addresses, an integral_constant: one block for each chunk. If a launch fails,
// `undo(launch)` is called for each one before it.
template <int64_t kCapacity, typename Extra, typename KernelFor, typename Undo = decltype(&undo_nothing)>
void launch_in_runs(const Call& call, const char* operation, Order order, const Extra& extra,
                    const KernelFor& kernel_for, const Undo& undo = undo_nothing) {
  if (call.only_loads) return load(operation, kernel_for(std::integral_constant<int64_t, kCapacity>{}));
  auto launches = plan_launches(call.table, kCapacity);
  if (order == Order::kBackward) std::reverse(launches.begin(), launches.end());
  for (const Launch& run : launches) {
    Arguments<Extra, kCapacity> arguments;
    pack_arguments(call.table, call.device, run, extra, arguments);
    try {
      launch(call, operation, kernel_for(std::integral_constant<int64_t, kCapacity>{}), arguments, run.chunk_count);
    } catch (...) {
      for (const Launch* done = launches.data(); done != &run; ++done) undo(*done);
      throw;
    }
  }
}

// The same, with arguments as small as the table allows.
template <typename Extra, typename KernelFor, typename Undo = decltype(&undo_nothing)>
void launch_over_tensors(const Call& call, const char* operation, Order order, const Extra& extra,
                         const KernelFor& kernel_for, const Undo& undo = undo_nothing) {
  if (call.table.tensor_count <= kFewTensors) {
    launch_in_runs<kFewTensors>(call, operation, order, extra, kernel_for, undo);
  } else {
    launch_in_runs<kManyTensors>(call, operation, order, extra, kernel_for, undo);
  }
}

}  // namespace fastsam::cuda
