// A chunk's elements on the CPU, a block at a time: loaded as what arithmetic is in, stored as what the table holds.
//
// Plain SAM's loops read and write what is stored. All others (of methods, and with masters) are written for opmath_t
// alone, and get at what is stored differently through Elements; so methods, rounding and masters know nothing of each
// other.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "../rounding.h"
#include "walk.h"

namespace fastsam::cpu {

// Bytes of one role's tensors above which results bypass the cache: they would be evicted before they are read again,
// and a cached store reads the line first.
constexpr int64_t kBypassFromBytes = int64_t{16} << 20;

inline bool should_bypass_cache(const TensorTable& table, int64_t element_size) {
  return table.work * element_size >= kBypassFromBytes;
}

// memcpy, with non-temporal stores if `bypass_cache`.
inline void store_block(void* target, const void* source, int64_t bytes, [[maybe_unused]] bool bypass_cache) {
#if defined(__SSE2__)
  if (bypass_cache) {
    char* to = static_cast<char*>(target);
    const char* from = static_cast<const char*>(source);
    const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<intptr_t>(to) & 63);
    std::memcpy(to, from, head);
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
      for (int64_t j = i; j < i + 64; j += 16) {
        const __m128i value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), value);
      }
    }
    std::memcpy(to + i, from + i, bytes - i);
    return;
  }
#endif
  std::memcpy(target, source, bytes);
}

template <typename target_t, typename source_t>
FASTSAM_MULTIVERSION void convert(target_t* __restrict__ target, const source_t* __restrict__ source, int64_t length) {
  for (int64_t i = 0; i < length; ++i) target[i] = static_cast<target_t>(source[i]);
}

template <typename scalar_t, typename Rounding>
FASTSAM_MULTIVERSION void round_block(scalar_t* __restrict__ target, const opmath_t<scalar_t>* __restrict__ source,
                                      int64_t length, int result, Rounding rounding) {
  for (int64_t i = 0; i < length; ++i) target[i] = rounding(source[i], result, i);
}

// What a row has for one chunk.
template <typename scalar_t>
class Elements {
  using T = opmath_t<scalar_t>;
  static constexpr bool kConverts = !std::is_same_v<scalar_t, T>;

 public:
  Elements() = default;

  // Row kNone is absent.
  Elements(const TensorTable& table, int64_t row, const Chunk& chunk) {
    if (row == kNone || !table.has(row, chunk.tensor)) return;
    if (!kConverts || table.is_wide(row)) {
      wide_ = table.pointer<T>(row, chunk.tensor) + chunk.start;
    } else {
      narrow_ = table.pointer<scalar_t>(row, chunk.tensor) + chunk.start;
    }
  }

  explicit operator bool() const { return wide_ != nullptr || narrow_ != nullptr; }

  // What is stored, where that is scalar_t; else null.
  scalar_t* stored() const {
    if constexpr (!kConverts) return wide_;
    return narrow_;
  }

  // The block itself where it is stored in opmath_t, else its values in `buffer`.
  T* load(T* buffer, int64_t start, int64_t length) const {
    if (wide_ != nullptr) return wide_ + start;
    if constexpr (kConverts) convert(buffer, narrow_ + start, length);
    return buffer;
  }

  // rounding: of this block; what is stored in opmath_t takes `values` as they are, in place or from elsewhere.
  template <typename Rounding>
  void store(const T* values, int64_t start, int64_t length, int result, const Rounding& rounding) const {
    if (wide_ == nullptr) {
      if constexpr (kConverts) round_block<scalar_t>(narrow_ + start, values, length, result, rounding);
    } else if (values != wide_ + start) {
      std::memcpy(wide_ + start, values, length * sizeof(T));
    }
  }

  // The block after this one. What lies behind a tensor is not read.
  void prefetch(int64_t start) const {
    const char* next = wide_ != nullptr ? reinterpret_cast<const char*>(wide_ + start + kBlock)
                                        : reinterpret_cast<const char*>(narrow_ + start + kBlock);
    const auto bytes = static_cast<int64_t>(kBlock * (wide_ != nullptr ? sizeof(T) : sizeof(scalar_t)));
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i);
  }

 private:
  T* wide_ = nullptr;
  scalar_t* narrow_ = nullptr;
};

// Calls body(rounding_for), of which rounding_for(tensor, seed) rounds kResults results of that tensor's elements.
template <typename scalar_t, Draw kDraw, int kResults, typename Body>
void with_rounding(const TensorTable& table, const Body& body) {
  if constexpr (kIsNarrow<scalar_t>) {
    if (table.positions != nullptr) {
      return body([&](int64_t tensor, double seed) {
        const int64_t position = table.positions[tensor], offset = table.positions[table.tensor_count + tensor];
        return Stochastic<scalar_t, kDraw, kResults>::make(seed, table.step(tensor), position, offset);
      });
    }
  }
  body([](int64_t, double) { return Nearest<scalar_t>{}; });
}

// ---- masters: parameters are rounded from them, and they follow parameters that were written to ----

template <typename scalar_t>
FASTSAM_MULTIVERSION bool are_rounded(const scalar_t* __restrict__ param, const float* __restrict__ master,
                                      int64_t length) {
  uint16_t different = 0;
  for (int64_t i = 0; i < length; ++i) different |= static_cast<scalar_t>(master[i]).x ^ param[i].x;
  return different == 0;
}

// Seldom writes: only where a parameter is not its master's rounding any more.
template <typename scalar_t>
void follow(float* master, const scalar_t* param, int64_t length) {
  if (are_rounded(param, master, length)) return;
  for (int64_t i = 0; i < length; ++i) master[i] = master_value(master[i], param[i]);
}

// w <- backup, or the master's rounding, if the chunk's tensor is perturbed.
template <typename scalar_t>
void restore_chunk(const TensorTable& table, const Chunk& chunk, bool bypass_cache) {
  if (!table.has(kBackup, chunk.tensor)) return;
  scalar_t* param = table.pointer<scalar_t>(kParam, chunk.tensor) + chunk.start;
  if constexpr (kIsNarrow<scalar_t>) {
    if (table.has_masters) {
      const float* master = table.pointer<float>(kMaster, chunk.tensor) + chunk.start;
      return for_each_block(chunk.length, [&](int64_t start, int64_t length) {
        alignas(64) scalar_t rounded[kBlock];
        convert(rounded, master + start, length);
        store_block(param + start, rounded, length * sizeof(scalar_t), bypass_cache);
      });
    }
  }
  store_block(param, table.pointer<scalar_t>(kBackup, chunk.tensor) + chunk.start, chunk.length * sizeof(scalar_t),
              bypass_cache);
}

}  // namespace fastsam::cpu
