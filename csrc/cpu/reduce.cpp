// grad_norm and dots on the CPU: sums of products in double, per chunk, then over the chunks in their order.
#include "forms.h"
#include "operations.h"

namespace fastsam::cpu {
namespace {

// Many running sums, enough to hide the latency of an addition, in an order that no instruction set changes.
constexpr int64_t kLanes = 32;
static_assert(kBlock % kLanes == 0, "an element's lane is the same however a chunk is cut into blocks");

template <bool adaptive>
struct Square {
  static constexpr int kProducts = 1;

  FASTSAM_HOST_DEVICE void operator()(double x, double param, double, double* products) const {
    products[0] = norm_square(param, x, adaptive);
  }
};

template <Map map, bool has_y, typename scalar_t>
struct Products {
  static constexpr int kProducts = has_y ? 3 : 1;
  double scale, term;

  FASTSAM_HOST_DEVICE void operator()(double x, double param, double y, double* products) const {
    products[0] = mapped<map, scalar_t>(x, param, scale, term) * x;
    if constexpr (has_y) {
      products[1] = x * y;
      products[2] = y * y;
    }
  }
};

template <typename scalar_t>
FASTSAM_HOST_DEVICE double widen(scalar_t x) {
  return static_cast<double>(static_cast<opmath_t<scalar_t>>(x));
}

// running[product][lane] += the products of every kLanes-th element
template <typename Product, typename scalar_t>
FASTSAM_HOST_DEVICE void add_all(const scalar_t* x, const scalar_t* param, [[maybe_unused]] const scalar_t* y,
                                 int64_t length, const Product& product,
                                 double (&running)[Product::kProducts][kLanes]) {
  constexpr int kProducts = Product::kProducts;
  const auto add = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    double products[kProducts], second = 0;
    if constexpr (kProducts > 1) second = widen(y[i]);
    product(widen(x[i]), widen(param[i]), second, products);
    for (int p = 0; p < kProducts; ++p) running[p][lane] += products[p];
  };
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  }
  for (int64_t lane = 0; i < length; ++i, ++lane) add(i, lane);
}

// One block of a chunk: the lanes' sums go on from block to block.
template <typename Product, typename scalar_t>
FASTSAM_MULTIVERSION void add_products(const scalar_t* x, const scalar_t* param, const scalar_t* y, int64_t length,
                                       const Product product, double* sums) {
  double running[Product::kProducts][kLanes];
  std::memcpy(running, sums, sizeof(running));
  add_all(x, param, y, length, product, running);
  std::memcpy(sums, running, sizeof(running));
}

// A whole chunk.
template <typename scalar_t>
FASTSAM_MULTIVERSION double square_sum_of(const scalar_t* __restrict__ x, const scalar_t* __restrict__ param,
                                          int64_t length, bool adaptive) {
  const scalar_t* none = nullptr;
  double sums[1][kLanes] = {};
  if (adaptive) {
    add_all(x, param, none, length, Square<true>{}, sums);
  } else {
    add_all(x, param, none, length, Square<false>{}, sums);
  }
  double total = 0;
  for (const double sum : sums[0]) total += sum;
  return total;
}

double sum_of(const double* lanes) {
  double total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

// The three dot products of one chunk.
template <typename scalar_t>
void sum_products(const TensorTable& table, const Ascent& form, const Chunk& chunk, double* result) {
  using T = opmath_t<scalar_t>;
  const Elements<scalar_t> param(table, kParam, chunk), x(table, form.x, chunk);
  const SecondTerm<scalar_t> y(table, form.y, chunk);
  const bool takes_part =
      form.coefficients != nullptr ? table.has(kBackup, chunk.tensor) : form.y == kNone || static_cast<bool>(y);
  if (!x || !takes_part) return;
  if (form.map == Map::kIdentity && !y && x.stored() != nullptr) {
    result[0] = square_sum_of(x.stored(), param.stored(), chunk.length, false);
    return;
  }
  double scale = 0, term = 0, sums[3 * kLanes] = {};
  if (form.coefficients != nullptr) {
    scale = form.coefficients[chunk.tensor].scale, term = form.coefficients[chunk.tensor].term;
  }
  for_each_block(chunk.length, [&](int64_t start, int64_t length) {
    alignas(64) T w_buffer[kBlock], x_buffer[kBlock], y_buffer[kBlock];
    const T* w = param.load(w_buffer, start, length);
    const T* first = x.load(x_buffer, start, length);
    const T* second = y.load(y_buffer, w, start, length);
    with_form(form.map, static_cast<bool>(y), [&]<Map map, bool has_y>() {
      add_products(first, w, second, length, Products<map, has_y, T>{scale, term}, sums);
    });
  });
  for (int product = 0; product < 3; ++product) result[product] = sum_of(sums + product * kLanes);
}

}  // namespace

double square_sum(const TensorTable& table, ScalarType dtype, const AscentOptions* options, double* partials) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    for_each_chunk(table, Order::kForward, {{kGrad}, sizeof(scalar_t)}, [&](const Chunk& chunk, int64_t index) {
      const bool is_perturbed = table.has(kGrad, chunk.tensor) && table.has(kBackup, chunk.tensor);
      partials[index] = is_perturbed ? square_sum_of(table.pointer<scalar_t>(kGrad, chunk.tensor) + chunk.start,
                                                     table.pointer<scalar_t>(kParam, chunk.tensor) + chunk.start,
                                                     chunk.length, options[table.groups[chunk.tensor]].adaptive != 0)
                                     : 0;
    });
  });
  double total = 0;
  for (int64_t i = 0; i < table.chunk_count; ++i) total += partials[i];
  return total;
}

void dots(const TensorTable& table, ScalarType dtype, const Ascent& form, double* partials, double* result) {
  dispatch(dtype, [&](auto type) {
    using scalar_t = decltype(type);
    for_each_chunk(table, Order::kForward, {{kGrad}, sizeof(scalar_t)}, [&](const Chunk& chunk, int64_t index) {
      double* mine = partials + 3 * index;
      mine[0] = mine[1] = mine[2] = 0;
      sum_products<scalar_t>(table, form, chunk, mine);
    });
  });
  std::fill(result, result + 3 * table.tensor_count, 0.0);
  for (int64_t i = 0; i < table.chunk_count; ++i) {
    double* sums = result + 3 * read_chunk(table, i).tensor;
    for (int product = 0; product < 3; ++product) sums[product] += partials[3 * i + product];
  }
}

}  // namespace fastsam::cpu
