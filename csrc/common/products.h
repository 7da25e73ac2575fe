// Matrix products in registers, between operands packed into panels, for kernels that work on a product before it reaches memory.
//
// A block of 6 x 16 sums stays in registers (12 vectors with AVX2); every step adds 6 numbers of one operand times 16 of the other. Feature maps
// (C channels, N positions) are packed once per call, widened to the type of the sums and padded with zeros:
//   rows      [N / 6][C][6]     positions as the rows of a block; also, read the other way, channels as rows in a sum over positions
//   columns   [N / 16][C][16]   positions as the columns of a block
//   channels  [C / 16][N][16]   channels as the columns of a block, in a sum over positions
#pragma once

#include <cmath>
#include <type_traits>

#include "dtypes.h"
#include "parallel.h"
#include "simd.h"

namespace kdops {

constexpr int64_t kRows = 6;
constexpr int64_t kColumns = 16;

constexpr int64_t panels(int64_t count, int64_t width) {
  return (count + width - 1) / width;
}

constexpr int64_t padded(int64_t count, int64_t width) {
  return panels(count, width) * width;
}

// --- vectors and blocks ----------------------------------------------------------------------------------------------------------

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(32)));
};

template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
constexpr int64_t kVectors = kColumns / kLanes<T>;  // in a row of a block

template <typename T>
struct Block {
  Vector<T> at[kRows][kVectors<T>];
};

// In all that follows pointers are aligned to a vector: panels are.
template <typename T>
KDOPS_INLINE const Vector<T>& vector(const T* from) {
  return *reinterpret_cast<const Vector<T>*>(from);
}

template <typename T>
KDOPS_INLINE Vector<T>& vector(T* from) {
  return *reinterpret_cast<Vector<T>*>(from);
}

template <typename T>
KDOPS_INLINE void clear(Block<T>& block) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVectors<T>; ++v) block.at[i][v] = Vector<T>{};
  }
}

template <typename T>
KDOPS_INLINE void load(Block<T>& block, const T* from, int64_t row_stride) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVectors<T>; ++v) block.at[i][v] = vector(from + i * row_stride + v * kLanes<T>);
  }
}

template <typename T>
KDOPS_INLINE void store(const Block<T>& block, T* to, int64_t row_stride) {
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t v = 0; v < kVectors<T>; ++v) vector(to + i * row_stride + v * kLanes<T>) = block.at[i][v];
  }
}

// sums[i, :] += sum over o < outer and j < Inner of a[o * outer_stride + i * RowStride + j] * b[(o * Inner + j) * 16 + :]
template <int RowStride, int Inner, typename T>
KDOPS_INLINE void multiply_add(Block<T>& sums, const T* __restrict a, int64_t outer_stride, int64_t outer, const T* __restrict b) {
  for (int64_t o = 0; o < outer; ++o, a += outer_stride) {
    for (int64_t j = 0; j < Inner; ++j, b += kColumns) {
      Vector<T> columns[kVectors<T>];
      for (int64_t v = 0; v < kVectors<T>; ++v) columns[v] = vector(b + v * kLanes<T>);
      for (int64_t i = 0; i < kRows; ++i) {
        const T row = a[i * RowStride + j];
        for (int64_t v = 0; v < kVectors<T>; ++v) sums.at[i][v] += row * columns[v];
      }
    }
  }
}

// x to e^x, to one rounding or two, for x below 88; below -87 it is 0 (no subnormal numbers). NaN stays NaN.
KDOPS_INLINE void exponential(Vector<float>& x) {
  typedef int32_t Bits __attribute__((vector_size(32)));
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, which its low bits then hold
  const Vector<float> zero = {};
  const auto underflows = x < -87.0f;
  const Vector<float> shifted = x * kLog2E + kShift;
  const Vector<float> whole = shifted - kShift;
  const Vector<float> r = (x - whole * kLn2High) - whole * kLn2Low;
  // 1 + r + r^2 q(r), with q fitted to minimise the relative error (3e-9) on |r| <= ln(2) / 2.
  Vector<float> power = r * 1.381461298e-3f + 8.368709843e-3f;
  power = power * r + 4.166838737e-2f;
  power = power * r + 1.666652069e-1f;
  power = power * r + 4.999999345e-1f;
  power = power * r + 1.0f;
  power = power * r + 1.0f;
  power = reinterpret_cast<Vector<float>>(reinterpret_cast<Bits>(power) + (reinterpret_cast<Bits>(shifted) << 23));
  x = underflows ? zero : power;
}

KDOPS_INLINE void exponential(Vector<double>& x) {
  for (int64_t lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp(x[lane]);
}

// --- feature maps ----------------------------------------------------------------------------------------------------------------

// A tensor (B, C, *S) read as (B, C, N) with one stride for the positions; a contiguous copy where its axes have no such stride.
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

// One panel [channels][Width] of positions; `count` of them exist, the rest and the channels up to `padded_channels` are zero.
template <int64_t Width, typename scalar_t, typename T>
KDOPS_CLONED void pack_positions(const scalar_t* from, int64_t channel_stride, int64_t position_stride, int64_t channels,
                                 int64_t padded_channels, int64_t count, T factor, T* to) {
  const bool whole = count == Width;
  std::fill(to + (whole ? channels : 0) * Width, to + padded_channels * Width, T(0));
  for (int64_t c = 0; c < channels; ++c, from += channel_stride, to += Width) {
    if (whole && position_stride == 1) {
      for (int64_t i = 0; i < Width; ++i) to[i] = factor * widen(from[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = factor * widen(from[i * position_stride]);
    }
  }
}

// [panels of positions][padded_channels][Width] for every batch, times `factor`.
template <int64_t Width, typename scalar_t>
Buffer<Accumulator<scalar_t>> packed_positions(const Map& map, int64_t padded_channels, Accumulator<scalar_t> factor = 1) {
  using T = Accumulator<scalar_t>;
  const int64_t count = panels(map.positions, Width), size = padded_channels * Width;
  Buffer<T> packed = allocate<T>(map.batches * count * size);
  const auto* values = const_data<scalar_t>(map.tensor);
  torch::stable::parallel_for(0, map.batches * count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % count * Width;
      const scalar_t* from = values + task / count * map.batch_stride + first * map.position_stride;
      pack_positions<Width>(from, map.channel_stride, map.position_stride, map.channels, padded_channels,
                            std::min(Width, map.positions - first), factor, packed.get() + task * size);
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
      pack_positions<kColumns>(from, map.position_stride, map.channel_stride, map.positions, padded(map.positions, kColumns),
                               std::min(kColumns, map.channels - first), T(1), packed.get() + task * size);
    }
  });
  return packed;
}

}  // namespace kdops
