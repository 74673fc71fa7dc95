// The loop over chunks on the CPU: which thread takes which chunk, in which order, and in blocks of how many elements.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include <torch/csrc/stable/ops.h>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "../table.h"

// One binary for every x86-64: the loop is compiled three times and chosen at load time. (An "avx2" clone would lack
// FMA.) Elsewhere the baseline is vectorised already.
// (Clang has target_clones, but not for templates.)
#if defined(__x86_64__) && defined(__has_attribute) && !defined(__clang__)
#if __has_attribute(target_clones)
#define FASTSAM_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef FASTSAM_MULTIVERSION
#define FASTSAM_MULTIVERSION
#endif

// Before a loop over elements whose pointers may be the same, element for element (AWP's y are the weights): no turn
// reads what another writes.
#if defined(__clang__)
#define FASTSAM_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define FASTSAM_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace fastsam::cpu {

// Elements that are worked on at a time: few enough that the stores of one block overlap with the loads of the next
// (measured: 1,024 is 6-10% slower), enough that choosing the loop for a block costs nothing.
constexpr int64_t kBlock = 256;
// Below this much work a second thread costs more than it saves.
constexpr int64_t kGrain = 32768;

// Non-temporal stores are weakly ordered: a thread fences before others may read what it wrote.
inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

enum class Order { kForward, kBackward };

// What a loop usually reads of each chunk: rows, and the size of their elements (float32 where a row is wide).
struct Reads {
  std::initializer_list<int64_t> rows;
  int64_t element_size;
};

// The hardware prefetcher follows a long tensor by itself, but not the step from one small tensor to the next.
constexpr int64_t kPrefetchedBytes = 2048;
// How many chunks ahead.
constexpr int64_t kAhead = 2;

// Always inlined: gcc takes a function that only prefetches for one without an effect, and drops its calls.
__attribute__((always_inline)) inline void prefetch(const TensorTable& table, const Reads& reads, const Chunk& chunk) {
  for (const int64_t row : reads.rows) {
    if (!table.has(row, chunk.tensor)) continue;
    const int64_t size = table.is_wide(row) ? int64_t{sizeof(float)} : reads.element_size;
    const int64_t bytes = std::min(chunk.length * size, kPrefetchedBytes);
    const char* start = table.pointer<char>(row, chunk.tensor) + chunk.start * size;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(start + i);
  }
}

// Calls body(chunk, index of the chunk) once for every chunk; threads take contiguous runs of equal work.
template <typename Body>
void for_each_chunk(const TensorTable& table, Order order, const Reads& reads, const Body& body) {
  torch::stable::parallel_for(0, table.work, kGrain, [&](int64_t work_begin, int64_t work_end) {
    // A chunk belongs to the thread in whose range its work begins.
    const auto first_at = [&](int64_t work) {
      int64_t low = 0, high = table.chunk_count;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (read_chunk(table, middle).work_before < work) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      return low;
    };
    const int64_t begin = first_at(work_begin), end = first_at(work_end);
    const auto index_of = [&](int64_t i) { return order == Order::kForward ? i : begin + end - 1 - i; };
    for (int64_t i = begin; i < end; ++i) {
      if (i + kAhead < end) prefetch(table, reads, read_chunk(table, index_of(i + kAhead)));
      body(read_chunk(table, index_of(i)), index_of(i));
    }
    finish_stores();
  });
}

// Calls body(start, length) for the blocks of a chunk, from its first element on.
template <typename Body>
void for_each_block(int64_t length, const Body& body) {
  for (int64_t start = 0; start < length; start += kBlock) {
    body(start, std::min(kBlock, length - start));
  }
}

}  // namespace fastsam::cpu
