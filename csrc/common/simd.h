// What the CPU kernels share: one binary for every x86-64, and rows of any dtype as tiles of float or double.
//
// Kernels are plain loops that the compiler vectorises. A function marked KDOPS_CLONED is compiled for AVX-512, AVX2
// and the baseline, and the loader picks the best one for the machine. What it calls must be KDOPS_INLINE, or it runs
// the baseline's code.
#pragma once

#include <torch/headeronly/util/bit_cast.h>

#include <cstdint>

#include "tensors.h"

#define KDOPS_INLINE inline __attribute__((always_inline))
#define KDOPS_INLINE_LAMBDA __attribute__((always_inline))

// setup.py finds out which spelling the compiler knows, if any. Without it one version is compiled, for the target of
// the compiler.
#if KDOPS_CLONES == 1
#define KDOPS_CLONED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif KDOPS_CLONES == 2
#define KDOPS_CLONED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define KDOPS_CLONED
#endif

namespace kdops {

// Numbers in 32 bytes: the widest block whose accumulators stay in registers with AVX2 as well as with AVX-512.
template <typename T>
constexpr int64_t kLanes = 32 / sizeof(T);

// Conversions of one number, without branches and so vectorised (those of c10 are not, for Half).

template <typename T>
KDOPS_INLINE T widen(T value) {
  return value;
}

KDOPS_INLINE float widen(BFloat16 value) {
  return c10::bit_cast<float>(static_cast<uint32_t>(value.x) << 16);
}

KDOPS_INLINE float widen(Half value) {
  const uint32_t half = value.x;
  // Exponent and mantissa moved into place, then rebiased by 2^112: exact, for subnormal numbers too.
  const float magnitude = c10::bit_cast<float>((half & 0x7fffu) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;  // infinity or NaN
  return c10::bit_cast<float>(c10::bit_cast<uint32_t>(magnitude) | special | (half & 0x8000u) << 16);
}

KDOPS_INLINE void narrow(float value, float& out) {
  out = value;
}

KDOPS_INLINE void narrow(double value, double& out) {
  out = value;
}

KDOPS_INLINE void narrow(float value, BFloat16& out) {
  const uint32_t bits = c10::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
  out.x = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

KDOPS_INLINE void narrow(float value, Half& out) {
  const uint32_t bits = c10::bit_cast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Three cases, all rounding to nearest even: the hardware's adder rounds subnormal results, an integer carry the
  // normal ones.
  const uint32_t subnormal = c10::bit_cast<uint32_t>(c10::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  out.x = static_cast<uint16_t>((magnitude >= 0x47800000u ? special : finite) | (bits >> 16 & 0x8000u));
}

// A tile holds `width` columns of every row as accumulator numbers, rows `pitch` apart, columns padded with zeros up to
// `padded`.
struct TileShape {
  int64_t width;   // columns that exist
  int64_t padded;  // the same, rounded up to whole lanes: what kernels loop over
  int64_t pitch;
};

// Short pieces of many rows defeat the hardware's prefetcher, so that each row asks for the next one's lines.
constexpr int64_t kLineBytes = 64;

template <typename scalar_t, typename T>
KDOPS_INLINE void load_tile(const scalar_t* __restrict from, int64_t row_stride, int64_t rows, TileShape shape,
                            T* __restrict tile) {
  constexpr int64_t line = kLineBytes / sizeof(scalar_t);
  for (int64_t row = 0; row < rows; ++row) {
    const scalar_t* __restrict source = from + row * row_stride;
    const scalar_t* next = row + 1 < rows ? source + row_stride : from + shape.width;
    T* __restrict target = tile + row * shape.pitch;
    int64_t t = 0;
    for (; t + line <= shape.width; t += line) {
      __builtin_prefetch(next + t);
#pragma omp simd
      for (int64_t i = 0; i < line; ++i) target[t + i] = widen(source[t + i]);
    }
    for (; t < shape.width; ++t) target[t] = widen(source[t]);
    for (; t < shape.padded; ++t) target[t] = 0;
  }
}

template <typename scalar_t, typename T>
KDOPS_INLINE void store_tile(const T* __restrict tile, TileShape shape, int64_t rows, scalar_t* __restrict to,
                             int64_t row_stride) {
  constexpr int64_t line = kLineBytes / sizeof(scalar_t);
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict source = tile + row * shape.pitch;
    scalar_t* __restrict target = to + row * row_stride;
    scalar_t* next = row + 1 < rows ? target + row_stride : to + shape.width;
    int64_t t = 0;
    for (; t + line <= shape.width; t += line) {
      __builtin_prefetch(next + t, 1);
#pragma omp simd
      for (int64_t i = 0; i < line; ++i) narrow(source[t + i], target[t + i]);
    }
    for (; t < shape.width; ++t) narrow(source[t], target[t]);
  }
}

}  // namespace kdops
