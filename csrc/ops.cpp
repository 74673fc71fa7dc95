// The operators' schemas and argument checks. Every device registers its kernels behind the same schemas.
//
// A table is (addresses [kRoles, n], tensors [2, n]: sizes and groups, chunks [count, 3], chunk_size, dtype, positions
// [n]: in the parameter groups, masters), int64, on the CPU; `options` is [groups, fields] in double, in the order of
// elementwise.h's structs. With positions, results are rounded stochastically, to which the climb needs `steps`; with
// masters, weights and state are kept in float. What other devices read from their own memory instead, and what
// `device_addresses` and `finished` are to them: cuda/ops.cpp.
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "arguments.h"
#include "cpu/operations.h"
#include "elementwise.h"
#include "tensor_table.h"

namespace fastsam {
namespace {

TensorTable read_table(const Tensor& addresses, const Tensor& tensors, const Tensor& chunks, int64_t chunk_size,
                       ScalarType dtype, const std::optional<Tensor>& positions, bool masters) {
  TensorTable table = read_tensors(addresses, tensors, chunk_size, dtype, positions.has_value(), masters);
  if (positions.has_value()) {
    check_cpu(*positions, ScalarType::Long, "positions");
    STD_TORCH_CHECK(positions->numel() == table.tensor_count, "fastsam: positions must be [n]");
    table.positions = positions->const_data_ptr<int64_t>();
  }
  check_cpu(chunks, ScalarType::Long, "chunks");
  STD_TORCH_CHECK(chunks.dim() == 2 && chunks.size(1) == 3, "fastsam: chunks must be [count, 3]");
  table.chunks = chunks.const_data_ptr<int64_t>();
  table.chunk_count = chunks.size(0);
  int64_t work = 0;
  for (int64_t i = 0; i < table.chunk_count; ++i) {
    const int64_t* row = table.chunks + 3 * i;
    STD_TORCH_CHECK(
        row[0] >= 0 && row[0] < table.tensor_count && row[1] >= 0 && row[1] < table.sizes[row[0]] && row[2] == work,
        "fastsam: chunk ", i, " is not part of its table");
    work += read_chunk(table, i).length + kChunkOverhead;
    STD_TORCH_CHECK(table.has(kParam, row[0]), "fastsam: tensor ", row[0], " has no address");
  }
  table.work = work;
  return table;
}

// The rows of `options` as structs.
template <typename Options>
std::vector<Options> read_options(const Tensor& options, const TensorTable& table) {
  check_cpu(options, ScalarType::Double, "options");
  STD_TORCH_CHECK(options.dim() == 2 && options.size(1) == Options::kFields, "fastsam: options must be [groups, ",
                  Options::kFields, "]");
  check_groups(table, options.size(0));
  std::vector<Options> result;
  result.reserve(options.size(0));
  const double* row = options.const_data_ptr<double>();
  for (int64_t i = 0; i < options.size(0); ++i, row += Options::kFields) result.push_back(Options::read(row));
  return result;
}

float* check_steps(const Tensor& steps, const TensorTable& table) {
  check_cpu(steps, ScalarType::Float, "steps");
  STD_TORCH_CHECK(steps.numel() == table.tensor_count, "fastsam: steps must be [n]");
  return steps.mutable_data_ptr<float>();
}

// torch.amp's two tensors, read on the host: on this device that is no synchronisation.
double read_scalar(const std::optional<Tensor>& scalar, double otherwise, const char* name) {
  if (!scalar.has_value()) return otherwise;
  STD_TORCH_CHECK(scalar->numel() == 1, "fastsam: ", name, " must have one element");
  check_cpu(*scalar, ScalarType::Float, name);
  return *scalar->const_data_ptr<float>();
}

void grad_norm_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                   std::optional<Tensor>, std::optional<Tensor> positions, bool masters, Tensor options,
                   Tensor partials, Tensor norm, std::optional<Tensor>, bool first, bool last) {
  const TensorTable table = read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
  const auto groups = read_options<ClimbOptions>(options, table);
  check_cpu(partials, ScalarType::Double, "partials");
  check_cpu(norm, ScalarType::Double, "norm");
  STD_TORCH_CHECK(partials.numel() == table.chunk_count, "fastsam: partials must be [chunks]");
  STD_TORCH_CHECK(norm.numel() == 1, "fastsam: norm must have one element");
  double* total = norm.mutable_data_ptr<double>();
  const double before = first ? 0 : *total;
  const double sum = before + cpu::square_sum(table, dtype, groups.data(), partials.mutable_data_ptr<double>());
  *total = last ? std::sqrt(sum) : sum;
}

void perturb_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                 std::optional<Tensor>, std::optional<Tensor> positions, bool masters, Tensor options, Tensor norm,
                 std::optional<Tensor> steps) {
  const TensorTable table = read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
  const auto groups = read_options<ClimbOptions>(options, table);
  check_cpu(norm, ScalarType::Double, "norm");
  STD_TORCH_CHECK(norm.numel() == 1, "fastsam: norm must have one element");
  STD_TORCH_CHECK(steps.has_value() || table.positions == nullptr, "fastsam: random numbers need steps");
  const float* step_counts = steps.has_value() ? check_steps(*steps, table) : nullptr;
  cpu::perturb_(table, dtype, groups.data(), step_counts, *norm.const_data_ptr<double>());
}

