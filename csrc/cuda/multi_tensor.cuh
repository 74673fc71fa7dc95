// The loop over a chunk on CUDA: which thread takes which elements, and how they are loaded and stored.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <new>

#include "launches.h"

namespace fastsam::cuda {

// Of a block. The tests run the kernels on the CPU, with fewer.
#ifndef FASTSAM_CUDA_THREADS
#define FASTSAM_CUDA_THREADS 256
#endif
constexpr int kThreads = FASTSAM_CUDA_THREADS;
// On a multiprocessor at least, which allows up to 128 registers. Left to itself, the assembler aims higher and spills.
constexpr int kBlocks = 2;

// A functor has kReads and kWrites, the tensors that it reads and writes of each chunk, and
//   void operator()(const scalar_t (&read)[kReads], scalar_t (&written)[...])
// for one element of all of them. Of what is set in the masks kStreamedReads and kStreamedWrites (bit i: tensor i),
// nothing is read again before it would be evicted anyway: it does not displace what will be.
template <typename scalar_t, int kReads, int kWrites>
struct Operands {
  const scalar_t* read[kReads];
  scalar_t* written[kWrites > 0 ? kWrites : 1];
};

template <typename scalar_t>
struct alignas(kVectorBytes) Vector {
  static constexpr int kWidth = kVectorBytes / sizeof(scalar_t);
  scalar_t elements[kWidth];
};

template <typename scalar_t>
__device__ __forceinline__ Vector<scalar_t> load_vector(const scalar_t* address, bool stream) {
  const auto* place = reinterpret_cast<const int4*>(address);
  const int4 bits = stream ? __ldcs(place) : __ldca(place);
  Vector<scalar_t> vector;
  std::memcpy(&vector, &bits, kVectorBytes);
  return vector;
}

template <typename scalar_t>
__device__ __forceinline__ void store_vector(scalar_t* address, const Vector<scalar_t>& vector, bool stream) {
  int4 bits;
  std::memcpy(&bits, &vector, kVectorBytes);
  auto* place = reinterpret_cast<int4*>(address);
  if (stream) {
    __stcs(place, bits);
  } else {
    __stwb(place, bits);
  }
}

// Vectors that a thread loads of each tensor before it computes: enough bytes in flight, few enough registers.
template <typename Functor>
constexpr int kUnrollFor = Functor::kReads == 1   ? 4
                           : Functor::kReads <= 3 ? 2
                                                  : 1;

template <typename scalar_t, typename Functor, int kReads, int kWrites>
__device__ __forceinline__ void walk_one_by_one(Functor& functor, const Operands<scalar_t, kReads, kWrites>& at,
                                                int length, const Split& split) {
  const int head = split.head, in_vectors = split.vectors * Vector<scalar_t>::kWidth;
#pragma unroll 1
  for (int i = threadIdx.x; i < length - in_vectors; i += kThreads) {
    const int element = i < head ? i : i + in_vectors;
    scalar_t read[kReads], written[kWrites > 0 ? kWrites : 1];
#pragma unroll
    for (int r = 0; r < kReads; ++r) read[r] = at.read[r][element];
    functor(read, written);
#pragma unroll
    for (int w = 0; w < kWrites; ++w) at.written[w][element] = written[w];
  }
}

template <typename scalar_t, typename Functor, int kReads, int kWrites>
__device__ __forceinline__ void walk_in_vectors(Functor& functor, const Operands<scalar_t, kReads, kWrites>& at,
                                                const Split& split) {
  using Vectors = Vector<scalar_t>;
  constexpr int kUnroll = kUnrollFor<Functor>;
  const int count = split.vectors, head = split.head;
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kUnroll * kThreads) {
    Vectors read[kUnroll][kReads];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int vector = first + u * kThreads;
#pragma unroll
      for (int r = 0; r < kReads; ++r) {
        if (vector < count) {
          read[u][r] =
              load_vector(at.read[r] + head + vector * Vectors::kWidth, (Functor::kStreamedReads >> r & 1) != 0);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int vector = first + u * kThreads;
      if (vector >= count) break;
      Vectors written[kWrites > 0 ? kWrites : 1];
#pragma unroll
      for (int e = 0; e < Vectors::kWidth; ++e) {
        scalar_t in[kReads], out[kWrites > 0 ? kWrites : 1];
#pragma unroll
        for (int r = 0; r < kReads; ++r) in[r] = read[u][r].elements[e];
        functor(in, out);
#pragma unroll
        for (int w = 0; w < kWrites; ++w) written[w].elements[e] = out[w];
      }
#pragma unroll
      for (int w = 0; w < kWrites; ++w) {
        store_vector(at.written[w] + head + vector * Vectors::kWidth, written[w],
                     (Functor::kStreamedWrites >> w & 1) != 0);
      }
    }
  }
}

// Hands every element of a chunk to the functor, once. All threads of the block come here.
template <typename scalar_t, typename Functor, int kReads, int kWrites>
__device__ __forceinline__ void walk(Functor& functor, const Operands<scalar_t, kReads, kWrites>& at, int length) {
  static_assert(kReads == Functor::kReads && kWrites == Functor::kWrites);
  const auto address = reinterpret_cast<uint64_t>(at.read[0]);
  uint64_t differences = 0;
#pragma unroll
  for (int r = 1; r < kReads; ++r) differences |= address ^ reinterpret_cast<uint64_t>(at.read[r]);
#pragma unroll
  for (int w = 0; w < kWrites; ++w) differences |= address ^ reinterpret_cast<uint64_t>(at.written[w]);
  const Split split = split_chunk(address, differences, length, sizeof(scalar_t));
  walk_in_vectors(functor, at, split);
  walk_one_by_one(functor, at, length, split);
}

// What one thread has made for its block: arithmetic in double is slow on some GPUs, and a chunk needs it once.
template <typename Make>
__device__ __forceinline__ auto once_per_block(const Make& make) {
  using Value = decltype(make());
  alignas(Value) __shared__ unsigned char memory[sizeof(Value)];
  if (threadIdx.x == 0) new (memory) Value(make());
  __syncthreads();
  return *reinterpret_cast<const Value*>(memory);
}

// Which block of a launch is the last to get to a point, found without waiting. What the first thread of any block read
// and wrote before it took its ticket has then happened, for all threads of the last block.
class Ticket {
 public:
  // `finished` counts, and is 0 between launches. The first thread alone draws.
  __device__ explicit Ticket(int* finished) : finished_(finished) {
    if (threadIdx.x == 0) {
      __threadfence();
      number_ = atomicAdd(finished, 1);
    }
  }

  // For all threads of the block together.
  __device__ bool is_last() const {
    __shared__ bool last;
    if (threadIdx.x == 0) {
      last = number_ == static_cast<int>(gridDim.x) - 1;
      if (last) *finished_ = 0;
      __threadfence();
    }
    __syncthreads();
    return last;
  }

 private:
  int* finished_;
  int number_ = 0;
};

// The sum over the threads of a block, in the same order every time; for the first thread.
__device__ inline double block_sum(double value) {
  __shared__ double sums[kThreads];
  const int thread = threadIdx.x;
  sums[thread] = value;
  __syncthreads();
#pragma unroll
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) sums[thread] += sums[thread + half];
    __syncthreads();
  }
  return sums[0];
}

}  // namespace fastsam::cuda
