// Channel attention on the CPU: products of C x C matrices with feature maps (C channels, N positions) and of maps with maps.
//
// A task is a chunk of positions of one head of one sample, and goes through it in packed tiles (channel_attention.h). What is summed over
// positions is summed per chunk and then over chunks in order; chunks follow from the shape, and so results do not depend on the number
// of threads.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "channel_attention.h"

namespace kdops {
namespace {

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
