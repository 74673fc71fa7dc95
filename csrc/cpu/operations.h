// The operations on the CPU, as ops.cpp calls them. Tables are checked; options are [groups] in the table's order.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include "../elementwise.h"
#include "../tensor_table.h"

namespace fastsam::cpu {

using torch::headeronly::ScalarType;

// partials[chunk] <- the chunk's sum of squares; returns their sum in chunk order, whatever the number of threads.
double square_sum(const TensorTable& table, ScalarType dtype, const ClimbOptions* options, double* partials);

void perturb_(const TensorTable& table, ScalarType dtype, const ClimbOptions* options, double norm);

void restore_(const TensorTable& table, ScalarType dtype);

// steps[tensor]: updates made so far, advanced here for every tensor with a gradient.
void restore_and_sgd_(const TensorTable& table, ScalarType dtype, const SgdOptions* options, float* steps,
                      double inv_grad_scale);

void restore_and_adam_(const TensorTable& table, ScalarType dtype, const AdamOptions* options, float* steps,
                       double inv_grad_scale);

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

}  // namespace fastsam::cpu
