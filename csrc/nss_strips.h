// What a thread of csrc/nss.cu makes at once, strips of neighbouring results, and its arithmetic.
#pragma once

#include "nss_tiles.h"

namespace kdops {
namespace {

// Results of a strip: along a row and down a column. With any radius (0) a strip is a single result and its values stay
// in shared memory.
template <int Radius>
constexpr int kAlong = Radius ? 4 : 1;
template <int Radius>
constexpr int kDown = Radius ? kRows * kColumns / kThreads : 1;

// body(row, first column) for strips of Count columns.
template <int Count, typename Body>
__device__ void for_rows(int rows, const Body& body) {
  constexpr int strips = kColumns / Count;
  for (int row = threadIdx.x / strips; row < rows; row += kThreads / strips) body(row, threadIdx.x % strips * Count);
}

// body(first row, column) for strips of Count of a tile's rows.
template <int Count, typename Body>
__device__ void for_columns(const Body& body) {
  for (int row = threadIdx.x / kColumns * Count; row < kRows; row += kStep * Count) body(row, threadIdx.x % kColumns);
}

// The values of the windows of a strip of Count results, `step` apart: (n, i) is tap i of result n.
template <int Radius, int Count>
struct Strip {
  float values[Count + 2 * Radius];

  __device__ explicit Strip(const float* from, int step = 1) {
#pragma unroll
    for (int i = 0; i < Count + 2 * Radius; ++i) values[i] = from[i * step];
  }

  __device__ float operator()(int n, int i) const {
    return values[n + i];
  }
};

template <int Count>
struct Strip<0, Count> {
  const float* from;
  int step;

  __device__ explicit Strip(const float* from, int step = 1) : from(from), step(step) {}

  __device__ float operator()(int n, int i) const {
    return from[(n + i) * step];
  }
};

// The values of the windows of four results along a row, read in words of 16 bytes: `row` is aligned, and `skip` more
// precede those of the first result.
template <int Radius>
struct Run {
  static constexpr int kSkip = pitch(Radius) - Radius, kCount = (4 + Radius + pitch(Radius) + 3) / 4;
  Quad quads[kCount];

  __device__ Run(const float* row, int) {
#pragma unroll
    for (int n = 0; n < kCount; ++n) quads[n] = reinterpret_cast<const Quad*>(row)[n];
  }

  __device__ float operator()(int n, int i) const {
    return quads[(kSkip + n + i) / 4].at[(kSkip + n + i) % 4];
  }
};

template <>
struct Run<0> {
  const float* from;

  __device__ Run(const float* row, int skip) : from(row + skip) {}

  __device__ float operator()(int n, int i) const {
    return from[n + i];
  }
};

// To within a rounding and with subnormal numbers as 0, which is several times faster than exactly.
__device__ float inverse(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1 / x;
#endif
}

// One instruction, which the compiler does not make of an assignment.
__device__ void store(float* to, const Quad& quad) {
#ifdef __CUDA_ARCH__
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(quad.at[0]), "f"(quad.at[1]), "f"(quad.at[2]),
               "f"(quad.at[3])
               : "memory");
#else
  *reinterpret_cast<Quad*>(to) = quad;
#endif
}

__device__ float root(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return sqrtf(x);
#endif
}

}  // namespace
}  // namespace kdops
