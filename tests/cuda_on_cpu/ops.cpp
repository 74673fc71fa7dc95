// The operators of csrc/cuda/ops.cpp on CPU tensors, in a namespace of their own; and what the tests ask csrc/cuda/'s
// plain functions.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

struct NoDeviceGuard {
  explicit NoDeviceGuard(int32_t) {}
};
namespace torch::stable::accelerator {
using ::NoDeviceGuard;
}

#define DeviceGuard NoDeviceGuard
#define is_cuda is_cpu
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(fastsam_on_cpu, CPU, m, C10_UID)

#include "../../csrc/cuda/ops.cpp"
#include "../../csrc/cuda/power.cuh"

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

using namespace fastsam;
using namespace fastsam::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

// {first tensor, tensors, first chunk, chunks, first, last} for each launch; returns how many there are.
EXPORT int64_t plan(const int64_t* sizes, int64_t count, int64_t chunk_size, int64_t capacity, int64_t* rows) {
  const TensorTable table{nullptr, sizes, nullptr, nullptr, count, 0, chunk_size, 0, nullptr, false};
  const auto launches = plan_launches(table, capacity);
  for (const Launch& launch : launches) {
    for (int64_t field : {launch.first_tensor, launch.tensor_count, launch.first_chunk, launch.chunk_count,
                          int64_t{launch.first}, int64_t{launch.last}}) {
      *rows++ = field;
    }
  }
  return static_cast<int64_t>(launches.size());
}

EXPORT int64_t few_tensors() { return kFewTensors; }
EXPORT int64_t many_tensors() { return kManyTensors; }
EXPORT int64_t method_tensors() { return kMethodTensors; }

// The launch after the next `count` ones fails.
EXPORT void fail_after(int count) { launches_left = count; }

EXPORT int64_t launches() { return launches_made; }

// How many kernels have been loaded, since the last call with true.
EXPORT int64_t loads(bool forget) {
  const auto count = static_cast<int64_t>(loaded.size());
  if (forget) loaded.clear();
  return count;
}

// The addresses that a launch's arguments hold, of a table whose gradients are at `addresses`.
EXPORT void packed_grads(const int64_t* addresses, int64_t count, int64_t first, int64_t launch_count, int64_t* grads) {
  std::vector<int64_t> rows(kRows * count, -1);
  std::copy(addresses, addresses + count, rows.begin() + kGrad * count);
  const TensorTable table{rows.data(), nullptr, nullptr, nullptr, count, 0, 1, 0, nullptr, false};
  Arguments<int, kManyTensors> arguments;
  pack_arguments(table, DeviceTable{nullptr, nullptr, count, nullptr}, Launch{first, launch_count, 0, 0, true, true}, 0,
                 arguments);
  std::copy(arguments.grads, arguments.grads + launch_count, grads);
}

// {tensor, start, length, group} of the launch's chunk `index`, and the address of its first element.
EXPORT void find_chunk(const int64_t* chunks, int64_t first_tensor, int64_t first_chunk, int64_t chunk_count,
                       int64_t index, int64_t address, int64_t* found) {
  const Launch launch{first_tensor, 1, first_chunk, chunk_count, true, true};
  const DeviceChunk chunk = cuda::read_chunk(DeviceTable{nullptr, chunks, 0, nullptr}, launch, index);
  found[0] = chunk.tensor;
  found[1] = chunk.start;
  found[2] = chunk.length;
  found[3] = chunk.group;
  found[4] = reinterpret_cast<int64_t>(element_pointer<double>(address, chunk));
}

EXPORT void split(uint64_t address, uint64_t differences, int64_t length, int64_t element_size, int64_t* found) {
  const Split result = split_chunk(address, differences, length, element_size);
  found[0] = result.head;
  found[1] = result.vectors;
}

EXPORT double power(double base, int64_t exponent) { return whole_power(base, exponent); }

// The random number for an element of a tensor, as the loops that begin at that element get it.
EXPORT uint32_t random_number(uint32_t seed, uint32_t step, uint32_t position, uint32_t draw, int64_t element) {
  const RandomKey key = RandomKey::make(seed, step, position, draw / 2).at(element);
  return bits_of_draw(key.bits(static_cast<uint32_t>(element)), draw);
}

EXPORT uint16_t bfloat16_bits(float x, uint32_t random) { return round_stochastically(x, random, bfloat16{}).x; }
EXPORT uint16_t float16_bits(float x, uint32_t random) { return round_stochastically(x, random, half{}).x; }
