// Tiles of feature maps for csrc/channel_attention.cpp: how they are packed, turned, multiplied and written back.
//
// A tile is some positions of one head of one sample, packed as [positions / 16][channels][16]: so it is the right operand of a product
// with a matrix and the left one of a product summed over positions, whose right operand is the same tile turned to
// [channels / 16][positions][16].
#pragma once

#include <type_traits>
#include <utility>

#include "common/maps.h"
#include "common/parallel.h"
#include "common/products.h"

namespace kdops {
namespace {

constexpr int64_t kTileNumbers = 1 << 16;  // of one operand of a tile: 256 KiB in float
constexpr int64_t kLongestTile = 256;      // positions
constexpr int64_t kSummedPanels = 8;  // of 16 positions
constexpr int64_t kShortestChunk = 1024;
constexpr int64_t kMostChunks = 32;

// One head of all samples' feature maps (B, C, N) is a map of C / heads channels.
template <typename scalar_t>
struct Heads {
  scalar_t* values;
  int64_t heads, channels, positions;
  int64_t batch_stride, channel_stride, position_stride;

  Heads(const Tensor& t, int64_t heads)
      : values(static_cast<scalar_t*>(const_cast<void*>(t.const_data_ptr()))),
        heads(heads),
        channels(t.size(1) / heads),
        positions(t.size(2)),
        batch_stride(t.stride(0)),
        channel_stride(t.stride(1)),
        position_stride(t.stride(2)) {}

  // Where channel `channel` and position `position` of a head lie; heads of all samples are numbered in one row.
  scalar_t* at(int64_t head, int64_t channel, int64_t position) const {
    return values + head / heads * batch_stride + (head % heads * channels + channel) * channel_stride + position * position_stride;
  }
};

struct Chunks {
  int64_t positions, tile, chunk, count;

  Chunks(int64_t positions, int64_t channels) : positions(positions) {
    tile = std::clamp<int64_t>(kTileNumbers / channels / kColumns * kColumns, kColumns, kLongestTile);
    chunk = padded(std::max(kShortestChunk, panels(positions, kMostChunks)), tile);
    count = panels(positions, chunk);
  }
};

// Calls run(first position, positions) for the tiles of a chunk.
template <typename Run>
KDOPS_INLINE void for_each_tile(const Chunks& chunks, int64_t chunk, const Run& run) {
  const int64_t end = std::min((chunk + 1) * chunks.chunk, chunks.positions);
  for (int64_t begin = chunk * chunks.chunk; begin < end; begin += chunks.tile) run(begin, std::min(chunks.tile, end - begin));
}

// --- tiles -----------------------------------------------------------------------------------------------------------------------

// [positions / 16][padded_channels][16] of a head, zero where there is nothing. Reads along what is contiguous: of rows of positions a
// short run at a time (longer ones would write to one set of the L1 cache), while the next run of the row is fetched.
template <typename scalar_t, typename T>
KDOPS_CLONED void pack_tile(const Heads<scalar_t>& maps, int64_t head, int64_t begin, int64_t count, int64_t padded_channels, T* to) {
  constexpr int64_t kRun = 8 * kColumns, kLine = 64 / sizeof(scalar_t);
  const scalar_t* const from = maps.at(head, 0, begin);
  const int64_t size = padded_channels * kColumns;
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t last = std::min(first + kRun, count), whole = last / kColumns * kColumns;
    for (int64_t c = 0; c < maps.channels && maps.position_stride == 1; ++c) {
      const scalar_t* const row = from + c * maps.channel_stride;
      for (int64_t line = last; line < last + kRun; line += kLine) __builtin_prefetch(row + line);
      for (int64_t t = first; t < whole; t += kColumns) {
        const scalar_t* __restrict source = row + t;
        T* __restrict target = to + t / kColumns * size + c * kColumns;
#pragma omp simd
        for (int64_t i = 0; i < kColumns; ++i) target[i] = widen(source[i]);
      }
      for (int64_t t = whole; t < padded(last, kColumns); ++t) {
        to[whole / kColumns * size + c * kColumns + t - whole] = t < last ? widen(row[t]) : T(0);
      }
    }
    for (int64_t t = first; t < padded(last, kColumns) && maps.position_stride != 1; ++t) {
      T* const column = to + t / kColumns * size + t % kColumns;
      for (int64_t c = 0; c < maps.channels; ++c) {
        column[c * kColumns] = t < last ? widen(from[t * maps.position_stride + c * maps.channel_stride]) : T(0);
      }
    }
    for (int64_t t = first; t < last; t += kColumns) {
      std::fill(to + t / kColumns * size + maps.channels * kColumns, to + (t / kColumns + 1) * size, T(0));
    }
  }
}

// Lanes whose number has the bit `Step` are exchanged between two rows: the step of a transposition of kLanes x kLanes.
template <int Step, typename T, size_t... Lane>
KDOPS_INLINE void exchange(Vector<T>& a, Vector<T>& b, std::index_sequence<Lane...>) {
  constexpr int kCount = sizeof...(Lane);
  const Vector<T> first = __builtin_shufflevector(a, b, (Lane & Step ? kCount + Lane - Step : Lane)...);
  b = __builtin_shufflevector(a, b, (Lane & Step ? kCount + Lane : Lane + Step)...);
  a = first;
}

template <int Step, typename T>
KDOPS_INLINE void transpose(Vector<T>* rows) {
  if constexpr (Step > 0) {
    for (int64_t i = 0; i < kLanes<T>; ++i) {
      if (!(i & Step)) exchange<Step, T>(rows[i], rows[i + Step], std::make_index_sequence<kLanes<T>>{});
    }
    transpose<Step / 2, T>(rows);
  }
}

// From [positions / 16][channels padded to 16][16] to [channels / 16][positions][16].
template <typename T>
KDOPS_CLONED void turn_tile(const T* tile, int64_t position_panels, int64_t channel_panels, T* to) {
  constexpr int64_t kSquare = kLanes<T>;
  for (int64_t panel = 0; panel < position_panels; ++panel) {
    for (int64_t c = 0; c < channel_panels; ++c) {
      const T* const from = tile + (panel * channel_panels + c) * kColumns * kColumns;
      T* const block = to + (c * position_panels + panel) * kColumns * kColumns;
      for (int64_t i = 0; i < kColumns; i += kSquare) {
        for (int64_t j = 0; j < kColumns; j += kSquare) {
          Vector<T> rows[kSquare];
          for (int64_t row = 0; row < kSquare; ++row) rows[row] = vector(from + (i + row) * kColumns + j);
          transpose<kSquare / 2, T>(rows);
          for (int64_t row = 0; row < kSquare; ++row) vector(block + (j + row) * kColumns + i) = rows[row];
        }
      }
    }
  }
}

template <typename T>
KDOPS_INLINE void add(Block<T>& block, const Block<T>& other, T factor) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVectors<T>; ++v) block.at[i][v] += factor * other.at[i][v];
  }
}

