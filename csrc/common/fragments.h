// What tensor cores of sm_90 work on: 8 x 8 matrices of 16-bit numbers, of which each lane of a warp holds the pair of numbers
// at row lane / 4 and columns lane % 4 * 2 and the next, in one word. Collective: all lanes of a warp call them together.
#pragma once

#include <cuda_runtime.h>

namespace kdops {

// Four matrices from shared memory, turned: the rows that lie there become columns. Lane 8 m + r says where row r of
// matrix m lies, 16 bytes.
__device__ inline void load_turned(unsigned (&matrices)[4], const uint4* row) {
#if __CUDA_ARCH__ >= 900
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
#endif
}

// And back.
__device__ inline void store_turned(uint4* row, const unsigned (&matrices)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
               :
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row))), "r"(matrices[0]), "r"(matrices[1]),
                 "r"(matrices[2]), "r"(matrices[3])
               : "memory");
#endif
}

// The upper and the lower half of 16 rows of 8.
struct Columns {
  unsigned upper, lower;
};

// sums (16 x 8 float: of rows lane / 4 and 8 below it two columns each) += left @ upper + right @ lower, matrices of 8 x 8 float16,
// turned.
__device__ inline void multiply_add(float (&sums)[4], Columns left, unsigned upper, Columns right, unsigned lower) {
#if __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left.upper), "r"(left.lower), "r"(right.upper), "r"(right.lower), "r"(upper), "r"(lower));
#endif
}

// Of a number of word `a` and both numbers of word `b`, all bfloat16, the sign of the difference: 1, -1, or 0 if they are equal or
// one of them is NaN.
template <int Which>
__device__ inline unsigned signs_of_difference(unsigned a, unsigned b) {
  unsigned sign = 0;
#if __CUDA_ARCH__ >= 900
  asm("{\n"
      ".reg .b16 number<2>;\n"
      ".reg .b32 twice, above, below;\n"
      "mov.b32 {number0, number1}, %1;\n"
      "mov.b32 twice, {number%3, number%3};\n"
      "set.gt.bf16x2.bf16x2 above, twice, %2;\n"
      "set.lt.bf16x2.bf16x2 below, twice, %2;\n"
      "sub.rn.bf16x2 %0, above, below;\n"
      "}"
      : "=r"(sign)
      : "r"(a), "r"(b), "n"(Which));
#endif
  return sign;
}

}  // namespace kdops
