// Contrastive distances on CUDA: each value is converted once for all pairs that it is in, partial sums are added in a
// fixed order, no atomics.
//
// Forward: the warps are independent. Each has the pairs of 8 x 8 rows (of few rows, of one) in registers and walks down a
// share of the features; its sums are added by shuffles, those of the shares by a second kernel. The warps of a block read
// the same features at about the same time and find each other's rows in the L1 cache. Backward: a thread holds up to 16
// rows of one input at a few neighbouring features and walks over all rows of the other, of which it can write the
// gradient too; for L1 distances of bfloat16 rows tensor cores add up signs instead (contrast_signs.h). All read ahead into
// shared memory: without, what is on its way from memory is too little to keep it busy.

#include "contrast_distances.h"
#include "contrast_signs.h"

namespace kdops {
namespace {

constexpr int kHeld = 16;         // rows in a backward thread's registers
constexpr int kStaged = 64;       // rows whose weights are in shared memory at a time
constexpr int kGroup = kHeld;     // rows whose slopes are added before they are centred: as many whichever input is held
constexpr int kRead = 8;          // rows that are read together

// What a difference a - b adds to a gradient, times its weight: for P = 2 the difference (the factor 2 is in the weight), for
// P = 1 whether it is above 0: 1, or 1/2 at a tie, or 0. The sign, 2 `above` - 1, takes one instruction so, and what it
// lacks is the same for all features (`centred`). Differences below 2^-128 count in part.
template <int P>
__device__ float slope(float difference) {
  return P == 2 ? difference : __saturatef(fmaf(difference, 0x1p127f, 0.5f));
}

// The same where numbers may not be finite: as in torch, the sign of NaN is 0.
template <int P>
__device__ float any_slope(float difference) {
  return P == 1 && isnan(difference) ? 0.5f : slope<P>(difference);
}

// Half of the gradient for P = 1, all of it for P = 2, from weighted slopes and the sum of their weights. At ties alone it
// is exactly 0 if the weights were added in the same order as the slopes.
template <int P>
__device__ float centred(float slopes, float weights) {
  return P == 2 ? slopes : slopes - 0.5f * weights;
}

// Sums of the weights that are in shared memory: of each row, and of each group of rows with each row of the tile.
template <int R>
__device__ void add_weights(const float (&staged)[kStaged][R], float (&of_row)[kStaged],
                            float (&of_group)[kStaged / kGroup][R]) {
  for (int j = threadIdx.x; j < kStaged; j += kThreads) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < R; ++i) sum += staged[j][i];
    of_row[j] = sum;
  }
  for (int n = threadIdx.x; n < kStaged / kGroup * R; n += kThreads) {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) sum += staged[n / R * kGroup + j][n % R];
    of_group[n / R][n % R] = sum;
  }
}

// One input as the kernel sees it; the weight of its row i and row k of the other is weights[i * weight_step + ...].
template <typename scalar_t>
struct Operand {
  Side<scalar_t> side;
  int64_t rows, weight_step;
  float sign;  // 1 of x, -1 of y: differences are x - y whichever is held, so that their slopes are the same bits
};

