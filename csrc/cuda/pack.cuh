// How a thread loads and stores consecutive elements of several tensors: 16 bytes at a time, or one element.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "launches.h"

namespace fastsam::cuda {

constexpr int at_least_one(int count) { return count > 0 ? count : 1; }

#if defined(__CUDACC__)
// Accesses to memory of which the compiler is not told that it is global: it would ask at each.
__device__ __forceinline__ int4 load_global(const int4* p) {
  int4 v;
  asm volatile("ld.global.v4.b32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ uint64_t load_global(const uint64_t* p) {
  uint64_t v;
  asm volatile("ld.global.b64 %0, [%1];" : "=l"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint32_t load_global(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.global.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint16_t load_global(const uint16_t* p) {
  uint16_t v;
  asm volatile("ld.global.b16 %0, [%1];" : "=h"(v) : "l"(p));
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

// ---- elements of tensors ----

// kWidth elements of one tensor, in as few accesses as that takes.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < kVectorBytes ? sizeof(T) * kWidth : kVectorBytes) Pack {
  static constexpr int kVectors = sizeof(T) * kWidth / kVectorBytes;
  T elements[kWidth];

  __device__ __forceinline__ static Pack load(const T* address) {
    Pack pack;
    if constexpr (kVectors == 0) {
      const auto bits = load_global(reinterpret_cast<const typename Word<sizeof(T)>::type*>(address));
      std::memcpy(&pack, &bits, sizeof(T));
    } else {
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const auto* place = reinterpret_cast<const int4*>(address) + v;
        const int4 bits = load_global(place);
        std::memcpy(reinterpret_cast<char*>(&pack) + v * kVectorBytes, &bits, kVectorBytes);
      }
    }
    return pack;
  }

  __device__ __forceinline__ void store(T* address) const {
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
        store_global(place, bits);
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
  __device__ __forceinline__ void load(const Pointers& from, int first) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kOptional) {
        packs[i] = from[i] == nullptr ? Pack<T, kWidth>::zeros() : Pack<T, kWidth>::load(from[i] + first);
      } else {
        packs[i] = Pack<T, kWidth>::load(from[i] + first);
      }
    }
  }

  template <bool kOptional, typename Pointers>
  __device__ __forceinline__ void store(const Pointers& to, int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!kOptional || to[i] != nullptr) packs[i].store(to[i] + first);
    }
  }

  // Only what differs from `known`.
  template <typename Known, typename Pointers>
  __device__ __forceinline__ void store_changes(const Known& known, const Pointers& to, int first) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (to[i] != nullptr && packs[i].differs_from(known.packs[i])) packs[i].store(to[i] + first);
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

}  // namespace fastsam::cuda
