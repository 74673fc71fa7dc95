// The operators' schemas and argument checks. Every device registers its kernels behind the same schemas.
//
// A table is (addresses [kRows, n], tensors [2, n]: sizes and groups, chunks [count, 3], chunk_size, dtype, positions
// [n]: in the parameter groups, masters), int64, on the CPU; `options` is [groups, fields] and `coefficients` [n,
// fields] in double, as spec.h's structs. With positions, results are rounded stochastically; with masters, weights and
// state are kept in float. What other devices read from their own memory instead, and what `device_addresses` and
// `finished` are to them: cuda/ops.cpp.
#include <cmath>
#include <cstdint>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "arguments.h"
#include "cpu/operations.h"
#include "elementwise.h"
#include "table.h"
#include "watch.h"

namespace fastsam {
namespace {

TensorTable read_table(const Tensor& addresses, const Tensor& tensors, const Tensor& chunks, int64_t chunk_size,
                       ScalarType dtype, const std::optional<Tensor>& positions, bool masters) {
  TensorTable table = read_tensors(addresses, tensors, chunk_size, dtype, positions.has_value(), masters);
  if (positions.has_value()) {
    check_cpu(*positions, ScalarType::Long, "positions");
    STD_TORCH_CHECK(positions->numel() == 2 * table.tensor_count, "fastsam: positions must be [2, n]");
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

// [groups, fields]
template <typename Options>
const Options* read_options(const Tensor& options, const TensorTable& table) {
  check_cpu(options, ScalarType::Double, "options");
  STD_TORCH_CHECK(options.dim() == 2 && options.size(1) == kFields<Options>, "fastsam: options must be [groups, ",
                  kFields<Options>, "]");
  check_groups(table, options.size(0));
  return reinterpret_cast<const Options*>(options.const_data_ptr<double>());
}

template <typename Coefficients>
const Coefficients* read_coefficients(const Tensor& coefficients, const TensorTable& table) {
  check_cpu(coefficients, ScalarType::Double, "coefficients");
  check_coefficients(coefficients, table, kFields<Coefficients>);
  return reinterpret_cast<const Coefficients*>(coefficients.const_data_ptr<double>());
}

double* read_doubles(const Tensor& tensor, int64_t count, const char* name) {
  check_cpu(tensor, ScalarType::Double, name);
  STD_TORCH_CHECK(tensor.numel() == count, "fastsam: ", name, " must have ", count, " elements");
  return tensor.mutable_data_ptr<double>();
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
  const auto* groups = read_options<AscentOptions>(options, table);
  double* sums = read_doubles(partials, table.chunk_count, "partials");
  double* total = read_doubles(norm, 1, "norm");
  const double sum = (first ? 0 : *total) + cpu::square_sum(table, dtype, groups, sums);
  *total = last ? std::sqrt(sum) : sum;
}

void dots_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
              std::optional<Tensor>, std::optional<Tensor> positions, bool masters, Tensor coefficients, int64_t x,
              int64_t y, int64_t map, bool ascent, Tensor partials, Tensor result, std::optional<Tensor>) {
  const TensorTable table = read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
  check_row(x);
  if (y != kNone && !(ascent && y == kPerturbation)) check_row(y);
  const auto* weights = ascent ? read_coefficients<AscentCoefficients>(coefficients, table) : nullptr;
  const Map mapping = check_map(map);
  STD_TORCH_CHECK(ascent || mapping == Map::kIdentity, "fastsam: a descent has no map");
  double* sums = read_doubles(partials, 3 * table.chunk_count, "partials");
  double* dots = read_doubles(result, 3 * table.tensor_count, "result");
  cpu::dots(table, dtype, {nullptr, 0, weights, x, y, mapping}, sums, dots);
}

void perturb_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                 std::optional<Tensor>, std::optional<Tensor> positions, bool masters, Tensor options,
                 std::optional<Tensor> norm, std::optional<Tensor> coefficients, int64_t x, int64_t y, int64_t map) {
  const TensorTable table = read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
  STD_TORCH_CHECK(norm.has_value() != coefficients.has_value(), "fastsam: give either norm or coefficients");
  cpu::Ascent ascent{read_options<AscentOptions>(options, table), 0, nullptr, x, y, check_map(map)};
  check_row(x);
  if (norm.has_value()) {
    STD_TORCH_CHECK(x == kGrad && y == kNone && ascent.map == Map::kIdentity, "fastsam: a norm is of the gradient");
    ascent.norm = *read_doubles(*norm, 1, "norm");
  } else {
    if (y != kNone && y != kPerturbation) check_row(y);
    ascent.coefficients = read_coefficients<AscentCoefficients>(*coefficients, table);
  }
  for (int64_t i = 0; table.positions != nullptr && i < table.tensor_count; ++i) {
    const bool draws = table.sizes[i] != 0 && table.has(kBackup, i) && table.has(x, i);
    STD_TORCH_CHECK(!draws || table.has(kStep, i), "fastsam: tensor ", i, " has no step for its random numbers");
  }
  cpu::perturb_(table, dtype, ascent);
}

void restore_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                 std::optional<Tensor>, std::optional<Tensor> positions, bool masters) {
  cpu::restore_(read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters), dtype);
}

