// Cross-entropy between two softmaxes over a codebook, on the CPU: what is done to a block of rows.
//
// A block is some rows (positions of student and teacher). Its logits against all codes stay in cache, where they turn
// into softmaxes, then weights of the codes, then products.
// With logits (2 features.e - e.e) / t, p and q the softmaxes of student and teacher, x the student's logits - maximum:
//
//   loss    : log(sum exp(x)) - sum q x, where no term is negative: nothing cancels, however large the logits
//   student : sum (p - q) e    teacher : sum q (sum q x - x) e    (times 2 / t): kept by the forward pass, one per row
#pragma once

#include <limits>

#include "common/maps.h"
#include "common/products.h"

namespace kdops::codebook {

constexpr int64_t kMostPanels = 8;        // row panels of a block: 48 rows of the student, and of the teacher
constexpr int64_t kLogitBytes = 4 << 20;  // of a block, roughly: with many codes its rows are fewer
constexpr int64_t kChunk = 16;            // panels of codes that pass at once: 16 channels of them fit the L1 cache
constexpr int64_t kBlock = kRows * kColumns;

// M rows of D channels, of any strides.
template <typename scalar_t>
struct Rows {
  scalar_t* values;
  int64_t count, channels, positions, batch_stride, position_stride, channel_stride;

  explicit Rows(const Map& map)
      : values(static_cast<scalar_t*>(const_cast<void*>(map.tensor.const_data_ptr()))),
        count(map.batches * map.positions),
        channels(map.channels),
        positions(map.positions),
        batch_stride(map.batch_stride),
        position_stride(map.position_stride),
        channel_stride(map.channel_stride) {}

  KDOPS_INLINE scalar_t* at(int64_t row) const {
    return values + row / positions * batch_stride + row % positions * position_stride;
  }
};

struct Sizes {
  int64_t rows, channels, codes, panels_of_block;

  template <typename T>
  static Sizes of(int64_t rows, int64_t channels, int64_t codes) {
    const int64_t fits = kLogitBytes / static_cast<int64_t>(2 * sizeof(T)) / padded(codes, kColumns) / kRows;
    const int64_t most = std::clamp<int64_t>(fits, 1, kMostPanels), all = panels(rows, kRows);
    return {rows, channels, codes, all ? panels(all, panels(all, most)) : 0};
  }

  int64_t code_panels() const {
    return panels(codes, kColumns);
  }
  int64_t block_rows() const {
    return panels_of_block * kRows;
  }
  int64_t blocks() const {
    return rows ? panels(rows, block_rows()) : 0;
  }
  // Channels of a packed row: a last one of ones sums up what the others are weighted with.
  int64_t row_channels() const {
    return padded(channels + 1, kRows);
  }
  // Numbers of a block of both networks in a panel of codes. One row more than there is, or the panels would meet in
  // few sets of the L1 cache.
  int64_t pitch() const {
    return (2 * block_rows() + 1) * kColumns;
  }
  int64_t logits() const {
    return code_panels() * pitch();
  }
  int64_t packed_rows() const {
    return 2 * block_rows() * row_channels();
  }
  int64_t packed_row_panel() const {
    return row_channels() * kRows;
  }
};

template <typename T>
struct Codes {
  Buffer<T> columns;  // [codes / 16][channels][16]
  Buffer<T> offsets;  // -e.e / t of each code; -infinity where there is none
  Buffer<T> values;   // [channels / 16][codes padded to 16][16]; null where no sum of codes is wanted
  T factor;           // 2 / t

  template <typename scalar_t>
  static Codes of(const Map& codebook, double temperature, bool want_values) {
    Map map = codebook;  // (K, D): codes are its positions
    std::swap(map.batches, map.positions);
    std::swap(map.batch_stride, map.position_stride);
    const int64_t count = map.positions, all = padded(count, kColumns);
    Codes codes{packed_positions<kColumns, scalar_t>(map, map.channels), allocate<T>(all),
                want_values ? packed_channels<scalar_t>(map) : nullptr, static_cast<T>(2 / temperature)};
    for (int64_t first = 0; first < all; first += kColumns) {
      const T* const panel = codes.columns.get() + first * map.channels;
      double squares[kColumns] = {};
      for (int64_t at = 0; at < map.channels * kColumns; ++at) {
        squares[at % kColumns] += static_cast<double>(panel[at]) * panel[at];
      }
      for (int64_t i = 0; i < kColumns; ++i) {
        codes.offsets[first + i] =
            first + i < count ? static_cast<T>(-squares[i] / temperature) : -std::numeric_limits<T>::infinity();
      }
    }
    return codes;
  }
};

// Softmaxes of M rows: maximum of the logits, sum of the exponentials of logits - maximum, and the teacher's mean of
// the student's logits - maximum.
template <typename number>
struct Statistics {
  number *student_maximum, *student_sum, *teacher_maximum, *teacher_sum, *expected;

