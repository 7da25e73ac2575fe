// Gradients of L1 distances of bfloat16 rows on tensor cores (sm_90), for csrc/contrast.cu.
//
// A gradient is a sum of weights times signs, and the signs 1, 0 and -1 are exact in bfloat16: two comparisons and a
// difference make two of them, and tensor cores add them up in float32. Each weight is split in two bfloat16 numbers, of 16
// bits together. Signs lie 16 features x 8 streamed rows at a time, of two held rows side by side. They are multiplied with
//   columns of those rows' weights, one for each part of each row: the gradients of the held rows, and
//   two diagonal matrices of the same weights: what the held rows add to the gradients of the streamed rows.
#pragma once

#include "common/fragments.h"
#include "contrast_distances.h"

namespace kdops {
namespace {

constexpr int kSignRows = 16;         // held rows, features of a warp and streamed rows of a step
constexpr int kSignWarps = 4;         // of a block
constexpr int kSignThreads = 32 * kSignWarps;
constexpr int kSignBlocks = 3;        // of a multiprocessor
constexpr int kSignAhead = 4;         // steps that are in shared memory or on their way, a power of two
constexpr int kSignSteps = 4;         // whose weights are in shared memory at a time

__device__ inline unsigned bfloat16_bits(float value) {
  return bits_as<unsigned short>(static_cast<BFloat16>(value));
}

// The weights of all held rows and of the streamed rows of kSignSteps steps, as lanes read them: of each half of a step's rows
// and two held rows at a time.
struct SignWeights {
  uint2 diagonal[kSignSteps][kSignRows][8];    // of row j the first parts of both held rows, then the second ones
  uint2 columns[kSignSteps][kSignRows][4][4];  // of each part and lane % 4: a column of one held row is 0 for the other

  __device__ void clear() {
    for (int n = threadIdx.x; n < kSignSteps * kSignRows * 16; n += kSignThreads) (&columns[0][0][0][0])[n] = {};
  }

  __device__ void put(int step, int held, int row, float weight) {
    const unsigned rounded = bfloat16_bits(weight);
    const float rest = weight - bits_as<float>(rounded << 16);
    const unsigned parts[2] = {rounded, isfinite(rest) ? bfloat16_bits(rest) : 0};
    const int j = row % 8, two = held / 2 * 2 + row / 8, which = held % 2;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      reinterpret_cast<unsigned short*>(&diagonal[step][two][j])[2 * part + which] = static_cast<unsigned short>(parts[part]);
      reinterpret_cast<unsigned short*>(&columns[step][two][2 * which + part][j / 2])[2 * which + j % 2] =
          static_cast<unsigned short>(parts[part]);
    }
  }
};

// Which bytes of a word of `diagonal` a lane needs of each held row. Its pair of numbers of a diagonal matrix is of column lane / 4,
// rows lane % 4 * 2 and the next: one of them is the column's own in eight of the lanes, elsewhere both are 0.
struct DiagonalBytes {
  unsigned first, second;

