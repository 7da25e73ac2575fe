// What the host code of CPU and CUDA kernels shares: dtypes, and dense tensors of any strides as flat rows.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

namespace kdops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

using BFloat16 = c10::BFloat16;
using Half = c10::Half;

template <typename scalar_t>
using Accumulator = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

inline ScalarType accumulator_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? dtype : ScalarType::Float;
}

// Calls run with a zero of the C++ type of `dtype`, which must be one of Types.
template <typename... Types, typename Run>
void for_dtype(ScalarType dtype, const Run& run) {
  const bool known =
      ((dtype == torch::headeronly::CppTypeToScalarType<Types>::value ? (run(Types{}), true) : false) || ...);
  STD_TORCH_CHECK(known, "kdops: no kernel for ", torch::headeronly::toString(dtype), " on this device.");
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// The axes from `first` on that have more than one element, as (stride, size): the stride of the others means nothing.
inline std::vector<std::pair<int64_t, int64_t>> axes(const Tensor& t, int64_t first) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (int64_t axis = first; axis < t.dim(); ++axis) {
    if (t.size(axis) > 1) found.emplace_back(t.stride(axis), t.size(axis));
  }
  return found;
}

// Whether the axes from `first` on fill one gapless run of memory, in whatever order.
inline bool features_are_dense(const Tensor& t, int64_t first) {
  auto sorted = axes(t, first);
  std::sort(sorted.begin(), sorted.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : sorted) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

inline int64_t count_features(const Tensor& t, int64_t first) {
  int64_t count = 1;
  for (int64_t axis = first; axis < t.dim(); ++axis) count *= t.size(axis);
  return count;
}

// Two tensors whose features lie in memory in the same order, so that a sum over them may read flat rows of both.
// Contiguous copies are made only where the layouts differ.
struct FlatPair {
  Tensor x, y;
  int64_t first_x, first_y;  // the axis where the features begin

  FlatPair(const Tensor& given_x, int64_t first_x, const Tensor& given_y, int64_t first_y)
      : x(given_x), y(given_y), first_x(first_x), first_y(first_y) {
    const bool same = axes(x, first_x) == axes(y, first_y);
    if (!same || !features_are_dense(x, first_x)) {
      x = torch::stable::contiguous(x);
      y = torch::stable::contiguous(y);
    }
  }
};

// The gradient of `input`, which the kernel reads as `flat` (itself, or a contiguous copy).
class Gradient {
 public:
  Tensor result;  // with the strides of empty_like(input), or of shape (0,) when nobody needs it
  Tensor rows;    // what the kernel writes: its features lie as those of `flat`

  Gradient(bool needed, const Tensor& input, const Tensor& flat, int64_t first)
      : result(needed ? torch::stable::empty_like(input) : torch::stable::new_empty(input, {0})), rows(result) {
    if (needed && axes(result, first) != axes(flat, first)) rows = torch::stable::empty_like(flat);
  }

  Tensor finish() {
    if (rows.const_data_ptr() != result.const_data_ptr()) torch::stable::copy_(result, rows);
    return result;
  }
};

}  // namespace kdops
