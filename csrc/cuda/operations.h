// The operations on CUDA, as ops.cpp calls them. Everything is checked; nothing here waits for the device.
#pragma once

#include "../dispatch.h"
#include "launches.h"

struct CUstream_st;

namespace fastsam::cuda {

using Stream = CUstream_st*;

// One table, and where to work on it.
struct Call {
  TensorTable table;   // the host's, without chunks
  DeviceTable device;  // the device's copy of it
  ScalarType dtype;
  Stream stream;
  bool only_loads = false;  // nothing is launched: see load()
};

// The tensors of an ascent or of dot products, and what is made of them. Of a descent, coefficients are not read.
struct Form {
  const AscentCoefficients* coefficients;
  int64_t x;
  int64_t y;  // a row, kNone or kPerturbation
  Map map;
};

// partials[block] <- a block's sum of squares. norm <- their sum in that order, added to what it was unless `first`;
// its root if `last`. *finished: 0 between launches; how many blocks are through.
void grad_norm_(const Call& call, const DeviceOption* options, double* partials, double* norm, int* finished,
                bool first, bool last);

// partials[chunk] <- the chunk's <map(x), x>, <x, y>, <y, y>; result[tensor] <- their sums, in the chunks' order.
// finished [2, n]: for each tensor, 0 between launches, and how many chunks it has.
void dots_(const Call& call, const Form& form, bool ascent, double* partials, double* result, int* finished);

// By a norm. If a launch fails, what those before it have perturbed is restored.
void perturb_(const Call& call, const DeviceOption* options, const double* norm);

// By coefficients.
void perturb_(const Call& call, const DeviceOption* options, const Form& form);

void restore_(const Call& call);

// What stands in the gradient's place.
struct DescentArguments {
  const DescentCoefficients* coefficients;
  int64_t y;  // a row or kNone
  bool keeps;
  bool decoupled;
};

// Steps are advanced here for every tensor with a gradient unless *found_inf is set. grad_scale and found_inf may be
// null.
struct UpdateArguments {
  const DeviceOption* options;
  const float* grad_scale;
  const float* found_inf;
  int* finished;
  DescentArguments descent;  // coefficients: null without one
};

// Of update kNone, only the descent counts.
void restore_and_update_(const Call& call, Update update, const UpdateArguments& arguments);

// Calls body(map) with the map as a type, an integral_constant.
template <typename Body>
void dispatch_map(Map map, const Body& body) {
  switch (map) {
    case Map::kIdentity:
      return body(std::integral_constant<Map, Map::kIdentity>{});
    case Map::kPower:
      return body(std::integral_constant<Map, Map::kPower>{});
    case Map::kAdaptive:
      return body(std::integral_constant<Map, Map::kAdaptive>{});
  }
}

// Why no kernel can run on the current device, or null.
const char* find_obstacle();

}  // namespace fastsam::cuda