// The gradient of R rows of `held` at Count neighbouring features per thread, and, if Both, that of all rows of
// `streamed`, of which the R rows are then all there are.
template <typename scalar_t, int P, int R, int Count, bool Both>
__global__ void __launch_bounds__(kThreads, 2)
    gradients(Operand<scalar_t> held, Operand<scalar_t> streamed, const float* weights, Problem problem) {
  constexpr float whole = P == 1 ? 2.0f : 1.0f;  // of what `centred` gives
  __shared__ __align__(16) float staged[kStaged][R], of_row[kStaged], of_group[kStaged / kGroup][R];
  // Of the rows at hand and of the next ones; each thread's own.
  __shared__ __align__(16) Values<scalar_t, Count> words[2 * kRead][kThreads];
  const int64_t tiles = divide_up(held.rows, R), features = problem.features;
  const int64_t column_tiles = divide_up(features, kThreads * Count);
  const int64_t first = blockIdx.x % tiles * R, rest = blockIdx.x / tiles, batch = rest / column_tiles;
  const int64_t column = (rest % column_tiles * kThreads + threadIdx.x) * Count;
  const int rows = static_cast<int>(min(int64_t{R}, held.rows - first));
  const bool inside = column < features;
  const int64_t readable = inside ? column : 0;
  const scalar_t* from = streamed.side.values + batch * streamed.side.rows.batch_stride + readable;
  int unread = static_cast<int>(streamed.rows);
  scalar_t* to = nullptr;
  if constexpr (Both) to = streamed.side.gradient + batch * streamed.side.gradient_rows.batch_stride + readable;
  scalar_t* result = nullptr;
  if (held.side.gradient != nullptr && inside)
    result = held.side.gradient + batch * held.side.gradient_rows.batch_stride +
             first * held.side.gradient_rows.row_stride + column;
  weights += batch * problem.pairs() + first * held.weight_step;

  float value[R][Count], sum[R][Count] = {};
  bool finite = true;  // numbers of this thread
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int64_t row = first + min(i, rows - 1);
    const auto read_values = read<Count>(held.side.values + batch * held.side.rows.batch_stride +
                                         row * held.side.rows.row_stride + readable);
#pragma unroll
    for (int n = 0; n < Count; ++n) {
      value[i][n] = held.sign * read_values[n];
      finite = finite && isfinite(value[i][n]);
    }
  }
  // Row j of `streamed` against all rows of the tile.
  const auto add = [&](int j, const float(&other)[Count], const auto& slope_of) {
    float total[Count] = {};
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const float weight = staged[j][i];
#pragma unroll
      for (int n = 0; n < Count; ++n) {
        const float factor = slope_of(value[i][n] - other[n]);
        sum[i][n] = fmaf(weight, factor, sum[i][n]);
        if (Both && (P == 1 || i < rows)) total[n] = fmaf(weight, factor, total[n]);  // 0 times infinity is NaN
      }
    }
    if constexpr (Both) {
#pragma unroll
      for (int n = 0; n < Count; ++n) total[n] = streamed.sign * whole * centred<P>(total[n], of_row[j]);
      if (inside) write(to, total);
      to += streamed.side.gradient_rows.row_stride;
    }
  };
  // The next rows are read while those at hand are used.
  const auto read_next = [&](int half) {
#pragma unroll 4
    for (int j = 0; j < kRead && unread > 0; ++j, --unread, from += streamed.side.rows.row_stride)
      read_ahead<Count>(&words[half * kRead + j][threadIdx.x], from);
    end_group();
  };
  read_next(0);
  for (int64_t begin = 0; begin < streamed.rows; begin += kStaged) {
    const int count = static_cast<int>(min(streamed.rows - begin, int64_t{kStaged}));
    __syncthreads();
    for (int n = threadIdx.x; n < kStaged * R; n += kThreads) {
      const int i = n % R, j = n / R;
      const bool used = i < rows && j < count;
      staged[j][i] = used ? P * weights[i * held.weight_step + (begin + j) * streamed.weight_step] : 0.0f;
    }
    __syncthreads();
    if constexpr (P == 1) {
      add_weights<R>(staged, of_row, of_group);
      __syncthreads();
    }
    for (int first_row = 0; first_row < count; first_row += kRead) {
      await_groups<0>();
      read_next((first_row / kRead + 1) % 2);
      const int end = min(first_row + kRead, count);
#pragma unroll P == 1 ? 4 : 1  // with more, squares spill
      for (int j = first_row; j < end; ++j) {
        const auto word = words[j % (2 * kRead)][threadIdx.x];
        float other[Count];
        bool usual = finite;
#pragma unroll
        for (int n = 0; n < Count; ++n) {
          other[n] = held.sign * word[n];
          usual = usual && isfinite(other[n]);
        }
        if (P == 2 || usual)
          add(j, other, [](float difference) { return slope<P>(difference); });
        else
          add(j, other, [](float difference) { return any_slope<P>(difference); });
      }
      if (P == 1 && (end % kGroup == 0 || end == count)) {
#pragma unroll
        for (int i = 0; i < R; ++i) {
#pragma unroll
          for (int n = 0; n < Count; ++n) sum[i][n] = centred<P>(sum[i][n], of_group[first_row / kGroup][i]);
        }
      }
    }
  }
  await_groups<0>();
  if (result == nullptr) return;