  Statistics(number* numbers, int64_t rows)
      : student_maximum(numbers),
        student_sum(numbers + rows),
        teacher_maximum(numbers + 2 * rows),
        teacher_sum(numbers + 3 * rows),
        expected(numbers + 4 * rows) {}
};

// --- a block ---

// [panel][channel][6] of rows from `first` on, zero where there is none.
template <typename scalar_t, typename T>
KDOPS_CLONED void pack_rows(const Rows<scalar_t>& rows, int64_t first, const Sizes& sizes, T* to) {
  const int64_t channels = sizes.channels, size = sizes.packed_row_panel();
  for (int64_t panel = 0; panel < sizes.panels_of_block; ++panel, first += kRows, to += size) {
    const int64_t here = std::clamp<int64_t>(rows.count - first, 0, kRows);
    std::fill(to + (here < kRows ? 0 : channels) * kRows, to + size, T(0));
    const scalar_t* from[kRows];
    for (int64_t i = 0; i < here; ++i) {
      from[i] = rows.at(first + i);
      to[channels * kRows + i] = 1;
    }
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t i = 0; i < here; ++i) to[c * kRows + i] = widen(from[i][c * rows.channel_stride]);
    }
  }
}

// Logits [panel of codes][row panels of student and teacher][6][16].
template <typename T>
KDOPS_CLONED void block_logits(const T* rows, const Codes<T>& codes, const Sizes& sizes, T* logits) {
  for (int64_t panel = 0; panel < sizes.code_panels(); ++panel) {
    const T* const offsets = codes.offsets.get() + panel * kColumns;
    for (int64_t i = 0; i < 2 * sizes.panels_of_block; ++i) {
      Block<T> block;
      clear(block);
      multiply_add<1, 1>(block, rows + i * sizes.packed_row_panel(), kRows, sizes.channels,
                         codes.columns.get() + panel * sizes.channels * kColumns);
      for (int64_t row = 0; row < kRows; ++row) {
        for (int64_t v = 0; v < kVectors<T>; ++v) {
          block.at[row][v] = block.at[row][v] * codes.factor + vector(offsets + v * kLanes<T>);
        }
      }
      store(block, logits + panel * sizes.pitch() + i * kBlock, kColumns);
    }
  }
}

// The largest logit of a row. Those of codes that do not exist are then finite, so that a weight of 0 removes them.
template <typename T>
KDOPS_INLINE T row_maximum(T* logits, const Sizes& sizes) {
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  Vector<T> largest[kVectors<T>];
  for (Vector<T>& lanes : largest) lanes = Vector<T>{} + kNothing;
  for (int64_t panel = 0; panel < sizes.code_panels(); ++panel) {
    for (int64_t v = 0; v < kVectors<T>; ++v) {
      const Vector<T>& logit = vector(logits + panel * sizes.pitch() + v * kLanes<T>);
      largest[v] = logit > largest[v] ? logit : largest[v];
    }
  }
  T maximum = kNothing;
  for (const Vector<T>& lanes : largest) maximum = std::max(maximum, largest_of_lanes<T>(lanes));
  T* const last = logits + (sizes.code_panels() - 1) * sizes.pitch();
  std::fill(last + (sizes.codes - 1) % kColumns + 1, last + kColumns, std::numeric_limits<T>::lowest());
  return maximum;
}

