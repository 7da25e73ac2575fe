// Spatial attention on the CPU, what its two directions share. Rows are positions of the query, columns positions of
// the key; packed operands are described in common/maps.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "common/maps.h"
#include "common/parallel.h"
#include "common/products.h"

namespace kdops::attention {

constexpr int64_t kBlockPanels = 16;  // row panels of a block: 96 rows
constexpr int64_t kLongestTile = 16;  // column panels: 6 rows of a tile fit the L1 cache twice
constexpr int64_t kFewestTasks = 16;  // for the whole batch, so that threads end at about the same time

struct Sizes {
  int64_t batches, rows, columns, channels, value_channels;

  int64_t row_panels() const {
    return panels(rows, kRows);
  }
  int64_t column_panels() const {
    return panels(columns, kColumns);
  }
  // Whether forward keeps the logits for backward: where they are fewer numbers than query and key have
  // (kdops/spatial_attention/spec.py).
  bool keep_logits() const {
    return rows * columns <= (rows + columns) * channels;
  }
  // Numbers of one sample's logits, [N / 6][N / 16][6][16].
  int64_t logits() const {
    return row_panels() * column_panels() * kRows * kColumns;
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

// Panels of a task: `most`, or fewer where that would make few tasks of a batch's `count` panels.
inline int64_t task_panels(int64_t most, int64_t batches, int64_t count) {
  return std::clamp<int64_t>(batches * count / kFewestTasks, 1, most);
}

// What is known of softmaxes: a weight is e^((logit - highest) - log_sum). In one number, the sum of the two, the
// logarithm would be rounded as coarsely as the highest logit.
template <typename T>
struct Softmaxes {
  const T* highest;  // logit
  const T* log_sum;  // logarithm of the sum of e^(logit - highest)

  // Those of one sample in statistics (batches, 2, count).
  static Softmaxes of(const T* statistics, int64_t batch, int64_t count) {
    return {statistics + 2 * batch * count, statistics + (2 * batch + 1) * count};
  }
  KDOPS_INLINE Softmaxes from(int64_t n) const {
    return {highest + n, log_sum + n};
  }
};

// Statistics (batches, 2, count) with `count` padded with zeros to a multiple of `width`.
template <typename T>
Buffer<T> padded_statistics(const T* statistics, int64_t batches, int64_t count, int64_t width) {
  const int64_t pitch = padded(count, width);
  Buffer<T> copy = allocate<T>(2 * batches * pitch);
  std::fill(copy.get(), copy.get() + 2 * batches * pitch, T(0));
  for (int64_t b = 0; b < 2 * batches; ++b) std::copy_n(statistics + b * count, count, copy.get() + b * pitch);
  return copy;
}

// result(row, channel) = numbers[row * pitch + channel] * factors[row]; few rows at a time, which stay in the L1 cache
template <typename scalar_t, typename T>
KDOPS_CLONED void scatter(const T* numbers, int64_t pitch, const T* factors, int64_t rows, int64_t channels,
                          scalar_t* result, int64_t row_stride, int64_t channel_stride) {
  for (int64_t begin = 0; begin < rows; begin += kColumns) {
    const int64_t end = std::min(begin + kColumns, rows);
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = begin; i < end; ++i)
        narrow(numbers[i * pitch + c] * factors[i], result[i * row_stride + c * channel_stride]);
    }
  }
}

}  // namespace kdops::attention
