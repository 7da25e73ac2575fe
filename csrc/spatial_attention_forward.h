// Spatial attention on the CPU, forward.
//
// A task is a block of query positions. Six rows of logits over a tile of keys stay in the L1 cache while they become
// weights under a running maximum and are multiplied with the values.
#pragma once

#include "spatial_attention.h"

namespace kdops::attention {

constexpr int64_t kForwardTile = 400 << 10;  // bytes of packed keys and values in a tile, which stay in the L2 cache

enum class Normalize {
  kRows,        // softmax over the columns, streamed: running maximum and sum of each row
  kStatistics,  // the same, but only maximum and sum are wanted
  kColumns,     // softmax over the rows, whose statistics are known
};

template <typename T>
struct RowState {
  T* weighted;  // (rows, value channels padded to 16): sums of values, times e^maximum
  T* maximum;
  T* sum;
};

// Logits of 6 rows and a tile, [panel][6][16]; columns that do not exist are -infinity. Returns the maximum of each row
// in `maximum`, and in `kept`, unless that is null, the logits once more.
template <typename T>
KDOPS_INLINE void tile_logits(const T* query, const T* keys, int64_t channels, int64_t count, int64_t columns,
                              T* logits, T* kept, T* maximum) {
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  Vector<T> largest[kRows];
  for (int64_t i = 0; i < kRows; ++i) largest[i] = Vector<T>{} + kNothing;
  for (int64_t panel = 0; panel < count; ++panel) {
    Block<T> block;
    clear(block);
    multiply_add<1, 1>(block, query, kRows, channels, keys + panel * channels * kColumns);
    T* const to = logits + panel * kRows * kColumns;
    store(block, to, kColumns);
    if (kept) store(block, kept + panel * kRows * kColumns, kColumns);
    if (columns < (panel + 1) * kColumns) {
      for (int64_t i = 0; i < kRows; ++i) {
        std::fill(to + i * kColumns + columns % kColumns, to + (i + 1) * kColumns, kNothing);
      }
      load(block, to, kColumns);
    }
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t v = 0; v < kVectors<T>; ++v) largest[i] = block.at[i][v] > largest[i] ? block.at[i][v] : largest[i];
    }
  }
  for (int64_t i = 0; i < kRows; ++i) maximum[i] = largest_of_lanes<T>(largest[i]);
}

// Logits to e^(logit - maximum); `sum` receives the sum of each row.
template <typename T>
KDOPS_INLINE void tile_weights(T* logits, int64_t count, const T* maximum, T* sum) {
  Vector<T> total[kRows] = {};
  for (int64_t panel = 0; panel < count; ++panel) {
    T* const at = logits + panel * kRows * kColumns;
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t v = 0; v < kVectors<T>; ++v) {
        Vector<T>& logit = vector(at + i * kColumns + v * kLanes<T>);
        logit -= maximum[i];
        exponential(logit);
        total[i] += logit;
      }
    }
  }
  for (int64_t i = 0; i < kRows; ++i) sum[i] = sum_of_lanes<T>(total[i]);
}

// The same for known softmaxes of the columns.
template <typename T>
KDOPS_INLINE void tile_column_weights(T* logits, int64_t count, Softmaxes<T> softmaxes) {
  for (int64_t panel = 0; panel < count; ++panel) {
    T* const at = logits + panel * kRows * kColumns;
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t v = 0; v < kVectors<T>; ++v) {
        Vector<T>& logit = vector(at + i * kColumns + v * kLanes<T>);
        const Softmaxes<T> columns = softmaxes.from(panel * kColumns + v * kLanes<T>);
        logit = (logit - vector(columns.highest)) - vector(columns.log_sum);
        exponential(logit);
      }
    }
  }
}

