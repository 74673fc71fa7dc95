// What the threads of a block do together: share a value, add up, find out whether they are the last.
#pragma once

#include <cuda_runtime.h>

#include <new>

#include "launches.h"

namespace fastsam::cuda {

// Threads of a block: 128 beat 256 by 1 to 7% on an H200. The tests run the kernels on the CPU, with fewer.
#ifndef FASTSAM_CUDA_THREADS
#define FASTSAM_CUDA_THREADS 128
#endif
constexpr int kThreads = FASTSAM_CUDA_THREADS;
// Blocks on a multiprocessor at least, which allows a thread 64, 80, 128 or 255 registers. Left to itself, the compiler
// takes more than it needs, or aims higher and spills.
constexpr int kLight = 1024 / kThreads, kMedium = 768 / kThreads, kHeavy = 512 / kThreads, kHeaviest = 256 / kThreads;

// What one thread has made for its block: arithmetic in double is slow on some GPUs, and a chunk needs it once.
template <typename Make>
__device__ __forceinline__ auto once_per_block(const Make& make) {
  using Value = decltype(make());
  alignas(kVectorBytes) __shared__ unsigned char memory[sizeof(Value)];
  if (threadIdx.x == 0) new (memory) Value(make());
  __syncthreads();
  return *reinterpret_cast<const Value*>(memory);
}

#if defined(__CUDACC__)
// counter += 1, returning what it was; what this thread has read and written before has happened then.
__device__ __forceinline__ int count_release(int* counter) {
  int before;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
#endif

// Which of `count` blocks is the last to get to a point, found without waiting. What the first thread of any of them
// read and wrote before it took its ticket has then happened, for all threads of the last one.
class Ticket {
 public:
  // `finished` counts, and is 0 between launches. The first thread alone draws.
  __device__ explicit Ticket(int* finished) : finished_(finished) {
    if (threadIdx.x == 0) number_ = count_release(finished);
  }

  // For all threads of the block together. No shared variable: one beside another's would be read along with it.
  __device__ bool is_last(int count) const {
    if (__syncthreads_or(threadIdx.x == 0 && number_ == count - 1) == 0) return false;
    __threadfence();
    if (threadIdx.x == 0) *finished_ = 0;
    return true;
  }

 private:
  int* finished_;
  int number_ = 0;
};

// The sums of kCount values over the threads of a block, in the same order every time; for the first thread.
template <int kCount>
__device__ __forceinline__ void block_sums(double (&values)[kCount]) {
  __shared__ double sums[kCount][kThreads];
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i][thread] = values[i];
  __syncthreads();
#pragma unroll
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i][thread] += sums[i][thread + half];
    }
    __syncthreads();
  }
  if (thread == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = sums[i][0];
  }
}

}  // namespace fastsam::cuda
