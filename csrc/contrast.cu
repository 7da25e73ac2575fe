// Contrastive distances on CUDA: each value is converted once for all pairs that it is in, partial sums are added in a
// fixed order, no atomics.
//
// Forward: the warps are independent. Each has the pairs of 8 x 8 rows (of few rows, of one) in registers and walks down a chunk of the
// features; its sums are added by shuffles, those of the chunks by a second kernel. The warps of a block read the same
// features at about the same time and find each other's rows in the L1 cache. Backward: a thread holds up to 16 rows of
// one input at a few neighbouring features and walks over all rows of the other, of which it can write the gradient too.
#include <torch/csrc/stable/accelerator.h>

#include "common/launch.h"
#include "contrast.h"

namespace kdops {
namespace {

constexpr int kWarps = 16;        // of a forward block
constexpr int kRows = 8;          // of each input in a forward thread's registers
constexpr int64_t kLongest = 2048;  // sums of a forward thread, which bounds their rounding error
constexpr int kThreads = 256;     // of the other kernels
constexpr int kHeld = 16;         // rows in a backward thread's registers
constexpr int kStaged = 64;       // rows whose weights are in shared memory at a time

__host__ __device__ constexpr int64_t divide_up(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

// Count neighbouring values of a row, read at once.
template <typename scalar_t, int Count>
struct alignas(sizeof(scalar_t) * Count) Values {
  scalar_t at[Count];

  __device__ float operator[](int i) const {
    return static_cast<float>(at[i]);
  }
};

template <int Bytes>
using Word = std::conditional_t<Bytes == 2, unsigned short, std::conditional_t<Bytes == 4, unsigned, uint2>>;

// Through the read-only path: no kernel here writes what it reads.
template <int Count, typename scalar_t>
__device__ Values<scalar_t, Count> read(const scalar_t* from) {
  const auto word = __ldg(reinterpret_cast<const Word<sizeof(scalar_t) * Count>*>(from));
  return *reinterpret_cast<const Values<scalar_t, Count>*>(&word);
}

template <typename scalar_t, int Count>
__device__ void write(scalar_t* to, const float (&values)[Count]) {
  Values<scalar_t, Count> narrow;
#pragma unroll
  for (int n = 0; n < Count; ++n) narrow.at[n] = static_cast<scalar_t>(values[n]);
  using Whole = Word<sizeof(narrow)>;
  *reinterpret_cast<Whole*>(to) = *reinterpret_cast<const Whole*>(&narrow);
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

// partial[batch][chunk][i][k]: distance of x_i and y_k over the features of the chunk. A warp computes RX x RY of them;
// of symmetric ones it writes both places.
template <typename scalar_t, int P, int RX, int RY, int Count>
__global__ void __launch_bounds__(32 * kWarps)
    partial_distances(const scalar_t* x, Rows rows_of_x, const scalar_t* y, Rows rows_of_y, Problem problem,
                      int64_t chunk, int64_t chunks, Tiles tiles, float* partial) {
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t tile = warp % tiles.count(), part = warp / tiles.count();  // of batch * chunks + chunk
  if (part >= problem.batches * chunks) return;
  const int64_t own_x = tiles.x(tile) * RX, own_y = tiles.y(tile) * RY;
  // A last tile that is not full begins earlier, so that rows are a fixed step apart; what others write it leaves out.
  const int64_t first_x = min(own_x, problem.rows_x - RX), first_y = min(own_y, problem.rows_y - RY);
  const int lane = threadIdx.x % 32;
  const int64_t begin = part % chunks * chunk + lane * Count, end = min(part % chunks * chunk + chunk, problem.features);
  x += part / chunks * rows_of_x.batch_stride + first_x * rows_of_x.row_stride;
  y += part / chunks * rows_of_y.batch_stride + first_y * rows_of_y.row_stride;

  float sums[RX * RY] = {};
  for (int64_t t = begin; t < end; t += 32 * Count) {
    const scalar_t *from_x = x + t, *from_y = y + t;
    int64_t step_x = rows_of_x.row_stride, step_y = rows_of_y.row_stride;
    asm volatile("" : "+l"(step_x), "+l"(step_y));  // a pointer for every row, kept from step to step, fills the registers
    Values<scalar_t, Count> a[RX], b[RY];
#pragma unroll
    for (int i = 0; i < RX; ++i, from_x += step_x) a[i] = read<Count>(from_x);
#pragma unroll
    for (int k = 0; k < RY; ++k, from_y += step_y) b[k] = read<Count>(from_y);
#pragma unroll
    for (int n = 0; n < Count; ++n) {
#pragma unroll
      for (int i = 0; i < RX; ++i) {
#pragma unroll
        for (int k = 0; k < RY; ++k) {
          const float difference = a[i][n] - b[k][n];
          sums[i * RY + k] += P == 1 ? fabsf(difference) : difference * difference;
        }
      }
    }
  }

  constexpr int mine = (RX * RY + 31) / 32;
  const int first = add_over_warp<RX * RY>(sums);
#pragma unroll
  for (int n = first; n < first + mine; ++n) {
    const int64_t i = first_x + n / RY, k = first_y + n % RY;
    if (i < own_x || i >= problem.rows_x || k < own_y || k >= problem.rows_y) continue;
    partial[part * problem.pairs() + i * problem.rows_y + k] = sums[n - first];
    if (problem.symmetric) partial[part * problem.pairs() + k * problem.rows_y + i] = sums[n - first];
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

// d|a - b|^P / da, without the factor 2 of P = 2. The sign is 0 at a tie and at NaN, as in torch: two comparisons that
// give 1 or 0.
template <int P>
__device__ float slope(float a, float b) {
  if constexpr (P == 2) return a - b;
  float above, below;
  asm("set.gt.f32.f32 %0, %1, %2;" : "=f"(above) : "f"(a), "f"(b));
  asm("set.lt.f32.f32 %0, %1, %2;" : "=f"(below) : "f"(a), "f"(b));
  return above - below;
}

// One input as the kernel sees it; the weight of its row i and row k of the other is weights[i * weight_step + ...].
template <typename scalar_t>
struct Operand {
  Side<scalar_t> side;
  int64_t rows, weight_step;
};

// The gradient of R rows of `held` at Count neighbouring features per thread, and, if Both, that of all rows of
// `streamed`, of which the R rows are then all there are.
template <typename scalar_t, int P, int R, int Count, bool Both>
__global__ void __launch_bounds__(kThreads, 2)
    gradients(Operand<scalar_t> held, Operand<scalar_t> streamed, const float* weights, Problem problem) {
  constexpr int ahead = 4;  // rows read before the first is used
  __shared__ __align__(16) float staged[kStaged][R];
  const int64_t tiles = divide_up(held.rows, R), features = problem.features;
  const int64_t column_tiles = divide_up(features, kThreads * Count);
  const int64_t first = blockIdx.x % tiles * R, rest = blockIdx.x / tiles, batch = rest / column_tiles;
  const int64_t column = (rest % column_tiles * kThreads + threadIdx.x) * Count;
  const int rows = static_cast<int>(min(int64_t{R}, held.rows - first));
  const bool inside = column < features;
  const int64_t readable = inside ? column : 0;
  const scalar_t* others = streamed.side.values + batch * streamed.side.rows.batch_stride + readable;
  weights += batch * problem.pairs() + first * held.weight_step;

  float value[R][Count], sum[R][Count] = {};
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int64_t row = first + min(i, rows - 1);
    const auto read_values = read<Count>(held.side.values + batch * held.side.rows.batch_stride +
                                         row * held.side.rows.row_stride + readable);
#pragma unroll
    for (int n = 0; n < Count; ++n) value[i][n] = read_values[n];
  }
  for (int64_t begin = 0; begin < streamed.rows; begin += kStaged) {
    const int count = static_cast<int>(min(streamed.rows - begin, int64_t{kStaged}));
    __syncthreads();
    for (int n = threadIdx.x; n < count * R; n += kThreads) {
      const int i = n % R;
      staged[n / R][i] = i < rows ? P * weights[i * held.weight_step + (begin + n / R) * streamed.weight_step] : 0.0f;
    }
    __syncthreads();
    for (int block = 0; block < count; block += ahead) {
      Values<scalar_t, Count> other[ahead];
#pragma unroll
      for (int j = 0; j < ahead; ++j)
        other[j] = read<Count>(others + (begin + min(block + j, count - 1)) * streamed.side.rows.row_stride);
#pragma unroll
      for (int j = 0; j < ahead; ++j) {
        if (block + j >= count) break;
        float total[Count] = {};
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const float weight = staged[block + j][i];
#pragma unroll
          for (int n = 0; n < Count; ++n) {
            const float factor = slope<P>(value[i][n], other[j][n]);
            sum[i][n] += weight * factor;
            if (Both && (P == 1 || i < rows)) total[n] -= weight * factor;  // 0 times an infinite difference is NaN
          }
        }
        if (Both && inside) {
          write(streamed.side.gradient + batch * streamed.side.gradient_rows.batch_stride +
                    (begin + block + j) * streamed.side.gradient_rows.row_stride + column,
                total);
        }
      }
    }
  }
  if (held.side.gradient == nullptr || !inside) return;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    if (i >= rows) break;
    write(held.side.gradient + batch * held.side.gradient_rows.batch_stride +
              (first + i) * held.side.gradient_rows.row_stride + column,
          sum[i]);
  }
}

// --- launches ---

// Whether Count neighbouring values can be read or written at once, at every row.
template <int Count, typename scalar_t>
bool aligned(const scalar_t* values, const Rows& rows, const Problem& problem) {
  return reinterpret_cast<uintptr_t>(values) % (sizeof(scalar_t) * Count) == 0 && problem.features % Count == 0 &&
         rows.batch_stride % Count == 0 && rows.row_stride % Count == 0;
}

// Calls run with Count as a constant where `possible`, else with 1.
template <int Count, typename Run>
void with_count(bool possible, const Run& run) {
  if (possible) return run(std::integral_constant<int, Count>{});
  run(std::integral_constant<int, 1>{});
}

// Rows of an input in a forward tile: few are read one by one.
int64_t tile_rows(int64_t rows) {
  return rows < kRows ? 1 : kRows;
}

template <typename scalar_t, int P>
void launch_distances(const Tensor& x, Rows rows_of_x, const Tensor& y, Rows rows_of_y, const Problem& problem,
                      Tensor& result) {
  // Four of the others spill: float16 takes more registers to convert, and squares more than absolute values.
  constexpr int vector = std::is_same_v<scalar_t, BFloat16> && P == 1 ? 4 : 2;
  const int64_t in_x = tile_rows(problem.rows_x), in_y = tile_rows(problem.rows_y);
  const Tiles tiles{divide_up(problem.rows_x, in_x), divide_up(problem.rows_y, in_y), problem.symmetric};
  // As many chunks as fill the device a whole number of times, so that no multiprocessor waits for the last ones.
  const int64_t fill = divide_up(multiprocessors(x) * kWarps, std::max(problem.batches * tiles.count(), int64_t{1}));
  const int64_t times = divide_up(problem.features, fill * kLongest * 32);
  const int64_t words = divide_up(problem.features, std::max(fill * times, int64_t{1}) * 32 * vector);
  const int64_t chunk = std::max(words, int64_t{1}) * 32 * vector;
  const int64_t chunks = divide_up(problem.features, chunk), count = problem.batches * problem.pairs();
  const Tensor partial = torch::stable::new_empty(result, {chunks * count});
  const auto stream = current_stream(x);
  const auto *from_x = const_data<scalar_t>(x), *from_y = const_data<scalar_t>(y);
  with_count<vector>(
      aligned<vector>(from_x, rows_of_x, problem) && aligned<vector>(from_y, rows_of_y, problem), [&](auto vectors) {
        const auto kernel = in_x == 1 ? in_y == 1 ? partial_distances<scalar_t, P, 1, 1, vectors>
                                                  : partial_distances<scalar_t, P, 1, kRows, vectors>
                            : in_y == 1 ? partial_distances<scalar_t, P, kRows, 1, vectors>
                                        : partial_distances<scalar_t, P, kRows, kRows, vectors>;
        launch(stream, divide_up(problem.batches * chunks * tiles.count(), kWarps), 32 * kWarps, 0, kernel, from_x,
               rows_of_x, from_y, rows_of_y, problem, chunk, chunks, tiles, data<float>(partial));
      });
  launch(stream, divide_up(count, kThreads), kThreads, 0, add_chunks, const_data<float>(partial), chunks,
         problem.pairs(), count, data<float>(result));
}

// One launch for both gradients where a thread can hold all rows of one input.
template <typename scalar_t, int P>
void launch_gradients(const Side<scalar_t>& x, const Side<scalar_t>& y, const Tensor& weight, const Problem& problem) {
  constexpr int vector = 2;
  const Operand<scalar_t> of_x{x, problem.rows_x, problem.rows_y}, of_y{y, problem.rows_y, 1};
  bool vectors = true;
  for (const auto& side : {x, y}) {
    vectors = vectors && aligned<vector>(side.values, side.rows, problem) &&
              aligned<vector>(side.gradient, side.gradient_rows, problem);
  }
  const auto run = [&](const Operand<scalar_t>& held, const Operand<scalar_t>& streamed, auto both) {
    with_count<vector>(vectors, [&](auto count) {
      const auto with_rows = [&](auto rows) {
        const int64_t tiles = divide_up(problem.features, kThreads * count) * divide_up(held.rows, rows);
        launch(current_stream(weight), problem.batches * tiles, kThreads, 0, gradients<scalar_t, P, rows, count, both>,
               held, streamed, const_data<float>(weight), problem);
      };
      if (held.rows == 1) return with_rows(std::integral_constant<int, 1>{});
      if (held.rows <= 4) return with_rows(std::integral_constant<int, 4>{});
      with_rows(std::integral_constant<int, kHeld>{});
    });
  };
  const auto fits = [](int64_t rows) { return rows >= 1 && rows <= kHeld; };
  if (x.gradient && y.gradient && fits(problem.rows_x)) return run(of_x, of_y, std::true_type{});
  if (x.gradient && y.gradient && fits(problem.rows_y)) return run(of_y, of_x, std::true_type{});
  if (x.gradient) run(of_x, of_y, std::false_type{});
  if (y.gradient) run(of_y, of_x, std::false_type{});
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