// Combinations are for tables that round to nearest and have no masters.
TensorTable read_plain_table(const Tensor& addresses, const Tensor& tensors, const Tensor& chunks, int64_t chunk_size,
                             ScalarType dtype, const std::optional<Tensor>& positions, bool masters) {
  STD_TORCH_CHECK(!positions.has_value() && !masters, "fastsam: no combinations with masters or random numbers");
  return read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
}

// [n, kWeightColumns] in double.
const double* check_weights(const Tensor& weights, const TensorTable& table) {
  check_cpu(weights, ScalarType::Double, "weights");
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == table.tensor_count && weights.size(1) == kWeightColumns,
                  "fastsam: weights must be [n, ", kWeightColumns, "]");
  return weights.const_data_ptr<double>();
}

cpu::Climb check_climb(const Tensor& weights, const TensorTable& table, int64_t x, int64_t y, int64_t map) {
  STD_TORCH_CHECK(x >= 0 && x < kRoles, "fastsam: there is no row ", x);
  STD_TORCH_CHECK(y >= cpu::kDistance && y < kRoles, "fastsam: there is no row ", y);
  STD_TORCH_CHECK(map >= 0 && map <= static_cast<int64_t>(Map::kAdaptive), "fastsam: there is no map ", map);
  return {check_weights(weights, table), x, y, static_cast<Map>(map)};
}

void dots_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
              std::optional<Tensor>, std::optional<Tensor> positions, bool masters, Tensor weights, int64_t x,
              int64_t y, int64_t map, bool climbing, Tensor partials, Tensor result) {
  const TensorTable table = read_plain_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
  const cpu::Climb climb = check_climb(weights, table, x, y, map);
  check_cpu(partials, ScalarType::Double, "partials");
  check_cpu(result, ScalarType::Double, "result");
  STD_TORCH_CHECK(partials.numel() == 3 * table.chunk_count, "fastsam: partials must be [chunks, 3]");
  STD_TORCH_CHECK(result.numel() == 3 * table.tensor_count, "fastsam: result must be [n, 3]");
  cpu::dots(table, dtype, climb, climbing, partials.mutable_data_ptr<double>(), result.mutable_data_ptr<double>());
}

void perturb_by_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                    std::optional<Tensor>, std::optional<Tensor> positions, bool masters, Tensor weights, int64_t x,
                    int64_t y, int64_t map) {
  const TensorTable table = read_plain_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
  cpu::perturb_by_(table, dtype, check_climb(weights, table, x, y, map));
}

