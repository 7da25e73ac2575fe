// Spatial attention on the CPU, backward.
//
// A task is a run of key tiles of one sample. Weights and their gradients come straight out of the products' registers
// (the statistics of the softmax are known), and are summed over a block of query positions at once for the gradients
// of key and value. The gradient of the query is summed within each task, and then over the tasks in order: how many
// there are follows from the shape.
#pragma once

#include <optional>

#include "spatial_attention.h"

namespace kdops::attention {

constexpr int64_t kBackwardTile = 500 << 10;  // bytes of packed keys, values and their gradients in a tile
constexpr int64_t kQueryTasks = 16;           // for the whole batch, where each task sums a query gradient of its own
constexpr int64_t kShortestGroup = 8;         // column panels of such a task

// Numbers of a block in a column panel. One row more than there is, or the panels would meet in few sets of the L1
// cache.
constexpr int64_t kFactors = (kBlockPanels * kRows + 1) * kColumns;

template <typename T>
struct Operands {          // of one sample, packed
  const T* logits;         // null where forward has not kept them
  const T* query_rows;     // where the logits are not kept, or the key needs a gradient
  const T* grad_rows;  // of the result
  const T* key_columns;    // where the logits are not kept, or the key is the value
  const T* key_channels;  // only where the query needs a gradient
  const T* value_columns;
  Softmaxes<T> softmaxes;
  T* delta;  // sum of weights times their gradients; of rows it is given, of columns it is computed here
};

template <typename T>
struct TileGradients {
  T* weights;  // [panel][96 rows and one][16], of the block at hand
  T* logits;   // gradient of the logits, likewise
  T* key;      // [panel][channels padded to 6][16]; null where not wanted
  T* value;    // likewise; the same memory as `key` where the two are one tensor
  T* query;    // (all rows, channels padded to 16); null where not wanted
};

// Weights of 6 rows and a panel, straight from the product's registers.
template <typename T, bool OverRows>
KDOPS_INLINE void logits_to_weights(Block<T>& block, Softmaxes<T> softmaxes) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVectors<T>; ++v) {
      Vector<T>& logit = block.at[i][v];
      if constexpr (OverRows) {
        const Softmaxes<T> columns = softmaxes.from(v * kLanes<T>);
        logit = (logit - vector(columns.highest)) - vector(columns.log_sum);
      } else {
        logit = (logit - softmaxes.highest[i]) - softmaxes.log_sum[i];
      }
      exponential(logit);
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
KDOPS_INLINE void row_panel_gradients(const Operands<T>& from, const Sizes& sizes, int64_t row_panel, int64_t first,
                                      int64_t count, bool want_logits, T* weights, T* logits) {
  const int64_t row = row_panel * kRows;
  const int64_t channels = padded(sizes.channels, kRows), value_channels = padded(sizes.value_channels, kRows);
  for (int64_t panel = first; panel < first + count; ++panel) {
    const int64_t statistic = OverRows ? panel * kColumns : row;
    const int64_t at = (panel - first) * kFactors;
    const bool whole = row + kRows <= sizes.rows && (panel + 1) * kColumns <= sizes.columns;
    Block<T> weight;
    if (from.logits) {
      load(weight, from.logits + (row_panel * sizes.column_panels() + panel) * kRows * kColumns, kColumns);
    } else {
      clear(weight);
      multiply_add<1, 1>(weight, from.query_rows + row * channels, kRows, sizes.channels,
                         from.key_columns + panel * sizes.channels * kColumns);
    }
    logits_to_weights<T, OverRows>(weight, from.softmaxes.from(statistic));
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

// sums [panel][channels padded to 6][16] += packed rows of a block, transposed, times `factors` [panel][rows][16]
template <typename T>
KDOPS_INLINE void add_over_rows(const T* packed_rows, int64_t channels, int64_t row_panels, const T* factors,
                                int64_t count, T* sums) {
  for (int64_t c = 0; c < channels; c += kRows) {
    for (int64_t panel = 0; panel < count; ++panel) {
      T* const to = sums + (panel * channels + c) * kColumns;
      Block<T> block;
      load(block, to, kColumns);
      multiply_add<kRows, kRows>(block, packed_rows + c * kRows, channels * kRows, row_panels,
                                 factors + panel * kFactors);
      store(block, to, kColumns);
    }
  }
}

// All rows against the tile of `count` column panels from `first` on.
template <typename T, bool OverRows>
KDOPS_CLONED void tile_gradients(const Operands<T>& from, const Sizes& sizes, int64_t first, int64_t count,
                                 bool want_value, bool want_logits, TileGradients<T> to) {
  const int64_t positions = sizes.column_panels() * kColumns;
  const int64_t channels = padded(sizes.channels, kRows), value_channels = padded(sizes.value_channels, kRows);
  const int64_t query_panels = panels(sizes.channels, kColumns), pitch = query_panels * kColumns;
  for (int64_t block = 0; block < sizes.row_panels(); block += kBlockPanels) {
    const int64_t here = std::min(kBlockPanels, sizes.row_panels() - block);
    for (int64_t panel = 0; panel < here; ++panel) {
      T* const logits = to.logits + panel * kRows * kColumns;
      row_panel_gradients<T, OverRows>(from, sizes, block + panel, first, count, want_logits,
                                       to.weights + panel * kRows * kColumns, logits);
      for (int64_t c = 0; want_logits && to.query && c < query_panels; ++c) {
        T* const sums = to.query + (block + panel) * kRows * pitch + c * kColumns;
        Block<T> sum;
        load(sum, sums, pitch);
        multiply_add<kColumns, kColumns>(sum, logits, kFactors, count,
                                         from.key_channels + (c * positions + first * kColumns) * kColumns);
        store(sum, sums, pitch);
      }
    }
    if (want_value) {
      add_over_rows(from.grad_rows + block * value_channels * kRows, value_channels, here, to.weights, count, to.value);
    }
    if (want_logits && to.key) {
      add_over_rows(from.query_rows + block * channels * kRows, channels, here, to.logits, count, to.key);
    }
  }
}

// delta of the columns of a tile: the value times its gradient, summed over the channels.
template <typename T>
KDOPS_CLONED void column_delta(const T* value_columns, const T* value_gradient, int64_t channels, int64_t count,
                               T* delta) {
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

// Writes the sums of a tile, [panel][channels padded to 6][16], to the gradient of key or value.
template <typename scalar_t, typename T>
void write_columns(const T* sums, const Map& to, int64_t batch, int64_t first, int64_t count) {
  const int64_t channels = padded(to.channels, kRows);
  scalar_t* const result = data<scalar_t>(to.tensor) + batch * to.batch_stride;
  for (int64_t c = 0; c < to.channels; ++c) {
    for (int64_t panel = 0; panel < count; ++panel) {
      const int64_t begin = (first + panel) * kColumns, columns = std::min(kColumns, to.positions - begin);
      const T* const from = sums + (panel * channels + c) * kColumns;
      for (int64_t j = 0; j < columns; ++j) {
        narrow(from[j], result[c * to.channel_stride + (begin + j) * to.position_stride]);
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
    const int64_t batch = task / blocks, first = task % blocks * block_rows;
    const int64_t here = std::min(block_rows, sizes.rows - first);
    T* const total = sums + batch * groups * size + first * pitch;
    for (int64_t group = 1; group < groups; ++group) add_to(total, total + group * size, here * pitch);
    std::fill(factors, factors + here, scale);
    scatter(total, pitch, factors, here, sizes.channels,
            data<scalar_t>(to.tensor) + batch * to.batch_stride + first * to.position_stride, to.position_stride,
            to.channel_stride);
  });
}

struct Given {
  const Map &query, &key, &value, &grad, &out;
  bool shared;  // key and value are one tensor, whose gradient as key holds both
};

// Where to write each gradient; none where it is not wanted.
struct Wanted {
  const std::optional<Map>&query, &key, &value;
};

template <typename scalar_t, bool OverRows>
class PackedOperands {
  using T = Accumulator<scalar_t>;
  const Sizes& sizes;
  const T* const logits;
  const Buffer<T> query_rows, grad_rows, key_columns, key_channels, value_columns, statistics, delta;

 public:
  PackedOperands(const Sizes& sizes, const Given& given, const T* statistics, const T* logits, T scale, bool need_query,
                 bool need_key)
      : sizes(sizes),
        logits(logits),
        query_rows(logits && !need_key
                       ? nullptr
                       : packed_positions<kRows, scalar_t>(given.query, padded(sizes.channels, kRows), scale)),
        grad_rows(packed_positions<kRows, scalar_t>(given.grad, padded(sizes.value_channels, kRows))),
        key_columns(logits && !given.shared ? nullptr
                                            : packed_positions<kColumns, scalar_t>(given.key, sizes.channels)),
        key_channels(need_query ? packed_channels<scalar_t>(given.key) : nullptr),
        value_columns(given.shared ? nullptr : packed_positions<kColumns, scalar_t>(given.value, sizes.value_channels)),
        statistics(OverRows ? padded_statistics(statistics, sizes.batches, sizes.columns, kColumns)
                            : padded_statistics(statistics, sizes.batches, sizes.rows, kRows)),
        delta(OverRows ? allocate<T>(sizes.batches * sizes.column_panels() * kColumns)
                       : row_delta<scalar_t>(given.out, given.grad)) {
  }

  Operands<T> of(int64_t batch) const {
    const int64_t rows_padded = sizes.row_panels() * kRows, columns_padded = sizes.column_panels() * kColumns;
    const int64_t rows = batch * rows_padded, columns = batch * columns_padded;
    const T* const keys = key_columns ? key_columns.get() + columns * sizes.channels : nullptr;
    return {logits ? logits + batch * sizes.logits() : nullptr,
            query_rows ? query_rows.get() + rows * padded(sizes.channels, kRows) : nullptr,
            grad_rows.get() + rows * padded(sizes.value_channels, kRows),
            keys,
            key_channels ? key_channels.get() + batch * sizes.packed_channels(sizes.channels) : nullptr,
            value_columns ? value_columns.get() + columns * sizes.value_channels : keys,
            Softmaxes<T>::of(statistics.get(), batch, OverRows ? columns_padded : rows_padded),
            delta.get() + (OverRows ? columns : rows)};
  }
};

template <typename scalar_t, bool OverRows>
void gradients(const Sizes& sizes, const Given& given, const Accumulator<scalar_t>* statistics,
               const Accumulator<scalar_t>* logits, Accumulator<scalar_t> scale, const Wanted& wanted) {
  using T = Accumulator<scalar_t>;
  const bool need_query = wanted.query.has_value(), need_key = wanted.key.has_value();
  const bool want_logits = need_query || need_key, want_value = wanted.value || (given.shared && need_key);
  const PackedOperands<scalar_t, OverRows> packed(sizes, given, statistics, logits, scale, need_query, need_key);

  const int64_t numbers = 3 * sizes.channels + 2 * sizes.value_channels;  // packed and summed, of each column
  const int64_t most = tile_panels<T>(kBackwardTile, numbers, sizes.column_panels());
  // A gradient of the query for every group, so there are few; without it every tile is a task of its own.
  const int64_t most_groups =
      std::clamp<int64_t>(kQueryTasks / sizes.batches, 1, panels(sizes.column_panels(), kShortestGroup));
  const int64_t tile = need_query ? std::min(most, panels(sizes.column_panels(), most_groups))
                                  : task_panels(most, sizes.batches, sizes.column_panels());
  const int64_t tiles = panels(sizes.column_panels(), tile);
  const int64_t tiles_per_group = need_query ? panels(tiles, most_groups) : 1, groups = panels(tiles, tiles_per_group);
  const int64_t query_size = sizes.row_panels() * kRows * padded(sizes.channels, kColumns);
  const Buffer<T> query_sums = need_query ? allocate<T>(sizes.batches * groups * query_size) : nullptr;

  const int64_t factors_size = tile * kFactors;
  const int64_t key_size = tile * padded(sizes.channels, kRows) * kColumns;
  const int64_t value_size = tile * padded(sizes.value_channels, kRows) * kColumns;
  const int64_t scratch_size = 2 * factors_size + key_size + value_size;
  for_each_task<T>(sizes.batches * groups, scratch_size, [&](int64_t task, T* scratch) {
    const int64_t batch = task / groups, begin = task % groups * tiles_per_group * tile;
    const int64_t end = std::min(begin + tiles_per_group * tile, sizes.column_panels());
    const Operands<T> from = packed.of(batch);
    T* const key_sums = scratch + 2 * factors_size;
    T* const value_sums = given.shared ? key_sums : key_sums + key_size;
    const TileGradients<T> to{scratch, scratch + factors_size, need_key ? key_sums : nullptr, value_sums,
                              need_query ? query_sums.get() + task * query_size : nullptr};
    if (need_query) std::fill(to.query, to.query + query_size, T(0));
    for (int64_t first = begin; first < end; first += tile) {
      const int64_t count = std::min(tile, end - first);
      std::fill(key_sums, scratch + scratch_size, T(0));
      if (OverRows && want_logits) {  // delta comes from the value's gradient, so that is needed first
        tile_gradients<T, OverRows>(from, sizes, first, count, true, false, to);
        column_delta(from.value_columns + first * sizes.value_channels * kColumns, value_sums, sizes.value_channels,
                     count, from.delta + first * kColumns);
        tile_gradients<T, OverRows>(from, sizes, first, count, false, true, to);
      } else {
        tile_gradients<T, OverRows>(from, sizes, first, count, want_value, want_logits, to);
      }
      if (need_key) write_columns<scalar_t>(key_sums, *wanted.key, batch, first, count);
      if (wanted.value) write_columns<scalar_t>(value_sums, *wanted.value, batch, first, count);
    }
  });
  if (need_query) write_query<scalar_t>(query_sums.get(), sizes, groups, scale, *wanted.query);
}

}  // namespace kdops::attention
