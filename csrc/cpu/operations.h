// The operations on the CPU, as ops.cpp calls them. Tables are checked; options are [groups], coefficients [tensors].
#pragma once

#include "../dispatch.h"
#include "../elementwise.h"
#include "../table.h"

namespace fastsam::cpu {

// spec.py's Ascent: by a norm, or by coefficients (else null).
struct Ascent {
  const AscentOptions* options;
  double norm;
  const AscentCoefficients* coefficients;
  int64_t x, y;
  Map map;
};

// spec.py's Descent.
struct Descent {
  const DescentCoefficients* coefficients;
  int64_t y;
  bool keeps, decoupled;
};

// partials[chunk] <- the chunk's sum of squares; returns their sum in chunk order, whatever the number of threads.
double square_sum(const TensorTable& table, ScalarType dtype, const AscentOptions* options, double* partials);

// result[tensor] <- <map(x), x>, <x, y>, <y, y>; partials: [chunks, 3]. Sums in chunk order, whatever the number of
// threads. With coefficients: of what has a backup and x; else of what has x and y.
void dots(const TensorTable& table, ScalarType dtype, const Ascent& form, double* partials, double* result);

void perturb_(const TensorTable& table, ScalarType dtype, const Ascent& ascent);

void restore_(const TensorTable& table, ScalarType dtype);

// options: SgdOptions or AdamOptions, by `update`, which also advances the steps. descent: may be null.
void restore_and_update_(const TensorTable& table, ScalarType dtype, Update update, const void* options,
                         double inv_grad_scale, const Descent* descent);

}  // namespace fastsam::cpu
