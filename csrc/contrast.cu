// Contrastive distances on CUDA: all pairs of a block of rows per reading, partial sums added in a fixed order, no
// atomics.
//
// Forward: a thread holds the pairs of 8 x 8 rows in registers and walks down the columns of a chunk; a block's sums
// are added by shuffles, those of the chunks by a second kernel. Backward: a thread holds 8 rows of one column and
// walks over all rows of the other input. Blocks that read the same columns are neighbours in the grid, so that they
// find them in the L2 cache.
#include <torch/csrc/stable/accelerator.h>

#include "common/launch.h"
#include "contrast.h"

namespace kdops {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 8;                  // of each input in a thread's registers
constexpr int64_t kShortestChunk = 2048;  // columns of a forward block
constexpr int64_t kMostChunks = 512;      // bounds the partial sums
constexpr int kStaged = 64;               // rows whose weights are in shared memory at a time

__host__ __device__ constexpr int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// Square tiles that cover all pairs of rows, `along` of them in a row; of symmetric distances each pair of tiles once: on
// the diagonal, one beside it, and so on, around the end.
struct Tiles {
  int64_t along_x, along_y;
  bool symmetric;

  __host__ __device__ int64_t count() const {
    return symmetric ? along_x * (along_x + 1) / 2 : along_x * along_y;
  }

  __device__ int64_t x(int64_t tile) const {
    return symmetric ? tile % along_x : tile / along_y;
  }

  __device__ int64_t y(int64_t tile) const {
    return symmetric ? (tile % along_x + tile / along_x) % along_x : tile % along_y;
  }
};

// --- forward ---

// Adds the first Count values over the 32 lanes of a warp. An exchange with the lane at distance Offset halves the
// number of values that a lane is responsible for; afterwards its first max(Count / 32, 1) values are the sums from
// number `first` (returned) on.
template <int Count, int Offset = 16, int N>
__device__ int add_over_warp(float (&values)[N]) {
  constexpr int half = Count > 1 ? Count / 2 : 1;
  int first = 0;
  if constexpr (Count > 1) {
    const bool upper = threadIdx.x & Offset;
    first = upper ? half : 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
      values[i] = kept + __shfl_xor_sync(~0u, sent, Offset);
    }
  } else {
    values[0] += __shfl_xor_sync(~0u, values[0], Offset);
  }
  if constexpr (Offset > 1) first += add_over_warp<half, Offset / 2>(values);
  return first;
}

// partial[batch][chunk][i][k]: distance of x_i and y_k over the columns of the chunk. A block computes RX x kRows of
// them; of symmetric ones it writes both places.
template <typename scalar_t, int P, int RX>
__global__ void __launch_bounds__(kThreads)
    partial_distances(const scalar_t* x, Rows rows_of_x, const scalar_t* y, Rows rows_of_y, Problem problem,
                      int64_t chunk, Tiles tiles, float* partial) {
  const int64_t chunks = divide_up(problem.features, chunk);
  const int64_t tile = blockIdx.x % tiles.count(), block = blockIdx.x / tiles.count();  // batch * chunks + chunk
  const int64_t first_x = tiles.x(tile) * RX, first_y = tiles.y(tile) * kRows;
  const int64_t begin = block % chunks * chunk, end = min(begin + chunk, problem.features);
  x += block / chunks * rows_of_x.batch_stride;
  y += block / chunks * rows_of_y.batch_stride;

  float sums[RX * kRows] = {};
  for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
    float a[RX], b[kRows];  // rows past the end repeat the last one; their sums are not written
#pragma unroll
    for (int i = 0; i < RX; ++i) a[i] = x[min(first_x + i, problem.rows_x - 1) * rows_of_x.row_stride + t];
#pragma unroll
    for (int k = 0; k < kRows; ++k) b[k] = y[min(first_y + k, problem.rows_y - 1) * rows_of_y.row_stride + t];
#pragma unroll
    for (int i = 0; i < RX; ++i) {
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const float difference = a[i] - b[k];
        sums[i * kRows + k] += P == 1 ? fabsf(difference) : difference * difference;
      }
    }
  }

  __shared__ float of_warps[kWarps][RX * kRows];
  const int first = add_over_warp<RX * kRows>(sums);
