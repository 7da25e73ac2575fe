// Channel attention on the CPU: products of C x C matrices with feature maps (C channels, N positions) and of maps with maps.
//
// A task is a chunk of positions of one head of one sample, and goes through it in packed tiles (channel_attention.h). What is summed over
// positions is summed per chunk and then over chunks in order; chunks follow from the shape, and so results do not depend on the number
// of threads.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "channel_attention.h"
#include "channel_softmax.h"

namespace kdops {
namespace {

// --- C x C matrices --------------------------------------------------------------------------------------------------------------

// (B, heads, R, K) of any strides, as [rows / 6][K][6] for every head; times `factor` (B,), unless that is null.
template <typename T>
struct Matrices {
  int64_t rows, columns, size;
  Buffer<T> packed;

  explicit Matrices(const Tensor& t, const T* factor = nullptr)
      : rows(t.size(2)), columns(t.size(3)), size(padded(rows, kRows) * columns), packed(allocate<T>(t.size(0) * t.size(1) * size)) {
    const int64_t heads = t.size(1), in_each = panels(rows, kRows);
    for_each_task<T>(t.size(0) * heads * in_each, 0, [&](int64_t task, T*) {
      const int64_t head = task / in_each, i = task % in_each * kRows;
      const T* const from = const_data<T>(t) + head / heads * t.stride(0) + head % heads * t.stride(1) + i * t.stride(2);
      pack_positions<kRows>(from, t.stride(3), t.stride(2), columns, columns, std::min(kRows, rows - i),
                            factor ? factor[head / heads] : T(1), packed.get() + head * size + i * columns);
    });
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
void distance(const Tensor& attention, const Tensor& value_map, const Tensor& target_map, const std::optional<Tensor>& residual,
              double* result) {
  using T = Accumulator<scalar_t>;
  const int64_t batches = attention.size(0), count = attention.size(1);
  const Heads<scalar_t> value(value_map, count), target(target_map, count);
  const Chunks chunks(value.positions, std::max(value.channels, target.channels));
  const Matrices<T> matrices(attention);
  const std::optional<Heads<T>> kept = residual ? std::optional(Heads<T>(*residual, count)) : std::nullopt;
  const int64_t tasks = batches * count * chunks.count, pitch = padded(value.channels, kColumns);
  const Buffer<double> sums = allocate<double>(tasks);
  for_each_task<T>(tasks, pitch * chunks.tile, [&](int64_t task, T* tile) {
    const int64_t head = task / chunks.count;
    sums[task] = 0;
    for_each_tile(chunks, task % chunks.count, [&](int64_t begin, int64_t positions) {
      pack_tile(value, head, begin, positions, pitch, tile);
      sums[task] += measure_tile(matrices.of(head), value.channels, tile, target, head, begin, positions, kept ? &*kept : nullptr);
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
  std::optional<Tensor> of_value;  // (B, Ck, N): slope * attention^T @ residual
  std::optional<Tensor> of_target; // (B, Cq, N): -slope * residual
};

template <typename scalar_t, typename T = Accumulator<scalar_t>>
void distance_backward(const Tensor& attention, const std::optional<Tensor>& given, const T* slope, const Tensor& value_map,
                       const Tensor& target_map, const Wanted<T>& wanted) {
  const int64_t count = attention.size(1), heads = attention.size(0) * count;
  const Heads<scalar_t> value(value_map, count), target(target_map, count);
  const Heads<scalar_t> of_value(wanted.of_value.value_or(value_map), count), of_target(wanted.of_target.value_or(target_map), count);
  const Chunks chunks(value.positions, std::max(value.channels, target.channels));
  const Matrices<T> matrices(attention), back(torch::stable::transpose(attention, 2, 3), slope);
  const int64_t pitch_v = padded(value.channels, kColumns), pitch_r = padded(target.channels, kRows);
  const std::optional<Heads<T>> kept = given ? std::optional(Heads<T>(*given, count)) : std::nullopt;
  const Partial<T> partial(wanted.of_attention ? heads * chunks.count : 0, target.channels, value.channels);
  for_each_task<T>(heads * chunks.count, (2 * pitch_v + pitch_r) * chunks.tile, [&](int64_t task, T* tile) {
    T* const turned = tile + pitch_v * chunks.tile;
    T* const residual = turned + pitch_v * chunks.tile;
    const int64_t head = task / chunks.count;
    for_each_tile(chunks, task % chunks.count, [&](int64_t begin, int64_t positions) {
      const int64_t position_panels = panels(positions, kColumns);
      if (!kept || wanted.of_attention) pack_tile(value, head, begin, positions, pitch_v, tile);
      if (kept) {
        pack_tile(*kept, head, begin, positions, pitch_r, residual);
      } else {
        form_residual(matrices.of(head), value.channels, tile, target, head, begin, positions, residual);
      }
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

// sum of (attention @ value - target)^2 over each sample, (B,) float64; what is squared is written to `residual` (B, Cq, N), if given.
Tensor channel_residual(const Tensor& attention, const Tensor& value, const Tensor& target, std::optional<Tensor> residual) {
  Tensor result = torch::stable::new_empty(attention, {attention.size(0)}, ScalarType::Double);
  for_dtype<float, double, BFloat16, Half>(
      value.scalar_type(), [&](auto zero) { distance<decltype(zero)>(attention, value, target, residual, data<double>(result)); });
  return result;
}

// With R = attention @ value - target, given or formed again: of_value = slope (B,) * attention^T @ R and of_target = -slope * R, where
// given, and R @ value^T, or (0,).
Tensor channel_residual_backward(const Tensor& attention, std::optional<Tensor> residual, const Tensor& slope, const Tensor& value,
                                 const Tensor& target, bool need_attention, std::optional<Tensor> of_value,
                                 std::optional<Tensor> of_target) {
  Tensor result = need_attention ? torch::stable::empty_like(attention) : torch::stable::new_empty(attention, {0});
  const Tensor factors = torch::stable::contiguous(slope);
  for_dtype<float, double, BFloat16, Half>(value.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = Accumulator<scalar_t>;
    distance_backward<scalar_t>(attention, residual, const_data<T>(factors), value, target,
                                {need_attention ? data<T>(result) : nullptr, of_value, of_target});
  });
  return result;
}

// logits (B, heads, R, K), contiguous, become softmax over K of scale * logits.
void channel_softmax(const Tensor& logits, double scale) {
  for_dtype<float, double>(logits.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t columns = logits.size(3);
    for_each_task<T>(logits.numel() / columns, padded(columns, kLanes<T>), [&](int64_t row, T* scratch) {
      soften<T>(data<T>(logits) + row * columns, columns, T(scale), scratch);
    });
  });
}

// of_attention (B, heads, R, K), contiguous, becomes the gradient of the logits; its own was to be multiplied with factor (B,), if given.
void channel_softmax_backward(const Tensor& of_attention, const Tensor& attention, double scale, std::optional<Tensor> factor) {
  for_dtype<float, double>(attention.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t columns = attention.size(3), in_sample = attention.size(1) * attention.size(2);
    const std::optional<Tensor> factors = factor ? std::optional(torch::stable::contiguous(*factor)) : std::nullopt;
    for_each_task<T>(attention.numel() / columns, 2 * padded(columns, kLanes<T>), [&](int64_t row, T* scratch) {
      const T of_sample = factors ? const_data<T>(*factors)[row / in_sample] : T(1);
      soften_backward<T>(data<T>(of_attention) + row * columns, const_data<T>(attention) + row * columns, columns, of_sample * T(scale),
                         scratch);
    });
  });
}

}  // namespace
}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("channel_gram", TORCH_BOX(&kdops::channel_gram));
  m.impl("channel_mix", TORCH_BOX(&kdops::channel_mix));
  m.impl("channel_residual", TORCH_BOX(&kdops::channel_residual));
  m.impl("channel_residual_backward", TORCH_BOX(&kdops::channel_residual_backward));
  m.impl("channel_softmax", TORCH_BOX(&kdops::channel_softmax));
  m.impl("channel_softmax_backward", TORCH_BOX(&kdops::channel_softmax_backward));
}
