// grad_norm and dots on CUDA: sums in double per block; the last block that has its part adds them up in a fixed order.
#include "launch.cuh"

namespace fastsam::cuda {
namespace {

// ---- the norm ----

// So many blocks are enough for any GPU, and few enough for one of them to add up their sums.
constexpr int64_t kNormBlocks = 16384;

struct NormArguments {
  const DeviceOption* options;
  double* partials;  // of the launch's blocks
  double* norm;      // the sum of squares so far, in the end its root
  int* finished;
  int64_t chunks_per_block;
  bool first;  // of the norm's tables
  bool last;
};

template <typename scalar_t, bool kAdaptive>
struct SquareFunctor : FunctorTraits {
  using Tensors = Counts<kAdaptive ? 2 : 1, 0>;
  // For 16-bit types this is the slow path, which must not determine the kernel's registers.
  static constexpr int kMostPacks = kIsNarrow<scalar_t> ? 1 : 4;
  double& sum;

  // read: the gradient, and w
  __device__ void operator()(const Element<scalar_t, Tensors>& element) {
    using T = opmath_t<scalar_t>;
    sum += norm_square(static_cast<T>(element.read[Tensors::kReads - 1]), static_cast<T>(element.read[0]), kAdaptive);
  }
};

// Sums the squares of 16-bit numbers, times kNarrowScale. A square is exact in float; its bits, shifted left by 29, are
// the double with that value times kNarrowScale, which is cheaper than a conversion (16 per clock and multiprocessor,
// on some GPUs 2). A sum below kNarrowLeast (squares of 2^-80) may have lost bits in float; one that is not finite is
// at least kNarrowInfinity.
constexpr double kNarrowScale = 0x1p-896, kNarrowLeast = 0x1p-976, kNarrowInfinity = 0x1p-768;

template <typename scalar_t>
struct NarrowSquareFunctor : FunctorTraits {
  using Tensors = Counts<1, 0>;
  static constexpr bool kTakesPacks = true;
  static constexpr int kSums = 4;  // independent chains of additions
  double sums[kSums] = {};

  template <int kWidth>
  __device__ void operator()(const Element<scalar_t, Tensors> (&elements)[kWidth]) {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const auto grad = static_cast<float>(elements[e].read[0]);
      sums[e % kSums] += bit_cast<double>(static_cast<uint64_t>(bit_cast<uint32_t>(grad * grad)) << 29);
    }
  }

  __device__ double total() const { return (sums[0] + sums[1]) + (sums[2] + sums[3]); }
};

template <typename scalar_t, typename Arguments>
__device__ __forceinline__ void add_chunk(const Arguments& args, const DeviceChunk& chunk, double& sum) {
  const DeviceTable& table = args.table;
  const auto* grad = grad_pointer<scalar_t>(args, chunk);
  if (grad == nullptr || element_pointer<scalar_t>(table, kBackup, chunk) == nullptr) return;
  if (read_options<AscentOptions>(args.extra.options, chunk.group).adaptive != 0) {
    SquareFunctor<scalar_t, true> squares{{}, sum};
    walk<scalar_t>(squares, {{grad, element_pointer<scalar_t>(table, kParam, chunk)}, {}, {}, {}}, chunk.length);
    return;
  }
  if constexpr (kIsNarrow<scalar_t>) {
    NarrowSquareFunctor<scalar_t> squares;
    walk<scalar_t>(squares, {{grad}, {}, {}, {}}, chunk.length);
    const double total = squares.total();
    if (total >= kNarrowLeast && total < kNarrowInfinity) {
      sum += total * (1 / kNarrowScale);
      return;
    }
  }
  SquareFunctor<scalar_t, false> squares{{}, sum};
  walk<scalar_t>(squares, {{grad}, {}, {}, {}}, chunk.length);
}

// The sum of what blocks have left in `partials`, for the first thread. From where all blocks see the same memory, not
// from this multiprocessor's cache (.cg).
template <int kCount>
__device__ __forceinline__ void sum_partials(const double* partials, int64_t count, double (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sums[i] = 0;
#pragma unroll 8
  for (int64_t at = threadIdx.x; at < count; at += kThreads) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) sums[i] += __ldcg(partials + kCount * at + i);
  }
  block_sums(sums);
}

template <typename scalar_t, int64_t kCapacity>
__global__ void __launch_bounds__(kThreads, std::is_same_v<scalar_t, double> ? kHeavy : kMedium)
    grad_norm_kernel(const __grid_constant__ Arguments<NormArguments, kCapacity> args) {
  const NormArguments& extra = args.extra;
  const Launch& launch = args.launch;
  double sum[1] = {0};
  for (int64_t i = 0; i < extra.chunks_per_block; ++i) {
    add_chunk<scalar_t>(args, read_chunk(args.table, launch, blockIdx.x * extra.chunks_per_block + i), sum[0]);
  }
  block_sums(sum);
  if (threadIdx.x == 0) extra.partials[blockIdx.x] = sum[0];
  if (!Ticket(extra.finished).is_last(gridDim.x)) return;
  sum_partials(extra.partials, gridDim.x, sum);
  if (threadIdx.x == 0) {
    const double total = extra.first && launch.first ? sum[0] : *extra.norm + sum[0];
    *extra.norm = extra.last && launch.last ? sqrt(total) : total;
  }
}

// ---- dot products ----

struct DotsArguments {
  Form form;
  bool ascent;
  double* partials;  // [the table's chunks, 3]
  double* result;    // [tensors, 3]
  int* finished;     // [2, tensors]: a tensor's chunks that are through, and all of them
  int64_t chunk_size;
};

