// Contrastive distances on the CPU: all pairs from one reading of the inputs.
//
// A tile of columns of every row is loaded into scratch that fits the L2 cache (converted to float, free of the cache conflicts that
// equal offsets in rows of a power-of-two length cause), and all pairs are computed from it in register blocks of 4 x 4 rows.
// Forward: tiles of a chunk add to the chunk's partial sums, which are added in order at the end. Backward: a tile's gradients are
// complete within the tile. Neither depends on the number of threads.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "contrast.h"

namespace kdops {
namespace {

constexpr int64_t kBlock = 4;               // rows of x and of y in a register block
constexpr int64_t kTileBytes = 128 * 1024;  // of the input rows of a tile
constexpr int64_t kLongestTile = 1024;      // columns
constexpr int64_t kShortestTile = 64;
constexpr int64_t kShortestChunk = 4096;  // columns of a forward task
constexpr int64_t kMostChunks = 64;       // bounds the partial sums

int64_t round_up(int64_t value, int64_t step) {
  return (value + step - 1) / step * step;
}

// Columns of a tile of `rows` rows.
template <typename T>
int64_t tile_width(int64_t rows, int64_t features) {
  const int64_t fits = kTileBytes / static_cast<int64_t>(sizeof(T)) / std::max<int64_t>(rows, 1) / kShortestTile * kShortestTile;
  return std::min(std::clamp(fits, kShortestTile, kLongestTile), round_up(std::max<int64_t>(features, 1), kShortestTile));
}

template <typename T>
TileShape tile_shape(int64_t begin, int64_t width, int64_t end) {
  const int64_t columns = std::min(width, end - begin);
  return {columns, round_up(columns, kLanes<T>), width + kLanes<T>};
}

// --- one register block ----------------------------------------------------------------------------------------------------------

// sums[i * rows_y + k] += distance over the tile, for I rows of x and K rows of y.
template <int P, int I, int K, typename T>
KDOPS_INLINE void block_distances(const T* __restrict x, const T* __restrict y, TileShape shape, double* sums, int64_t rows_y) {
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

// weight * d|difference|^P / d difference; the sign is 0 at a tie and, as in torch, at NaN.
template <int P, typename T>
KDOPS_INLINE T slope(T difference, T weight) {
  if constexpr (P == 2) return weight * (difference + difference);
  return weight * static_cast<T>((difference > 0) - (difference < 0));
}

// Adds the gradients of I x K pairs to the tiles of those that are wanted.
template <int P, int I, int K, bool NeedX, bool NeedY, typename T>
KDOPS_INLINE void block_gradients(const T* __restrict x, const T* __restrict y, const T* __restrict weights, int64_t rows_y,
                                  TileShape shape, T* __restrict grad_x, T* __restrict grad_y) {
  for (int64_t t = 0; t < shape.padded; t += kLanes<T>) {
    T sum_x[I][kLanes<T>] = {}, sum_y[K][kLanes<T>] = {};
    for (int i = 0; i < I; ++i) {
      for (int k = 0; k < K; ++k) {
#pragma omp simd
        for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
          const T difference = x[i * shape.pitch + t + lane] - y[k * shape.pitch + t + lane];
          const T gradient = slope<P>(difference, weights[i * rows_y + k]);
          if constexpr (NeedX) sum_x[i][lane] += gradient;
          if constexpr (NeedY) sum_y[k][lane] -= gradient;
        }
      }
    }
    for (int i = 0; NeedX && i < I; ++i) {
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) grad_x[i * shape.pitch + t + lane] += sum_x[i][lane];
    }
    for (int k = 0; NeedY && k < K; ++k) {
#pragma omp simd
      for (int64_t lane = 0; lane < kLanes<T>; ++lane) grad_y[k * shape.pitch + t + lane] += sum_y[k][lane];
    }
  }
}

// --- one tile --------------------------------------------------------------------------------------------------------------------

// Calls block(first row of x, first row of y, rows of x, rows of y) for blocks that cover all pairs; the last two are constants.
template <typename Block>
KDOPS_INLINE void for_each_block(int64_t rows_x, int64_t rows_y, const Block& block) {
  using Many = std::integral_constant<int, kBlock>;
  using One = std::integral_constant<int, 1>;
  const auto along_y = [&](int64_t i, auto count_x) KDOPS_INLINE_LAMBDA {
    int64_t k = 0;
    for (; k + kBlock <= rows_y; k += kBlock) block(i, k, count_x, Many{});
    for (; k < rows_y; ++k) block(i, k, count_x, One{});
  };
  int64_t i = 0;
  for (; i + kBlock <= rows_x; i += kBlock) along_y(i, Many{});
  for (; i < rows_x; ++i) along_y(i, One{});
}

template <typename T, int P>
KDOPS_CLONED void tile_distances(const T* x, int64_t rows_x, const T* y, int64_t rows_y, TileShape shape, double* sums) {
  for_each_block(rows_x, rows_y, [&](int64_t i, int64_t k, auto count_x, auto count_y) KDOPS_INLINE_LAMBDA {
    block_distances<P, count_x, count_y>(x + i * shape.pitch, y + k * shape.pitch, shape, sums + i * rows_y + k, rows_y);
  });
}

template <typename T, int P, bool NeedX, bool NeedY>
KDOPS_CLONED void tile_gradients(const T* x, int64_t rows_x, const T* y, int64_t rows_y, const T* weights, TileShape shape,
                                 T* grad_x, T* grad_y) {
  for_each_block(rows_x, rows_y, [&](int64_t i, int64_t k, auto count_x, auto count_y) KDOPS_INLINE_LAMBDA {
    block_gradients<P, count_x, count_y, NeedX, NeedY>(x + i * shape.pitch, y + k * shape.pitch, weights + i * rows_y + k, rows_y,
                                                       shape, grad_x + i * shape.pitch, grad_y + k * shape.pitch);
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

// --- the whole problem -----------------------------------------------------------------------------------------------------------

template <typename scalar_t>
void distances(const scalar_t* x, Rows x_rows, const scalar_t* y, Rows y_rows, const Problem& problem,
               Accumulator<scalar_t>* result) {
  using T = Accumulator<scalar_t>;
  const int64_t batches = problem.batches, rows_x = problem.rows_x, rows_y = problem.rows_y, features = problem.features;
  const int64_t pairs = problem.pairs();
  const int64_t width = tile_width<T>(rows_x + rows_y, features);
  const int64_t chunk = round_up(std::max(kShortestChunk, features / kMostChunks), width);
  const int64_t chunks = (features + chunk - 1) / chunk;
  const auto kernel = problem.p == 1 ? tile_distances<T, 1> : tile_distances<T, 2>;

  const Buffer<double> partial = allocate<double>(batches * chunks * pairs);
  const int64_t pitch = tile_shape<T>(0, width, features).pitch;
  for_each_task<T>(batches * chunks, (rows_x + rows_y) * pitch, [&](int64_t task, T* tile_x) {
    const int64_t batch = task / chunks, begin = task % chunks * chunk, end = std::min(begin + chunk, features);
    T* tile_y = tile_x + rows_x * pitch;
    double* sums = partial.get() + task * pairs;
    std::fill(sums, sums + pairs, 0.0);
    for (int64_t t = begin; t < end; t += width) {
      const TileShape shape = tile_shape<T>(t, width, end);
      load(x + batch * x_rows.batch_stride + t, x_rows.row_stride, rows_x, shape, tile_x);
      load(y + batch * y_rows.batch_stride + t, y_rows.row_stride, rows_y, shape, tile_y);
      kernel(tile_x, rows_x, tile_y, rows_y, shape, sums);
    }
  });

  for (int64_t batch = 0; batch < batches; ++batch) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      double sum = 0;
      for (int64_t c = 0; c < chunks; ++c) sum += partial[(batch * chunks + c) * pairs + pair];
      result[batch * pairs + pair] = static_cast<T>(sum);
    }
  }
}

template <typename scalar_t>
struct Side {
  const scalar_t* values;
  Rows rows;
  scalar_t* gradient;  // null when not wanted
  Rows gradient_rows;
};

template <typename scalar_t, int P, bool NeedX, bool NeedY>
void gradients(const Side<scalar_t>& x, const Side<scalar_t>& y, const Accumulator<scalar_t>* weights, const Problem& problem) {
  using T = Accumulator<scalar_t>;
  const int64_t rows_x = problem.rows_x, rows_y = problem.rows_y, features = problem.features;
  const int64_t width = tile_width<T>(2 * (rows_x + rows_y), features);
  const int64_t tiles = (features + width - 1) / width;
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
    tile_gradients<T, P, NeedX, NeedY>(tile_x, rows_x, tile_y, rows_y, weights + batch * problem.pairs(), shape, grad_x, grad_y);
    if (NeedX) store(grad_x, shape, rows_x, x.gradient + batch * x.gradient_rows.batch_stride + t, x.gradient_rows.row_stride);
    if (NeedY) store(grad_y, shape, rows_y, y.gradient + batch * y.gradient_rows.batch_stride + t, y.gradient_rows.row_stride);
  });
}

