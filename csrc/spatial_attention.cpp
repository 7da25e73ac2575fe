// Spatial attention on the CPU: blocks of logits are made, used and forgotten within the cache.
//
// Forward: a task is a block of query positions. Six rows of logits over a tile of keys stay in the L1 cache while they become weights
// under a running maximum and are multiplied with the values. Backward: a task is a run of key tiles of one sample. Weights and their
// gradients come out of the products' registers (the statistics of the softmax are known), and are summed over a block of
// query positions at once for the gradients of key and value. The gradient of the query is summed per task and then over tasks, in order: how
// many there are follows from the shape, so results do not depend on the number of threads.
//
// "Rows" are positions of the query, "columns" positions of the key. Packed operands are described in common/products.h.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "common/products.h"
#include "common/simd.h"

namespace kdops {
namespace {

constexpr int64_t kBlockPanels = 16;         // row panels of a task's block: 96 rows
constexpr int64_t kForwardTile = 400 << 10;  // bytes of packed keys and values in a tile, which stay in the L2 cache
constexpr int64_t kBackwardTile = 320 << 10;
constexpr int64_t kLongestTile = 16;  // column panels: 6 rows of a tile fit the L1 cache twice
constexpr int64_t kQueryTasks = 16;   // of backward where the query needs a gradient, for the whole batch: each holds one of its own
constexpr int64_t kShortestGroup = 8;  // column panels of such a task

// --- sizes -----------------------------------------------------------------------------------------------------------------------

struct Sizes {
  int64_t batches, rows, columns, channels, value_channels;

  int64_t row_panels() const {
    return panels(rows, kRows);
  }
  int64_t column_panels() const {
    return panels(columns, kColumns);
  }
  // Numbers that one sample has in the packed layouts.
  int64_t packed_columns(int64_t c) const {
    return column_panels() * kColumns * c;
  }
  int64_t packed_channels(int64_t c) const {
    return padded(c, kColumns) * column_panels() * kColumns;
  }
};

// Column panels of a tile that has `bytes` for `numbers` numbers per column.
template <typename T>
int64_t tile_panels(int64_t bytes, int64_t numbers, int64_t column_panels) {
  const int64_t fits = bytes / static_cast<int64_t>(sizeof(T)) / numbers / kColumns;
  const int64_t most = std::clamp<int64_t>(fits, 2, kLongestTile);
  return panels(column_panels, panels(column_panels, most));  // tiles of about equal size
}

// --- forward ---------------------------------------------------------------------------------------------------------------------

enum class Normalize {
  kRows,     // softmax over the columns, streamed: running maximum and sum of each row
  kColumns,  // softmax over the rows, whose statistics are known
  kStatistics,  // as kRows, but only maximum and sum are wanted
};

template <typename T>
struct RowState {
  T* weighted;  // (rows, value channels padded to 16): sums of values, times e^maximum
  T* maximum;
  T* sum;
};

// Logits of 6 rows and a tile, [panel][6][16]; columns that do not exist are -infinity. Returns the maximum of each row in `maximum`.
template <typename T>
KDOPS_INLINE void tile_logits(const T* query, const T* keys, int64_t channels, int64_t count, int64_t columns, T* logits, T* maximum) {
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  Vector<T> largest[kRows];
  for (int64_t i = 0; i < kRows; ++i) largest[i] = Vector<T>{} + kNothing;
  for (int64_t panel = 0; panel < count; ++panel) {
    Block<T> block;
    clear(block);
    multiply_add<1, 1>(block, query, kRows, channels, keys + panel * channels * kColumns);
    T* const to = logits + panel * kRows * kColumns;
    store(block, to, kColumns);
    if (columns < (panel + 1) * kColumns) {
      for (int64_t i = 0; i < kRows; ++i) std::fill(to + i * kColumns + columns % kColumns, to + (i + 1) * kColumns, kNothing);
      load(block, to, kColumns);
    }
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t v = 0; v < kVectors<T>; ++v) largest[i] = block.at[i][v] > largest[i] ? block.at[i][v] : largest[i];
    }
  }
  for (int64_t i = 0; i < kRows; ++i) {
    maximum[i] = kNothing;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) maximum[i] = std::max(maximum[i], largest[i][lane]);
  }
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
  for (int64_t i = 0; i < kRows; ++i) {
    sum[i] = 0;
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum[i] += total[i][lane];
  }
}

