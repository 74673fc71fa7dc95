// What is decided before an element is touched: which tensors a launch takes, what its arguments hold, and which part
// of a chunk is walked in vectors. Plain C++, so that the tests run it on the CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../elementwise.h"
#include "../table.h"

namespace fastsam::cuda {

// Gradients are new tensors in every step, so their addresses travel in the kernel's arguments, of which CUDA takes
// 32,764 bytes; what else is in them fits into the rest. Most models are content with the smaller ones. Each kernel
// takes as much in the library as its arguments: those for methods, of which there are many, take less.
constexpr int64_t kFewTensors = 480;
constexpr int64_t kManyTensors = 4064;
constexpr int64_t kMethodTensors = 512;

// One launch: a run of tensors, in the table's order, and all of their chunks.
struct Launch {
  int64_t first_tensor;
  int64_t tensor_count;
  int64_t first_chunk;
  int64_t chunk_count;
  bool first;  // of the table's launches
  bool last;
};

// A table in device memory.
struct DeviceTable {
  const int64_t* addresses;  // [kRows, tensor_count]; the rows of a step are not read
  const int64_t* chunks;     // [count, 4]: tensor, first element, length, parameter group
  int64_t tensor_count;
  // [2, n]: of the tensors in the parameter groups, and of their first elements in the whole parameters, of which they
  // may be shards; null: everything is rounded to nearest.
  const int64_t* positions;
};

// Addresses of a launch's tensors in the rows that are new in every step; 0: absent. Methods have more of them.
template <int64_t kCapacity>
struct StepRows {
  int64_t grads[kCapacity];
};

template <>
struct StepRows<kMethodTensors> {
  int64_t grads[kMethodTensors];
  int64_t first_grads[kMethodTensors];
  int64_t directions[kMethodTensors];
};

// What a kernel gets: the table, its share of it, what only this operation needs, and the rows of this step.
template <typename Extra, int64_t kCapacity>
struct Arguments : StepRows<kCapacity> {
  DeviceTable table;
  Launch launch;
  Extra extra;
};

inline int64_t chunks_of(int64_t size, int64_t chunk_size) { return (size + chunk_size - 1) / chunk_size; }

// As few launches as it takes to hand over `capacity` addresses at a time. Every tensor is in one, empty ones too.
inline std::vector<Launch> plan_launches(const TensorTable& table, int64_t capacity) {
  std::vector<Launch> launches;
  int64_t chunk = 0;
  for (int64_t first = 0; first < table.tensor_count; first += capacity) {
    const int64_t count = std::min(capacity, table.tensor_count - first), first_chunk = chunk;
    for (int64_t i = first; i < first + count; ++i) chunk += chunks_of(table.sizes[i], table.chunk_size);
    launches.push_back(
        {first, count, first_chunk, chunk - first_chunk, first == 0, first + count == table.tensor_count});
  }
  return launches;
}

// `table` is the host's: the one whose gradients are up to date.
template <typename Extra, int64_t kCapacity>
void pack_arguments(const TensorTable& table, const DeviceTable& device, const Launch& launch, const Extra& extra,
                    Arguments<Extra, kCapacity>& arguments) {
  static_assert(sizeof(arguments) <= 32764, "CUDA takes no more");
  arguments.table = device;
  arguments.launch = launch;
  arguments.extra = extra;
  const auto copy_row = [&](Row row, int64_t* target) {
    const int64_t* addresses = table.addresses + row * table.tensor_count + launch.first_tensor;
    std::memcpy(target, addresses, launch.tensor_count * sizeof(int64_t));
  };
  copy_row(kGrad, arguments.grads);
  if constexpr (kCapacity == kMethodTensors) {
    copy_row(kFirstGrad, arguments.first_grads);
    copy_row(kDirection, arguments.directions);
  }
}

// A block's share of the work, as two 16-byte loads.
struct alignas(16) DeviceChunk {
  int64_t tensor;
  int64_t start;
  int64_t length;
  int64_t group;
};

// The launch's chunk `index`. A launch has at least one block; one of empty tensors alone has no chunk for it.
FASTSAM_HOST_DEVICE DeviceChunk read_chunk(const DeviceTable& table, const Launch& launch, int64_t index) {
  if (index >= launch.chunk_count) return {launch.first_tensor, 0, 0, 0};
  return reinterpret_cast<const DeviceChunk*>(table.chunks)[launch.first_chunk + index];
}

// The address of a chunk's first element; null where the tensor is absent.
template <typename scalar_t>
FASTSAM_HOST_DEVICE scalar_t* element_pointer(int64_t address, const DeviceChunk& chunk) {
  return address == 0 ? nullptr : reinterpret_cast<scalar_t*>(address) + chunk.start;
}

template <typename scalar_t>
FASTSAM_HOST_DEVICE scalar_t* element_pointer(const DeviceTable& table, int64_t row, const DeviceChunk& chunk) {
  return element_pointer<scalar_t>(table.addresses[row * table.tensor_count + chunk.tensor], chunk);
}

// A chunk of a tensor that is float where masters are kept and the row is state, or narrow like the parameters: where
// it begins, in one of the two. Both are null where the tensor is absent.
template <typename scalar_t>
struct Source {
  const scalar_t* narrow;
  const float* wide;

