// perturb_ and restore_ on the CPU: backup <- w; w <- w + A * map(x) + B * y, and back.
#include "forms.h"
#include "operations.h"

namespace fastsam::cpu {
namespace {

// result may be param, element for element; so may `from` and y. from_t: float where `from` is a master, void where it
// is param.
template <Map map, bool has_y, typename scalar_t, typename from_t, typename Rounding>
FASTSAM_MULTIVERSION void ascend(scalar_t* result, [[maybe_unused]] const from_t* from, const scalar_t* param,
                                 const scalar_t* x, [[maybe_unused]] const scalar_t* y, int64_t length,
                                 const AscentStep<opmath_t<scalar_t>> step, Rounding rounding) {
  using T = opmath_t<scalar_t>;
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < length; ++i) {
    const T w = static_cast<T>(param[i]);
    T origin = w, second = 0;
    if constexpr (!std::is_void_v<from_t>) origin = static_cast<T>(from[i]);
    if constexpr (has_y) second = static_cast<T>(y[i]);
    const T moved = step.template perturbed<map, has_y, scalar_t>(origin, w, static_cast<T>(x[i]), second);
    result[i] = rounding(moved, 0, i);
  }
}

// How one chunk's tensor ascends.
template <typename scalar_t>
class ChunkAscent {
  using T = opmath_t<scalar_t>;

 public:
  ChunkAscent(const TensorTable& table, const Ascent& ascent, const Chunk& chunk, bool bypass_cache)
      : length_(chunk.length),
        bypass_cache_(bypass_cache),
        has_masters_(table.has_masters),
        again_(ascent.y == kPerturbation),
        map_(ascent.map),
        param_(table, kParam, chunk),
        backup_(table, kBackup, chunk),
        x_(table, ascent.x, chunk),
        y_(table, ascent.y, chunk),
        step_(ascent.coefficients == nullptr
                  ? AscentStep<T>(ascent.options[table.groups[chunk.tensor]], ascent.norm)
                  : AscentStep<T>(ascent.coefficients[chunk.tensor], static_cast<bool>(y_))) {}

  // rounding: of the elements from the chunk's first on.
  template <typename RoundingAt>
  void perturb(const RoundingAt& rounding_at) const {
    if (!x_ || step_.stays(again_)) {
      if (!again_) keep_weights(param_.stored(), 0, length_);
    } else if (map_ == Map::kIdentity && !y_ && x_.stored() != nullptr) {
      perturb_stored(rounding_at);
    } else {
      perturb_loaded(rounding_at);
    }
  }

 private:
  // backup <- w; a master follows w.
  void keep_weights(const scalar_t* param, int64_t start, int64_t length) const {
    if constexpr (kIsNarrow<scalar_t>) {
      if (has_masters_) return follow(backup_.load(nullptr, start, length), param + start, length);
    }
    store_block(backup_.stored() + start, param + start, length * sizeof(scalar_t), bypass_cache_);
  }

  // Plain SAM's.
  template <typename RoundingAt>
  void perturb_stored(const RoundingAt& rounding_at) const {
    scalar_t* const param = param_.stored();
    const scalar_t *const x = x_.stored(), *const none = nullptr;
    const AscentStep<T> step = step_;
    for_each_block(length_, [&](int64_t start, int64_t length) {
      scalar_t* const w = param + start;
      keep_weights(param, start, length);
      if (has_masters_) {
        const T* const master = backup_.load(nullptr, start, length);
        ascend<Map::kIdentity, false>(w, master, w, x + start, none, length, step, rounding_at(start));
      } else {
        const void* const same = nullptr;
        ascend<Map::kIdentity, false>(w, same, w, x + start, none, length, step, rounding_at(start));
      }
    });
  }

  template <typename RoundingAt>
  void perturb_loaded(const RoundingAt& rounding_at) const {
    for_each_block(length_, [&](int64_t start, int64_t length) {
      alignas(64) T w_buffer[kBlock], x_buffer[kBlock], y_buffer[kBlock], backup_buffer[kBlock];
      if (!again_) keep_weights(param_.stored(), start, length);
      T* const w = param_.load(w_buffer, start, length);
      const T* const x = x_.load(x_buffer, start, length);
      const T* const y = y_.load(y_buffer, w, start, length);
      // A first ascent begins at the weights: their backup has just been stored past the cache.
      const T* const from = again_ || has_masters_ ? backup_.load(backup_buffer, start, length) : w;
      with_form(map_, static_cast<bool>(y_),
                [&]<Map map, bool has_y>() { ascend<map, has_y>(w, from, w, x, y, length, step_, Nearest<T>{}); });
      param_.store(w, start, length, 0, rounding_at(start));
    });
  }

  int64_t length_;
  bool bypass_cache_, has_masters_, again_;
  Map map_;
  Elements<scalar_t> param_, backup_, x_;
  SecondTerm<scalar_t> y_;
  AscentStep<T> step_;
};

}  // namespace

void perturb_(const TensorTable& table, ScalarType dtype, const Ascent& ascent) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const bool bypass_cache = should_bypass_cache(table, sizeof(scalar_t));
    with_rounding<scalar_t, kAscentDraw, 1>(table, [&](const auto& rounding_for) {
      // Backward: the gradients that the norm read last are still in the cache.
      for_each_chunk(table, Order::kBackward, {{kParam, kGrad}, sizeof(scalar_t)}, [&](const Chunk& chunk, int64_t) {
        if (!table.has(kBackup, chunk.tensor)) return;
        const auto rounding = rounding_for(chunk.tensor, ascent.options[table.groups[chunk.tensor]].rounding_seed);
        ChunkAscent<scalar_t>(table, ascent, chunk, bypass_cache).perturb([&](int64_t start) {
          return rounding.at(chunk.start + start);
        });
      });
    });
  });
}

void restore_(const TensorTable& table, ScalarType dtype) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const bool bypass_cache = should_bypass_cache(table, sizeof(scalar_t));
    for_each_chunk(table, Order::kForward, {{kBackup}, sizeof(scalar_t)},
                   [&](const Chunk& chunk, int64_t) { restore_chunk<scalar_t>(table, chunk, bypass_cache); });
  });
}

}  // namespace fastsam::cpu