// The same for statistics of the columns: e^(logit - statistic).
template <typename T>
KDOPS_INLINE void tile_column_weights(T* logits, int64_t count, const T* statistics) {
  for (int64_t panel = 0; panel < count; ++panel) {
    T* const at = logits + panel * kRows * kColumns;
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t v = 0; v < kVectors<T>; ++v) {
        Vector<T>& logit = vector(at + i * kColumns + v * kLanes<T>);
        logit -= vector(statistics + panel * kColumns + v * kLanes<T>);
        exponential(logit);
      }
    }
  }
}

// A block of `count` row panels against all columns.
template <typename T, Normalize Over>
KDOPS_CLONED void attend(const T* query, const T* keys, const T* values, const T* statistics, const Sizes& sizes, int64_t count,
                         int64_t tile, T* weights, RowState<T> state) {
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
                  sizes.columns - first * kColumns, weights, highest);
      if constexpr (Over == Normalize::kColumns) {
        tile_column_weights(weights, here, statistics + first * kColumns);
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

// result(row, channel) = numbers[row * pitch + channel] * factors[row]
template <typename scalar_t, typename T>
KDOPS_CLONED void scatter(const T* numbers, int64_t pitch, const T* factors, int64_t rows, int64_t channels, scalar_t* result,
                          int64_t row_stride, int64_t channel_stride) {
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < rows; ++i) narrow(numbers[i * pitch + c] * factors[i], result[i * row_stride + c * channel_stride]);
  }
}

// Streams all columns past every row. With `out` the weighted values are written there; with `statistics_out` the logarithm of each
// row's sum. `column_statistics` (padded to 16 in every sample) makes the softmax one over the rows.
template <typename scalar_t, Normalize Over>
void attend_all(const Sizes& sizes, const Accumulator<scalar_t>* rows, const Accumulator<scalar_t>* columns,
                const Accumulator<scalar_t>* values, const Accumulator<scalar_t>* column_statistics, scalar_t* out,
                Accumulator<scalar_t>* statistics_out) {
  using T = Accumulator<scalar_t>;
  const int64_t blocks = panels(sizes.row_panels(), kBlockPanels), block_rows = kBlockPanels * kRows;
  const int64_t pitch = padded(sizes.value_channels, kColumns), columns_padded = sizes.column_panels() * kColumns;
  const int64_t tile = tile_panels<T>(kForwardTile, sizes.channels + sizes.value_channels, sizes.column_panels());
  const int64_t weights_size = tile * kRows * kColumns;
  for_each_task<T>(sizes.batches * blocks, weights_size + block_rows * (pitch + 2), [&](int64_t task, T* weights) {
    const int64_t batch = task / blocks, panel = task % blocks * kBlockPanels, first = panel * kRows;
    const int64_t count = std::min(kBlockPanels, sizes.row_panels() - panel), here = std::min(block_rows, sizes.rows - first);
    T* const weighted = weights + weights_size;
    const RowState<T> state{weighted, weighted + block_rows * pitch, weighted + block_rows * (pitch + 1)};
    attend<T, Over>(rows + (batch * sizes.row_panels() + panel) * sizes.channels * kRows,
                    columns + batch * sizes.packed_columns(sizes.channels),
                    values + batch * sizes.packed_channels(sizes.value_channels), column_statistics + batch * columns_padded, sizes,
                    count, tile, weights, state);
    for (int64_t i = 0; i < here; ++i) {
      if (statistics_out) statistics_out[batch * sizes.rows + first + i] = state.maximum[i] + std::log(state.sum[i]);
      state.sum[i] = Over == Normalize::kColumns ? T(1) : 1 / state.sum[i];
    }
    if (out) scatter(weighted, pitch, state.sum, here, sizes.value_channels,
                     out + batch * sizes.value_channels * sizes.rows + first, 1, sizes.rows);
  });
}

// --- backward --------------------------------------------------------------------------------------------------------------------

