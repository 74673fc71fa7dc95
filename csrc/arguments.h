// Checks of what the operators are handed that hold on every device.
#pragma once

#include <cstdint>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "table.h"

namespace fastsam {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_dense(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, "fastsam: ", name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), "fastsam: ", name, " must be contiguous");
}

inline void check_cpu(const Tensor& tensor, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), "fastsam: ", name, " must be on the CPU");
  check_dense(tensor, dtype, name);
}

// Only what is narrower than its arithmetic is rounded stochastically or has masters, which stand for the backups.
inline void check_precision(const TensorTable& table, ScalarType dtype, bool stochastic) {
  const bool is_narrow = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
  STD_TORCH_CHECK(is_narrow || !stochastic, "fastsam: only float16 and bfloat16 are rounded stochastically");
  STD_TORCH_CHECK(is_narrow || !table.has_masters, "fastsam: only float16 and bfloat16 have masters");
  if (!table.has_masters) return;
  for (int64_t i = 0; i < table.tensor_count; ++i) {
    const bool is_perturbed = table.sizes[i] != 0 && table.has(kBackup, i);
    STD_TORCH_CHECK(!is_perturbed || table.pointer<float>(kBackup, i) == table.pointer<float>(kMaster, i),
                    "fastsam: the backup of tensor ", i, " is not its master");
  }
}

// The table without what each device reads from its own memory: chunks and positions.
inline TensorTable read_tensors(const Tensor& addresses, const Tensor& tensors, int64_t chunk_size, ScalarType dtype,
                                bool stochastic, bool masters) {
  check_cpu(addresses, ScalarType::Long, "addresses");
  check_cpu(tensors, ScalarType::Long, "tensors");
  STD_TORCH_CHECK(tensors.dim() == 2 && tensors.size(0) == 2, "fastsam: tensors must be [2, n]");
  const int64_t n = tensors.size(1);
  STD_TORCH_CHECK(addresses.dim() == 2 && addresses.size(0) == kRows && addresses.size(1) == n,
                  "fastsam: addresses must be [", int64_t{kRows}, ", n]");
  STD_TORCH_CHECK(chunk_size > 0, "fastsam: chunk_size must be positive");
  const int64_t* rows = tensors.const_data_ptr<int64_t>();
  const TensorTable table{
      addresses.const_data_ptr<int64_t>(), rows, rows + n, nullptr, n, 0, chunk_size, 0, nullptr, masters};
  check_precision(table, dtype, stochastic);
  return table;
}

// An options row is read by its group's index: each must exist.
inline void check_groups(const TensorTable& table, int64_t group_count) {
  for (int64_t i = 0; i < table.tensor_count; ++i) {
    STD_TORCH_CHECK(table.groups[i] >= 0 && table.groups[i] < group_count, "fastsam: tensor ", i,
                    " names a group without options");
  }
}

// A row of one address per tensor's elements: a step is none.
inline void check_row(int64_t row) {
  STD_TORCH_CHECK(row >= 0 && row < kRows && row != kStep, "fastsam: there is no row ", row);
}

inline Map check_map(int64_t map) {
  STD_TORCH_CHECK(map >= 0 && map <= static_cast<int64_t>(Map::kAdaptive), "fastsam: there is no map ", map);
  return static_cast<Map>(map);
}

inline Update check_update(int64_t update) {
  STD_TORCH_CHECK(update >= 0 && update < kUpdates, "fastsam: there is no update ", update);
  return static_cast<Update>(update);
}

// [n, fields] in double, dense.
inline void check_coefficients(const Tensor& coefficients, const TensorTable& table, int fields) {
  check_dense(coefficients, ScalarType::Double, "coefficients");
  STD_TORCH_CHECK(
      coefficients.dim() == 2 && coefficients.size(0) == table.tensor_count && coefficients.size(1) == fields,
      "fastsam: coefficients must be [n, ", fields, "]");
}

// What an update needs of every tensor that has a gradient: that is, of each with elements.
template <typename Needs>
void check_present(const TensorTable& table, Row row, const char* name, const Needs& needs) {
  for (int64_t i = 0; i < table.tensor_count; ++i) {
    const bool is_updated = table.sizes[i] != 0 && table.has(kGrad, i);
    STD_TORCH_CHECK(!is_updated || table.has(row, i) || !needs(i), "fastsam: tensor ", i, " has no ", name);
  }
}

inline void check_masters(const TensorTable& table) {
  if (table.has_masters) check_present(table, kMaster, "master", [](int64_t) { return true; });
}

// A count is a float of its own, of an empty tensor too.
inline void check_steps(const TensorTable& table, bool needed) {
  if (needed) check_present(table, kStep, "step", [](int64_t) { return true; });
  for (int64_t i = 0; i < table.tensor_count; ++i) {
    const int64_t address = table.addresses[kStep * table.tensor_count + i];
    STD_TORCH_CHECK(address % static_cast<int64_t>(sizeof(float)) == 0, "fastsam: the step of tensor ", i,
                    " is not at an address of a float");
  }
}

}  // namespace fastsam
