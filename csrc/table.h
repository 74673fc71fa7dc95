// How a tensor table and its chunks are read: plain pointers and sizes, checked by ops.cpp.
//
// `addresses` is [kRows, tensors] with 0 for "absent"; every address of a tensor is the start of `sizes[tensor]`
// elements in memory order, but for a step's, which is one float. With masters, what the base and the method keep is
// float32 (is_wide), and a backup's address is the master's. `chunks` is [count, 3]: tensor, first element, and the
// work that lies before this chunk (elements plus kChunkOverhead each), by which threads share the chunks.
#pragma once

#include <cstdint>

#include "spec.h"

namespace fastsam {

// What finding a chunk costs, in elements: threads share tiny tensors by it.
constexpr int64_t kChunkOverhead = 64;

struct TensorTable {
  const int64_t* addresses;
  const int64_t* sizes;
  const int64_t* groups;
  const int64_t* chunks;
  int64_t tensor_count;
  int64_t chunk_count;
  int64_t chunk_size;
  int64_t work;  // of all chunks together
  // [2, n]: of the tensors in the parameter groups, and of their first elements in the whole parameters, of which they
  // may be shards; null: everything is rounded to nearest.
  const int64_t* positions;
  bool has_masters;

  bool has(int64_t row, int64_t tensor) const { return addresses[row * tensor_count + tensor] != 0; }

  template <typename scalar_t>
  scalar_t* pointer(int64_t row, int64_t tensor) const {
    return reinterpret_cast<scalar_t*>(addresses[row * tensor_count + tensor]);
  }

  // How many updates a tensor has had; 1 where they are not counted.
  float step(int64_t tensor) const { return has(kStep, tensor) ? *pointer<float>(kStep, tensor) : 1; }

  // Whether a row's elements are float32 where the parameters may be narrower.
  bool is_wide(int64_t row) const {
    return has_masters && row != kParam && row != kGrad && row != kFirstGrad && row != kDirection;
  }
};

struct Chunk {
  int64_t tensor;
  int64_t start;
  int64_t length;
  int64_t work_before;
};

inline Chunk read_chunk(const TensorTable& table, int64_t index) {
  const int64_t* row = table.chunks + 3 * index;
  const int64_t left = table.sizes[row[0]] - row[1];
  return {row[0], row[1], left < table.chunk_size ? left : table.chunk_size, row[2]};
}

}  // namespace fastsam