#pragma unroll
  for (int n = 0; n < (RX * kRows + 31) / 32; ++n) of_warps[threadIdx.x / 32][first + n] = sums[n];
  __syncthreads();
  const int64_t i = first_x + threadIdx.x / kRows, k = first_y + threadIdx.x % kRows;
  if (threadIdx.x < RX * kRows && i < problem.rows_x && k < problem.rows_y) {
    float sum = 0;
    for (int warp = 0; warp < kWarps; ++warp) sum += of_warps[warp][threadIdx.x];
    partial[block * problem.pairs() + i * problem.rows_y + k] = sum;
    if (problem.symmetric) partial[block * problem.pairs() + k * problem.rows_y + i] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    add_chunks(const float* partial, int64_t chunks, int64_t pairs, int64_t count, float* result) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;  // batch * pairs + pair
  if (n >= count) return;
  double sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += partial[(n / pairs * chunks + c) * pairs + n % pairs];
  result[n] = static_cast<float>(sum);
}

// --- backward ---

// weight * d|difference|^P / d difference, without the factor 2 of P = 2; as in torch, the sign is 0 at a tie and at
// NaN, and the product with it keeps a NaN weight.
template <int P>
__device__ float slope(float difference, float weight) {
  if constexpr (P == 2) return weight * difference;
  return (fabsf(difference) > 0 ? copysignf(1.0f, difference) : 0.0f) * weight;
}

// One input as the kernel sees it within a batch; the weight of its row i and row k of the other is weights[i *
// weight_step + ...].
template <typename scalar_t>
struct Matrix {
  const scalar_t* values;
  int64_t stride, rows, weight_step;
};

// The gradient of R rows of `of`, from row `first` on, at one column per thread.
template <int P, int R, typename scalar_t>
__device__ void row_gradients(Matrix<scalar_t> of, Matrix<scalar_t> others, const float* weights, int64_t first,
                              int64_t column, int64_t features, scalar_t* gradient, int64_t gradient_stride) {
  __shared__ float staged[kStaged][R];
  const int64_t readable = min(column, features - 1);
  float value[R], sum[R] = {};
#pragma unroll
  for (int i = 0; i < R; ++i) value[i] = of.values[min(first + i, of.rows - 1) * of.stride + readable];
  for (int64_t begin = 0; begin < others.rows; begin += kStaged) {
    const int count = static_cast<int>(min(others.rows - begin, static_cast<int64_t>(kStaged)));
    __syncthreads();
    for (int n = threadIdx.x; n < count * R; n += kThreads) {
      const int64_t i = min(first + n % R, of.rows - 1), k = begin + n / R;
      staged[n / R][n % R] = P * weights[i * of.weight_step + k * others.weight_step];
    }
    __syncthreads();
    for (int k = 0; k < count; ++k) {
      const float other = others.values[(begin + k) * others.stride + readable];
#pragma unroll
      for (int i = 0; i < R; ++i) sum[i] += slope<P>(value[i] - other, staged[k][i]);
    }
  }
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (first + i < of.rows && column < features)
      gradient[(first + i) * gradient_stride + column] = static_cast<scalar_t>(sum[i]);
  }
}

// Row tiles of a wanted gradient; an input of one row (an anchor with its own negatives) needs no kRows registers.
__host__ __device__ constexpr int64_t row_tiles(bool wanted, int64_t rows) {
  return wanted ? divide_up(rows, kRows) : 0;
}

template <typename scalar_t, int P>
__global__ void __launch_bounds__(kThreads)
    gradients(Side<scalar_t> x, Side<scalar_t> y, const float* weights, Problem problem) {
  const int64_t tiles_x = row_tiles(x.gradient, problem.rows_x), tiles_y = row_tiles(y.gradient, problem.rows_y);
  const int64_t column_tiles = divide_up(problem.features, kThreads);
  const int64_t tile = blockIdx.x % (tiles_x + tiles_y), rest = blockIdx.x / (tiles_x + tiles_y);
  const int64_t column = rest % column_tiles * kThreads + threadIdx.x, batch = rest / column_tiles;
  const Matrix<scalar_t> in_x{x.values + batch * x.rows.batch_stride, x.rows.row_stride, problem.rows_x,
                              problem.rows_y};
  const Matrix<scalar_t> in_y{y.values + batch * y.rows.batch_stride, y.rows.row_stride, problem.rows_y, 1};
  weights += batch * problem.pairs();
  if (tile >= tiles_x) {
    scalar_t* gradient = y.gradient + batch * y.gradient_rows.batch_stride;
    const int64_t first = (tile - tiles_x) * kRows;
    row_gradients<P, kRows>(in_y, in_x, weights, first, column, problem.features, gradient, y.gradient_rows.row_stride);
  } else {
    scalar_t* gradient = x.gradient + batch * x.gradient_rows.batch_stride;
    if (problem.rows_x == 1) {
      row_gradients<P, 1>(in_x, in_y, weights, 0, column, problem.features, gradient, x.gradient_rows.row_stride);
    } else {
      row_gradients<P, kRows>(in_x, in_y, weights, tile * kRows, column, problem.features, gradient,
                              x.gradient_rows.row_stride);
    }
  }
}

