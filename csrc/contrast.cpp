// Contrastive distances on the CPU: all pairs from one reading of the inputs.
//
// A tile of columns of every row is loaded into scratch that fits the L2 cache (converted to float, and free of the
// cache conflicts that rows of a power-of-two length cause), and all pairs are computed from it in register blocks of 4
// x 4 rows. Forward: the tiles of a chunk add to its partial sums, which are added in order at the end. Backward: the
// gradients of a tile are complete within the tile. Neither depends on the number of threads.
#include "contrast.h"

#include <cmath>
#include <optional>

#include "common/parallel.h"
#include "common/simd.h"

namespace kdops {
namespace {

constexpr int64_t kBlock = 4;               // rows of x and of y in a register block
constexpr int64_t kTileBytes = 128 * 1024;  // of the input rows of a tile
constexpr int64_t kLongestTile = 1024;      // columns
constexpr int64_t kShortestTile = 64;
constexpr int64_t kGroup = 64;            // rows of x in a forward task
constexpr int64_t kShortestChunk = 4096;  // columns of a forward task
constexpr int64_t kMostChunks = 64;

int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

int64_t round_up(int64_t value, int64_t step) {
  return divide_up(value, step) * step;
}

// Columns of a tile of `rows` rows.
template <typename T>
int64_t tile_width(int64_t rows, int64_t features) {
  const int64_t fits =
      kTileBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(rows, 1) / kShortestTile * kShortestTile;
  return std::min(std::clamp(fits, kShortestTile, kLongestTile),
                  round_up(std::max<int64_t>(features, 1), kShortestTile));
}

// Columns of a forward task, so many that the partial sums of a batch take no more than a sixteenth of the memory of
// its inputs.
int64_t chunk_width(const Problem& problem, int64_t tile) {
  const int64_t inputs = (problem.rows_x + problem.rows_y) * problem.features;
  const int64_t affordable = inputs / 32 / std::max<int64_t>(problem.pairs(), 1);  // floats of 4 bytes, sums of 8
  const int64_t chunks = std::clamp<int64_t>(affordable, 1, kMostChunks);
  return round_up(std::max(kShortestChunk, divide_up(problem.features, chunks)), tile);
}

template <typename T>
TileShape tile_shape(int64_t begin, int64_t width, int64_t end) {
  const int64_t columns = std::min(width, end - begin);
  return {columns, round_up(columns, kLanes<T>), width + kLanes<T>};
}

// --- one register block ---

// sums[i * rows_y + k] += distance over the tile, for I rows of x and K rows of y.
template <int P, int I, int K, typename T>
KDOPS_INLINE void block_distances(const T* __restrict x, const T* __restrict y, TileShape shape, double* sums,
                                  int64_t rows_y) {
  T partial[I][K][kLanes<T>] = {};
  for (int64_t t = 0; t < shape.padded; t += kLanes<T>) {
    for (int i = 0; i < I; ++i) {
      for (int k = 0; k < K; ++k) {
#pragma omp simd
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
          const T difference = x[i * shape.pitch + t + lane] - y[k * shape.pitch + t + lane];
          partial[i][k][lane] += P == 1 ? std::fabs(difference) : difference * difference;
        }
      }
    }
  }
  for (int i = 0; i < I; ++i) {
    for (int k = 0; k < K; ++k) {
      T sum = 0;
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += partial[i][k][lane];
      sums[i * rows_y + k] += sum;
    }
  }
}

// weight * d|difference|^P / d difference; as in torch, the sign is 0 at a tie and at NaN, and the product with it
// keeps a NaN weight.
template <int P, typename T>
KDOPS_INLINE T slope(T difference, T weight) {
  if constexpr (P == 2) return 2 * weight * difference;
  return (__builtin_islessgreater(difference, T(0)) ? std::copysign(T(1), difference) : T(0)) * weight;
}

// Adds the gradients of I x K pairs to the tiles of those that are wanted.
template <int P, int I, int K, bool NeedX, bool NeedY, typename T>
KDOPS_INLINE void block_gradients(const T* __restrict x, const T* __restrict y, const T* __restrict weights,
                                  int64_t rows_y, TileShape shape, T* __restrict grad_x, T* __restrict grad_y) {
  // The loops over rows must be unrolled before the one over columns can be vectorised: without the pragmas this is 8
  // times slower.
#pragma omp simd
  for (int64_t t = 0; t < shape.padded; ++t) {
    T sum_x[I] = {}, sum_y[K] = {};
#pragma GCC unroll kBlock
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll kBlock
      for (int k = 0; k < K; ++k) {
        const T difference = x[i * shape.pitch + t] - y[k * shape.pitch + t];
        const T gradient = slope<P>(difference, weights[i * rows_y + k]);
        sum_x[i] += gradient;
        sum_y[k] -= gradient;
      }
    }
#pragma GCC unroll kBlock
    for (int i = 0; NeedX && i < I; ++i) grad_x[i * shape.pitch + t] += sum_x[i];
#pragma GCC unroll kBlock
    for (int k = 0; NeedY && k < K; ++k) grad_y[k * shape.pitch + t] += sum_y[k];
  }
}