#pragma unroll
  for (int i = 0; i < R; ++i, result += held.side.gradient_rows.row_stride) {
    if (i >= rows) break;
#pragma unroll
    for (int n = 0; n < Count; ++n) sum[i][n] *= held.sign * whole;
    write(result, sum[i]);
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
  constexpr int vector = 8 / sizeof(scalar_t);
  STD_TORCH_CHECK(std::max(rows_of_x.row_stride, rows_of_y.row_stride) <= int64_t{UINT32_MAX},
                  "kdops: rows of x or y lie more than ", UINT32_MAX, " numbers apart, which is more than CUDA takes.");
  const int64_t in_x = tile_rows(problem.rows_x), in_y = tile_rows(problem.rows_y);
  const Tiles tiles{divide_up(problem.rows_x, in_x), divide_up(problem.rows_y, in_y), problem.symmetric};
  // As many shares as fill the device a whole number of times, so that no multiprocessor waits for the last ones.
  const int64_t fill = divide_up(multiprocessors(x) * 2 * kWarps, std::max(problem.batches * tiles.count(), int64_t{1}));
  const int64_t times = divide_up(problem.features, fill * kLongest * 32);
  const int64_t shares = std::min(fill * times, divide_up(problem.features, 32 * vector));
  const int64_t count = problem.batches * problem.pairs();
  const Tensor partial = torch::stable::new_empty(result, {shares * count});
  const auto stream = current_stream(x);
  const auto *from_x = const_data<scalar_t>(x), *from_y = const_data<scalar_t>(y);
  with_count<vector>(
      aligned<vector>(from_x, rows_of_x, problem) && aligned<vector>(from_y, rows_of_y, problem), [&](auto vectors) {
        const auto kernel = in_x == 1 ? in_y == 1 ? partial_distances<scalar_t, P, 1, 1, vectors>
                                                  : partial_distances<scalar_t, P, 1, kRows, vectors>
                            : in_y == 1 ? partial_distances<scalar_t, P, kRows, 1, vectors>
                                        : partial_distances<scalar_t, P, kRows, kRows, vectors>;
        const auto shared = static_cast<size_t>(kAhead * (in_x + in_y) * 32 * kWarps) * sizeof(scalar_t) * vectors;
        launch(stream, divide_up(problem.batches * shares * tiles.count(), kWarps), 32 * kWarps, shared, kernel, from_x,
               rows_of_x, from_y, rows_of_y, problem, shares, tiles, data<float>(partial));
      });
  launch(stream, divide_up(count, kThreads), kThreads, 0, add_shares, const_data<float>(partial), shares,
         problem.pairs(), count, data<float>(result));
}

// Whether gradients of L1 distances are taken on tensor cores.
bool on_tensor_cores(const Side<BFloat16>& x, const Side<BFloat16>& y, const Problem& problem) {
  constexpr int64_t kFewRows = 4;  // of which a tile would be empty for the most part
  constexpr int vector = 8;
  bool fits = architecture(sign_gradients<true, true>) >= 90 && std::min(problem.rows_x, problem.rows_y) > kFewRows;
  for (const auto& side : {x, y}) {
    fits = fits && aligned<vector>(side.values, side.rows, problem) && aligned<vector>(side.gradient, side.gradient_rows, problem);
  }
  return fits;
}

// One launch for both gradients where a thread can hold all rows of one input.
template <typename scalar_t, int P>
void launch_gradients(const Side<scalar_t>& x, const Side<scalar_t>& y, const Tensor& weight, const Problem& problem) {
  if constexpr (std::is_same_v<scalar_t, BFloat16> && P == 1) {
    if (on_tensor_cores(x, y, problem)) return launch_sign_gradients(x, y, weight, problem);
  }
  constexpr int vector = 2;
  const Operand<scalar_t> of_x{x, problem.rows_x, problem.rows_y, 1}, of_y{y, problem.rows_y, 1, -1};
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
  const OnDevice guard(x);
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
  const OnDevice guard(x);
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
