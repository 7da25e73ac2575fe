// From the dtype of a tensor to the type of C++ that a CPU kernel is instantiated for.
#pragma once

#include "simd.h"
#include "tensors.h"

namespace kdops {

// Calls run with a value of the C++ type of the dtype.
template <typename Run>
void for_dtype(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Double: return run(double{});
    case ScalarType::BFloat16: return run(BFloat16{});
    case ScalarType::Half: return run(Half{});
    default: STD_TORCH_CHECK(false, "kdops: the CPU kernels take float32, float64, bfloat16 and float16, but not ", toString(dtype), ".");
  }
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace kdops