// --- launches ---

template <typename scalar_t, int P>
void launch_distances(const Tensor& x, Rows rows_of_x, const Tensor& y, Rows rows_of_y, const Problem& problem,
                      Tensor& result) {
  const int64_t chunk =
      std::max(kShortestChunk, divide_up(divide_up(problem.features, kMostChunks), kThreads) * kThreads);
  const int64_t chunks = divide_up(problem.features, chunk), count = problem.batches * problem.pairs();
  const Tensor partial = torch::stable::new_empty(result, {chunks * count});
  const bool single = problem.rows_x == 1;
  const Tiles tiles{divide_up(problem.rows_x, single ? 1 : kRows), divide_up(problem.rows_y, kRows), problem.symmetric};
  const auto kernel = single ? partial_distances<scalar_t, P, 1> : partial_distances<scalar_t, P, kRows>;
  const auto stream = current_stream(x);
  launch(stream, problem.batches * chunks * tiles.count(), kThreads, 0, kernel, const_data<scalar_t>(x), rows_of_x,
         const_data<scalar_t>(y), rows_of_y, problem, chunk, tiles, data<float>(partial));
  launch(stream, divide_up(count, kThreads), kThreads, 0, add_chunks, const_data<float>(partial), chunks, problem.pairs(), count,
         data<float>(result));
}

template <typename scalar_t, int P>
void launch_gradients(const Side<scalar_t>& x, const Side<scalar_t>& y, const Tensor& weight, const Problem& problem) {
  const int64_t tiles = row_tiles(x.gradient, problem.rows_x) + row_tiles(y.gradient, problem.rows_y);
  const int64_t blocks = problem.batches * divide_up(problem.features, kThreads) * tiles;
  launch(current_stream(weight), blocks, kThreads, 0, gradients<scalar_t, P>, x, y, const_data<float>(weight), problem);
}

}  // namespace

// --- operators ---

Tensor distance(const Tensor& x, const Tensor& y, int64_t p, Pairing pairing) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Problem problem = pairing.problem(x, y, p);
  const FlatPair flat(x, 1, y, pairing.first_y);
  Tensor result = empty_distances(x, y, pairing);
  for_dtype<float, BFloat16, Half>(x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto run = p == 1 ? launch_distances<scalar_t, 1> : launch_distances<scalar_t, 2>;
    run(flat.x, pairing.rows_x(flat.x), flat.y, pairing.rows_y(flat.y), problem, result);
  });
  return result;
}

std::tuple<Tensor, Tensor> distance_backward(const Tensor& grad, const Tensor& x, const Tensor& y, int64_t p,
                                             bool need_x, bool need_y, Pairing pairing) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Problem problem = pairing.problem(x, y, p);
  const FlatPair flat(x, 1, y, pairing.first_y);
  const Tensor weight = weights(grad, x, problem);
  Gradient grad_x(need_x, x, flat.x, 1), grad_y(need_y, y, flat.y, pairing.first_y);
  for_dtype<float, BFloat16, Half>(x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    Side<scalar_t> side_x{const_data<scalar_t>(flat.x), pairing.rows_x(flat.x)};
    Side<scalar_t> side_y{const_data<scalar_t>(flat.y), pairing.rows_y(flat.y)};
    if (need_x) side_x.write_to(grad_x, pairing.rows_x(grad_x.rows));
    if (need_y) side_y.write_to(grad_y, pairing.rows_y(grad_y.rows));
    const auto run = p == 1 ? launch_gradients<scalar_t, 1> : launch_gradients<scalar_t, 2>;
    run(side_x, side_y, weight, problem);
  });
  return {grad_x.finish(), grad_y.finish()};
}

}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CUDA, m) {
  kdops::implement_contrast(m);
}
