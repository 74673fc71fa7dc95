// The operators on CUDA tensors: argument checks, device, stream.
//
// What the host reads is a table as in ../ops.cpp, less its chunks: above all the addresses of this step's gradients.
// What kernels read is in device memory (fastsam/backends/device_table.py): `device_addresses` [kRows, n] as int64,
// whose rows of gradients, first gradients and directions are not read; `chunks` [count, 4] as int64: tensor, first
// element, length, group; `options` as two words for each of [groups, fields]; `coefficients`; `positions`; `finished`
// [2, n] as int32: zeros between operations, and the number of each tensor's chunks.
#include <cstdint>
#include <exception>
#include <optional>
#include <string>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "operations.h"

// Declared in shim.h for builds of PyTorch with CUDA alone. Weak: a PyTorch without it loads this library, too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fastsam::cuda {
namespace {

using torch::stable::accelerator::DeviceGuard;

// The most elements of a chunk: threads count them in 32 bits.
constexpr int64_t kLargestChunk = int64_t{1} << 30;

void check_device(const Tensor& tensor, ScalarType dtype, const char* name, int32_t device) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == device, "fastsam: ", name,
                  " must be on the table's CUDA device");
  check_dense(tensor, dtype, name);
}

template <typename T>
T* device_pointer(const Tensor& tensor, ScalarType dtype, const char* name, int32_t device, int64_t count) {
  check_device(tensor, dtype, name, device);
  STD_TORCH_CHECK(tensor.numel() == count, "fastsam: ", name, " must have ", count, " elements");
  return static_cast<T*>(tensor.data_ptr());
}

const float* scalar_pointer(const std::optional<Tensor>& scalar, const char* name, int32_t device) {
  return scalar.has_value() ? device_pointer<float>(*scalar, ScalarType::Float, name, device, 1) : nullptr;
}

TensorTable read_host_table(const Tensor& addresses, const Tensor& tensors, int64_t chunk_size, ScalarType dtype,
                            bool stochastic, bool masters) {
  TensorTable table = read_tensors(addresses, tensors, chunk_size, dtype, stochastic, masters);
  STD_TORCH_CHECK(table.tensor_count > 0, "fastsam: a table has at least one tensor");
  STD_TORCH_CHECK(chunk_size <= kLargestChunk, "fastsam: chunk_size must be at most ", kLargestChunk);
  for (int64_t i = 0; i < table.tensor_count; ++i) {
    STD_TORCH_CHECK(table.sizes[i] >= 0, "fastsam: tensor ", i, " has a negative size");
    STD_TORCH_CHECK(table.sizes[i] == 0 || table.has(kParam, i), "fastsam: tensor ", i, " has no address");
    table.chunk_count += chunks_of(table.sizes[i], chunk_size);
  }
  STD_TORCH_CHECK(table.chunk_count <= INT32_MAX, "fastsam: more chunks than a launch has blocks");
  return table;
}

// A table on its device, which is the current one as long as this lives, and on that device's current stream.
class Operation {
 public:
  Operation(const Tensor& addresses, const Tensor& tensors, const Tensor& chunks, int64_t chunk_size, ScalarType dtype,
            const std::optional<Tensor>& device_addresses, const std::optional<Tensor>& positions, bool masters)
      : device(find_device(device_addresses)),
        call{
            read_host_table(addresses, tensors, chunk_size, dtype, positions.has_value(), masters), {}, dtype, nullptr},
        guard_(device) {
    const int64_t n = call.table.tensor_count;
    check_device(chunks, ScalarType::Long, "chunks", device);
    // A table without elements has a row of none.
    const int64_t rows = call.table.chunk_count == 0 ? 1 : call.table.chunk_count;
    STD_TORCH_CHECK(chunks.dim() == 2 && chunks.size(0) == rows && chunks.size(1) == 4, "fastsam: chunks must be [",
                    rows, ", 4]");
    call.device = {device_pointer<int64_t>(*device_addresses, ScalarType::Long, "device_addresses", device, kRows * n),
                   chunks.const_data_ptr<int64_t>(), n,
                   positions.has_value()
                       ? device_pointer<int64_t>(*positions, ScalarType::Long, "positions", device, 2 * n)
                       : nullptr};
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fastsam: this PyTorch has no CUDA streams");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    call.stream = static_cast<Stream>(stream);
  }

  template <typename Options>
  const DeviceOption* options(const Tensor& options) const {
    check_device(options, ScalarType::Long, "options", device);
    constexpr int64_t kWords = 2 * kFields<Options>;
    STD_TORCH_CHECK(options.numel() % kWords == 0, "fastsam: options must be ", kWords, " words for each group");
    check_groups(call.table, options.numel() / kWords);
    const auto* first = static_cast<const DeviceOption*>(options.data_ptr());
    STD_TORCH_CHECK(reinterpret_cast<uint64_t>(first) % alignof(DeviceOption) == 0, "fastsam: options must be aligned");
    return first;
  }