// The options of the update's groups; checks the state that it reads.
const void* read_update(const TensorTable& table, Update update, const Tensor& options) {
  if (update == Update::kSgd) {
    const auto* groups = read_options<SgdOptions>(options, table);
    check_present(table, kState0, "momentum buffer", [&](int64_t i) { return groups[table.groups[i]].momentum != 0; });
    return groups;
  }
  if (update == Update::kAdam) {
    const auto* groups = read_options<AdamOptions>(options, table);
    const auto always = [](int64_t) { return true; };
    check_present(table, kState0, "exp_avg", always);
    check_present(table, kState1, "exp_avg_sq", always);
    check_present(table, kState2, "max_exp_avg_sq", [&](int64_t i) { return groups[table.groups[i]].amsgrad != 0; });
    return groups;
  }
  return nullptr;
}

void restore_and_update_cpu(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                            std::optional<Tensor>, std::optional<Tensor> positions, bool masters, int64_t update,
                            Tensor options, std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
                            std::optional<Tensor>, std::optional<Tensor> coefficients, int64_t y, bool keeps,
                            bool decoupled) {
  const TensorTable table = read_table(addresses, tensors, chunks, chunk_size, dtype, positions, masters);
  const Update algorithm = check_update(update);
  const void* groups = read_update(table, algorithm, options);
  if (algorithm != Update::kNone) {
    check_masters(table);
    check_steps(table, algorithm == Update::kAdam || (table.positions != nullptr && !table.has_masters));
  }
  std::optional<cpu::Descent> descent;
  if (coefficients.has_value()) {
    if (y != kNone) check_row(y);
    // Without a fused update, the decoupled part is left there for the caller.
    const bool leaves_part = decoupled && algorithm == Update::kNone && !keeps;
    check_present(table, kFirstGrad, "first gradient",
                  [&](int64_t i) { return leaves_part && (y == kNone || table.has(y, i)); });
    descent = {read_coefficients<DescentCoefficients>(*coefficients, table), y, keeps, decoupled};
  }
  const double inv_scale = 1.0 / read_scalar(grad_scale, 1.0, "grad_scale");
  if (read_scalar(found_inf, 0.0, "found_inf") != 0) return cpu::restore_(table, dtype);
  cpu::restore_and_update_(table, dtype, algorithm, groups, inv_scale, descent ? &*descent : nullptr);
}

}  // namespace
}  // namespace fastsam

#define FASTSAM_TABLE                                                                   \
  "Tensor addresses, Tensor tensors, Tensor chunks, int chunk_size, ScalarType dtype, " \
  "Tensor? device_addresses, Tensor? positions, bool masters"

STABLE_TORCH_LIBRARY(fastsam, m) {
  m.def("grad_norm_(" FASTSAM_TABLE
        ", Tensor options, Tensor(a!) partials, Tensor(b!) norm, Tensor(c!)? finished, bool first, bool last) -> ()");
  m.def("dots_(" FASTSAM_TABLE
        ", Tensor coefficients, int x, int y, int map, bool ascent, Tensor(a!) partials, Tensor(b!) result, "
        "Tensor(c!)? finished) -> ()");
  m.def("perturb_(" FASTSAM_TABLE ", Tensor options, Tensor? norm, Tensor? coefficients, int x, int y, int map) -> ()");
  m.def("restore_(" FASTSAM_TABLE ") -> ()");
  m.def("restore_and_update_(" FASTSAM_TABLE
        ", int update, Tensor options, Tensor? grad_scale, Tensor? found_inf, Tensor(a!)? finished, "
        "Tensor? coefficients, int y, bool keeps, bool decoupled) -> ()");
  m.def("watch(Tensor[] tensors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(fastsam, CompositeExplicitAutograd, m) { m.impl("watch", TORCH_BOX(&fastsam::watch)); }

STABLE_TORCH_LIBRARY_IMPL(fastsam, CPU, m) {
  m.impl("grad_norm_", TORCH_BOX(&fastsam::grad_norm_cpu));
  m.impl("dots_", TORCH_BOX(&fastsam::dots_cpu));
  m.impl("perturb_", TORCH_BOX(&fastsam::perturb_cpu));
  m.impl("restore_", TORCH_BOX(&fastsam::restore_cpu));
  m.impl("restore_and_update_", TORCH_BOX(&fastsam::restore_and_update_cpu));
}