// --- one tile ---

// Calls block(first row of x, first row of y, rows of x, rows of y) for blocks that cover all pairs; the last two are
// constants. Where row 0 of x is row `diagonal` of y, only the blocks on the diagonal and above are called.
template <typename Block>
KDOPS_INLINE void for_each_block(int64_t rows_x, int64_t rows_y, std::optional<int64_t> diagonal, const Block& block) {
  using Many = std::integral_constant<int, kBlock>;
  using One = std::integral_constant<int, 1>;
  const auto along_y = [&](int64_t i, auto count_x) KDOPS_INLINE_LAMBDA {
    int64_t k = diagonal ? *diagonal + i : 0;
    for (; k + kBlock <= rows_y; k += kBlock) block(i, k, count_x, Many{});
    for (; k < rows_y; ++k) block(i, k, count_x, One{});
  };
  int64_t i = 0;
  for (; i + kBlock <= rows_x; i += kBlock) along_y(i, Many{});
  for (; i < rows_x; ++i) along_y(i, One{});
}

template <typename T, int P>
KDOPS_CLONED void tile_distances(const T* x, int64_t rows_x, const T* y, int64_t rows_y,
                                 std::optional<int64_t> diagonal, TileShape shape, double* sums) {
  for_each_block(rows_x, rows_y, diagonal, [&](int64_t i, int64_t k, auto count_x, auto count_y) KDOPS_INLINE_LAMBDA {
    block_distances<P, count_x, count_y>(x + i * shape.pitch, y + k * shape.pitch, shape, sums + i * rows_y + k,
                                         rows_y);
  });
}

template <typename T, int P, bool NeedX, bool NeedY>
KDOPS_CLONED void tile_gradients(const T* x, int64_t rows_x, const T* y, int64_t rows_y, const T* weights,
                                 TileShape shape, T* grad_x, T* grad_y) {
  for_each_block(rows_x, rows_y, {}, [&](int64_t i, int64_t k, auto count_x, auto count_y) KDOPS_INLINE_LAMBDA {
    block_gradients<P, count_x, count_y, NeedX, NeedY>(x + i * shape.pitch, y + k * shape.pitch,
                                                       weights + i * rows_y + k, rows_y, shape,
                                                       grad_x + i * shape.pitch, grad_y + k * shape.pitch);
  });
}

// Of the rows to one another. A block above the diagonal serves the gradients of both its sides; one on the diagonal holds
// each of its pairs twice.
template <typename T, int P>
KDOPS_CLONED void tile_symmetric_gradients(const T* x, int64_t rows, const T* weights, TileShape shape, T* grad) {
  for_each_block(rows, rows, 0, [&](int64_t i, int64_t k, auto count_x, auto count_y) KDOPS_INLINE_LAMBDA {
    const T *of = x + i * shape.pitch, *others = x + k * shape.pitch, *pairs = weights + i * rows + k;
    T *grad_of = grad + i * shape.pitch, *grad_others = grad + k * shape.pitch;
    if (i == k) {
      block_gradients<P, count_x, count_y, true, false>(of, others, pairs, rows, shape, grad_of, grad_others);
    } else {
      block_gradients<P, count_x, count_y, true, true>(of, others, pairs, rows, shape, grad_of, grad_others);
    }
  });
}