// Statistics of `count` rows from `first` on.
template <typename T>
KDOPS_CLONED void block_statistics(T* logits, const Sizes& sizes, int64_t first, int64_t count, Statistics<T> to) {
  for (int64_t row = 0; row < count; ++row) {
    T* const student = logits + row * kColumns;
    T* const teacher = student + sizes.block_rows() * kColumns;
    const T student_maximum = row_maximum(student, sizes), teacher_maximum = row_maximum(teacher, sizes);
    T student_sum = 0, teacher_sum = 0, expected = 0;
    for (int64_t begin = 0; begin < sizes.code_panels(); begin += kChunk) {
      Vector<T> p_sum = {}, q_sum = {}, product_sum = {};
      for (int64_t panel = begin; panel < std::min(begin + kChunk, sizes.code_panels()); ++panel) {
        for (int64_t at = panel * sizes.pitch(); at < panel * sizes.pitch() + kColumns; at += kLanes<T>) {
          const Vector<T> x = vector(student + at) - student_maximum;
          Vector<T> p = x, q = vector(teacher + at) - teacher_maximum;
          exponential(p);
          exponential(q);
          p_sum += p;
          q_sum += q;
          product_sum += q * x;
        }
      }
      student_sum += sum_of_lanes<T>(p_sum);
      teacher_sum += sum_of_lanes<T>(q_sum);
      expected += sum_of_lanes<T>(product_sum);
    }
    to.student_maximum[first + row] = student_maximum;
    to.student_sum[first + row] = student_sum;
    to.teacher_maximum[first + row] = teacher_maximum;
    to.teacher_sum[first + row] = teacher_sum;
    to.expected[first + row] = expected / teacher_sum;
  }
}

// Logits to the weights of the codes in the gradients of student and teacher, times `upstream` of each row, if given.
template <typename T>
KDOPS_CLONED void block_weights(T* logits, const Sizes& sizes, int64_t first, int64_t count,
                                Statistics<const T> from, const T* upstream) {
  for (int64_t row = 0; row < count; ++row) {
    T* const student = logits + row * kColumns;
    T* const teacher = student + sizes.block_rows() * kColumns;
    const T student_maximum = from.student_maximum[first + row], teacher_maximum = from.teacher_maximum[first + row];
    const T factor = upstream ? upstream[first + row] : T(1), expected = from.expected[first + row];
    const T student_factor = factor / from.student_sum[first + row];
    const T teacher_factor = factor / from.teacher_sum[first + row];
    for (int64_t panel = 0; panel < sizes.code_panels(); ++panel) {
      for (int64_t at = panel * sizes.pitch(); at < panel * sizes.pitch() + kColumns; at += kLanes<T>) {
        const Vector<T> x = vector(student + at) - student_maximum;
        Vector<T> p = x, q = vector(teacher + at) - teacher_maximum;
        exponential(p);
        exponential(q);
        q *= teacher_factor;
        vector(student + at) = p * student_factor - q;
        vector(teacher + at) = q * (expected - x);
      }
    }
  }
}

// Onto sums in memory: with many codes or rows, adding up chunks loses fewer digits than one long sum.
template <typename T>
KDOPS_INLINE void add(const Block<T>& block, T* to, int64_t row_stride) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVectors<T>; ++v) vector(to + i * row_stride + v * kLanes<T>) += block.at[i][v];
  }
}

// sums (rows of a block, channels padded to 16) = weights @ codes
template <typename T>
KDOPS_CLONED void weighted_codes(const T* weights, const T* values, const Sizes& sizes, T* sums) {
  const int64_t width = padded(sizes.channels, kColumns), depth = sizes.code_panels() * kColumns;
  std::fill(sums, sums + sizes.block_rows() * width, T(0));
  for (int64_t first = 0; first < sizes.code_panels(); first += kChunk) {
    const int64_t count = std::min(kChunk, sizes.code_panels() - first);
    for (int64_t c = 0; c < width; c += kColumns) {
      for (int64_t i = 0; i < sizes.panels_of_block; ++i) {
        T* const to = sums + i * kRows * width + c;
        Block<T> block;
        clear(block);
        multiply_add<kColumns, kColumns>(block, weights + first * sizes.pitch() + i * kBlock, sizes.pitch(), count,
                                         values + (c * depth / kColumns + first * kColumns) * kColumns);
        add(block, to, width);
      }
    }
  }
}

// sums [panel of codes][channels][16] += packed rows of both networks, transposed, times their weights
template <typename T>
KDOPS_CLONED void add_weighted_rows(const T* rows, const T* weights, const Sizes& sizes, T* sums) {
  const int64_t channels = sizes.row_channels();
  for (int64_t panel = 0; panel < sizes.code_panels(); ++panel) {
    for (int64_t c = 0; c < channels; c += kRows) {
      T* const to = sums + (panel * channels + c) * kColumns;
      Block<T> block;
      clear(block);
      multiply_add<kRows, kRows>(block, rows + c * kRows, channels * kRows, 2 * sizes.panels_of_block,
                                 weights + panel * sizes.pitch());
      add(block, to, kColumns);
    }
  }
}

}  // namespace kdops::codebook
