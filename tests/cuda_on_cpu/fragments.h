// In place of csrc/common/fragments.h: what tensor cores do with matrices whose numbers lie in the lanes of a warp.
#pragma once

#include "launch.h"

namespace gpu {

inline unsigned words[kMostThreads][8];
inline const uint4* rows[kMostThreads];

inline unsigned short& number(unsigned& word, int which) {
  return reinterpret_cast<unsigned short*>(&word)[which];
}

// The number at a row and a column of matrix `m` of this warp: which lane has it, and which of its pair it is.
inline unsigned short& at(int m, int row, int column) {
  return number(words[threadIdx.x / 32 * 32 + row * 4 + column / 2][m], column % 2);
}

inline float of_bfloat16(unsigned short bits) {
  const unsigned wide = unsigned{bits} << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

inline float of_float16(unsigned short bits) {
  kdops::Half value;
  std::memcpy(&value, &bits, sizeof(value));
  return static_cast<float>(value);
}

}  // namespace gpu

namespace kdops {

inline void load_turned(unsigned (&matrices)[4], const uint4* row) {
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  gpu::rows[threadIdx.x] = row;
  __syncwarp();
  for (int m = 0; m < 4; ++m) {
    for (int pair = 0; pair < 2; ++pair) {
      const auto* there = reinterpret_cast<const unsigned short*>(gpu::rows[first + 8 * m + lane % 4 * 2 + pair]);
      gpu::number(matrices[m], pair) = there[lane / 4];
    }
  }
  __syncwarp();
}

inline void store_turned(uint4* row, const unsigned (&matrices)[4]) {
  const int lane = threadIdx.x % 32;
  std::memcpy(gpu::words[threadIdx.x], matrices, sizeof(matrices));
  __syncwarp();
  for (int column = 0; column < 8; ++column) {
    reinterpret_cast<unsigned short*>(row)[column] = gpu::at(lane / 8, column, lane % 8);
  }
  __syncwarp();
}

struct Columns {
  unsigned upper, lower;
};

inline void multiply_add(float (&sums)[4], Columns left, unsigned upper, Columns right, unsigned lower) {
  const int lane = threadIdx.x % 32;
  const unsigned mine[6] = {left.upper, left.lower, right.upper, right.lower, upper, lower};
  std::memcpy(gpu::words[threadIdx.x], mine, sizeof(mine));
  __syncwarp();
  for (int n = 0; n < 4; ++n) {
    const int below = n / 2, column = lane % 4 * 2 + n % 2;
    for (int k = 0; k < 16; ++k) {
      // The right operand is turned: its lanes hold columns.
      const float a = gpu::of_float16(gpu::at(k / 8 * 2 + below, lane / 4, k % 8));
      sums[n] += a * gpu::of_float16(gpu::at(4 + k / 8, column, k % 8));
    }
  }
  __syncwarp();
}

template <int Which>
unsigned signs_of_difference(unsigned a, unsigned b) {
  unsigned sign = 0;
  for (int n = 0; n < 2; ++n) {
    const float x = gpu::of_bfloat16(gpu::number(a, Which)), y = gpu::of_bfloat16(gpu::number(b, n));
    gpu::number(sign, n) = x > y ? 0x3f80 : x < y ? 0xbf80 : 0;
  }
  return sign;
}

}  // namespace kdops
