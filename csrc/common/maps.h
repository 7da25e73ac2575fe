// Feature maps (C channels, N positions) of any strides and dtype, packed into panels for common/products.h.
//
// They are packed once per call, widened to the type of the sums and padded with zeros:
//   rows      [N / 6][C][6]    positions are the rows of a block; read the other way, channels are the rows in a sum
//   over positions columns   [N / 16][C][16]  positions are the columns of a block channels  [C / 16][N][16]  channels
//   are the columns of a block, in a sum over positions
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "parallel.h"
#include "products.h"
#include "simd.h"
#include "tensors.h"

namespace kdops {

// A tensor (B, C, *S) read as (B, C, N) with one stride for the positions; a contiguous copy where its axes have no
// such stride.
struct Map {
  Tensor tensor;
  int64_t batches, channels, positions;
  int64_t batch_stride, channel_stride, position_stride;

  explicit Map(const Tensor& given) : tensor(has_one_stride(given) ? given : torch::stable::contiguous(given)) {
    batches = tensor.size(0), channels = tensor.size(1), positions = count_features(tensor, 2);
    batch_stride = tensor.stride(0), channel_stride = tensor.stride(1), position_stride = 1;
    for (int64_t axis = tensor.dim() - 1; axis >= 2; --axis) {
      if (tensor.size(axis) > 1) {
        position_stride = tensor.stride(axis);
        break;
      }
    }
  }

  static bool has_one_stride(const Tensor& t) {
    int64_t expected = -1;
    for (int64_t axis = t.dim() - 1; axis >= 2; --axis) {
      if (t.size(axis) <= 1) continue;
      if (expected >= 0 && t.stride(axis) != expected) return false;
      expected = t.stride(axis) * t.size(axis);
    }
    return true;
  }
};

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

// Panels [padded_channels][Width] of `count` positions; what does not exist is zero.
template <int64_t Width, typename scalar_t, typename T>
KDOPS_CLONED void pack_positions(const scalar_t* from, int64_t channel_stride, int64_t position_stride,
                                 int64_t channels, int64_t padded_channels, int64_t count, T factor, T* to) {
  const int64_t size = padded_channels * Width, whole = position_stride == 1 ? count / Width : 0;
  for (int64_t c = 0; c < channels; ++c, from += channel_stride) {
    T* at = to + c * Width;
    for (int64_t panel = 0; panel < whole; ++panel, at += size) {
      for (int64_t i = 0; i < Width; ++i) at[i] = factor * widen(from[panel * Width + i]);
    }
    for (int64_t begin = whole * Width; begin < count; begin += Width, at += size) {
      const int64_t here = std::min(Width, count - begin);
      for (int64_t i = 0; i < here; ++i) at[i] = factor * widen(from[(begin + i) * position_stride]);
      for (int64_t i = here; i < Width; ++i) at[i] = 0;
    }
  }
  for (int64_t begin = 0; begin < count; begin += Width, to += size) {
    std::fill(to + channels * Width, to + size, T(0));
  }
}

// [panels of positions][padded_channels][Width] for every batch, times `factor`.
template <int64_t Width, typename scalar_t>
Buffer<Accumulator<scalar_t>> packed_positions(const Map& map, int64_t padded_channels,
                                               Accumulator<scalar_t> factor = 1) {
  using T = Accumulator<scalar_t>;
  const int64_t count = panels(map.positions, Width), size = padded_channels * Width;
  // Where positions are neighbours in memory, several panels at once read whole lines of each channel.
  const int64_t most = map.position_stride == 1 ? 8 : 1, groups = panels(count, most);
  Buffer<T> packed = allocate<T>(map.batches * count * size);
  const auto* values = const_data<scalar_t>(map.tensor);
  torch::stable::parallel_for(0, map.batches * groups, 16 / most, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t batch = task / groups, panel = task % groups * most, first = panel * Width;
      pack_positions<Width>(values + batch * map.batch_stride + first * map.position_stride, map.channel_stride,
                            map.position_stride, map.channels, padded_channels,
                            std::min(most * Width, map.positions - first), factor,
                            packed.get() + (batch * count + panel) * size);
    }
  });
  return packed;
}

// [panels of channels][positions, padded to 16][16] for every batch.
template <typename scalar_t>
Buffer<Accumulator<scalar_t>> packed_channels(const Map& map) {
  using T = Accumulator<scalar_t>;
  const int64_t count = panels(map.channels, kColumns), size = padded(map.positions, kColumns) * kColumns;
  Buffer<T> packed = allocate<T>(map.batches * count * size);
  const auto* values = const_data<scalar_t>(map.tensor);
  torch::stable::parallel_for(0, map.batches * count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % count * kColumns;
      const scalar_t* from = values + task / count * map.batch_stride + first * map.channel_stride;
      // The same packing with channels and positions in each other's place.
      pack_positions<kColumns>(from, map.position_stride, map.channel_stride, map.positions,
                               padded(map.positions, kColumns), std::min(kColumns, map.channels - first), T(1),
                               packed.get() + task * size);
    }
  });
  return packed;
}

}  // namespace kdops