void restore_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                 std::optional<Tensor>, std::optional<Tensor> positions, bool masters) {
  cpu::restore_(read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters), dtype);
}

// What the updates by a combination are given besides.
std::optional<cpu::Descent> read_descent(const TensorTable& table, const std::optional<Tensor>& weights, int64_t y,
                                         bool keeps, bool decoupled) {
  if (!weights.has_value()) return std::nullopt;
  STD_TORCH_CHECK(y >= cpu::kNothing && y < kRoles, "fastsam: there is no row ", y);
  STD_TORCH_CHECK(!decoupled || y != cpu::kNothing, "fastsam: a decoupled update needs a second tensor");
  return cpu::Descent{check_weights(*weights, table), y, keeps, decoupled};
}

// What both updates check, and then one of them: check_state(groups), update(groups, steps, inv_grad_scale, descent).
template <typename Options, typename CheckState, typename Update>
void restore_and_update(const TensorTable& table, ScalarType dtype, const Tensor& options, const Tensor& steps,
                        const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
                        const std::optional<Tensor>& weights, int64_t y, bool keeps, bool decoupled,
                        const CheckState& check_state, const Update& update) {
  STD_TORCH_CHECK(!weights.has_value() || (table.positions == nullptr && !table.has_masters),
                  "fastsam: no combinations with masters or random numbers");
  const auto groups = read_options<Options>(options, table);
  check_masters(table);
  check_state(groups);
  float* step_counts = check_steps(steps, table);
  const double inv_scale = 1.0 / read_scalar(grad_scale, 1.0, "grad_scale");
  if (read_scalar(found_inf, 0.0, "found_inf") != 0) return cpu::restore_(table, dtype);
  const auto descent = read_descent(table, weights, y, keeps, decoupled);
  update(groups.data(), step_counts, inv_scale, descent ? &*descent : nullptr);
}

void restore_and_sgd_by_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                            std::optional<Tensor>, std::optional<Tensor> positions, bool masters, Tensor options,
                            Tensor steps, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                            std::optional<Tensor>, std::optional<Tensor> weights, int64_t y, bool keeps,
                            bool decoupled) {
  const TensorTable table = read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
  const auto check_state = [&](const auto& groups) {
    for (int64_t i = 0; i < table.tensor_count; ++i) {
      const bool needs_buffer = table.sizes[i] != 0 && table.has(kGrad, i) && groups[table.groups[i]].momentum != 0;
      STD_TORCH_CHECK(!needs_buffer || table.has(kState0, i), "fastsam: tensor ", i, " has no momentum buffer");
    }
  };
  const auto update = [&](auto... arguments) { cpu::restore_and_sgd_(table, dtype, arguments...); };
  restore_and_update<SgdOptions>(table, dtype, options, steps, grad_scale, found_inf, weights, y, keeps, decoupled,
                                 check_state, update);
}

void restore_and_sgd_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                         std::optional<Tensor> device_addresses, std::optional<Tensor> positions, bool masters,
                         Tensor options, Tensor steps, std::optional<Tensor> grad_scale,
                         std::optional<Tensor> found_inf, std::optional<Tensor> finished) {
  restore_and_sgd_by_cpu(addresses, tensors, chunks, chunk_size, dtype, device_addresses, positions, masters, options,
                         steps, grad_scale, found_inf, finished, std::nullopt, 0, false, false);
}

