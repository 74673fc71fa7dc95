// What stands in the gradient's place: A * x + B * y, of an update of one chunk.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "../elementwise.h"
#include "operations.h"

namespace fastsam::cuda {

template <typename T>
struct DescentStep {
  T a, b, keep_x, keep_first, keep_state, decoupled_x, decoupled_y;

  __device__ __forceinline__ T gradient(T x, T y) const { return times(a, x) + times(b, y); }
  __device__ __forceinline__ T decoupled(T x, T y) const { return times(decoupled_x, x) + times(decoupled_y, y); }
  __device__ __forceinline__ T kept(T x, T first, T state) const {
    return times(keep_x, x) + times(keep_first, first) + times(keep_state, state);
  }
};

// A chunk's tensors of a descent. What lacks one of those that the form names takes no part.
template <typename scalar_t, typename stored_t>
struct DescentPlace {
  Source<scalar_t> y;
  scalar_t* first;
  stored_t* method_state;
  bool takes_part;
};

template <typename scalar_t, typename stored_t, typename Arguments>
__device__ __forceinline__ DescentPlace<scalar_t, stored_t> find_descent(const Arguments& args,
                                                                         const DescentArguments& descent,
                                                                         const DeviceChunk& chunk) {
  constexpr bool kMasters = !std::is_same_v<scalar_t, stored_t>;
  DescentPlace<scalar_t, stored_t> place{find_source<scalar_t, kMasters>(args, descent.y, chunk),
                                         element_pointer<scalar_t>(find_address(args, kFirstGrad, chunk), chunk),
                                         element_pointer<stored_t>(args.table, kMethodState, chunk), true};
  if (descent.y != kNone && !place.y.is_present()) place.takes_part = false;
  if (descent.keeps && (place.first == nullptr || place.method_state == nullptr)) place.takes_part = false;
  if (!place.takes_part) place.y = {nullptr, nullptr};
  if (!place.takes_part || !descent.keeps) place.method_state = nullptr;
  return place;
}

template <typename T>
__device__ __forceinline__ DescentStep<T> make_descent(const DescentArguments& descent, int64_t tensor,
                                                       bool takes_part) {
  if (!takes_part) return {T(1), T(0), T(0), T(0), T(1), T(0), T(0)};
  const DescentCoefficients given = descent.coefficients[tensor];
  const bool has_y = descent.y != kNone, decoupled = descent.decoupled;
  return {static_cast<T>(given.a),
          static_cast<T>(has_y ? given.b : 0),
          static_cast<T>(given.keep_x),
          static_cast<T>(given.keep_first),
          static_cast<T>(given.keep_state),
          static_cast<T>(decoupled ? given.decoupled_x : 0),
          static_cast<T>(decoupled && has_y ? given.decoupled_y : 0)};
}

}  // namespace fastsam::cuda
