// w <- backup, for one chunk: by itself, and where an update has nothing to do.
#pragma once

#include "multi_tensor.cuh"

namespace fastsam::cuda {

template <typename scalar_t>
struct CopyFunctor {
  static constexpr int kReads = 1, kWrites = 1;
  // The backup is done with.
  static constexpr unsigned kStreamedReads = 0b1, kStreamedWrites = 0;

  __device__ void operator()(const scalar_t (&read)[1], scalar_t (&written)[1]) const { written[0] = read[0]; }
};

template <typename scalar_t>
__device__ __forceinline__ void restore_chunk(const DeviceTable& table, const DeviceChunk& chunk) {
  const auto* backup = element_pointer<scalar_t>(table, kBackup, chunk);
  if (backup == nullptr) return;
  const CopyFunctor<scalar_t> copy;
  walk(copy, Operands<scalar_t, 1, 1>{{backup}, {element_pointer<scalar_t>(table, kParam, chunk)}}, chunk.length);
}

}  // namespace fastsam::cuda
