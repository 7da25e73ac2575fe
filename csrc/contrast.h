// What csrc/contrast.cpp and csrc/contrast.cu share: both distances as one problem over flat rows.
//
// Pairwise distances are one batch of B x K pairs; matched distances are B batches of 1 x K pairs.
#pragma once

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "common/tensors.h"

namespace kdops {

struct Problem {
  int64_t batches, rows_x, rows_y, features, p;
  bool symmetric = false;  // x and y are one: each pair is computed once

  C10_HOST_DEVICE int64_t pairs() const {
    return rows_x * rows_y;
  }
};

// Where row `row` of batch `batch` begins: data + batch * batch_stride + row * row_stride.
struct Rows {
  int64_t batch_stride, row_stride;
};

// Which of the two distances a call is about: how its tensors map to batches and rows.
struct Pairing {
  int64_t first_y;         // the axis of y where the features begin: (K, *F) or (B, K, *F)
  bool symmetric = false;  // y is x

  bool matched() const {
    return first_y == 2;
  }

  Problem problem(const Tensor& x, const Tensor& y, int64_t p) const {
    STD_TORCH_CHECK(p == 1 || p == 2, "kdops: p is ", p, ", but it must be 1 or 2.");
    STD_TORCH_CHECK(x.dim() >= 1 && y.dim() == x.dim() - 1 + first_y && x.scalar_type() == y.scalar_type(),
                    "kdops: x and y do not fit together in dtype or number of axes.");
    for (int64_t axis = 1; axis < x.dim(); ++axis) {
      STD_TORCH_CHECK(x.size(axis) == y.size(axis - 1 + first_y), "kdops: x and y differ in size along axis ", axis,
                      " of x.");
    }
    STD_TORCH_CHECK(!matched() || x.size(0) == y.size(0), "kdops: anchor and others differ in batch size.");
    const int64_t features = count_features(x, 1);
    if (matched()) return {x.size(0), 1, y.size(1), features, p};
    return {1, x.size(0), y.size(0), features, p, symmetric};
  }

  Rows rows_x(const Tensor& x) const {
    return matched() ? Rows{x.stride(0), 0} : Rows{0, x.stride(0)};
  }

  Rows rows_y(const Tensor& y) const {
    return matched() ? Rows{y.stride(0), y.stride(1)} : Rows{0, y.stride(0)};
  }
};

constexpr Pairing kPairwise{1};
constexpr Pairing kSymmetric{1, true};
constexpr Pairing kMatched{2};

// The distances of every pair, of shape (B, K) for both pairings.
inline Tensor empty_distances(const Tensor& x, const Tensor& y, Pairing pairing) {
  const auto dtype = accumulator_dtype(x.scalar_type());
  return torch::stable::new_empty(x, {x.size(0), y.size(pairing.first_y - 1)}, dtype);
}

// The upstream gradient (B, K), contiguous; throws unless it fits.
inline Tensor weights(const Tensor& grad, const Tensor& x, const Problem& problem) {
  STD_TORCH_CHECK(grad.scalar_type() == accumulator_dtype(x.scalar_type()),
                  "kdops: the gradient has not the dtype of the distances.");
  STD_TORCH_CHECK(grad.dim() == 2 && grad.numel() == problem.batches * problem.pairs(),
                  "kdops: the gradient has not the shape of the distances.");
  return torch::stable::contiguous(grad);
}

// One of the two inputs of a backward pass.
template <typename scalar_t>
struct Side {
  const scalar_t* values;
  Rows rows;
  scalar_t* gradient = nullptr;  // null when not wanted
  Rows gradient_rows = {};

  void write_to(const Gradient& wanted, Rows wanted_rows) {
    gradient = data<scalar_t>(wanted.rows);
    gradient_rows = wanted_rows;
  }
};

// What each device implements. A symmetric distance has one gradient, that of x, and `grad` is the sum of both places of
// a pair.
Tensor distance(const Tensor& x, const Tensor& y, int64_t p, Pairing pairing);
std::tuple<Tensor, Tensor> distance_backward(const Tensor& grad, const Tensor& x, const Tensor& y, int64_t p,
                                             bool need_x, bool need_y, Pairing pairing);

// The operators, as kdops/contrast/spec.py declares them.

inline Tensor pairwise_distance(const Tensor& x, const std::optional<Tensor>& y, int64_t p) {
  return distance(x, y.value_or(x), p, y ? kPairwise : kSymmetric);
}

inline std::tuple<Tensor, Tensor> pairwise_distance_backward(const Tensor& grad, const Tensor& x,
                                                             const std::optional<Tensor>& y, int64_t p, bool need_x,
                                                             bool need_y) {
  return distance_backward(grad, x, y.value_or(x), p, need_x, need_y, y ? kPairwise : kSymmetric);
}

inline Tensor matched_distance(const Tensor& anchor, const Tensor& others, int64_t p) {
  return distance(anchor, others, p, kMatched);
}

inline std::tuple<Tensor, Tensor> matched_distance_backward(const Tensor& grad, const Tensor& anchor,
                                                            const Tensor& others, int64_t p, bool need_anchor,
                                                            bool need_others) {
  return distance_backward(grad, anchor, others, p, need_anchor, need_others, kMatched);
}

inline void implement_contrast(torch::stable::detail::StableLibrary& library) {
  library.impl("pairwise_distance", TORCH_BOX(&pairwise_distance));
  library.impl("pairwise_distance_backward", TORCH_BOX(&pairwise_distance_backward));
  library.impl("matched_distance", TORCH_BOX(&matched_distance));
  library.impl("matched_distance_backward", TORCH_BOX(&matched_distance_backward));
}

}  // namespace kdops
