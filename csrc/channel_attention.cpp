// Channel attention on the CPU: products of C x C matrices with feature maps (C channels, N positions) and of maps with maps.
//
// A task is a chunk of positions of one head of one sample. It goes through the chunk in tiles that are packed into scratch (see
// common/products.h), as [positions / 16][channels][16]: so a tile is the right operand of a product with a matrix and the left one of a
// product summed over positions, whose right operand is the same tile turned to [channels / 16][positions][16]. What is summed over
// positions is summed per chunk and then over chunks in order; chunks follow from the shape, and so results do not depend on the number
// of threads.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <utility>

#include "common/maps.h"
#include "common/parallel.h"
#include "common/products.h"

namespace kdops {
namespace {

constexpr int64_t kTileNumbers = 1 << 16;  // of one operand of a tile: 256 KiB in float
constexpr int64_t kLongestTile = 256;      // positions
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

// sums (rows padded to 6, columns padded to 16) += tile @ turned^T, over the positions of a tile; `pitch` channels of `tile` a panel.
template <typename T>
KDOPS_CLONED void add_gram(const T* tile, int64_t rows, int64_t pitch, const T* turned, int64_t columns, int64_t position_panels, T* sums) {
  const int64_t width = padded(columns, kColumns);
  for (int64_t j = 0; j < columns; j += kColumns) {
    for (int64_t i = 0; i < rows; i += kRows) {
      Block<T> block;
      load(block, sums + i * width + j, width);
      multiply_add<kColumns, kColumns>(block, tile + i * kColumns, pitch * kColumns, position_panels, turned + j * position_panels * kColumns);
      store(block, sums + i * width + j, width);
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

template <typename T>
KDOPS_INLINE void add(Block<T>& block, const Block<T>& other, T factor) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVectors<T>; ++v) block.at[i][v] += factor * other.at[i][v];
  }
}

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

// matrix @ tile - target: its sum of squares, and in `residual` (not null) itself as [positions / 16][rows padded to 6][16].
template <typename scalar_t, typename T>
KDOPS_CLONED double residual_tile(const T* matrix, int64_t channels, const T* tile, const Heads<scalar_t>& target, int64_t head,
                                  int64_t begin, int64_t count, T* residual) {
  double sum = 0;
  const int64_t pitch = padded(target.channels, kRows);
  for_each_product(matrix, target.channels, channels, tile, padded(channels, kColumns), count,
                   [&](int64_t i, int64_t t, Block<T>& block) KDOPS_INLINE_LAMBDA {
                     Block<T> wanted;
                     Place<scalar_t>(target, head, i, begin + t, begin + count).read(wanted);
                     add(block, wanted, T(-1));
                     if (residual) store(block, residual + (t * pitch + i * kColumns), kColumns);
                     Vector<T> squares = {};
                     for (int64_t row = 0; row < kRows; ++row) {
                       for (int64_t v = 0; v < kVectors<T>; ++v) squares += block.at[row][v] * block.at[row][v];
                     }
                     T of_block = 0;
                     for (int64_t lane = 0; lane < kLanes<T>; ++lane) of_block += squares[lane];
                     sum += of_block;
                   });
  return sum;
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

// --- C x C matrices --------------------------------------------------------------------------------------------------------------

// (B, heads, R, K) of any strides, as [rows / 6][K][6] for every head.
template <typename T>
struct Matrices {
  int64_t rows, columns, size;
  Buffer<T> packed;

  explicit Matrices(const Tensor& t) : rows(t.size(2)), columns(t.size(3)), size(padded(rows, kRows) * columns) {
    packed = allocate<T>(t.size(0) * t.size(1) * size);
    for (int64_t head = 0; head < t.size(0) * t.size(1); ++head) {
      const T* const from = const_data<T>(t) + head / t.size(1) * t.stride(0) + head % t.size(1) * t.stride(1);
      for (int64_t i = 0; i < rows; i += kRows) {
        pack_positions<kRows>(from + i * t.stride(2), t.stride(3), t.stride(2), columns, columns, std::min(kRows, rows - i), T(1),
                              packed.get() + head * size + i * columns);
      }
    }
  }
  const T* of(int64_t head) const {
    return packed.get() + head * size;
  }
};

// Sums of each chunk, (rows padded to 6, columns padded to 16), and their total.
template <typename T>
struct Partial {
  int64_t rows, columns, size;
  Buffer<T> sums;

  Partial(int64_t tasks, int64_t rows, int64_t columns)
      : rows(rows), columns(columns), size(padded(rows, kRows) * padded(columns, kColumns)), sums(allocate<T>(tasks * size)) {
    std::fill(sums.get(), sums.get() + tasks * size, T(0));
  }
  T* of(int64_t task) const {
    return sums.get() + task * size;
  }
  // result (heads, rows, columns), contiguous: over `chunks` tasks of each head, in order.
  void total(int64_t heads, int64_t chunks, T* result) const {
    for_each_task<T>(heads * rows, 0, [&](int64_t task, T*) {
      const int64_t head = task / rows, row = task % rows * padded(columns, kColumns);
      add_rows(of(head * chunks) + row, size, chunks, columns, result + task * columns);
    });
  }

 private:
  static KDOPS_CLONED void add_rows(const T* __restrict from, int64_t stride, int64_t count, int64_t columns, T* __restrict to) {
    std::copy(from, from + columns, to);
    for (int64_t chunk = 1; chunk < count; ++chunk) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) to[j] += from[chunk * stride + j];
    }
  }
};

// --- the whole problem -----------------------------------------------------------------------------------------------------------

template <typename scalar_t>
void gram(const Tensor& x_map, const Tensor& y_map, int64_t count, Accumulator<scalar_t>* result) {
  using T = Accumulator<scalar_t>;
  const Heads<scalar_t> x(x_map, count), y(y_map, count);
  const Chunks chunks(x.positions, std::max(x.channels, y.channels));
  const int64_t heads = x_map.size(0) * count, pitch_x = padded(x.channels, kRows), pitch_y = padded(y.channels, kColumns);
  const Partial<T> partial(heads * chunks.count, x.channels, y.channels);
  for_each_task<T>(heads * chunks.count, (pitch_x + 2 * pitch_y) * chunks.tile, [&](int64_t task, T* tile_x) {
    T* const tile_y = tile_x + pitch_x * chunks.tile;
    T* const turned = tile_y + pitch_y * chunks.tile;
    const int64_t head = task / chunks.count;
    for_each_tile(chunks, task % chunks.count, [&](int64_t begin, int64_t positions) {
      const int64_t position_panels = panels(positions, kColumns);
      pack_tile(x, head, begin, positions, pitch_x, tile_x);
      pack_tile(y, head, begin, positions, pitch_y, tile_y);
      turn_tile(tile_y, position_panels, pitch_y / kColumns, turned);
      add_gram(tile_x, x.channels, pitch_x, turned, y.channels, position_panels, partial.of(task));
    });
  });
  partial.total(heads, chunks.count, result);
}

template <typename scalar_t>
void mix(const Tensor& out_map, const Tensor& matrix, const Tensor& x_map, bool onto) {
  using T = Accumulator<scalar_t>;
  const int64_t count = matrix.size(1), heads = matrix.size(0) * count;
  const Heads<scalar_t> x(x_map, count), out(out_map, count);
  const Chunks chunks(x.positions, std::max(x.channels, out.channels));
  const Matrices<T> matrices(matrix);
  for_each_task<T>(heads * chunks.count, x.channels * chunks.tile, [&](int64_t task, T* tile) {
    const int64_t head = task / chunks.count;
    for_each_tile(chunks, task % chunks.count, [&](int64_t begin, int64_t positions) {
      pack_tile(x, head, begin, positions, x.channels, tile);
      mix_tile(matrices.of(head), x.channels, tile, x.channels, out, head, begin, positions, onto);
    });
  });
}

template <typename scalar_t>
void distance(const Tensor& attention, const Tensor& value_map, const Tensor& target_map, double* result) {
  using T = Accumulator<scalar_t>;
  const int64_t batches = attention.size(0), count = attention.size(1);
  const Heads<scalar_t> value(value_map, count), target(target_map, count);
  const Chunks chunks(value.positions, std::max(value.channels, target.channels));
  const Matrices<T> matrices(attention);
  const int64_t tasks = batches * count * chunks.count, pitch = padded(value.channels, kColumns);
  const Buffer<double> sums = allocate<double>(tasks);
  for_each_task<T>(tasks, pitch * chunks.tile, [&](int64_t task, T* tile) {
    const int64_t head = task / chunks.count;
    sums[task] = 0;
    for_each_tile(chunks, task % chunks.count, [&](int64_t begin, int64_t positions) {
      pack_tile(value, head, begin, positions, pitch, tile);
      sums[task] += residual_tile(matrices.of(head), value.channels, tile, target, head, begin, positions, static_cast<T*>(nullptr));
    });
  });
  for (int64_t batch = 0; batch < batches; ++batch) {
    result[batch] = 0;
    for (int64_t task = batch * count * chunks.count; task < (batch + 1) * count * chunks.count; ++task) result[batch] += sums[task];
  }
}

// What backward of the distance writes; what nobody needs is not given.
template <typename T>
struct Wanted {
  T* of_attention;                 // (heads, Cq, Ck), but for the factor 2 * grad
  std::optional<Tensor> of_value;  // (B, Ck, N): to_value @ residual
  std::optional<Tensor> of_target; // (B, Cq, N): -slope * residual
};

template <typename scalar_t, typename T = Accumulator<scalar_t>>
void distance_backward(const Tensor& attention, const Tensor& to_value, const T* slope, const Tensor& value_map, const Tensor& target_map,
                       const Wanted<T>& wanted) {
  const int64_t count = attention.size(1), heads = attention.size(0) * count;
  const Heads<scalar_t> value(value_map, count), target(target_map, count);
  const Heads<scalar_t> of_value(wanted.of_value.value_or(value_map), count), of_target(wanted.of_target.value_or(target_map), count);
  const Chunks chunks(value.positions, std::max(value.channels, target.channels));
  const Matrices<T> matrices(attention), back(to_value);
  const int64_t pitch_v = padded(value.channels, kColumns), pitch_r = padded(target.channels, kRows);
  const Partial<T> partial(wanted.of_attention ? heads * chunks.count : 0, target.channels, value.channels);
  for_each_task<T>(heads * chunks.count, (2 * pitch_v + pitch_r) * chunks.tile, [&](int64_t task, T* tile) {
    T* const turned = tile + pitch_v * chunks.tile;
    T* const residual = turned + pitch_v * chunks.tile;
    const int64_t head = task / chunks.count;
    for_each_tile(chunks, task % chunks.count, [&](int64_t begin, int64_t positions) {
      const int64_t position_panels = panels(positions, kColumns);
      pack_tile(value, head, begin, positions, pitch_v, tile);
      residual_tile(matrices.of(head), value.channels, tile, target, head, begin, positions, residual);
      if (wanted.of_attention) {
        turn_tile(tile, position_panels, pitch_v / kColumns, turned);
        add_gram(residual, target.channels, pitch_r, turned, value.channels, position_panels, partial.of(task));
      }
      if (wanted.of_value) mix_tile(back.of(head), target.channels, residual, pitch_r, of_value, head, begin, positions, false);
      if (wanted.of_target) write_tile(residual, -slope[head / count], of_target, head, begin, positions);
    });
  });
  if (wanted.of_attention) partial.total(heads, chunks.count, wanted.of_attention);
}

// --- operators -------------------------------------------------------------------------------------------------------------------

// x (B, Cx, N), y (B, Cy, N) -> (B, heads, Cx / heads, Cy / heads) in the type of sums.
Tensor channel_gram(const Tensor& x, const Tensor& y, int64_t heads) {
  Tensor result = torch::stable::new_empty(x, {x.size(0), heads, x.size(1) / heads, y.size(1) / heads}, accumulator_dtype(x.scalar_type()));
  for_dtype<float, double, BFloat16, Half>(x.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    gram<scalar_t>(x, y, heads, data<Accumulator<scalar_t>>(result));
  });
  return result;
}