template <typename T>
struct Operands {  // of one sample, packed
  const T* query_rows;
  const T* grad_rows;  // of the result
  const T* key_columns;
  const T* key_channels;  // only where the query needs a gradient
  const T* value_columns;
  const T* statistics;
  T* delta;  // sum of weights times their gradients; of rows it is given, of columns it is computed here
};

template <typename T>
struct TileGradients {
  T* weights;       // [panel][96 rows][16]
  T* logits;        // their gradient, likewise
  T* key;           // [panel][channels padded to 6][16]; null where not wanted
  T* value;         // the same as `key` where the two are one tensor
  T* query;         // (all rows, channels padded to 16), added to; null where not wanted
};

// Weights of 6 rows and a panel, straight from the product's registers.
template <typename T, bool OverRows>
KDOPS_INLINE void subtract_and_exponentiate(Block<T>& block, const T* statistics) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVectors<T>; ++v) {
      block.at[i][v] -= OverRows ? vector(statistics + v * kLanes<T>) : Vector<T>{} + statistics[i];
      exponential(block.at[i][v]);
    }
  }
}

// Zeros where a row or column does not exist.
template <typename T>
KDOPS_INLINE void mask(Block<T>& block, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t column = 0; column < kColumns; ++column) {
      if (i >= rows || column >= columns) block.at[i][column / kLanes<T>][column % kLanes<T>] = 0;
    }
  }
}

// Weights and, if wanted, gradients of the logits, of one row panel and a tile of `count` column panels.
template <typename T, bool OverRows>
KDOPS_INLINE void row_panel_gradients(const Operands<T>& from, const Sizes& sizes, int64_t row_panel, int64_t first, int64_t count,
                                      bool want_logits, T* weights, T* logits) {
  const int64_t block_rows = kBlockPanels * kRows, row = row_panel * kRows;
  const int64_t channels = padded(sizes.channels, kRows), value_channels = padded(sizes.value_channels, kRows);
  for (int64_t panel = first; panel < first + count; ++panel) {
    const int64_t statistic = OverRows ? panel * kColumns : row;
    const int64_t at = (panel - first) * block_rows * kColumns;
    const bool whole = row + kRows <= sizes.rows && (panel + 1) * kColumns <= sizes.columns;
    Block<T> weight;
    clear(weight);
    multiply_add<1, 1>(weight, from.query_rows + row * channels, kRows, sizes.channels,
                       from.key_columns + panel * sizes.channels * kColumns);
    subtract_and_exponentiate<T, OverRows>(weight, from.statistics + statistic);
    if (!whole) mask(weight, sizes.rows - row, sizes.columns - panel * kColumns);
    store(weight, weights + at, kColumns);
    if (!want_logits) continue;
    Block<T> slope;
    clear(slope);
    multiply_add<1, 1>(slope, from.grad_rows + row * value_channels, kRows, sizes.value_channels,
                       from.value_columns + panel * sizes.value_channels * kColumns);
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t v = 0; v < kVectors<T>; ++v) {
        const T* const delta = from.delta + statistic;
        const Vector<T> mean = OverRows ? vector(delta + v * kLanes<T>) : Vector<T>{} + delta[i];
        slope.at[i][v] = vector(weights + at + i * kColumns + v * kLanes<T>) * (slope.at[i][v] - mean);
      }
    }
    if (!whole) mask(slope, sizes.rows - row, sizes.columns - panel * kColumns);
    store(slope, logits + at, kColumns);
  }
}

// sums [panel][channels padded to 6][16] += packed rows of a block, transposed, times `factors` [panel][96 rows][16]
template <typename T>
KDOPS_INLINE void add_over_rows(const T* packed_rows, int64_t channels, int64_t row_panels, const T* factors, int64_t panel, T* sums) {
  for (int64_t c = 0; c < channels; c += kRows) {
    T* const to = sums + (panel * channels + c) * kColumns;
    Block<T> block;
    load(block, to, kColumns);
    multiply_add<kRows, kRows>(block, packed_rows + c * kRows, channels * kRows, row_panels,
                               factors + panel * kBlockPanels * kRows * kColumns);
    store(block, to, kColumns);
  }
}