  FASTSAM_HOST_DEVICE bool is_present() const { return narrow != nullptr || wide != nullptr; }
};

// As TensorTable::is_wide.
FASTSAM_HOST_DEVICE bool is_wide(bool masters, int64_t row) {
  return masters && row != kParam && row != kGrad && row != kFirstGrad && row != kDirection;
}

// The address of the chunk's tensor in any row, those of this step included; 0 in none.
template <typename Extra, int64_t kCapacity>
FASTSAM_HOST_DEVICE int64_t find_address(const Arguments<Extra, kCapacity>& args, int64_t row,
                                         const DeviceChunk& chunk) {
  if (row < 0) return 0;
  const int64_t in_launch = chunk.tensor - args.launch.first_tensor;
  if (row == kGrad) return args.grads[in_launch];
  if constexpr (kCapacity == kMethodTensors) {
    if (row == kFirstGrad) return args.first_grads[in_launch];
    if (row == kDirection) return args.directions[in_launch];
  }
  return args.table.addresses[row * args.table.tensor_count + chunk.tensor];
}

template <typename scalar_t, bool kMasters, typename Arguments>
FASTSAM_HOST_DEVICE Source<scalar_t> find_source(const Arguments& args, int64_t row, const DeviceChunk& chunk) {
  const int64_t address = find_address(args, row, chunk);
  if (is_wide(kMasters, row)) return {nullptr, element_pointer<float>(address, chunk)};
  return {element_pointer<scalar_t>(address, chunk), nullptr};
}

template <typename scalar_t, typename Arguments>
FASTSAM_HOST_DEVICE scalar_t* grad_pointer(const Arguments& args, const DeviceChunk& chunk) {
  return element_pointer<scalar_t>(find_address(args, kGrad, chunk), chunk);
}

constexpr int64_t kVectorBytes = 16;

// How a chunk is walked: `head` elements one by one, then `vectors` of 16 bytes, then the rest one by one.
struct Split {
  int64_t head;
  int64_t vectors;
};

// `address`: of one role; `differences`: of all others, each xor-ed with it, or-ed together. They can be aligned at the
// same element only if they are equally far from it.
FASTSAM_HOST_DEVICE Split split_chunk(uint64_t address, uint64_t differences, int64_t length, int64_t element_size) {
  const int64_t bytes_before = -address & (kVectorBytes - 1);
  if ((differences & (kVectorBytes - 1)) != 0 || bytes_before % element_size != 0) return {0, 0};
  const int64_t before = bytes_before / element_size, head = before < length ? before : length;
  return {head, (length - head) * element_size / kVectorBytes};
}

// An option on the device: a number, or the address of a tensor to read it from when the kernel runs. The address is
// odd if that tensor is float64, else it is float32.
struct alignas(16) DeviceOption {
  double number;
  int64_t address;

  FASTSAM_HOST_DEVICE double value() const {
    if (address == 0) return number;
    if ((address & 1) != 0) return *reinterpret_cast<const double*>(address & ~int64_t{1});
    return *reinterpret_cast<const float*>(address);
  }
};

// One group's options. All are loaded before the first is looked at: else each would wait for the one before.
template <typename Options>
FASTSAM_HOST_DEVICE Options read_options(const DeviceOption* options, int64_t group) {
  constexpr int kCount = kFields<Options>;
  DeviceOption fields[kCount];
  for (int i = 0; i < kCount; ++i) fields[i] = options[group * kCount + i];
  double values[kCount];
  for (int i = 0; i < kCount; ++i) values[i] = fields[i].value();
  Options result;
  std::memcpy(&result, values, sizeof(result));
  return result;
}

}  // namespace fastsam::cuda
