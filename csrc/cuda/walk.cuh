// The loop over a chunk on CUDA: which thread takes which elements, and how they are loaded and stored.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <new>

#include "../rounding.h"
#include "launches.h"

namespace fastsam::cuda {

// Of a block. The tests run the kernels on the CPU, with fewer.
#ifndef FASTSAM_CUDA_THREADS
#define FASTSAM_CUDA_THREADS 256
#endif
constexpr int kThreads = FASTSAM_CUDA_THREADS;
// Blocks on a multiprocessor at least, which allows a thread 64, 80 or 128 registers. Left to itself, the compiler
// takes more than it needs, or aims higher and spills.
constexpr int kLight = 1024 / kThreads, kMedium = 768 / kThreads, kHeavy = 512 / kThreads;

// How many tensors of each chunk a functor reads and writes. Wide are those that are float where others are narrower:
// masters, and with them the state.
template <int kReadCount, int kWriteCount, int kWideReadCount = 0, int kWideWriteCount = 0>
struct Counts {
  static constexpr int kReads = kReadCount, kWrites = kWriteCount;
  static constexpr int kWideReads = kWideReadCount, kWideWrites = kWideWriteCount;
};

constexpr int at_least_one(int count) { return count > 0 ? count : 1; }

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
struct FunctorTraits {
  static constexpr bool kOptional = false, kKeepsWide = false, kTakesPacks = false;
  static constexpr unsigned kStreamedReads = 0, kStreamedWrites = 0;
};

#if defined(__CUDACC__)
// Accesses to memory of which the compiler is not told that it is global: it would ask at each.
#if defined(FASTSAM_ACCESS_NOALLOC)
#define FASTSAM_LD "ld.global.L1::no_allocate"
#else
#define FASTSAM_LD "ld.global"
#endif
__device__ __forceinline__ int4 load_global(const int4* p) {
  int4 v;
  asm volatile(FASTSAM_LD ".v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint64_t load_global(const uint64_t* p) {
  uint64_t v;
  asm volatile(FASTSAM_LD ".b64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t load_global(const uint32_t* p) {
  uint32_t v;
  asm volatile(FASTSAM_LD ".b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint16_t load_global(const uint16_t* p) {
  uint16_t v;
  asm volatile(FASTSAM_LD ".b16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ void store_global(int4* p, const int4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
__device__ __forceinline__ void store_global(uint64_t* p, uint64_t v) {
  asm volatile("st.global.b64 [%0], %1;" ::"l"(p), "l"(v) : "memory");
}
__device__ __forceinline__ void store_global(uint32_t* p, uint32_t v) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store_global(uint16_t* p, uint16_t v) {
  asm volatile("st.global.b16 [%0], %1;" ::"l"(p), "h"(v) : "memory");
}
#endif

#if defined(FASTSAM_ACCESS_OLD)
#define FASTSAM_LOAD(p) __ldca(p)
#define FASTSAM_STORE(p, v) __stwb(p, v)
#else
#define FASTSAM_LOAD(p) load_global(p)
#define FASTSAM_STORE(p, v) store_global(p, v)
#endif
#if defined(FASTSAM_ACCESS_OLD) || defined(FASTSAM_ACCESS_STREAM)
#define FASTSAM_STREAM_LOAD(p) __ldcs(p)
#define FASTSAM_STREAM_STORE(p, v) __stcs(p, v)
#else
#define FASTSAM_STREAM_LOAD(p) load_global(p)
#define FASTSAM_STREAM_STORE(p, v) store_global(p, v)
#endif

template <int kBytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};

// kWidth elements of one tensor, in as few accesses as that takes.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < kVectorBytes ? sizeof(T) * kWidth : kVectorBytes) Pack {
  static constexpr int kVectors = sizeof(T) * kWidth / kVectorBytes;
  T elements[kWidth];

  __device__ __forceinline__ static Pack load(const T* address, bool stream) {
    Pack pack;
    if constexpr (kVectors == 0) {
      const auto bits = load_global(reinterpret_cast<const typename Word<sizeof(T)>::type*>(address));
      std::memcpy(&pack, &bits, sizeof(T));
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const auto* place = reinterpret_cast<const int4*>(address) + v;
        const int4 bits = stream ? FASTSAM_STREAM_LOAD(place) : FASTSAM_LOAD(place);
        std::memcpy(reinterpret_cast<char*>(&pack) + v * kVectorBytes, &bits, kVectorBytes);
      }
    }
    return pack;
  }

  __device__ __forceinline__ void store(T* address, bool stream) const {
    if constexpr (kVectors == 0) {
      typename Word<sizeof(T)>::type bits;
      std::memcpy(&bits, this, sizeof(T));
      store_global(reinterpret_cast<decltype(bits)*>(address), bits);
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        int4 bits;
        std::memcpy(&bits, reinterpret_cast<const char*>(this) + v * kVectorBytes, kVectorBytes);
        auto* place = reinterpret_cast<int4*>(address) + v;
        if (stream) {
          FASTSAM_STREAM_STORE(place, bits);
        } else {
          FASTSAM_STORE(place, bits);
        }
      }
    }
  }

  __device__ __forceinline__ static Pack zeros() {
    Pack pack;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) pack.elements[e] = static_cast<T>(0.0f);
    return pack;
  }

  __device__ __forceinline__ bool differs_from(const Pack& other) const {
    uint32_t difference = 0;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      difference |= bit_cast<uint32_t>(elements[e]) ^ bit_cast<uint32_t>(other.elements[e]);
    }
    return difference != 0;
  }
};