// All rows against the tile of `count` column panels from `first` on.
template <typename T, bool OverRows>
KDOPS_CLONED void tile_gradients(const Operands<T>& from, const Sizes& sizes, int64_t first, int64_t count, bool want_value,
                                 bool want_logits, TileGradients<T> to) {
  const int64_t block_rows = kBlockPanels * kRows, positions = sizes.column_panels() * kColumns;
  const int64_t channels = padded(sizes.channels, kRows), value_channels = padded(sizes.value_channels, kRows);
  const int64_t query_panels = panels(sizes.channels, kColumns), pitch = query_panels * kColumns;
  for (int64_t block = 0; block < sizes.row_panels(); block += kBlockPanels) {
    const int64_t here = std::min(kBlockPanels, sizes.row_panels() - block);
    for (int64_t panel = 0; panel < here; ++panel) {
      T* const logits = to.logits + panel * kRows * kColumns;
      row_panel_gradients<T, OverRows>(from, sizes, block + panel, first, count, want_logits, to.weights + panel * kRows * kColumns,
                                       logits);
      for (int64_t c = 0; want_logits && to.query && c < query_panels; ++c) {
        T* const sums = to.query + (block + panel) * kRows * pitch + c * kColumns;
        Block<T> sum;
        load(sum, sums, pitch);
        multiply_add<kColumns, kColumns>(sum, logits, block_rows * kColumns, count,
                                         from.key_channels + (c * positions + first * kColumns) * kColumns);
        store(sum, sums, pitch);
      }
    }
    for (int64_t panel = 0; panel < count; ++panel) {
      if (want_value) {
        add_over_rows(from.grad_rows + block * value_channels * kRows, value_channels, here, to.weights, panel, to.value);
      }
      if (want_logits && to.key) {
        add_over_rows(from.query_rows + block * channels * kRows, channels, here, to.logits, panel, to.key);
      }
    }
  }
}

// delta of the columns of a tile: the value times its gradient, summed over the channels.
template <typename T>
KDOPS_CLONED void column_delta(const T* value_columns, const T* value_gradient, int64_t channels, int64_t count, T* delta) {
  const int64_t pitch = padded(channels, kRows) * kColumns;
  for (int64_t panel = 0; panel < count; ++panel) {
    for (int64_t column = 0; column < kColumns; ++column) {
      T sum = 0;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t at = c * kColumns + column;
        sum += value_columns[panel * channels * kColumns + at] * value_gradient[panel * pitch + at];
      }
      delta[panel * kColumns + column] = sum;
    }
  }
}

// The gradient (B, C, *S) of `input`, written through `map`.
struct MapGradient {
  Tensor result;
  std::optional<Map> map;  // of the result, or of a contiguous buffer where its axes have no common stride

  MapGradient(bool needed, const Tensor& input)
      : result(needed ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0})) {
    if (needed) map.emplace(Map::has_one_stride(result) ? result : torch::stable::new_empty(input, sizes(input)));
  }

  static std::vector<int64_t> sizes(const Tensor& t) {
    return {t.sizes().begin(), t.sizes().end()};
  }

  Tensor finish() {
    if (map && map->tensor.const_data_ptr() != result.const_data_ptr()) torch::stable::copy_(result, map->tensor);
    return result;
  }
};

// Numbers of `count` rows per sample, `width` of them padded with zeros.
template <typename T>
Buffer<T> padded_statistics(const T* statistics, int64_t batches, int64_t count, int64_t width) {
  const int64_t pitch = padded(count, width);
  Buffer<T> copy = allocate<T>(batches * pitch);
  std::fill(copy.get(), copy.get() + batches * pitch, T(0));
  for (int64_t b = 0; b < batches; ++b) std::copy_n(statistics + b * count, count, copy.get() + b * pitch);
  return copy;
}

