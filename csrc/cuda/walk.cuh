// The loop over a chunk on CUDA: which thread takes which elements, and how they are loaded and stored.
#pragma once

#include "block.cuh"
#include "launches.h"
#include "pack.cuh"

namespace fastsam::cuda {

// How many tensors of each chunk a functor reads and writes. Wide are those that are float where others are narrower:
// masters, and with them the state.
template <int kReadCount, int kWriteCount, int kWideReadCount = 0, int kWideWriteCount = 0>
struct Counts {
  static constexpr int kReads = kReadCount, kWrites = kWriteCount;
  static constexpr int kWideReads = kWideReadCount, kWideWrites = kWideWriteCount;
};

// Where a chunk of each of them begins. A null pointer is not read, which leaves a zero, or not written.
template <typename scalar_t, typename Tensors>
struct Operands {
  const scalar_t* read[at_least_one(Tensors::kReads)];
  scalar_t* written[at_least_one(Tensors::kWrites)];
  const float* wide_read[at_least_one(Tensors::kWideReads)];
  float* wide_written[at_least_one(Tensors::kWideWrites)];
};

// One element of each of them, and which it is of the chunk's.
template <typename scalar_t, typename Tensors>
struct Element {
  int number;
  scalar_t read[at_least_one(Tensors::kReads)];
  scalar_t written[at_least_one(Tensors::kWrites)];
  float wide_read[at_least_one(Tensors::kWideReads)];
  float wide_written[at_least_one(Tensors::kWideWrites)];
};

// A functor is called with one Element after the other and fills in what is to be written. Its `Tensors` are Counts;
// kOptional says whether some of them may be absent. If kKeepsWide, what is written to wide tensors is mostly what was
// read from them, and only what has changed is stored. If kTakesPacks, it is called with an array of Elements.
// kMostPacks are loaded before it computes, at most.
struct FunctorTraits {
  static constexpr bool kOptional = false, kKeepsWide = false, kTakesPacks = false;
  static constexpr int kMostPacks = 4;
};

// Packs of 16 bytes that a thread loads of each tensor before it computes: enough bytes in flight, few enough
// registers. Single elements are as many as that is, up to four.
template <typename Tensors>
constexpr int kUnrollFor = Tensors::kReads + 2 * Tensors::kWideReads == 1   ? 4
                           : Tensors::kReads + 2 * Tensors::kWideReads <= 3 ? 2
                                                                            : 1;
constexpr int kSingles = 4;

// Hands `count` packs to the functor: pack i begins at element i * kWidth, past a gap of `skipped` elements after the
// first `head` ones.
template <int kWidth, int kUnroll, typename scalar_t, typename Functor>
__device__ __forceinline__ void walk_packs(Functor& functor, const Operands<scalar_t, typename Functor::Tensors>& at,
                                           int count, int head, int skipped) {
  using Tensors = typename Functor::Tensors;
  constexpr bool kOptional = Functor::kOptional;
#pragma unroll 1
  for (int start = threadIdx.x; start < count; start += kUnroll * kThreads) {
    Tile<scalar_t, Tensors::kReads, kWidth> read[kUnroll];
    Tile<float, Tensors::kWideReads, kWidth> wide_read[kUnroll];
    int number[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int first = (start + u * kThreads) * kWidth;
      number[u] = first < head ? first : first + skipped;
      if (start + u * kThreads < count) {
        read[u].template load<kOptional>(at.read, number[u]);
        wide_read[u].template load<kOptional>(at.wide_read, number[u]);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (start + u * kThreads >= count) break;
      Element<scalar_t, Tensors> elements[kWidth];
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        elements[e].number = number[u] + e;
        read[u].get(e, elements[e].read);
        wide_read[u].get(e, elements[e].wide_read);
        if constexpr (!Functor::kTakesPacks) functor(elements[e]);
      }
      if constexpr (Functor::kTakesPacks) functor(elements);
      Tile<scalar_t, Tensors::kWrites, kWidth> written;
      Tile<float, Tensors::kWideWrites, kWidth> wide_written;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        written.set(e, elements[e].written);
        wide_written.set(e, elements[e].wide_written);
      }
      written.template store<kOptional>(at.written, number[u]);
      if constexpr (Functor::kKeepsWide) {
        wide_written.store_changes(wide_read[u], at.wide_written, number[u]);
      } else {
        wide_written.template store<kOptional>(at.wide_written, number[u]);
      }
    }
  }
}

// How a chunk's pointers are aligned: what they have in common, and where they differ.
struct Alignment {
  uint64_t any = 0;
  uint64_t differences = 0;

  template <typename T>
  __device__ __forceinline__ void add(const T* pointer) {
    const auto address = reinterpret_cast<uint64_t>(pointer);
    if (pointer == nullptr) return;
    if (any == 0) any = address;
    differences |= any ^ address;
  }
};

template <typename scalar_t, typename Tensors>
__device__ __forceinline__ Split split_operands(const Operands<scalar_t, Tensors>& at, int length) {
  Alignment narrow;
#pragma unroll
  for (int r = 0; r < Tensors::kReads; ++r) narrow.add(at.read[r]);
#pragma unroll
  for (int w = 0; w < Tensors::kWrites; ++w) narrow.add(at.written[w]);
  const Split split = split_chunk(narrow.any, narrow.differences, length, sizeof(scalar_t));
  uint64_t wide = 0;
#pragma unroll
  for (int r = 0; r < Tensors::kWideReads; ++r) {
    if (at.wide_read[r] != nullptr) wide |= reinterpret_cast<uint64_t>(at.wide_read[r] + split.head);
  }
  // What is written of wide tensors is read, too.
  return wide % kVectorBytes == 0 ? split : Split{0, 0};
}

// Hands every element of a chunk to the functor, once. All threads of the block come here.
template <typename scalar_t, typename Functor>
__device__ __forceinline__ void walk(Functor& functor, const Operands<scalar_t, typename Functor::Tensors>& at,
                                     int length) {
  constexpr int kWidth = kVectorBytes / sizeof(scalar_t);
  const Split split = split_operands(at, length);
  const int head = split.head, in_packs = split.vectors * kWidth;
  constexpr int kWanted = kUnrollFor<typename Functor::Tensors>, kMost = Functor::kMostPacks;
  constexpr int kPacks = kWanted < kMost ? kWanted : kMost;
  walk_packs<kWidth, kPacks>(functor, at, split.vectors, 0, head);
  walk_packs<1, kSingles>(functor, at, length - in_packs, head, in_packs);
}

}  // namespace fastsam::cuda