  template <typename Coefficients>
  const Coefficients* coefficients(const Tensor& coefficients) const {
    check_device(coefficients, ScalarType::Double, "coefficients", device);
    check_coefficients(coefficients, call.table, kFields<Coefficients>);
    return static_cast<const Coefficients*>(coefficients.data_ptr());
  }

  double* doubles(const Tensor& tensor, int64_t count, const char* name) const {
    return device_pointer<double>(tensor, ScalarType::Double, name, device, count);
  }

  // What the blocks of all tables count by: the first counter of one of them.
  int* shared_counter(const std::optional<Tensor>& finished) const {
    STD_TORCH_CHECK(finished.has_value(), "fastsam: on CUDA, finished must be given");
    check_device(*finished, ScalarType::Int, "finished", device);
    STD_TORCH_CHECK(finished->numel() > 0, "fastsam: finished must have an element");
    return static_cast<int*>(finished->data_ptr());
  }

  int* counters(const std::optional<Tensor>& finished) const {
    STD_TORCH_CHECK(finished.has_value(), "fastsam: on CUDA, finished must be given");
    return device_pointer<int>(*finished, ScalarType::Int, "finished", device, 2 * call.table.tensor_count);
  }

  // Of a perturbation: whose random numbers need a step.
  void check_draws(int64_t x) const {
    const TensorTable& table = call.table;
    for (int64_t i = 0; call.device.positions != nullptr && i < table.tensor_count; ++i) {
      const bool draws = table.sizes[i] != 0 && table.has(kBackup, i) && table.has(x, i);
      STD_TORCH_CHECK(!draws || table.has(kStep, i), "fastsam: tensor ", i, " has no step for its random numbers");
    }
  }

  const int32_t device;
  Call call;

 private:
  static int32_t find_device(const std::optional<Tensor>& device_addresses) {
    STD_TORCH_CHECK(device_addresses.has_value() && device_addresses->is_cuda(),
                    "fastsam: device_addresses must be on a CUDA device");
    return device_addresses->get_device_index();
  }

  DeviceGuard guard_;
};

void grad_norm_cuda(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                    std::optional<Tensor> device_addresses, std::optional<Tensor> positions, bool masters,
                    Tensor options, Tensor partials, Tensor norm, std::optional<Tensor> finished, bool first,
                    bool last) {
  const Operation operation(addresses, tensors, chunks, chunk_size, dtype, device_addresses, positions, masters);
  const DeviceOption* groups = operation.options<AscentOptions>(options);
  double* sums = operation.doubles(partials, chunks.size(0), "partials");
  grad_norm_(operation.call, groups, sums, operation.doubles(norm, 1, "norm"), operation.shared_counter(finished),
             first, last);
}

void dots_cuda(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
               std::optional<Tensor> device_addresses, std::optional<Tensor> positions, bool masters,
               Tensor coefficients, int64_t x, int64_t y, int64_t map, bool ascent, Tensor partials, Tensor result,
               std::optional<Tensor> finished) {
  const Operation operation(addresses, tensors, chunks, chunk_size, dtype, device_addresses, positions, masters);
  check_row(x);
  if (y != kNone && !(ascent && y == kPerturbation)) check_row(y);
  const Map mapping = check_map(map);
  STD_TORCH_CHECK(ascent || mapping == Map::kIdentity, "fastsam: a descent has no map");
  const auto* given = ascent ? operation.coefficients<AscentCoefficients>(coefficients) : nullptr;
  double* sums = operation.doubles(partials, 3 * chunks.size(0), "partials");
  double* dots = operation.doubles(result, 3 * operation.call.table.tensor_count, "result");
  dots_(operation.call, {given, x, y, mapping}, ascent, sums, dots, operation.counters(finished));
}

void perturb_cuda(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                  std::optional<Tensor> device_addresses, std::optional<Tensor> positions, bool masters, Tensor options,
                  std::optional<Tensor> norm, std::optional<Tensor> coefficients, int64_t x, int64_t y, int64_t map) {
  const Operation operation(addresses, tensors, chunks, chunk_size, dtype, device_addresses, positions, masters);
  STD_TORCH_CHECK(norm.has_value() != coefficients.has_value(), "fastsam: give either norm or coefficients");
  const DeviceOption* groups = operation.options<AscentOptions>(options);
  const Map mapping = check_map(map);
  check_row(x);
  operation.check_draws(x);
  if (norm.has_value()) {
    STD_TORCH_CHECK(x == kGrad && y == kNone && mapping == Map::kIdentity, "fastsam: a norm is of the gradient");
    return perturb_(operation.call, groups, operation.doubles(*norm, 1, "norm"));
  }
  if (y != kNone && y != kPerturbation) check_row(y);
  perturb_(operation.call, groups, {operation.coefficients<AscentCoefficients>(*coefficients), x, y, mapping});
}

