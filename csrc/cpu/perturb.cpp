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
struct ChunkAscent {
  using T = opmath_t<scalar_t>;
  bool has_masters, again;
  Map map;
  Elements<scalar_t> param, backup, x;
  SecondTerm<scalar_t> y;
  AscentStep<T> step;

  ChunkAscent(const TensorTable& table, const Ascent& ascent, const Chunk& chunk)
      : has_masters(table.has_masters),
        again(ascent.y == kPerturbation),
        map(ascent.map),
        param(table, kParam, chunk),
        backup(table, kBackup, chunk),
        x(table, ascent.x, chunk),
        y(table, ascent.y, chunk),
        step(ascent.coefficients == nullptr ? AscentStep<T>(ascent.options[table.groups[chunk.tensor]], ascent.norm)
                                            : AscentStep<T>(ascent.coefficients[chunk.tensor], static_cast<bool>(y))) {}

  void keep_weights(int64_t start, int64_t length, bool stream) const {
    if constexpr (kIsNarrow<scalar_t>) {
      if (has_masters) return follow(backup.load(nullptr, start, length), param.stored() + start, length);
    }
    store_block(backup.stored() + start, param.stored() + start, length * sizeof(scalar_t), stream);
  }

  template <typename Rounding>
  void perturb(int64_t start, int64_t length, const Rounding& rounding) const {
    if (map == Map::kIdentity && !y && x.stored() != nullptr) return perturb_stored(start, length, rounding);
    perturb_loaded(start, length, rounding);
  }

  // Plain SAM's.
  template <typename Rounding>
  void perturb_stored(int64_t start, int64_t length, const Rounding& rounding) const {
    scalar_t* w = param.stored() + start;
    const scalar_t *g = x.stored() + start, *none = nullptr;
    if (has_masters) {
      const T* master = backup.load(nullptr, start, length);
      ascend<Map::kIdentity, false>(w, master, w, g, none, length, step, rounding);
    } else {
      const void* same = nullptr;
      ascend<Map::kIdentity, false>(w, same, w, g, none, length, step, rounding);
    }
  }

  template <typename Rounding>
  void perturb_loaded(int64_t start, int64_t length, const Rounding& rounding) const {
    alignas(64) T w_buffer[kBlock], x_buffer[kBlock], y_buffer[kBlock], backup_buffer[kBlock];
    T* w = param.load(w_buffer, start, length);
    const T* first = x.load(x_buffer, start, length);
    const T* second = y.load(y_buffer, w, start, length);
    // A first ascent begins at the weights: their backup has just been streamed past the cache.
    const T* from = again || has_masters ? backup.load(backup_buffer, start, length) : w;
    with_form(map, static_cast<bool>(y), [&]<Map kMap, bool has_y>() {
      ascend<kMap, has_y>(w, from, w, first, second, length, step, Nearest<T>{});
    });
    param.store(w, start, length, 0, rounding);
  }
};

}  // namespace

void perturb_(const TensorTable& table, ScalarType dtype, const Ascent& ascent) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const bool stream = should_stream(table, sizeof(scalar_t));
    with_rounding<scalar_t, 1>(table, kAscentDraw, [&](const auto& rounding_for) {
      // Backward: the gradients that the norm read last are still in the cache.
      for_each_chunk(table, Order::kBackward, [&](const Chunk& chunk, int64_t) {
        if (!table.has(kBackup, chunk.tensor)) return;
        const ChunkAscent<scalar_t> mine(table, ascent, chunk);
        const auto rounding = rounding_for(chunk.tensor, ascent.options[table.groups[chunk.tensor]].rounding_seed);
        const bool moves = mine.x && !mine.step.stays(mine.again);
        for_each_block(chunk.length, [&](int64_t start, int64_t length) {
          if (!mine.again) mine.keep_weights(start, length, stream);
          if (moves) mine.perturb(start, length, rounding.at(chunk.start + start));
        });
      });
    });
  });
}

void restore_(const TensorTable& table, ScalarType dtype) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    const bool stream = should_stream(table, sizeof(scalar_t));
    for_each_chunk(table, Order::kForward,
                   [&](const Chunk& chunk, int64_t) { restore_chunk<scalar_t>(table, chunk, stream); });
  });
}

}  // namespace fastsam::cpu