// delta of every row, padded to 6: the result times its gradient, summed over the channels.
template <typename scalar_t>
Buffer<Accumulator<scalar_t>> row_delta(const Map& out, const Map& grad) {
  using T = Accumulator<scalar_t>;
  const int64_t pitch = padded(out.positions, kRows);
  Buffer<T> delta = allocate<T>(out.batches * pitch);
  std::fill(delta.get(), delta.get() + out.batches * pitch, T(0));
  const scalar_t* const a = const_data<scalar_t>(out.tensor);
  const scalar_t* const b = const_data<scalar_t>(grad.tensor);
  torch::stable::parallel_for(0, out.batches, 1, [&](int64_t begin, int64_t end) {
    for (int64_t batch = begin; batch < end; ++batch) {
      for (int64_t c = 0; c < out.channels; ++c) {
        const scalar_t* const x = a + batch * out.batch_stride + c * out.channel_stride;
        const scalar_t* const y = b + batch * grad.batch_stride + c * grad.channel_stride;
        for (int64_t n = 0; n < out.positions; ++n) {
          delta[batch * pitch + n] += T(widen(x[n * out.position_stride])) * widen(y[n * grad.position_stride]);
        }
      }
    }
  });
  return delta;
}

template <typename scalar_t>
struct Wanted {
  MapGradient& query;
  MapGradient& key;
  MapGradient& value;
  bool shared;  // key and value are one tensor: the key's gradient holds both
};

// Writes the sums of a tile, [panel][channels padded to 6][16], to the gradient of key or value.
template <typename scalar_t, typename T>
void write_columns(const T* sums, const Map& to, int64_t batch, int64_t first, int64_t count) {
  const int64_t channels = padded(to.channels, kRows);
  scalar_t* const result = data<scalar_t>(to.tensor) + batch * to.batch_stride;
  for (int64_t panel = 0; panel < count; ++panel) {
    const int64_t begin = (first + panel) * kColumns, columns = std::min(kColumns, to.positions - begin);
    const T* const from = sums + panel * channels * kColumns;
    for (int64_t c = 0; c < to.channels; ++c) {
      for (int64_t j = 0; j < columns; ++j) {
        narrow(from[c * kColumns + j], result[c * to.channel_stride + (begin + j) * to.position_stride]);
      }
    }
  }
}

template <typename T>
KDOPS_CLONED void add_to(T* __restrict sum, const T* __restrict other, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] += other[i];
}

// The query's gradient: the sums of all groups [batch][group][rows padded to 6][channels padded to 16], in order.
template <typename scalar_t, typename T>
void write_query(T* sums, const Sizes& sizes, int64_t groups, T scale, const Map& to) {
  const int64_t pitch = padded(sizes.channels, kColumns), size = sizes.row_panels() * kRows * pitch;
  const int64_t blocks = panels(sizes.row_panels(), kBlockPanels), block_rows = kBlockPanels * kRows;
  for_each_task<T>(sizes.batches * blocks, block_rows, [&](int64_t task, T* factors) {
    const int64_t batch = task / blocks, first = task % blocks * block_rows, here = std::min(block_rows, sizes.rows - first);
    T* const total = sums + batch * groups * size + first * pitch;
    for (int64_t group = 1; group < groups; ++group) add_to(total, total + group * size, here * pitch);
    std::fill(factors, factors + here, scale);
    scatter(total, pitch, factors, here, sizes.channels,
            data<scalar_t>(to.tensor) + batch * to.batch_stride + first * to.position_stride, to.position_stride, to.channel_stride);
  });
}

