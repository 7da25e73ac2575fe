// Gradients of L1 distances of bfloat16 rows on tensor cores (sm_90), for csrc/contrast.cu.
//
// A gradient is a sum of weights times signs. Two comparisons and a difference make two signs of bfloat16 numbers, and tensor
// cores add them up in float32. They take them for float16, in which the bits of 1 are 1.875: as exact, and weights keep 12 bits
// of their largest, one scale for each row of a gradient. Signs lie 16 features x 8 streamed rows at a time, of two held rows side
// by side. They are multiplied with
//   columns of those rows' weights, of eight held rows in one accumulator: the gradients of the held rows, and
//   two diagonal matrices of the same weights: what the held rows add to the gradients of the streamed rows.
#pragma once

#include "common/fragments.h"
#include "contrast_distances.h"

namespace kdops {
namespace {

constexpr int kSignRows = 16;         // held rows, and streamed rows of a step
constexpr int kSignFeatures = 32;     // of a warp
constexpr int kSignWarps = 4;         // of a block
constexpr int kSignThreads = 32 * kSignWarps;
constexpr int kSignAhead = 4;         // steps that are in shared memory or on their way, a power of two
constexpr int kSignSteps = 4;         // whose weights are in shared memory at a time
constexpr float kSignOne = 1.875f;    // 1 in bfloat16, its bits taken for float16

// Blocks of a multiprocessor: registers for both gradients, so that signs are on their way while others are added up, are worth more
// than a fourth block.
template <bool Held, bool Streamed>
constexpr int kSignBlocks = Held && Streamed ? 3 : 4;

// The weights of all held rows and of the streamed rows of kSignSteps steps, as lanes read them: of two held rows and half of a
// step's rows at a time, a word for each of both held rows, and at the end what lanes read whose part of a matrix is 0.
struct SignWeights {
  static constexpr int kNone = 8;
  uint2 columns[kSignSteps][kSignRows][kNone + 1];   // 4 * (which held row) + lane % 4: two streamed rows, of one held row
  uint2 diagonal[kSignSteps][kSignRows][kNone + 1];  // a streamed row, of both held rows
  float of_held[kSignRows], of_streamed[kSignSteps * kSignRows];  // scales: what sums are multiplied with

  __device__ void clear() {
    for (int n = threadIdx.x; n < kSignSteps * kSignRows * (kNone + 1); n += kSignThreads)
      (&columns[0][0][0])[n] = (&diagonal[0][0][0])[n] = {};
  }

  __device__ static float scale(float largest) { return largest > 0 && isfinite(largest) ? largest : 1.0f; }