// A block of `count` row panels against all columns.
template <typename T, Normalize Over>
KDOPS_CLONED void attend(const T* query, const T* keys, const T* values, Softmaxes<T> softmaxes, const Sizes& sizes,
                         int64_t count, int64_t tile, T* weights, T* kept, RowState<T> state) {
  const int64_t channels = sizes.channels, value_panels = panels(sizes.value_channels, kColumns);
  const int64_t pitch = value_panels * kColumns, positions = sizes.column_panels() * kColumns;
  std::fill(state.weighted, state.weighted + count * kRows * pitch, T(0));
  std::fill(state.maximum, state.maximum + count * kRows, -std::numeric_limits<T>::infinity());
  std::fill(state.sum, state.sum + count * kRows, T(0));
  for (int64_t first = 0; first < sizes.column_panels(); first += tile) {
    const int64_t here = std::min(tile, sizes.column_panels() - first);
    for (int64_t panel = 0; panel < count; ++panel) {
      T* const maximum = state.maximum + panel * kRows;
      T* const sum = state.sum + panel * kRows;
      T shrink[kRows], highest[kRows], added[kRows];
      tile_logits(query + panel * channels * kRows, keys + first * channels * kColumns, channels, here,
                  sizes.columns - first * kColumns, weights,
                  kept ? kept + (panel * sizes.column_panels() + first) * kRows * kColumns : nullptr, highest);
      if constexpr (Over == Normalize::kColumns) {
        tile_column_weights(weights, here, softmaxes.from(first * kColumns));
        std::fill(shrink, shrink + kRows, T(1));
      } else {
        T finite[kRows];  // a row of -infinity alone has weights of 0 so far
        for (int64_t i = 0; i < kRows; ++i) {
          highest[i] = std::max(maximum[i], highest[i]);
          finite[i] = highest[i] == -std::numeric_limits<T>::infinity() ? T(0) : highest[i];
          shrink[i] = std::exp(maximum[i] - finite[i]);
          maximum[i] = highest[i];
        }
        tile_weights(weights, here, finite, added);
        for (int64_t i = 0; i < kRows; ++i) sum[i] = sum[i] * shrink[i] + added[i];
      }
      if constexpr (Over != Normalize::kStatistics) {
        for (int64_t c = 0; c < value_panels; ++c) {
          T* const to = state.weighted + panel * kRows * pitch + c * kColumns;
          Block<T> block;
          load(block, to, pitch);
          for (int64_t i = 0; i < kRows; ++i) {
            for (int64_t v = 0; v < kVectors<T>; ++v) block.at[i][v] *= shrink[i];
          }
          multiply_add<kColumns, kColumns>(block, weights, kRows * kColumns, here,
                                           values + (c * positions + first * kColumns) * kColumns);
          store(block, to, pitch);
        }
      }
    }
  }
}

// Streams all columns past every row. With `out` the weighted values are written there; with `statistics_out` what is
// known of each row's softmax, with `kept` the logits. `column_statistics` (padded to 16 in every sample) makes the
// softmax one over the rows.
template <typename scalar_t, Normalize Over>
void attend_all(const Sizes& sizes, const Accumulator<scalar_t>* rows, const Accumulator<scalar_t>* columns,
                const Accumulator<scalar_t>* values, const Accumulator<scalar_t>* column_statistics,
                Accumulator<scalar_t>* kept, scalar_t* out, Accumulator<scalar_t>* statistics_out) {
  using T = Accumulator<scalar_t>;
  const int64_t block = task_panels(kBlockPanels, sizes.batches, sizes.row_panels()), block_rows = block * kRows;
  const int64_t blocks = panels(sizes.row_panels(), block);
  const int64_t pitch = padded(sizes.value_channels, kColumns), columns_padded = sizes.column_panels() * kColumns;
  const int64_t tile = tile_panels<T>(kForwardTile, sizes.channels + sizes.value_channels, sizes.column_panels());
  const int64_t weights_size = tile * kRows * kColumns;
  for_each_task<T>(sizes.batches * blocks, weights_size + block_rows * (pitch + 2), [&](int64_t task, T* weights) {
    const int64_t batch = task / blocks, panel = task % blocks * block, first = panel * kRows;
    const int64_t count = std::min(block, sizes.row_panels() - panel);
    const int64_t here = std::min(block_rows, sizes.rows - first);
    T* const weighted = weights + weights_size;
    const RowState<T> state{weighted, weighted + block_rows * pitch, weighted + block_rows * (pitch + 1)};
    attend<T, Over>(rows + (batch * sizes.row_panels() + panel) * sizes.channels * kRows,
                    columns + batch * sizes.packed_columns(sizes.channels),
                    values + batch * sizes.packed_channels(sizes.value_channels),
                    Softmaxes<T>::of(column_statistics, batch, columns_padded), sizes, count, tile, weights,
                    kept ? kept + batch * sizes.logits() + panel * sizes.column_panels() * kRows * kColumns : nullptr,
                    state);
    for (int64_t i = 0; i < here; ++i) {
      if (statistics_out) {
        T* const statistics = statistics_out + 2 * batch * sizes.rows + first + i;
        statistics[0] = state.maximum[i];
        statistics[sizes.rows] = std::log(state.sum[i]);
      }
      state.sum[i] = Over == Normalize::kColumns ? T(1) : 1 / state.sum[i];
    }
    if (out) {
      scatter(weighted, pitch, state.sum, here, sizes.value_channels,
              out + batch * sizes.value_channels * sizes.rows + first, 1, sizes.rows);
    }
  });
}

}  // namespace kdops::attention