// sums (rows padded to 6, columns padded to 16) += tile @ turned^T, over the positions of a tile; `pitch` channels of `tile` a panel.
// A few panels are summed apart before they are added: the error of a sum grows with the root of its length.
template <typename T>
KDOPS_CLONED void add_gram(const T* tile, int64_t rows, int64_t pitch, const T* turned, int64_t columns, int64_t position_panels, T* sums) {
  const int64_t width = padded(columns, kColumns);
  for (int64_t j = 0; j < columns; j += kColumns) {
    const T* const right = turned + j * position_panels * kColumns;
    for (int64_t i = 0; i < rows; i += kRows) {
      for (int64_t panel = 0; panel < position_panels; panel += kSummedPanels) {
        Block<T> block, before;
        clear(block);
        multiply_add<kColumns, kColumns>(block, tile + (panel * pitch + i) * kColumns, pitch * kColumns,
                                         std::min(kSummedPanels, position_panels - panel), right + panel * kColumns * kColumns);
        load(before, sums + i * width + j, width);
        add(block, before, T(1));
        store(block, sums + i * width + j, width);
      }
    }
  }
}

// use(row, position, block of matrix @ tile) for all blocks; `matrix` is packed as [rows / 6][channels][6].
template <typename T, typename Use>
KDOPS_INLINE void for_each_product(const T* matrix, int64_t rows, int64_t channels, const T* tile, int64_t pitch, int64_t count,
                                   const Use& use) {
  for (int64_t t = 0; t < count; t += kColumns) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Block<T> block;
      clear(block);
      multiply_add<1, 1>(block, matrix + i * channels, kRows, channels, tile + t * pitch);
      use(i, t, block);
    }
  }
}

// A block that is part of a map: its numbers and where they lie.
template <typename scalar_t>
struct Place {
  scalar_t* values;
  int64_t channel_stride, position_stride, rows, columns;

  Place(const Heads<scalar_t>& maps, int64_t head, int64_t channel, int64_t position, int64_t end)
      : values(maps.at(head, channel, position)),
        channel_stride(maps.channel_stride),
        position_stride(maps.position_stride),
        rows(std::min(kRows, maps.channels - channel)),
        columns(std::min(kColumns, end - position)) {}

  // Whether rows of a block lie in memory as in registers.
  template <typename T>
  KDOPS_INLINE bool direct() const {
    return std::is_same_v<scalar_t, T> && rows == kRows && columns == kColumns && position_stride == 1;
  }