  // Held row i and streamed row j.
  __device__ void put(int i, int j, float in_column, float in_diagonal) {
    const int step = j / kSignRows, row = j % 8, which = i % 2, two = i / 2 * 2 + j % kSignRows / 8;
    const auto word = [&](uint2& both) { return reinterpret_cast<unsigned short*>(&both) + 2 * which + row % 2; };
    *word(columns[step][two][4 * which + row / 2]) = bits_as<unsigned short>(static_cast<Half>(in_column));
    *word(diagonal[step][two][row]) = bits_as<unsigned short>(static_cast<Half>(in_diagonal));
  }
};

// One input of the kernel below.
struct SignSide {
  Side<BFloat16> side;
  int64_t rows, weight_step;
};

// The largest over groups of Lanes lanes.
template <int Lanes>
__device__ float largest_of(float value) {
#pragma unroll
  for (int offset = Lanes / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  return value;
}

// Of up to 16 rows of `held` (of all of them, if Streamed) and all rows of `streamed`; blocks take tiles of features in turn,
// `shares` of them a tile of rows.
template <bool Held, bool Streamed>
__global__ void __launch_bounds__(kSignThreads, (kSignBlocks<Held, Streamed>))
    sign_gradients(SignSide held, SignSide streamed, const float* weights, Problem problem, int shares) {
  __shared__ SignWeights table;
  __shared__ uint4 words[kSignWarps][kSignAhead + 1][kSignRows * 4];  // of each warp: steps that were read, and results
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = lane / 4, chunk = lane % 4;
  const auto place = [](int row, int chunk) { return 4 * row + (chunk ^ (row >> 1 & 3)); };  // no two of 8 rows in one bank
  const auto turned = [&](int m) { return place(lane / 16 * 8 + lane % 8, 2 * m + lane / 8 % 2); };
  const int share = static_cast<int>(blockIdx.x) % shares, rest = static_cast<int>(blockIdx.x) / shares;
  const int tiles = static_cast<int>(divide_up(held.rows, kSignRows));
  const int64_t first = rest % tiles * kSignRows, batch = rest / tiles;
  const int column_tiles = static_cast<int>(divide_up(problem.features, kSignFeatures * kSignWarps));
  const int rows = static_cast<int>(min(int64_t{kSignRows}, held.rows - first)), others = static_cast<int>(streamed.rows);
  const int steps = static_cast<int>(divide_up(streamed.rows, kSignRows));
  const BFloat16* const from = streamed.side.values + batch * streamed.side.rows.batch_stride;
  const BFloat16* const held_from = held.side.values + batch * held.side.rows.batch_stride + first * held.side.rows.row_stride;
  weights += batch * problem.pairs() + first * held.weight_step;
  uint4(&slots)[kSignAhead + 1][kSignRows * 4] = words[warp];
  uint4* const results = slots[kSignAhead];

  // Where this lane's features begin. Beyond the last one the first ones are read, and nothing is written.
  const auto column_of = [&](int tile) { return (int64_t{tile} * kSignWarps + warp) * kSignFeatures + 8 * chunk; };
  const auto readable = [&](int64_t column) { return column < problem.features ? column : 0; };
  const auto offset = [](int row, int64_t row_stride) {  // rows are a multiple of 8 numbers apart
    return static_cast<uint64_t>(static_cast<unsigned>(row)) * static_cast<unsigned>(row_stride / 8) * 8;
  };
  // Of each tile the held rows, then the streamed ones, step by step.
  int next_tile = share, next_step = 0, slot = kSignAhead - 1;
  const auto read_next = [&](int into) {
    if (next_tile < column_tiles) {
      const bool is_held = next_step == 0;
      const int begin = is_held ? 0 : (next_step - 1) * kSignRows, last = (is_held ? rows : others) - 1;
      const BFloat16* const source = (is_held ? held_from : from) + readable(column_of(next_tile));
      const int64_t stride = is_held ? held.side.rows.row_stride : streamed.side.rows.row_stride;
#pragma unroll
      for (int i = 0; i < kSignRows; i += 8) {
        read_ahead<8, false>(reinterpret_cast<Values<BFloat16, 8>*>(&slots[into][place(row + i, chunk)]),
                             source + offset(min(begin + row + i, last), stride));
      }
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
  // Sums of 2 x 16 features and two times 8 rows, of which row i is the first one, to the gradient.
  const auto write_rows = [&](const SignSide& to, int64_t i, const float (&sums)[2][2][4], const float* scales, int64_t column) {
    const float* const own = scales + lane % 4 * 2;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      unsigned result[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const float *const two = &sums[m][n / 2][n % 2 * 2], *const scale = own + n / 2 * 8;
        result[n] = bits_as<unsigned short>(static_cast<BFloat16>(two[0] * scale[0])) |
                    bits_as<unsigned short>(static_cast<BFloat16>(two[1] * scale[1])) << 16;
      }
      store_turned(&results[turned(m)], result);
    }
    __syncwarp();
    const auto& side = to.side;
    BFloat16* const gradient = side.gradient + batch * side.gradient_rows.batch_stride + i * side.gradient_rows.row_stride + column;
#pragma unroll
    for (int j = row; j < kSignRows; j += 8) {
      if (i + j < to.rows && column < problem.features)
        *reinterpret_cast<uint4*>(gradient + offset(j, side.gradient_rows.row_stride)) = results[place(j, chunk)];
    }
    __syncwarp();
  };

  table.clear();
  for (int into = 0; into < kSignAhead - 1; ++into) read_next(into);
  {
    constexpr int each = kSignThreads / kSignRows;
    const int i = threadIdx.x / each;
    float largest = 0;
    for (int64_t k = threadIdx.x % each; i < rows && k < streamed.rows; k += each)
      largest = fmaxf(largest, fabsf(weights[i * held.weight_step + k * streamed.weight_step]));
    table.of_held[i] = SignWeights::scale(largest_of<each>(largest)) / kSignOne;
  }
  // Whose entries of the weights a lane reads: where it has none of two held rows or of the diagonal, zeros.
  int own_column[4];
#pragma unroll
  for (int n = 0; n < 4; ++n) own_column[n] = lane / 8 == n ? lane % 8 : SignWeights::kNone;
  const int own_diagonal = lane / 8 == lane % 4 ? lane / 4 : SignWeights::kNone;

  for (int tile = share; tile < column_tiles; tile += shares) {
    const int64_t column = column_of(tile);
    unsigned value[kSignRows][2];  // of features lane / 4 and 8 further, and of 16 and 24 further
    const uint4* const held_words = arrived();
#pragma unroll
    for (int i = 0; i < kSignRows; ++i) {
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const auto number = [&](int n) {
          return unsigned{reinterpret_cast<const unsigned short*>(&held_words[place(i, 2 * m + n)])[lane / 4]};
        };
        value[i][m] = number(0) | number(1) << 16;
      }
    }
    float of_held[2][2][4] = {};  // of 16 features each, of 8 rows each
    for (int step = 0; step < steps; ++step) {
      const int here = step % kSignSteps;
      if (here == 0 && (tile == share || steps > kSignSteps)) {
        __syncthreads();
        for (int n = threadIdx.x; n < kSignSteps * kSignRows * kSignRows; n += kSignThreads) {
          const int i = n % kSignRows, j = n / kSignRows;
          const int64_t k = int64_t{step} * kSignRows + j;
          const bool used = i < rows && k < streamed.rows;
          const float weight = used ? weights[i * held.weight_step + k * streamed.weight_step] : 0.0f;
          const float scale = SignWeights::scale(largest_of<kSignRows>(fabsf(weight)));
          table.put(i, j, weight / (table.of_held[i] * kSignOne), weight / scale);
          if (i == 0) table.of_streamed[j] = -scale / kSignOne;  // signs are those of held - streamed
        }
        __syncthreads();
      }
      const uint4* const step_words = arrived();
      unsigned other[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) load_turned(other[m], &step_words[turned(m)]);
      float of_streamed[2][2][4] = {};
#pragma unroll
      for (int i = 0; i < kSignRows; i += 2) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const uint2 columns = table.columns[here][i + n][own_column[i / 2 % 4]];
          const uint2 diagonal = table.diagonal[here][i + n][own_diagonal];
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            Columns sign[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
              sign[k].upper = signs_of_difference<0>(value[i + k][m], other[m][2 * n]);
              sign[k].lower = signs_of_difference<1>(value[i + k][m], other[m][2 * n + 1]);
            }
            if constexpr (Held) multiply_add(of_held[m][i / 8], sign[0], columns.x, sign[1], columns.y);
            if constexpr (Streamed) multiply_add(of_streamed[m][n], sign[0], diagonal.x, sign[1], diagonal.y);
          }
        }
      }
      if constexpr (Streamed)
        write_rows(streamed, int64_t{step} * kSignRows, of_streamed, &table.of_streamed[here * kSignRows], column);
    }
    if constexpr (Held) write_rows(held, first, of_held, table.of_held, column);
  }
  await_groups<0>();
}

template <bool Held, bool Streamed>
void launch_signs(const SignSide& held, const SignSide& streamed, const Tensor& weight, const Problem& problem) {
  const int64_t tiles = problem.batches * divide_up(held.rows, kSignRows);
  const int64_t fill = divide_up(kSignBlocks<Held, Streamed> * multiprocessors(weight), std::max(tiles, int64_t{1}));
  const int64_t shares = std::min(divide_up(problem.features, kSignFeatures * kSignWarps), fill);
  launch(current_stream(weight), tiles * shares, kSignThreads, 0, sign_gradients<Held, Streamed>, held, streamed,
         const_data<float>(weight), problem, static_cast<int>(shares));
}

inline void launch_signs(const SignSide& held, const SignSide& streamed, const Tensor& weight, const Problem& problem) {
  const bool of_held = held.side.gradient != nullptr, of_streamed = streamed.side.gradient != nullptr;
  if (of_held && of_streamed) return launch_signs<true, true>(held, streamed, weight, problem);
  if (of_held) return launch_signs<true, false>(held, streamed, weight, problem);
  launch_signs<false, true>(held, streamed, weight, problem);
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