void restore_and_adam_by_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                             std::optional<Tensor>, std::optional<Tensor> positions, bool masters, Tensor options,
                             Tensor steps, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                             std::optional<Tensor>, std::optional<Tensor> weights, int64_t y, bool keeps,
                             bool decoupled) {
  const TensorTable table = read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
  const auto check_state = [&](const auto& groups) {
    check_moments(table);
    for (int64_t i = 0; i < table.tensor_count; ++i) {
      const bool needs_largest = table.sizes[i] != 0 && table.has(kGrad, i) && groups[table.groups[i]].amsgrad;
      STD_TORCH_CHECK(!needs_largest || table.has(kState2, i), "fastsam: tensor ", i, " has no max_exp_avg_sq");
    }
  };
  const auto update = [&](auto... arguments) { cpu::restore_and_adam_(table, dtype, arguments...); };
  restore_and_update<AdamOptions>(table, dtype, options, steps, grad_scale, found_inf, weights, y, keeps, decoupled,
                                  check_state, update);
}

void restore_and_adam_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                          std::optional<Tensor> device_addresses, std::optional<Tensor> positions, bool masters,
                          Tensor options, Tensor steps, std::optional<Tensor> grad_scale,
                          std::optional<Tensor> found_inf, std::optional<Tensor> finished) {
  restore_and_adam_by_cpu(addresses, tensors, chunks, chunk_size, dtype, device_addresses, positions, masters, options,
                          steps, grad_scale, found_inf, finished, std::nullopt, 0, false, false);
}

}  // namespace
}  // namespace fastsam

#define FASTSAM_TABLE                                                                   \
  "Tensor addresses, Tensor tensors, Tensor chunks, int chunk_size, ScalarType dtype, " \
  "Tensor? device_addresses, Tensor? positions, bool masters"
#define FASTSAM_UPDATE \
  FASTSAM_TABLE ", Tensor options, Tensor(a!) steps, Tensor? grad_scale, Tensor? found_inf, Tensor(b!)? finished"
#define FASTSAM_UPDATE_BY FASTSAM_UPDATE ", Tensor? weights, int y, bool keeps, bool decoupled"

STABLE_TORCH_LIBRARY(fastsam, m) {
  m.def("grad_norm_(" FASTSAM_TABLE
        ", Tensor options, Tensor(a!) partials, Tensor(b!) norm, Tensor(c!)? finished, bool first, bool last) -> ()");
  m.def("perturb_(" FASTSAM_TABLE ", Tensor options, Tensor norm, Tensor? steps) -> ()");
  m.def("restore_(" FASTSAM_TABLE ") -> ()");
  m.def("restore_and_sgd_(" FASTSAM_UPDATE ") -> ()");
  m.def("restore_and_adam_(" FASTSAM_UPDATE ") -> ()");
  // For methods beyond SAM (fastsam/backends/combination.py).
  m.def("dots(" FASTSAM_TABLE
        ", Tensor weights, int x, int y, int map, bool climbing, Tensor(a!) partials, Tensor(b!) result) -> ()");
  m.def("perturb_by_(" FASTSAM_TABLE ", Tensor weights, int x, int y, int map) -> ()");
  m.def("restore_and_sgd_by_(" FASTSAM_UPDATE_BY ") -> ()");
  m.def("restore_and_adam_by_(" FASTSAM_UPDATE_BY ") -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastsam, CPU, m) {
  m.impl("grad_norm_", TORCH_BOX(&fastsam::grad_norm_cpu));
  m.impl("perturb_", TORCH_BOX(&fastsam::perturb_cpu));
  m.impl("restore_", TORCH_BOX(&fastsam::restore_cpu));
  m.impl("restore_and_sgd_", TORCH_BOX(&fastsam::restore_and_sgd_cpu));
  m.impl("restore_and_adam_", TORCH_BOX(&fastsam::restore_and_adam_cpu));
  m.impl("dots", TORCH_BOX(&fastsam::dots_cpu));
  m.impl("perturb_by_", TORCH_BOX(&fastsam::perturb_by_cpu));
  m.impl("restore_and_sgd_by_", TORCH_BOX(&fastsam::restore_and_sgd_by_cpu));
  m.impl("restore_and_adam_by_", TORCH_BOX(&fastsam::restore_and_adam_by_cpu));
}
