// From a dtype at run time to a type at compile time.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "elementwise.h"

namespace fastsam {

using torch::headeronly::ScalarType;

// Calls body(scalar_t{}) with the type of `dtype`.
template <typename Body>
void dispatch(ScalarType dtype, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(bfloat16{});
    case ScalarType::Half:
      return body(half{});
    default:
      STD_TORCH_CHECK(false, "fastsam: unsupported dtype ", static_cast<int>(dtype));
  }
}

}  // namespace fastsam
