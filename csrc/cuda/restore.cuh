// w <- backup, or the master's rounding, for one chunk: by itself, and where an update has nothing to do.
#pragma once

#include <type_traits>

#include "walk.cuh"

namespace fastsam::cuda {

template <typename scalar_t>
struct CopyFunctor : FunctorTraits {
  using Tensors = Counts<1, 1>;

  __device__ void operator()(Element<scalar_t, Tensors>& element) const { element.written[0] = element.read[0]; }
};

template <typename scalar_t>
struct RoundFunctor : FunctorTraits {
  using Tensors = Counts<0, 1, 1>;

  __device__ void operator()(Element<scalar_t, Tensors>& element) const {
    element.written[0] = static_cast<scalar_t>(element.wide_read[0]);
  }
};

template <typename scalar_t, bool kMasters>
__device__ __forceinline__ void restore_chunk(const DeviceTable& table, const DeviceChunk& chunk) {
  using stored_t = std::conditional_t<kMasters, float, scalar_t>;
  const auto* backup = element_pointer<stored_t>(table, kBackup, chunk);
  if (backup == nullptr) return;
  auto* param = element_pointer<scalar_t>(table, kParam, chunk);
  if constexpr (kMasters) {
    const RoundFunctor<scalar_t> round;
    walk<scalar_t>(round, {{}, {param}, {backup}, {}}, chunk.length);
  } else {
    const CopyFunctor<scalar_t> copy;
    walk<scalar_t>(copy, {{backup}, {param}, {}, {}}, chunk.length);
  }
}

}  // namespace fastsam::cuda