  // The numbers, zero where there are none.
  template <typename T>
  KDOPS_INLINE void read(Block<T>& block) const {
    if (direct<T>()) {
      for (int64_t i = 0; i < kRows; ++i) __builtin_memcpy(block.at[i], values + i * channel_stride, sizeof(block.at[i]));
      return;
    }
    alignas(64) T numbers[kRows * kColumns] = {};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t t = 0; t < columns; ++t) numbers[i * kColumns + t] = widen(values[i * channel_stride + t * position_stride]);
    }
    load(block, numbers, kColumns);
  }

  template <typename T>
  KDOPS_INLINE void write(const Block<T>& block) const {
    if (direct<T>()) {
      for (int64_t i = 0; i < kRows; ++i) __builtin_memcpy(values + i * channel_stride, block.at[i], sizeof(block.at[i]));
      return;
    }
    alignas(64) T numbers[kRows * kColumns];
    store(block, numbers, kColumns);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t t = 0; t < columns; ++t) narrow(numbers[i * kColumns + t], values[i * channel_stride + t * position_stride]);
    }
  }
};

// out = matrix @ tile, or added to what is there, for a tile of positions.
template <typename scalar_t, typename T>
KDOPS_CLONED void mix_tile(const T* matrix, int64_t channels, const T* tile, int64_t pitch, const Heads<scalar_t>& out, int64_t head,
                           int64_t begin, int64_t count, bool onto) {
  for_each_product(matrix, out.channels, channels, tile, pitch, count, [&](int64_t i, int64_t t, Block<T>& block) KDOPS_INLINE_LAMBDA {
    const Place<scalar_t> place(out, head, i, begin + t, begin + count);
    if (onto) {
      Block<T> before;
      place.read(before);
      add(block, before, T(1));
    }
    place.write(block);
  });
}

// Sum of squares of residual = matrix @ tile - target; what becomes of its blocks, use(channel, position, block) says.
template <typename scalar_t, typename T, typename Use>
KDOPS_INLINE double residual_tile(const T* matrix, int64_t channels, const T* tile, const Heads<scalar_t>& target, int64_t head,
                                  int64_t begin, int64_t count, const Use& use) {
  double sum = 0;
  for_each_product(matrix, target.channels, channels, tile, padded(channels, kColumns), count,
                   [&](int64_t i, int64_t t, Block<T>& block) KDOPS_INLINE_LAMBDA {
                     Block<T> wanted;
                     Place<scalar_t>(target, head, i, begin + t, begin + count).read(wanted);
                     add(block, wanted, T(-1));
                     use(i, t, block);
                     Vector<T> squares = {};
                     // Rows that do not exist are 0 times the tile, which is NaN where that holds infinities.
                     for (int64_t row = 0; row < std::min(kRows, target.channels - i); ++row) {
                       for (int64_t v = 0; v < kVectors<T>; ++v) squares += block.at[row][v] * block.at[row][v];
                     }
                     sum += sum_of_lanes<T>(squares);
                   });
  return sum;
}

// The sum of squares, and the residual itself in the map `kept`, if there is one.
template <typename scalar_t, typename T>
KDOPS_CLONED double measure_tile(const T* matrix, int64_t channels, const T* tile, const Heads<scalar_t>& target, int64_t head,
                                 int64_t begin, int64_t count, const Heads<T>* kept) {
  return residual_tile(matrix, channels, tile, target, head, begin, count,
                       [&](int64_t i, int64_t t, const Block<T>& block) KDOPS_INLINE_LAMBDA {
                         if (kept) Place<T>(*kept, head, i, begin + t, begin + count).write(block);
                       });
}

// The residual as [positions / 16][channels padded to 6][16].
template <typename scalar_t, typename T>
KDOPS_CLONED void form_residual(const T* matrix, int64_t channels, const T* tile, const Heads<scalar_t>& target, int64_t head,
                                int64_t begin, int64_t count, T* residual) {
  const int64_t pitch = padded(target.channels, kRows);
  residual_tile(matrix, channels, tile, target, head, begin, count,
                [&](int64_t i, int64_t t, const Block<T>& block) KDOPS_INLINE_LAMBDA {
                  store(block, residual + (t * pitch + i * kColumns), kColumns);
                });
}

// maps = factor * tile of [positions / 16][channels padded to 6][16].
template <typename scalar_t, typename T>
KDOPS_CLONED void write_tile(const T* tile, T factor, const Heads<scalar_t>& maps, int64_t head, int64_t begin, int64_t count) {
  const int64_t pitch = padded(maps.channels, kRows);
  for (int64_t t = 0; t < count; t += kColumns) {
    for (int64_t i = 0; i < maps.channels; i += kRows) {
      Block<T> from, block;
      load(from, tile + t * pitch + i * kColumns, kColumns);
      clear(block);
      add(block, from, factor);
      Place<scalar_t>(maps, head, i, begin + t, begin + count).write(block);
    }
  }
}

}  // namespace
}  // namespace kdops