  __device__ explicit DiagonalBytes(int lane) {
    const bool own = lane / 8 == lane % 4, upper = lane / 4 % 2 == 1;
    first = !own ? 0x4444 : upper ? 0x1044 : 0x4410;
    second = !own ? 0x4444 : upper ? 0x3244 : 0x4432;
  }
};

// One input of the kernel below.
struct SignSide {
  Side<BFloat16> side;
  int64_t rows, weight_step;
};

// Of up to 16 rows of `held` (of all of them, if Streamed) and all rows of `streamed`; blocks take tiles of features in turn,
// `shares` of them a tile of rows.
template <bool Held, bool Streamed>
__global__ void __launch_bounds__(kSignThreads, kSignBlocks)
    sign_gradients(SignSide held, SignSide streamed, const float* weights, Problem problem, int shares) {
  __shared__ SignWeights table;
  __shared__ uint4 words[kSignWarps][kSignAhead + 1][32];  // of each warp: steps that were read, and results to be written
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 2, half = lane % 2;
  const auto place = [](int row, int half) { return 2 * row + (half ^ (row >> 2 & 1)); };  // no two of 8 rows in one bank
  const DiagonalBytes bytes(lane);
  const int own = place(row, half), turned = place(lane / 16 * 8 + lane % 8, lane / 8 % 2);
  const int share = static_cast<int>(blockIdx.x) % shares, rest = static_cast<int>(blockIdx.x) / shares;
  const int tiles = static_cast<int>(divide_up(held.rows, kSignRows));
  const int64_t first = rest % tiles * kSignRows, batch = rest / tiles;
  const int column_tiles = static_cast<int>(divide_up(problem.features, kSignRows * kSignWarps));
  const int rows = static_cast<int>(min(int64_t{kSignRows}, held.rows - first));
  const int steps = static_cast<int>(divide_up(streamed.rows, kSignRows));
  const BFloat16* const from = streamed.side.values + batch * streamed.side.rows.batch_stride;
  const BFloat16* const held_from = held.side.values + batch * held.side.rows.batch_stride + first * held.side.rows.row_stride;
  weights += batch * problem.pairs() + first * held.weight_step;
  uint4(&slots)[kSignAhead + 1][32] = words[warp];
  uint4* const results = slots[kSignAhead];

  // Where the features of this warp begin. Beyond the last one the first ones are read, and nothing is written.
  const auto column_of = [&](int tile) { return (int64_t{tile} * kSignWarps + warp) * kSignRows; };
  const auto readable = [&](int64_t column) { return column < problem.features ? column : 0; };
  // Of each tile the held rows, then the streamed ones, step by step.
  int next_tile = share, next_step = 0, slot = kSignAhead - 1;
  const auto read_next = [&](int into) {
    if (next_tile < column_tiles) {
      const bool is_held = next_step == 0;
      const int64_t j = is_held ? min(row, rows - 1) : min(int64_t{next_step - 1} * kSignRows + row, streamed.rows - 1);
      const BFloat16* source = is_held ? held_from + j * held.side.rows.row_stride : from + j * streamed.side.rows.row_stride;
      read_ahead<8, false>(reinterpret_cast<Values<BFloat16, 8>*>(&slots[into][own]), source + readable(column_of(next_tile)) + 8 * half);
      if (++next_step > steps) next_step = 0, next_tile += shares;
    }
    end_group();
  };
  // The oldest rows that are on their way, once they are there; others follow them.
  const auto arrived = [&]() {
    await_groups<kSignAhead - 2>();
    __syncwarp();
    read_next(slot);
    slot = (slot + 1) % kSignAhead;
    return slots[slot];
  };
  // Row i of a tile, which lies in `results`, to the gradient.
  const auto write_results = [&](const SignSide& to, int64_t i, int64_t column) {
    __syncwarp();
    if (i < to.rows && column < problem.features) {
      BFloat16* const gradient = to.side.gradient + batch * to.side.gradient_rows.batch_stride + i * to.side.gradient_rows.row_stride;
      *reinterpret_cast<uint4*>(gradient + column + 8 * half) = results[own];
    }
    __syncwarp();
  };

  table.clear();
  for (int into = 0; into < kSignAhead - 1; ++into) read_next(into);
  for (int tile = share; tile < column_tiles; tile += shares) {
    const int64_t column = column_of(tile);
    unsigned value[kSignRows][2];  // of features lane / 4 and 8 further, twice in a word
    const uint4* const held_words = arrived();
#pragma unroll
    for (int i = 0; i < kSignRows; ++i) {
#pragma unroll
      for (int n = 0; n < 2; ++n)
        value[i][n] = reinterpret_cast<const unsigned short*>(&held_words[place(i, n)])[lane / 4] * 0x10001u;
    }
    float of_held[kSignRows / 2][4] = {};  // of two rows
    for (int step = 0; step < steps; ++step) {
      if (step % kSignSteps == 0 && (tile == share || steps > kSignSteps)) {
        __syncthreads();
        for (int n = threadIdx.x; n < kSignSteps * kSignRows * kSignRows; n += kSignThreads) {
          const int i = n % kSignRows, j = n / kSignRows;
          const int64_t k = int64_t{step} * kSignRows + j;
          const bool used = i < rows && k < streamed.rows;
          table.put(j / kSignRows, i, j % kSignRows, used ? weights[i * held.weight_step + k * streamed.weight_step] : 0.0f);
        }
        __syncthreads();
      }
      unsigned other[4];
      load_turned(other, &arrived()[turned]);
      float of_streamed[2][4] = {};  // of the first and the last 8 rows
#pragma unroll
      for (int i = 0; i < kSignRows; i += 2) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          Columns sign[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            sign[k].upper = signs_of_difference(value[i + k][0], other[2 * n]);
            sign[k].lower = signs_of_difference(value[i + k][1], other[2 * n + 1]);
          }
          if constexpr (Held) {
            const uint2 both = table.columns[step % kSignSteps][i + n][lane / 4 % 4][lane % 4];
            multiply_add(of_held[i / 2], sign[0], both.x, sign[1], both.y);
          }
          if constexpr (Streamed) {
            const uint2 both = table.diagonal[step % kSignSteps][i + n][lane / 4];
            multiply_add(of_streamed[n], sign[0], pick_bytes(both.x, bytes.first), sign[1], pick_bytes(both.x, bytes.second));
            multiply_add(of_streamed[n], sign[0], pick_bytes(both.y, bytes.first), sign[1], pick_bytes(both.y, bytes.second));
          }
        }
      }
      if constexpr (Streamed) {
        unsigned result[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {  // signs are those of held - streamed
          const float* const sums = &of_streamed[n / 2][n % 2 * 2];
          result[n] = bfloat16_bits(-sums[0]) | bfloat16_bits(-sums[1]) << 16;
        }
        store_turned(&results[turned], result);
        write_results(streamed, int64_t{step} * kSignRows + row, column);
      }
    }
    if constexpr (Held) {
#pragma unroll
      for (int i = 0; i < kSignRows; i += 2) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {  // lane % 4 has the columns of both parts of row i + lane % 4, if there is one
          auto* const at = reinterpret_cast<unsigned short*>(&results[place(i + lane % 2, n)]) + lane / 4;
          const float sum = of_held[i / 2][2 * n] + of_held[i / 2][2 * n + 1];
          if (lane % 4 < 2) *at = static_cast<unsigned short>(bfloat16_bits(sum));
        }
      }
      write_results(held, first + row, column);
    }
  }
  await_groups<0>();
}

