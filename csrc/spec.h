// The numbers that Python, C++ and Triton share. fastsam/spec.py says what they mean; tests/unit/test_spec.py compares.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTSAM_HOST_DEVICE __host__ __device__ __forceinline__
// Called: too long to be written out for every element of a vector.
#define FASTSAM_HOST_DEVICE_CALL __host__ __device__ __noinline__ inline
#else
// Inlined by force: only inside a multiversioned caller is the element compiled for that caller's instruction set.
#define FASTSAM_HOST_DEVICE inline __attribute__((always_inline))
#define FASTSAM_HOST_DEVICE_CALL FASTSAM_HOST_DEVICE
#endif

namespace fastsam {

enum Row : int64_t {
  kParam,
  kGrad,
  kBackup,
  kState0,
  kState1,
  kState2,
  kMaster,
  kFirstGrad,
  kDirection,
  kMethodState,
  kStep,
  kRows
};
constexpr int64_t kStateSlots = 3;

// In place of y's row.
constexpr int64_t kNone = -1, kPerturbation = -2;

enum class Update : int64_t { kNone, kSgd, kAdam };
constexpr int64_t kUpdates = 3;

enum class Map : int64_t { kIdentity, kPower, kAdaptive };

enum Draw : uint32_t { kAscentDraw, kWeightDraw = 2, kStateDraw, kMethodStateDraw = kStateDraw + kStateSlots };
constexpr uint32_t kRandomWords = 8;

// Rows of options and coefficients as they lie in memory: all doubles, in spec.py's order. A flag is not 0.

struct AscentOptions {
  double rho, adaptive, maximize, rounding_seed;
};

struct SgdOptions {
  double lr, momentum, dampening, weight_decay, nesterov, maximize, rounding_seed;
};

struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay, decoupled, amsgrad, maximize, rounding_seed;
};

struct AscentCoefficients {
  double a, b, scale, term;
};

struct DescentCoefficients {
  double a, b, keep_x, keep_first, keep_state, decoupled_x, decoupled_y;
};

template <typename Fields>
constexpr int kFields = static_cast<int>(sizeof(Fields) / sizeof(double));

}  // namespace fastsam
