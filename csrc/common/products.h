// Matrix products in registers, for kernels that work on a product before it reaches memory.
//
// A block of 6 x 16 sums stays in registers (12 vectors with AVX2); every step adds 6 numbers of one operand times 16
// of the other.
#pragma once

#include <algorithm>
#include <cmath>

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

// --- vectors and blocks ---

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

template <typename T>
KDOPS_INLINE T sum_of_lanes(const Vector<T>& values) {
  T sum = 0;
  for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += values[lane];
  return sum;
}

template <typename T>
KDOPS_INLINE T largest_of_lanes(const Vector<T>& values) {
  T largest = values[0];
  for (int64_t lane = 1; lane < kLanes<T>; ++lane) largest = std::max(largest, values[lane]);
  return largest;
}

// sums[i, :] += sum over o < outer and j < Inner of a[o * outer_stride + i * RowStride + j] * b[(o * Inner + j) * 16 +
// :]
template <int RowStride, int Inner, typename T>
KDOPS_INLINE void multiply_add(Block<T>& sums, const T* __restrict a, int64_t outer_stride, int64_t outer,
                               const T* __restrict b) {
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

}  // namespace kdops