inline void launch_signs(const SignSide& held, const SignSide& streamed, const Tensor& weight, const Problem& problem) {
  const int64_t tiles = problem.batches * divide_up(held.rows, kSignRows);
  const int64_t shares = std::min(divide_up(problem.features, kSignRows * kSignWarps),
                                  divide_up(kSignBlocks * multiprocessors(weight), std::max(tiles, int64_t{1})));
  const auto kernel = held.side.gradient == nullptr      ? sign_gradients<false, true>
                      : streamed.side.gradient == nullptr ? sign_gradients<true, false>
                                                          : sign_gradients<true, true>;
  launch(current_stream(weight), tiles * shares, kSignThreads, 0, kernel, held, streamed, const_data<float>(weight), problem,
         static_cast<int>(shares));
}

// Both gradients in one launch where one input has at most 16 rows; the same bits whichever of them is wanted.
inline void launch_sign_gradients(const Side<BFloat16>& x, const Side<BFloat16>& y, const Tensor& weight, const Problem& problem) {
  const SignSide of_x{x, problem.rows_x, problem.rows_y}, of_y{y, problem.rows_y, 1};
  const auto alone = [](SignSide other) { return other.side.gradient = nullptr, other; };
  if (problem.rows_x <= kSignRows) return launch_signs(of_x, of_y, weight, problem);
  if (problem.rows_y <= kSignRows) return launch_signs(of_y, of_x, weight, problem);
  if (x.gradient) launch_signs(of_x, alone(of_y), weight, problem);
  if (y.gradient) launch_signs(of_y, alone(of_x), weight, problem);
}

}  // namespace
}  // namespace kdops