template <typename scalar_t, Map map, bool kMasters>
struct ProductFunctor : FunctorTraits {
  using Tensors = Counts<3, 0, kMasters ? 2 : 0, 0>;
  static constexpr bool kOptional = true;
  double scale, term;
  bool has_y, from_backup, wide_x, wide_y;
  double (&sums)[3];

  // read: x, w, y or the backup; wide x, wide y or the master
  __device__ void operator()(Element<scalar_t, Tensors>& element) {
    using T = opmath_t<scalar_t>;
    T x = static_cast<T>(element.read[0]), other = static_cast<T>(element.read[2]);
    const T w = static_cast<T>(element.read[1]);
    if constexpr (kMasters) {
      x = wide_x ? element.wide_read[0] : x;
      other = wide_y ? element.wide_read[1] : other;
    }
    const double value = x;
    sums[0] += mapped<map, scalar_t>(value, static_cast<double>(w), scale, term) * value;
    if (has_y) {
      const double y = from_backup ? w - other : other;
      sums[1] += value * y;
      sums[2] += y * y;
    }
  }
};

template <typename scalar_t, Map map, bool kMasters, typename Arguments>
__device__ __forceinline__ void add_products(const Arguments& args, const DeviceChunk& chunk, double (&sums)[3]) {
  const DotsArguments& extra = args.extra;
  const Form& form = extra.form;
  const bool from_backup = form.y == kPerturbation;
  const auto x = find_source<scalar_t, kMasters>(args, form.x, chunk);
  const auto backup = find_source<scalar_t, kMasters>(args, kBackup, chunk);
  const auto y = from_backup ? backup : find_source<scalar_t, kMasters>(args, form.y, chunk);
  const bool takes_part = extra.ascent ? backup.is_present() : form.y == kNone || y.is_present();
  if (!x.is_present() || !takes_part) return;
  const bool needs_w = map == Map::kAdaptive || from_backup;
  const scalar_t* w = needs_w ? element_pointer<scalar_t>(args.table, kParam, chunk) : nullptr;
  AscentCoefficients given{};
  if (map != Map::kIdentity) given = form.coefficients[chunk.tensor];
  ProductFunctor<scalar_t, map, kMasters> products{{},          given.scale,       given.term,        y.is_present(),
                                                   from_backup, x.wide != nullptr, y.wide != nullptr, sums};
  if constexpr (kMasters) {
    walk<scalar_t>(products, {{x.narrow, w, y.narrow}, {}, {x.wide, y.wide}, {}}, chunk.length);
  } else {
    walk<scalar_t>(products, {{x.narrow, w, y.narrow}, {}, {}, {}}, chunk.length);
  }
}

template <typename scalar_t, Map map, bool kMasters, int64_t kCapacity>
__global__ void __launch_bounds__(kThreads, kHeavy)
    dots_kernel(const __grid_constant__ Arguments<DotsArguments, kCapacity> args) {
  const DotsArguments& extra = args.extra;
  const Launch& launch = args.launch;
  const int* counts = extra.finished + args.table.tensor_count;
  // Empty tensors have no block of their own.
  for (int64_t i = threadIdx.x; blockIdx.x == 0 && i < 3 * launch.tensor_count; i += kThreads) {
    if (counts[launch.first_tensor + i / 3] == 0) extra.result[3 * launch.first_tensor + i] = 0;
  }
  const DeviceChunk chunk = read_chunk(args.table, launch, blockIdx.x);
  if (chunk.length == 0) return;
  double sums[3] = {0, 0, 0};
  add_products<scalar_t, map, kMasters>(args, chunk, sums);
  block_sums(sums);
  const int64_t index = launch.first_chunk + blockIdx.x, first = index - chunk.start / extra.chunk_size;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 3; ++i) extra.partials[3 * index + i] = sums[i];
  }
  const int count = counts[chunk.tensor];
  if (!Ticket(extra.finished + chunk.tensor).is_last(count)) return;
  sum_partials(extra.partials + 3 * first, count, sums);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < 3; ++i) extra.result[3 * chunk.tensor + i] = sums[i];
  }
}

}  // namespace

void grad_norm_(const Call& call, const DeviceOption* options, double* partials, double* norm, int* finished,
                bool first, bool last) {
  const auto in_runs = [&](auto type, auto capacity) {
    constexpr int64_t kCapacity = decltype(capacity)::value;
    for (const Launch& run : plan_launches(call.table, kCapacity)) {
      Arguments<NormArguments, kCapacity> arguments;
      const int64_t chunks_per_block = std::max<int64_t>(chunks_of(run.chunk_count, kNormBlocks), 1);
      const NormArguments extra{options, partials + run.first_chunk, norm, finished, chunks_per_block, first, last};
      pack_arguments(call.table, call.device, run, extra, arguments);
      launch(call, "grad_norm_", &grad_norm_kernel<decltype(type), kCapacity>, arguments,
             chunks_of(run.chunk_count, chunks_per_block));
    }
  };
  dispatch(call.dtype, [&](auto type) {
    if (call.table.tensor_count <= kFewTensors) {
      in_runs(type, std::integral_constant<int64_t, kFewTensors>{});
    } else {
      in_runs(type, std::integral_constant<int64_t, kManyTensors>{});
    }
  });
}

void dots_(const Call& call, const Form& form, bool ascent, double* partials, double* result, int* finished) {
  const DotsArguments extra{form, ascent, partials, result, finished, call.table.chunk_size};
  dispatch_precision(call.dtype, false, call.table.has_masters, [&](auto type, auto, auto masters) {
    dispatch_map(form.map, [&](auto map) {
      launch_in_runs<kMethodTensors>(call, "dots_", Order::kForward, extra, [](auto capacity) {
        return &dots_kernel<decltype(type), decltype(map)::value, decltype(masters)::value, decltype(capacity)::value>;
      });
    });
  });
}

}  // namespace fastsam::cuda
