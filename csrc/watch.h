// Tensors that are asked in every step whether they still are what they were: see watch.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include <torch/csrc/stable/tensor.h>

namespace fastsam {

// Remembers `tensors` (which have addresses) as they are now, under the number that it returns.
int64_t watch(std::vector<torch::stable::Tensor> tensors);

// Whether all have the address, device, dtype, shape and strides that they had; false if there is no such number.
bool is_unchanged(int64_t number);

// Lets go of them.
void unwatch(int64_t number);

}  // namespace fastsam