template <typename scalar_t, bool OverRows>
void gradients(const Sizes& sizes, const Map& query, const Map& key, const Map& value, const Map& grad, const Map& out,
               const Accumulator<scalar_t>* statistics, Accumulator<scalar_t> scale, Wanted<scalar_t> wanted) {
  using T = Accumulator<scalar_t>;
  const bool need_query = wanted.query.map.has_value(), need_key = wanted.key.map.has_value();
  const bool want_logits = need_query || need_key, need_value = wanted.value.map.has_value() || (wanted.shared && need_key);
  const bool want_value = need_value || (OverRows && want_logits);
  const int64_t channels = padded(sizes.channels, kRows), value_channels = padded(sizes.value_channels, kRows);
  const int64_t columns = sizes.column_panels() * kColumns, rows = sizes.row_panels() * kRows;

  const auto query_rows = packed_positions<kRows, scalar_t>(query, channels, scale);
  const auto grad_rows = packed_positions<kRows, scalar_t>(grad, value_channels);
  const auto key_columns = packed_positions<kColumns, scalar_t>(key, sizes.channels);
  const auto value_columns = wanted.shared ? nullptr : packed_positions<kColumns, scalar_t>(value, sizes.value_channels);
  const auto key_channels = need_query ? packed_channels<scalar_t>(key) : nullptr;
  const auto padded_stats = padded_statistics(statistics, sizes.batches, OverRows ? sizes.columns : sizes.rows, OverRows ? kColumns : kRows);
  const auto delta = OverRows ? allocate<T>(sizes.batches * columns) : row_delta<scalar_t>(out, grad);

  const int64_t tile = tile_panels<T>(kBackwardTile, 3 * sizes.channels + 2 * sizes.value_channels, sizes.column_panels());
  const int64_t tiles = panels(sizes.column_panels(), tile);
  // A gradient of the query for every group, so there are few; without it every tile is a task of its own.
  const int64_t most_groups = std::clamp<int64_t>(kQueryTasks / sizes.batches, 1, panels(sizes.column_panels(), kShortestGroup));
  const int64_t tiles_per_group = need_query ? panels(tiles, most_groups) : 1;
  const int64_t groups = panels(tiles, tiles_per_group);
  const int64_t query_size = rows * padded(sizes.channels, kColumns);
  const auto query_sums = need_query ? allocate<T>(sizes.batches * groups * query_size) : nullptr;

  const int64_t factors_size = tile * kBlockPanels * kRows * kColumns;
  const int64_t key_size = tile * channels * kColumns, value_size = tile * value_channels * kColumns;
  for_each_task<T>(sizes.batches * groups, 2 * factors_size + key_size + value_size, [&](int64_t task, T* weights) {
    const int64_t batch = task / groups, group = task % groups;
    const T* const keys = key_columns.get() + batch * columns * sizes.channels;
    const Operands<T> from{query_rows.get() + batch * rows * channels,
                           grad_rows.get() + batch * rows * value_channels,
                           keys,
                           key_channels.get() + (need_query ? batch * sizes.packed_channels(sizes.channels) : 0),
                           wanted.shared ? keys : value_columns.get() + batch * columns * sizes.value_channels,
                           padded_stats.get() + batch * (OverRows ? columns : rows),
                           delta.get() + batch * (OverRows ? columns : rows)};
    T* const key_sums = weights + 2 * factors_size;
    TileGradients<T> to{weights, weights + factors_size, need_key ? key_sums : nullptr,
                        wanted.shared ? key_sums : key_sums + key_size,
                        need_query ? query_sums.get() + task * query_size : nullptr};
    if (to.query) std::fill(to.query, to.query + query_size, T(0));
    const int64_t end = std::min((group + 1) * tiles_per_group, tiles);
    for (int64_t first = group * tiles_per_group * tile; first < std::min(end * tile, sizes.column_panels()); first += tile) {
      const int64_t count = std::min(tile, sizes.column_panels() - first);
      std::fill(key_sums, key_sums + key_size + value_size, T(0));
      if (OverRows && want_logits) {  // delta comes from the value's gradient, so that is needed first
        tile_gradients<T, OverRows>(from, sizes, first, count, true, false, to);
        column_delta(from.value_columns + first * sizes.value_channels * kColumns, to.value, sizes.value_channels, count,
                     from.delta + first * kColumns);
        tile_gradients<T, OverRows>(from, sizes, first, count, false, true, to);
      } else {
        tile_gradients<T, OverRows>(from, sizes, first, count, want_value, want_logits, to);
      }
      if (need_key) write_columns<scalar_t>(to.key, *wanted.key.map, batch, first, count);
      if (wanted.value.map) write_columns<scalar_t>(to.value, *wanted.value.map, batch, first, count);
    }
  });
  if (need_query) write_query<scalar_t>(query_sums.get(), sizes, groups, scale, *wanted.query.map);
}

// --- operators -------------------------------------------------------------------------------------------------------------------