template <typename scalar_t, typename T>
KDOPS_CLONED void load(const scalar_t* from, int64_t row_stride, int64_t rows, TileShape shape, T* tile) {
  load_tile(from, row_stride, rows, shape, tile);
}

template <typename scalar_t, typename T>
KDOPS_CLONED void store(const T* tile, TileShape shape, int64_t rows, scalar_t* to, int64_t row_stride) {
  store_tile(tile, shape, rows, to, row_stride);
}

// --- the whole problem ---

template <typename scalar_t>
void distances(const scalar_t* x, Rows x_rows, const scalar_t* y, Rows y_rows, const Problem& problem,
               Accumulator<scalar_t>* result) {
  using T = Accumulator<scalar_t>;
  const int64_t batches = problem.batches, rows_x = problem.rows_x, rows_y = problem.rows_y,
                features = problem.features;
  const int64_t pairs = problem.pairs(), group = std::min(kGroup, rows_x), groups = divide_up(rows_x, kGroup);
  const int64_t width = tile_width<T>(group + rows_y, features), pitch = tile_shape<T>(0, width, features).pitch;
  const int64_t chunk = chunk_width(problem, width), chunks = divide_up(features, chunk);
  const auto kernel = problem.p == 1 ? tile_distances<T, 1> : tile_distances<T, 2>;

  const Buffer<double> partial = allocate<double>(batches * chunks * pairs);
  for_each_task<T>(batches * chunks * groups, (group + rows_y) * pitch, [&](int64_t task, T* tile_x) {
    const int64_t first = task % groups * kGroup, rows = std::min(group, rows_x - first);
    const int64_t slice = task / groups, batch = slice / chunks;
    const int64_t begin = slice % chunks * chunk, end = std::min(begin + chunk, features);
    T* tile_y = tile_x + group * pitch;
    double* sums = partial.get() + slice * pairs + first * rows_y;
    std::fill(sums, sums + rows * rows_y, 0.0);
    for (int64_t t = begin; t < end; t += width) {
      const TileShape shape = tile_shape<T>(t, width, end);
      load(y + batch * y_rows.batch_stride + t, y_rows.row_stride, rows_y, shape, tile_y);
      if (problem.symmetric) {
        kernel(tile_y + first * shape.pitch, rows, tile_y, rows_y, first, shape, sums);
      } else {
        load(x + batch * x_rows.batch_stride + first * x_rows.row_stride + t, x_rows.row_stride, rows, shape, tile_x);
        kernel(tile_x, rows, tile_y, rows_y, {}, shape, sums);
      }
    }
  });

  for (int64_t batch = 0; batch < batches; ++batch) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t i = pair / rows_y, k = pair % rows_y;
      const int64_t computed = problem.symmetric && i > k ? k * rows_y + i : pair;
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[(batch * chunks + c) * pairs + computed];
      result[batch * pairs + pair] = static_cast<T>(sum);
    }
  }
}

template <typename scalar_t, int P, bool NeedX, bool NeedY>
void gradients(const Side<scalar_t>& x, const Side<scalar_t>& y, const Accumulator<scalar_t>* weights,
               const Problem& problem) {
  using T = Accumulator<scalar_t>;
  const int64_t rows_x = problem.rows_x, rows_y = problem.rows_y, features = problem.features;
  const int64_t width = tile_width<T>(2 * (rows_x + rows_y), features);
  const int64_t tiles = divide_up(features, width);
  const int64_t pitch = tile_shape<T>(0, width, features).pitch;

  for_each_task<T>(problem.batches * tiles, 2 * (rows_x + rows_y) * pitch, [&](int64_t task, T* tile_x) {
    const int64_t batch = task / tiles, t = task % tiles * width;
    const TileShape shape = tile_shape<T>(t, width, features);
    T* tile_y = tile_x + rows_x * pitch;
    T* grad_x = tile_y + rows_y * pitch;
    T* grad_y = grad_x + rows_x * pitch;
    load(x.values + batch * x.rows.batch_stride + t, x.rows.row_stride, rows_x, shape, tile_x);
    load(y.values + batch * y.rows.batch_stride + t, y.rows.row_stride, rows_y, shape, tile_y);
    std::fill(grad_x, grad_x + (rows_x + rows_y) * pitch, T(0));
    tile_gradients<T, P, NeedX, NeedY>(tile_x, rows_x, tile_y, rows_y, weights + batch * problem.pairs(), shape, grad_x,
                                       grad_y);
    if (NeedX)
      store(grad_x, shape, rows_x, x.gradient + batch * x.gradient_rows.batch_stride + t, x.gradient_rows.row_stride);
    if (NeedY)
      store(grad_y, shape, rows_y, y.gradient + batch * y.gradient_rows.batch_stride + t, y.gradient_rows.row_stride);
  });
}

