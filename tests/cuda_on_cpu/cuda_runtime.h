// As much of CUDA as the kernels use, on the CPU: found in place of CUDA's own header when the tests compile csrc/cuda/
// with a C++ compiler.
//
// The blocks of a launch run one after another, the threads of a block at the same time, as threads. So indices,
// addresses, alignment, barriers, shared memory and arithmetic are as on a GPU; the order of blocks, warps, caches and
// registers are not.
#pragma once

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x;
  explicit dim3(unsigned count) : x(count) {}
};

inline thread_local dim3 threadIdx{0}, blockIdx{0};
inline dim3 gridDim{0};
inline std::barrier<>* block_barrier = nullptr;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline int __syncthreads_or(int condition) {
  static std::atomic<int> any{0};
  __syncthreads();
  if (condition != 0) any = 1;
  __syncthreads();
  const int result = any;
  __syncthreads();
  any = 0;
  return result;
}

// csrc/cuda/walk.cuh's, which are in PTX.
inline int count_release(int* counter) { return std::atomic_ref<int>(*counter).fetch_add(1); }

// In volatile variables nothing is fused.
inline double __dmul_rn(double a, double b) {
  const volatile double result = a * b;
  return result;
}
inline double __dadd_rn(double a, double b) {
  const volatile double result = a + b;
  return result;
}
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }

struct int4 {
  int x, y, z, w;
};

// What a GPU would refuse, too.
template <typename T>
void check_alignment(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) == 0) return;
  std::fprintf(stderr, "an access of %zu bytes at %p\n", sizeof(T), static_cast<const void*>(address));
  std::abort();
}

template <typename T>
T load_global(const T* address) {
  check_alignment(address);
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return load_global(address);
}
template <typename T>
void store_global(T* address, T value) {
  check_alignment(address);
  *address = value;
}

enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
using cudaStream_t = struct CUstream_st*;
struct cudaFuncAttributes {};

// How many launches succeed from now on, for tests of what happens when one does not; negative: all.
inline int launches_left = -1;
inline long launches_made = 0;

// The kernels that were loaded, which the first use of each does.
inline std::set<const void*> loaded;

inline const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename Arguments>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, void (*kernel)(Arguments)) {
  loaded.insert(reinterpret_cast<const void*>(kernel));
  return cudaSuccess;
}

template <typename Arguments>
cudaError_t cudaLaunchKernel(void (*kernel)(Arguments), dim3 blocks, dim3 threads, void** pointers, size_t,
                             cudaStream_t) {
  if (launches_left == 0) {
    launches_left = -1;
    return cudaErrorMemoryAllocation;
  }
  loaded.insert(reinterpret_cast<const void*>(kernel));
  --launches_left;
  ++launches_made;
  const Arguments& arguments = *static_cast<const Arguments*>(pointers[0]);
  std::barrier<> barrier(threads.x);
  block_barrier = &barrier;
  gridDim = blocks;
  std::vector<std::jthread> running;
  for (unsigned thread = 0; thread < threads.x; ++thread) {
    running.emplace_back([&, thread] {
      threadIdx.x = thread;
      for (blockIdx.x = 0; blockIdx.x < blocks.x; ++blockIdx.x) {
        kernel(arguments);
        barrier.arrive_and_wait();
      }
    });
  }
  return cudaSuccess;
}
