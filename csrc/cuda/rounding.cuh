// How a kernel rounds: chosen when it is compiled; what random numbers need, read where it runs.
#pragma once

#include <type_traits>

#include "../dispatch.h"
#include "../rounding.h"
#include "launches.h"

namespace fastsam::cuda {

// The updates that a chunk's tensor has had; without a count, some.
__device__ __forceinline__ float read_step(const DeviceTable& table, const DeviceChunk& chunk) {
  const int64_t address = table.addresses[kStep * table.tensor_count + chunk.tensor];
  return address == 0 ? 1 : *reinterpret_cast<const float*>(address);
}

// For kResults results of each of the chunk's elements, which are counted from its first.
template <typename scalar_t, bool kStochastic, Draw kDraw, int kResults>
__device__ __forceinline__ auto make_rounding(const DeviceTable& table, const DeviceChunk& chunk, double seed) {
  if constexpr (kStochastic) {
    using Rounding = Stochastic<scalar_t, kDraw, kResults>;
    const int64_t *position = table.positions + chunk.tensor, offset = position[table.tensor_count];
    return Rounding::make(seed, read_step(table, chunk), *position, offset).at(chunk.start);
  } else {
    return Nearest<scalar_t>{};
  }
}

}  // namespace fastsam::cuda
