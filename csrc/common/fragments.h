// What tensor cores of sm_90 work on: 8 x 8 matrices of bfloat16, of which each lane of a warp holds the pair of numbers
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

// sums (16 x 8 float: of rows lane / 4 and 8 below it two columns each) += left @ upper + right @ lower, matrices of 8 x 8, turned.
__device__ inline void multiply_add(float (&sums)[4], Columns left, unsigned upper, Columns right, unsigned lower) {
#if __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(left.upper), "r"(left.lower), "r"(right.upper), "r"(right.lower), "r"(upper), "r"(lower));
#endif
}

// Four bytes of a word, one for each hexadecimal digit of the selector, from the lowest on: 0 to 3 name a byte of it, 4 is zero.
__device__ inline unsigned pick_bytes(unsigned word, unsigned selector) { return __byte_perm(word, 0, selector); }

// Of both numbers of a word the sign of a - b: 1, -1, or 0 if they are equal or one of them is NaN.
__device__ inline unsigned signs_of_difference(unsigned a, unsigned b) {
  unsigned sign = 0;
#if __CUDA_ARCH__ >= 900
  asm("{\n"
      ".reg .b32 above, below;\n"
      "set.gt.bf16x2.bf16x2 above, %1, %2;\n"
      "set.lt.bf16x2.bf16x2 below, %1, %2;\n"
      "sub.rn.bf16x2 %0, above, below;\n"
      "}"
      : "=r"(sign)
      : "r"(a), "r"(b));
#endif
  return sign;
}

}  // namespace kdops