Sizes check(const Map& query, const Map& key, const Map& value) {
  STD_TORCH_CHECK(query.tensor.scalar_type() == key.tensor.scalar_type() && key.tensor.scalar_type() == value.tensor.scalar_type(),
                  "kdops: query, key and value differ in dtype.");
  STD_TORCH_CHECK(query.batches == key.batches && key.batches == value.batches && query.channels == key.channels &&
                      key.positions == value.positions,
                  "kdops: query, key and value do not fit together.");
  STD_TORCH_CHECK(query.channels > 0 && value.channels > 0 && query.positions > 0 && key.positions > 0,
                  "kdops: attention needs at least one channel and one position.");
  return {query.batches, query.positions, key.positions, query.channels, value.channels};
}

double scale_or_default(std::optional<double> scale, const Sizes& sizes) {
  return scale ? *scale : 1 / std::sqrt(static_cast<double>(sizes.channels));
}

std::tuple<Tensor, Tensor> spatial_attention(const Tensor& query, const Tensor& key, std::optional<Tensor> value,
                                             std::optional<double> scale, bool over_query) {
  const Map q(query), k(key), v(value ? *value : key);
  const Sizes sizes = check(q, k, v);
  std::vector<int64_t> shape = MapGradient::sizes(query);
  shape[1] = sizes.value_channels;
  Tensor out = torch::stable::new_empty(query, shape);
  Tensor statistics =
      torch::stable::new_empty(query, {sizes.batches, over_query ? sizes.columns : sizes.rows}, accumulator_dtype(query.scalar_type()));
  for_dtype(query.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = Accumulator<scalar_t>;
    const T factor = static_cast<T>(scale_or_default(scale, sizes));
    T* const stats = data<T>(statistics);
    scalar_t* const result = data<scalar_t>(out);
    const auto values = packed_channels<scalar_t>(v);
    const auto rows = packed_positions<kRows, scalar_t>(q, sizes.channels, factor);
    const auto columns = packed_positions<kColumns, scalar_t>(k, sizes.channels);
    if (!over_query) {
      return attend_all<scalar_t, Normalize::kRows>(sizes, rows.get(), columns.get(), values.get(), nullptr, result, stats);
    }
    // Statistics first, with query and key in each other's place; the factor stays with the query, so that the logits have the same bits.
    const Sizes swapped{sizes.batches, sizes.columns, sizes.rows, sizes.channels, 0};
    const auto key_rows = packed_positions<kRows, scalar_t>(k, sizes.channels);
    const auto query_columns = packed_positions<kColumns, scalar_t>(q, sizes.channels, factor);
    attend_all<scalar_t, Normalize::kStatistics>(swapped, key_rows.get(), query_columns.get(), nullptr, nullptr, nullptr, stats);
    const auto known = padded_statistics(stats, sizes.batches, sizes.columns, kColumns);
    attend_all<scalar_t, Normalize::kColumns>(sizes, rows.get(), columns.get(), values.get(), known.get(), result, nullptr);
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> spatial_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                              std::optional<Tensor> value, const Tensor& out, const Tensor& statistics,
                                                              std::optional<double> scale, bool over_query, bool need_query,
                                                              bool need_key, bool need_value) {
  const Map q(query), k(key), v(value ? *value : key), g(grad), o(out);
  const Sizes sizes = check(q, k, v);
  MapGradient grad_query(need_query, query), grad_key(need_key, key), grad_value(need_value, value ? *value : key);
  for_dtype(query.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = Accumulator<scalar_t>;
    if (sizes.batches == 0 || !(need_query || need_key || need_value)) return;
    const auto run = over_query ? gradients<scalar_t, true> : gradients<scalar_t, false>;
    run(sizes, q, k, v, g, o, const_data<T>(statistics), static_cast<T>(scale_or_default(scale, sizes)),
        Wanted<scalar_t>{grad_query, grad_key, grad_value, !value});
  });
  return {grad_query.finish(), grad_key.finish(), grad_value.finish()};
}

}  // namespace
}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("spatial_attention", TORCH_BOX(&kdops::spatial_attention));
  m.impl("spatial_attention_backward", TORCH_BOX(&kdops::spatial_attention_backward));
}