template <typename scalar_t, int P>
void symmetric_gradients(const Side<scalar_t>& x, const Accumulator<scalar_t>* weights, const Problem& problem) {
  using T = Accumulator<scalar_t>;
  const int64_t rows = problem.rows_x, features = problem.features;
  const int64_t width = tile_width<T>(2 * rows, features);
  const int64_t pitch = tile_shape<T>(0, width, features).pitch;

  for_each_task<T>(divide_up(features, width), 2 * rows * pitch, [&](int64_t task, T* tile) {
    const int64_t t = task * width;
    const TileShape shape = tile_shape<T>(t, width, features);
    T* grad = tile + rows * pitch;
    load(x.values + t, x.rows.row_stride, rows, shape, tile);
    std::fill(grad, grad + rows * pitch, T(0));
    tile_symmetric_gradients<T, P>(tile, rows, weights, shape, grad);
    store(grad, shape, rows, x.gradient + t, x.gradient_rows.row_stride);
  });
}

template <typename scalar_t, int P>
void choose_gradients(const Side<scalar_t>& x, const Side<scalar_t>& y, const Accumulator<scalar_t>* weights,
                      const Problem& problem) {
  if (x.gradient && problem.symmetric) return symmetric_gradients<scalar_t, P>(x, weights, problem);
  if (x.gradient && y.gradient) return gradients<scalar_t, P, true, true>(x, y, weights, problem);
  if (x.gradient) return gradients<scalar_t, P, true, false>(x, y, weights, problem);
  if (y.gradient) return gradients<scalar_t, P, false, true>(x, y, weights, problem);
}

}  // namespace

// --- operators ---

Tensor distance(const Tensor& x, const Tensor& y, int64_t p, Pairing pairing) {
  const Problem problem = pairing.problem(x, y, p);
  const FlatPair flat(x, 1, y, pairing.first_y);
  Tensor result = empty_distances(x, y, pairing);
  for_dtype<float, double, BFloat16, Half>(x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    distances<scalar_t>(const_data<scalar_t>(flat.x), pairing.rows_x(flat.x), const_data<scalar_t>(flat.y),
                        pairing.rows_y(flat.y), problem, data<Accumulator<scalar_t>>(result));
  });
  return result;
}

std::tuple<Tensor, Tensor> distance_backward(const Tensor& grad, const Tensor& x, const Tensor& y, int64_t p,
                                             bool need_x, bool need_y, Pairing pairing) {
  const Problem problem = pairing.problem(x, y, p);
  const FlatPair flat(x, 1, y, pairing.first_y);
  const Tensor weight = weights(grad, x, problem);
  Gradient grad_x(need_x, x, flat.x, 1), grad_y(need_y, y, flat.y, pairing.first_y);
  for_dtype<float, double, BFloat16, Half>(x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    Side<scalar_t> side_x{const_data<scalar_t>(flat.x), pairing.rows_x(flat.x)};
    Side<scalar_t> side_y{const_data<scalar_t>(flat.y), pairing.rows_y(flat.y)};
    if (need_x) side_x.write_to(grad_x, pairing.rows_x(grad_x.rows));
    if (need_y) side_y.write_to(grad_y, pairing.rows_y(grad_y.rows));
    const auto* weight_data = const_data<Accumulator<scalar_t>>(weight);
    if (p == 1) return choose_gradients<scalar_t, 1>(side_x, side_y, weight_data, problem);
    choose_gradients<scalar_t, 2>(side_x, side_y, weight_data, problem);
  });
  return {grad_x.finish(), grad_y.finish()};
}

}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  kdops::implement_contrast(m);
}