template <typename scalar_t, int P>
void choose_gradients(const Side<scalar_t>& x, const Side<scalar_t>& y, const Accumulator<scalar_t>* weights, const Problem& problem) {
  if (x.gradient && y.gradient) return gradients<scalar_t, P, true, true>(x, y, weights, problem);
  if (x.gradient) return gradients<scalar_t, P, true, false>(x, y, weights, problem);
  if (y.gradient) return gradients<scalar_t, P, false, true>(x, y, weights, problem);
}

// --- operators -------------------------------------------------------------------------------------------------------------------

Tensor distance(const Tensor& x, const Tensor& y, int64_t p, Pairing pairing) {
  const Problem problem = pairing.problem(x, y, p);
  const FlatPair flat(x, 1, y, pairing.first_y);
  Tensor result = empty_distances(x, y, pairing);
  for_dtype(x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    distances<scalar_t>(const_data<scalar_t>(flat.x), pairing.rows_x(flat.x), const_data<scalar_t>(flat.y), pairing.rows_y(flat.y),
                        problem, data<Accumulator<scalar_t>>(result));
  });
  return result;
}

std::tuple<Tensor, Tensor> distance_backward(const Tensor& grad, const Tensor& x, const Tensor& y, int64_t p, bool need_x,
                                             bool need_y, Pairing pairing) {
  const Problem problem = pairing.problem(x, y, p);
  const FlatPair flat(x, 1, y, pairing.first_y);
  const Tensor weight = weights(grad, x, problem);
  Gradient grad_x(need_x, x, flat.x, 1), grad_y(need_y, y, flat.y, pairing.first_y);
  for_dtype(x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    Side<scalar_t> side_x{const_data<scalar_t>(flat.x), pairing.rows_x(flat.x), nullptr, {}};
    Side<scalar_t> side_y{const_data<scalar_t>(flat.y), pairing.rows_y(flat.y), nullptr, {}};
    if (need_x) side_x.gradient = data<scalar_t>(grad_x.rows), side_x.gradient_rows = pairing.rows_x(grad_x.rows);
    if (need_y) side_y.gradient = data<scalar_t>(grad_y.rows), side_y.gradient_rows = pairing.rows_y(grad_y.rows);
    const auto* weight_data = const_data<Accumulator<scalar_t>>(weight);
    if (p == 1) return choose_gradients<scalar_t, 1>(side_x, side_y, weight_data, problem);
    choose_gradients<scalar_t, 2>(side_x, side_y, weight_data, problem);
  });
  return {grad_x.finish(), grad_y.finish()};
}

Tensor pairwise_distance(const Tensor& x, const Tensor& y, int64_t p) {
  return distance(x, y, p, kPairwise);
}

std::tuple<Tensor, Tensor> pairwise_distance_backward(const Tensor& grad, const Tensor& x, const Tensor& y, int64_t p, bool need_x,
                                                      bool need_y) {
  return distance_backward(grad, x, y, p, need_x, need_y, kPairwise);
}

Tensor matched_distance(const Tensor& anchor, const Tensor& others, int64_t p) {
  return distance(anchor, others, p, kMatched);
}

std::tuple<Tensor, Tensor> matched_distance_backward(const Tensor& grad, const Tensor& anchor, const Tensor& others, int64_t p,
                                                     bool need_anchor, bool need_others) {
  return distance_backward(grad, anchor, others, p, need_anchor, need_others, kMatched);
}

}  // namespace
}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("pairwise_distance", TORCH_BOX(&kdops::pairwise_distance));
  m.impl("pairwise_distance_backward", TORCH_BOX(&kdops::pairwise_distance_backward));
  m.impl("matched_distance", TORCH_BOX(&kdops::matched_distance));
  m.impl("matched_distance_backward", TORCH_BOX(&kdops::matched_distance_backward));
}