// kWidth elements of each of kCount tensors.
template <typename T, int kCount, int kWidth>
struct Tile {
  Pack<T, kWidth> packs[at_least_one(kCount)];

  template <bool kOptional, typename Pointers>
  __device__ __forceinline__ void load(const Pointers& from, int first, unsigned streamed) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool stream = (streamed >> i & 1) != 0;
      if constexpr (kOptional) {
        packs[i] = from[i] == nullptr ? Pack<T, kWidth>::zeros() : Pack<T, kWidth>::load(from[i] + first, stream);
      } else {
        packs[i] = Pack<T, kWidth>::load(from[i] + first, stream);
      }
    }
  }

  template <bool kOptional, typename Pointers>
  __device__ __forceinline__ void store(const Pointers& to, int first, unsigned streamed) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!kOptional || to[i] != nullptr) packs[i].store(to[i] + first, (streamed >> i & 1) != 0);
    }
  }

  // Only what differs from `known`.
  template <typename Known, typename Pointers>
  __device__ __forceinline__ void store_changes(const Known& known, const Pointers& to, int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (to[i] != nullptr && packs[i].differs_from(known.packs[i])) packs[i].store(to[i] + first, false);
    }
  }

  template <typename Values>
  __device__ __forceinline__ void get(int element, Values& values) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = packs[i].elements[element];
  }

  template <typename Values>
  __device__ __forceinline__ void set(int element, const Values& values) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) packs[i].elements[element] = values[i];
  }
};

// Packs of 16 bytes that a thread loads of each tensor before it computes: enough bytes in flight, few enough
// registers. Single elements are as many as that is, up to four.
#ifndef FASTSAM_CUDA_DEPTH
#define FASTSAM_CUDA_DEPTH 1
#endif
template <typename Tensors>
constexpr int kUnrollFor = FASTSAM_CUDA_DEPTH*(Tensors::kReads + 2 * Tensors::kWideReads == 1   ? 4
                                               : Tensors::kReads + 2 * Tensors::kWideReads <= 3 ? 2
                                                                                                : 1);
constexpr int kSingles = 4;

// Hands `count` packs to the functor: pack i begins at element i * kWidth, past a gap of `skipped` elements after the
// first `head` ones.
template <int kWidth, int kUnroll, typename scalar_t, typename Functor>
__device__ __forceinline__ void walk_packs(Functor& functor,
                                           const Operands<scalar_t, typename Functor::Tensors>& at, int count, int head,
                                           int skipped) {
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
        read[u].template load<kOptional>(at.read, number[u], Functor::kStreamedReads);
        wide_read[u].template load<kOptional>(at.wide_read, number[u], ~0u);
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
      written.template store<kOptional>(at.written, number[u], Functor::kStreamedWrites);
      if constexpr (Functor::kKeepsWide) {
        wide_written.store_changes(wide_read[u], at.wide_written, number[u]);
      } else {
        wide_written.template store<kOptional>(at.wide_written, number[u], ~0u);
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
  walk_packs<kWidth, kUnrollFor<typename Functor::Tensors>>(functor, at, split.vectors, 0, head);
  walk_packs<1, kSingles>(functor, at, length - in_packs, head, in_packs);
}

// What one thread has made for its block: arithmetic in double is slow on some GPUs, and a chunk needs it once.
template <typename Make>
__device__ __forceinline__ auto once_per_block(const Make& make) {
  using Value = decltype(make());
  alignas(kVectorBytes) __shared__ unsigned char memory[sizeof(Value)];
  if (threadIdx.x == 0) new (memory) Value(make());
  __syncthreads();
  return *reinterpret_cast<const Value*>(memory);
}

#if defined(__CUDACC__)
// counter += 1, returning what it was; what this thread has read and written before has happened then.
__device__ __forceinline__ int count_release(int* counter) {
  int before;
  asm volatile("atom.add.release.gpu.global.s32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
#endif

// Which of `count` blocks is the last to get to a point, found without waiting. What the first thread of any of them
// read and wrote before it took its ticket has then happened, for all threads of the last one.
class Ticket {
 public:
  // `finished` counts, and is 0 between launches. The first thread alone draws.
  __device__ explicit Ticket(int* finished) : finished_(finished) {
    if (threadIdx.x == 0) number_ = count_release(finished);
  }

  // For all threads of the block together. No shared variable: one beside another's would be read along with it.
  __device__ bool is_last(int count) const {
    if (__syncthreads_or(threadIdx.x == 0 && number_ == count - 1) == 0) return false;
    __threadfence();
    if (threadIdx.x == 0) *finished_ = 0;
    return true;
  }

 private:
  int* finished_;
  int number_ = 0;
};

// The sums of kCount values over the threads of a block, in the same order every time; for the first thread.
template <int kCount>
__device__ __forceinline__ void block_sums(double (&values)[kCount]) {
  __shared__ double sums[kCount][kThreads];
  const int thread = threadIdx.x;
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i][thread] = values[i];
  __syncthreads();
#pragma unroll
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (thread < half) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) sums[i][thread] += sums[i][thread + half];
    }
    __syncthreads();
  }
  if (thread == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = sums[i][0];
  }
}

}  // namespace fastsam::cuda
