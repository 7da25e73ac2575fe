// One stack of matrices minus another in place, and the distance between them: the step between the matrix products of a distance
// of products.
//
// x becomes the slope of the distance, sign(x - y) for p = 1 and x - y (half the slope) for p = 2; the result is the sum of |x - y|^p
// of each matrix. Runs are summed apart and added in order, so that the result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "common/parallel.h"
#include "common/simd.h"
#include "common/tensors.h"

namespace kdops {
namespace {

constexpr int64_t kBlock = 1024;  // numbers that are added in T before the sum goes on in double
constexpr int64_t kWidth = 16;    // running sums of a block

// n <= kBlock numbers, side by side in both.
template <int P, typename T>
KDOPS_INLINE double block_difference(T* __restrict x, const T* __restrict y, int64_t n) {
  T sums[kWidth] = {};
  const auto one = [&](int64_t t, int64_t lane) KDOPS_INLINE_LAMBDA {
    const T difference = x[t] - y[t];
    sums[lane] += P == 1 ? std::fabs(difference) : difference * difference;
    x[t] = P == 2 ? difference : static_cast<T>((difference > 0) - (difference < 0));  // 0 at a tie and, as in torch, at NaN
  };
  const int64_t whole = n - n % kWidth;
  for (int64_t t = 0; t < whole; t += kWidth) {
#pragma omp simd
    for (int64_t lane = 0; lane < kWidth; ++lane) one(t + lane, lane);
  }
  for (int64_t t = whole; t < n; ++t) one(t, t - whole);
  double sum = 0;
  for (int64_t lane = 0; lane < kWidth; ++lane) sum += sums[lane];
  return sum;
}

template <typename T, int P>
KDOPS_CLONED double run_difference(T* x, const T* y, int64_t n) {
  double sum = 0;
  for (int64_t t = 0; t < n; t += kBlock) sum += block_difference<P>(x + t, y + t, std::min(kBlock, n - t));
  return sum;
}

// `along` is the axis, 1 or 2, whose numbers lie side by side in both; the other one counts the runs.
template <typename T>
void stack_difference(const Tensor& x, const Tensor& y, int64_t along, int64_t p, double* result) {
  const auto kernel = p == 1 ? run_difference<T, 1> : run_difference<T, 2>;
  const int64_t across = 3 - along, matrices = x.size(0), runs = x.size(across), length = x.size(along);
  T* const to = static_cast<T*>(x.mutable_data_ptr());
  const T* const from = static_cast<const T*>(y.const_data_ptr());
  const Buffer<double> sums = allocate<double>(matrices * runs);
  for_each_task<double>(matrices * runs, 0, [&](int64_t task, double*) {
    const int64_t m = task / runs, run = task % runs;
    sums[task] = kernel(to + m * x.stride(0) + run * x.stride(across), from + m * y.stride(0) + run * y.stride(across), length);
  });
  for (int64_t m = 0; m < matrices; ++m) {
    result[m] = 0;
    for (int64_t run = 0; run < runs; ++run) result[m] += sums[m * runs + run];
  }
}

// x (G, R, T) float or double, changed in place; y the same; -> (G,) float64.
Tensor difference_(const Tensor& x, const Tensor& given_y, int64_t p) {
  STD_TORCH_CHECK(p == 1 || p == 2, "kdops: p is ", p, ", but it must be 1 or 2.");
  STD_TORCH_CHECK(x.dim() == 3 && given_y.dim() == 3 && x.scalar_type() == given_y.scalar_type(),
                  "kdops: difference_ takes two stacks of matrices of one dtype.");
  for (int64_t axis = 0; axis < 3; ++axis) {
    STD_TORCH_CHECK(x.size(axis) == given_y.size(axis), "kdops: difference_ takes two stacks of one shape.");
  }
  const int64_t along = x.stride(2) == 1 ? 2 : 1;
  STD_TORCH_CHECK(x.stride(along) == 1, "kdops: difference_ needs rows or columns of x side by side.");
  Tensor y = given_y;
  if (y.stride(along) != 1) {  // another layout: copied into that of x
    y = torch::stable::empty_like(x);
    torch::stable::copy_(y, given_y);
  }
  Tensor result = torch::stable::new_empty(x, {x.size(0)}, ScalarType::Double);
  double* const sums = static_cast<double*>(result.mutable_data_ptr());
  if (x.scalar_type() == ScalarType::Float) {
    stack_difference<float>(x, y, along, p, sums);
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "kdops: difference_ takes float32 and float64, but not ",
                    toString(x.scalar_type()), ".");
    stack_difference<double>(x, y, along, p, sums);
  }
  return result;
}

}  // namespace
}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("difference_", TORCH_BOX(&kdops::difference_));
}