void restore_cuda(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                  std::optional<Tensor> device_addresses, std::optional<Tensor> positions, bool masters) {
  restore_(Operation(addresses, tensors, chunks, chunk_size, dtype, device_addresses, positions, masters).call);
}

// The options of the update's groups; checks the state that it reads, as far as the host knows of it.
const DeviceOption* read_update(const Operation& operation, Update update, const Tensor& options) {
  const TensorTable& table = operation.call.table;
  const bool is_stochastic = operation.call.device.positions != nullptr && !table.has_masters;
  if (update == Update::kNone) return nullptr;
  check_masters(table);
  check_steps(table, update == Update::kAdam || is_stochastic);
  if (update == Update::kSgd) return operation.options<SgdOptions>(options);
  const auto always = [](int64_t) { return true; };
  check_present(table, kState0, "exp_avg", always);
  check_present(table, kState1, "exp_avg_sq", always);
  return operation.options<AdamOptions>(options);
}

void restore_and_update_cuda(Tensor addresses, Tensor tensors, Tensor chunks, int64_t chunk_size, ScalarType dtype,
                             std::optional<Tensor> device_addresses, std::optional<Tensor> positions, bool masters,
                             int64_t update, Tensor options, std::optional<Tensor> grad_scale,
                             std::optional<Tensor> found_inf, std::optional<Tensor> finished,
                             std::optional<Tensor> coefficients, int64_t y, bool keeps, bool decoupled) {
  const Operation operation(addresses, tensors, chunks, chunk_size, dtype, device_addresses, positions, masters);
  const TensorTable& table = operation.call.table;
  const Update algorithm = check_update(update);
  UpdateArguments arguments{read_update(operation, algorithm, options),
                            scalar_pointer(grad_scale, "grad_scale", operation.device),
                            scalar_pointer(found_inf, "found_inf", operation.device),
                            operation.counters(finished),
                            {nullptr, y, keeps, decoupled}};
  if (coefficients.has_value()) {
    if (y != kNone) check_row(y);
    // Without a fused update, that is where the decoupled part is left for its caller.
    const bool needs_first_grad = decoupled && algorithm == Update::kNone;
    check_present(table, kFirstGrad, "first gradient", [&](int64_t i) {
      return needs_first_grad && (y == kNone || table.has(y, i)) && (!keeps || table.has(kMethodState, i));
    });
    arguments.descent.coefficients = operation.coefficients<DescentCoefficients>(*coefficients);
  }
  restore_and_update_(operation.call, algorithm, arguments);
}

}  // namespace
}  // namespace fastsam::cuda

// For fastsam/backends/native.py: why no kernel can run on the current device, or null.
extern "C" __attribute__((visibility("default"))) const char* fastsam_cuda_obstacle() {
  if (aoti_torch_get_current_cuda_stream == nullptr) return "PyTorch does not hand out its CUDA streams";
  return fastsam::cuda::find_obstacle();
}

// The same: loads what restore_and_update_ will run on the current device; why it cannot, or null.
extern "C" __attribute__((visibility("default"))) const char* fastsam_cuda_load_update(int32_t dtype, int64_t update,
                                                                                       int64_t tensor_count,
                                                                                       bool stochastic, bool masters,
                                                                                       bool has_descent) {
  using namespace fastsam;
  const auto algorithm = static_cast<Update>(update);
  // Without an update and a descent that is restore_, which perturb_ loads.
  if (algorithm == Update::kNone && !has_descent) return nullptr;
  const int64_t some_position = 0;
  const DescentCoefficients some_coefficients{};
  cuda::Call call{{}, {}, static_cast<ScalarType>(dtype), nullptr, true};
  call.table.tensor_count = tensor_count;
  call.table.has_masters = masters;
  call.device.positions = stochastic ? &some_position : nullptr;
  cuda::UpdateArguments arguments{};
  arguments.descent.coefficients = has_descent ? &some_coefficients : nullptr;
  try {
    cuda::restore_and_update_(call, algorithm, arguments);
  } catch (const std::exception& error) {
    thread_local std::string reason;
    reason = error.what();
    return reason.c_str();
  }
  return nullptr;
}

STABLE_TORCH_LIBRARY_IMPL(fastsam, CUDA, m) {
  m.impl("grad_norm_", TORCH_BOX(&fastsam::cuda::grad_norm_cuda));
  m.impl("dots_", TORCH_BOX(&fastsam::cuda::dots_cuda));
  m.impl("perturb_", TORCH_BOX(&fastsam::cuda::perturb_cuda));
  m.impl("restore_", TORCH_BOX(&fastsam::cuda::restore_cuda));
  m.impl("restore_and_update_", TORCH_BOX(&fastsam::cuda::restore_and_update_cuda));
}
