// Softmaxes of rows of the C x C logits and what goes back through them, for csrc/channel_attention.cpp: in place, because at a few
// hundred channels and positions fresh memory for each step in between costs more than the step.
#pragma once

#include <limits>

#include "common/parallel.h"
#include "common/products.h"

namespace kdops {
namespace {

// row = softmax(factor * row); `scratch` holds `count` numbers, padded to whole vectors.
template <typename T>
KDOPS_CLONED void soften(T* row, int64_t count, T factor, T* scratch) {
  constexpr T kNothing = -std::numeric_limits<T>::infinity();
  const int64_t width = padded(count, kLanes<T>);
  for (int64_t i = 0; i < count; ++i) scratch[i] = factor * row[i];
  std::fill(scratch + count, scratch + width, kNothing);
  Vector<T> largest = Vector<T>{} + kNothing, sums = {};
  for (int64_t i = 0; i < width; i += kLanes<T>) largest = vector(scratch + i) > largest ? vector(scratch + i) : largest;
  const T maximum = largest_of_lanes<T>(largest);
  for (int64_t i = 0; i < width; i += kLanes<T>) {
    vector(scratch + i) -= maximum;
    exponential(vector(scratch + i));
    sums += vector(scratch + i);
  }
  const T inverse = 1 / sum_of_lanes<T>(sums);
  for (int64_t i = 0; i < count; ++i) row[i] = inverse * scratch[i];
}

// of_row = factor * weights * (of_row - sum of weights * of_row); `scratch` holds `count` numbers twice, padded to whole vectors.
template <typename T>
KDOPS_CLONED void soften_backward(T* of_row, const T* weights, int64_t count, T factor, T* scratch) {
  const int64_t width = padded(count, kLanes<T>);
  T* const other = scratch + width;
  std::copy(of_row, of_row + count, scratch);
  std::copy(weights, weights + count, other);
  std::fill(scratch + count, scratch + width, T(0));
  std::fill(other + count, other + width, T(0));
  Vector<T> sums = {};
  for (int64_t i = 0; i < width; i += kLanes<T>) sums += vector(scratch + i) * vector(other + i);
  const T sum = sum_of_lanes<T>(sums);
  for (int64_t i = 0; i < count; ++i) of_row[i] = factor * other[i] * (scratch[i] - sum);
}

}  // namespace
}  // namespace kdops