// out (B, C, N) = matrix (B, heads, C / heads, Cx / heads) @ x (B, Cx, N), or added to it.
void channel_mix(const Tensor& out, const Tensor& matrix, const Tensor& x, bool onto) {
  for_dtype<float, double, BFloat16, Half>(x.scalar_type(), [&](auto zero) { mix<decltype(zero)>(out, matrix, x, onto); });
}

// sum of (attention @ value - target)^2 over each sample, (B,) float64.
Tensor channel_residual(const Tensor& attention, const Tensor& value, const Tensor& target) {
  Tensor result = torch::stable::new_empty(attention, {attention.size(0)}, ScalarType::Double);
  for_dtype<float, double, BFloat16, Half>(value.scalar_type(), [&](auto zero) { distance<decltype(zero)>(attention, value, target, data<double>(result)); });
  return result;
}

// With R = attention @ value - target: of_value = to_value @ R and of_target = -slope (B,) * R, where given, and R @ value^T, or (0,).
Tensor channel_residual_backward(const Tensor& attention, const Tensor& to_value, const Tensor& slope, const Tensor& value,
                                 const Tensor& target, bool need_attention, std::optional<Tensor> of_value,
                                 std::optional<Tensor> of_target) {
  Tensor result = need_attention ? torch::stable::empty_like(attention) : torch::stable::new_empty(attention, {0});
  const Tensor factors = torch::stable::contiguous(slope);
  for_dtype<float, double, BFloat16, Half>(value.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = Accumulator<scalar_t>;
    distance_backward<scalar_t>(attention, to_value, const_data<T>(factors), value, target,
                                {need_attention ? data<T>(result) : nullptr, of_value, of_target});
  });
  return result;
}

}  // namespace
}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("channel_gram", TORCH_BOX(&kdops::channel_gram));
  m.impl("channel_mix", TORCH_BOX(&kdops::channel_mix));
  m.impl("channel_residual", TORCH_BOX(&kdops::channel_residual));
  m.impl("channel_residual_backward", TORCH_BOX(&kdops::channel_residual_backward));
}
