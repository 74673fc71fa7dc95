// From a form at run time to the loop compiled for it: which map, and whether there is a y.
#pragma once

#include "../elementwise.h"
#include "blocks.h"

namespace fastsam::cpu {

// Calls body.operator()<map, has_y>().
template <typename Body>
void with_form(Map map, bool has_y, const Body& body) {
  const auto with_map = [&]<Map kMap>() {
    return has_y ? body.template operator()<kMap, true>() : body.template operator()<kMap, false>();
  };
  switch (map) {
    case Map::kIdentity:
      return with_map.template operator()<Map::kIdentity>();
    case Map::kPower:
      return with_map.template operator()<Map::kPower>();
    case Map::kAdaptive:
      return with_map.template operator()<Map::kAdaptive>();
  }
}

// result may be one of the others, element for element.
template <typename T>
FASTSAM_MULTIVERSION void subtract(T* result, const T* from, const T* what, int64_t length) {
  FASTSAM_INDEPENDENT
  for (int64_t i = 0; i < length; ++i) result[i] = from[i] - what[i];
}

// An ascent's y in one chunk: a row; or the perturbation, w - backup.
template <typename scalar_t>
class SecondTerm {
  using T = opmath_t<scalar_t>;

 public:
  SecondTerm(const TensorTable& table, int64_t y, const Chunk& chunk)
      : elements_(table, y == kPerturbation ? kBackup : y, chunk), is_perturbation_(y == kPerturbation) {}

  explicit operator bool() const { return static_cast<bool>(elements_); }

  // The block's values, which may be in `buffer`; param: those of w.
  const T* load(T* buffer, const T* param, int64_t start, int64_t length) const {
    if (!elements_) return nullptr;
    const T* values = elements_.load(buffer, start, length);
    if (!is_perturbation_) return values;
    subtract(buffer, param, values, length);
    return buffer;
  }

 private:
  Elements<scalar_t> elements_;
  bool is_perturbation_;
};

}  // namespace fastsam::cpu
