// Gaussian distances of many taps on the CPU: one pass over the inputs forward, one backward, whatever their shapes.
//
// Every sample of every tap is cut into pieces of columns, by the shapes alone. Forward: each piece has a sum of
// squares, which are added in order at the end. Backward: each piece has its gradients. The threads share the pieces
// evenly by their columns.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>

#include "common/pages.h"
#include "common/parallel.h"
#include "common/simd.h"

namespace kdops {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kPiece = 32768;          // columns
constexpr int64_t kStretch = 2048;         // columns whose squares are added in the type of the inputs' arithmetic
constexpr double kAdaptiveFloor = 1e-12;   // as in kdops/gaussian/reference.py

// Columns [begin, end) of one sample of a tap.
struct Piece {
  size_t tap;
  int64_t row, begin, end;
};

// All pieces of all taps, in order, and for each the columns before it.
struct Pieces {
  std::vector<Piece> all;
  std::vector<int64_t> before;
  int64_t columns = 0;

  explicit Pieces(const Tensors& taps) {
    for (size_t tap = 0; tap < taps.size(); ++tap) {
      const int64_t features = count_features(taps[tap], 1);
      for (int64_t row = 0; row < taps[tap].size(0); ++row) {
        for (int64_t begin = 0; begin < features; begin += kPiece) {
          all.push_back({tap, row, begin, std::min(begin + kPiece, features)});
          before.push_back(columns);
          columns += all.back().end - begin;
        }
      }
    }
  }

  // body(index) for every piece. A thread takes those that begin within its share of the columns.
  template <typename Body>
  void for_each(const Body& body) const {
    torch::stable::parallel_for(0, columns, kPiece, [&](int64_t from, int64_t to) {
      auto index = std::lower_bound(before.begin(), before.end(), from) - before.begin();
      for (; index < static_cast<int64_t>(all.size()) && before[index] < to; ++index) body(index);
    });
  }
};

// Both inputs of every tap as rows in the same order of features.
std::vector<FlatPair> flatten(const Tensors& x, const Tensors& y) {
  STD_TORCH_CHECK(!x.empty() && x.size() == y.size(), "kdops: x and y must be lists of as many taps, at least one.");
  std::vector<FlatPair> taps;
  for (size_t t = 0; t < x.size(); ++t) {
    STD_TORCH_CHECK(x[t].dim() >= 1 && x[t].dim() == y[t].dim() && x[t].size(0) == x[0].size(0),
                    "kdops: x and y of tap ", t, " do not fit together in number of axes or in batch size.");
    for (int64_t axis = 0; axis < x[t].dim(); ++axis) {
      STD_TORCH_CHECK(x[t].size(axis) == y[t].size(axis), "kdops: x and y of tap ", t, " differ along axis ", axis,
                      ".");
    }
    STD_TORCH_CHECK(x[t].scalar_type() == x[0].scalar_type() && y[t].scalar_type() == x[0].scalar_type(),
                    "kdops: taps must have one dtype.");
    taps.emplace_back(x[t], 1, y[t], 1);
  }
  return taps;
}

// Where sample `row` of a tensor begins.
template <typename scalar_t>
const scalar_t* sample(const Tensor& t, int64_t row) {
  return const_data<scalar_t>(t) + row * t.stride(0);
}

template <typename scalar_t>
KDOPS_CLONED double sum_of_squares(const scalar_t* __restrict x, const scalar_t* __restrict y, int64_t count) {
  using T = Accumulator<scalar_t>;
  constexpr int64_t lanes = 4 * kLanes<T>;
  double sum = 0;
  for (int64_t begin = 0; begin < count; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, count);
    T partial[lanes] = {};
    int64_t t = begin;
    for (; t + lanes <= end; t += lanes) {
#pragma omp simd
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T difference = widen(x[t + lane]) - widen(y[t + lane]);
        partial[lane] += difference * difference;
      }
    }
    for (int64_t lane = 0; t + lane < end; ++lane) {
      const T difference = widen(x[t + lane]) - widen(y[t + lane]);
      partial[lane] += difference * difference;
    }
    for (int64_t lane = 0; lane < lanes; ++lane) sum += partial[lane];
  }
  return sum;
}

// The gradients scale * (x - y) and its negative of those that are wanted (not null).
template <typename scalar_t, bool NeedX, bool NeedY>
KDOPS_CLONED void scale_difference(const scalar_t* __restrict x, const scalar_t* __restrict y, int64_t count,
                                   Accumulator<scalar_t> scale, scalar_t* __restrict grad_x,
                                   scalar_t* __restrict grad_y) {
#pragma omp simd
  for (int64_t t = 0; t < count; ++t) {
    const auto gradient = scale * (widen(x[t]) - widen(y[t]));
    if constexpr (NeedX) narrow(gradient, grad_x[t]);
    if constexpr (NeedY) narrow(-gradient, grad_y[t]);
  }
}

template <typename scalar_t>
void scale_difference(const scalar_t* x, const scalar_t* y, int64_t count, Accumulator<scalar_t> scale,
                      scalar_t* grad_x, scalar_t* grad_y) {
  if (grad_x && grad_y) return scale_difference<scalar_t, true, true>(x, y, count, scale, grad_x, grad_y);
  if (grad_x) return scale_difference<scalar_t, true, false>(x, y, count, scale, grad_x, grad_y);
  if (grad_y) return scale_difference<scalar_t, false, true>(x, y, count, scale, grad_x, grad_y);
}

// sums[tap * batch + row]: the squared distance of every sample.
template <typename scalar_t>
std::vector<double> squared_distances(const std::vector<FlatPair>& taps, const Pieces& pieces, int64_t batch) {
  std::vector<double> partial(pieces.all.size()), sums(taps.size() * batch);
  pieces.for_each([&](int64_t index) {
    const Piece& piece = pieces.all[index];
    const FlatPair& tap = taps[piece.tap];
    partial[index] =
        sum_of_squares(sample<scalar_t>(tap.x, piece.row) + piece.begin,
                       sample<scalar_t>(tap.y, piece.row) + piece.begin, piece.end - piece.begin);
  });
  for (size_t index = 0; index < partial.size(); ++index) {
    sums[pieces.all[index].tap * batch + pieces.all[index].row] += partial[index];
  }
  return sums;
}

enum Reduction : int64_t { kNone, kSum, kMean };  // over the batch, as in kdops/gaussian/spec.py

// From the squared distances of one tap: distance = -expm1(-rate * sum), one for each sample or reduced; its derivative
// by every sum; and the rate.
template <typename scalar_t, typename T = Accumulator<scalar_t>>
void apply_gaussian(const double* sums, int64_t batch, std::optional<double> sigma, double features,
                    int64_t reduction, scalar_t* distance, T* slope, T* rate) {
  double variance = kAdaptiveFloor;
  if (sigma) {
    variance = *sigma * *sigma;
  } else {
    for (int64_t row = 0; row < batch; ++row) variance += sums[row] / features / static_cast<double>(batch);
  }
  const double per_square = 1 / (2 * variance * features);
  *rate = static_cast<T>(per_square);
  const double share = reduction == kMean ? 1 / static_cast<double>(batch) : 1;
  double total = 0;
  for (int64_t row = 0; row < batch; ++row) {
    const double exponent = -sums[row] * per_square, one = -std::expm1(exponent) * share;
    if (reduction == kNone) narrow(static_cast<T>(one), distance[row]);
    total += one;
    slope[row] = static_cast<T>(per_square * std::exp(exponent) * share);
  }
  if (reduction != kNone) narrow(static_cast<T>(total), *distance);
}

std::tuple<Tensor, Tensor, Tensor> gaussian_distance(const Tensors& x, const Tensors& y,
                                                     const std::optional<std::vector<double>>& sigma, bool mean,
                                                     int64_t reduction) {
  const std::vector<FlatPair> taps = flatten(x, y);
  STD_TORCH_CHECK(!sigma || sigma->size() == taps.size(), "kdops: sigma must hold a number for each tap.");
  const int64_t count = static_cast<int64_t>(taps.size()), batch = x[0].size(0);
  const auto dtype = accumulator_dtype(x[0].scalar_type());
  STD_TORCH_CHECK(reduction == kNone || reduction == kSum || reduction == kMean, "kdops: no reduction ", reduction, ".");
  const int64_t each = reduction == kNone ? batch : 1;  // results of a tap
  Tensor distance = torch::stable::new_empty(
      x[0], reduction == kNone ? std::vector<int64_t>{count, batch} : std::vector<int64_t>{count});
  Tensor slope = torch::stable::new_empty(x[0], {count, batch}, dtype);
  Tensor rate = torch::stable::new_empty(x[0], {count}, dtype);
  for_dtype<float, double, BFloat16, Half>(x[0].scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = Accumulator<scalar_t>;
    const std::vector<double> sums = squared_distances<scalar_t>(taps, Pieces(x), batch);
    for (int64_t t = 0; t < count; ++t) {
      const auto features = mean ? static_cast<double>(count_features(x[t], 1)) : 1.0;
      apply_gaussian(sums.data() + t * batch, batch, sigma ? std::optional((*sigma)[t]) : std::nullopt, features,
                     reduction, data<scalar_t>(distance) + t * each, data<T>(slope) + t * batch, data<T>(rate) + t);
    }
  });
  return {distance, slope, rate};
}

// 2 grad slope of every sample of every tap, (T, B) as a list.
template <typename T>
std::vector<T> factors(const Tensor& grad, const Tensor& slope) {
  const Tensor dense_grad = torch::stable::contiguous(grad), dense_slope = torch::stable::contiguous(slope);
  std::vector<T> result(slope.numel());
  for_dtype<float, double, BFloat16, Half>(grad.scalar_type(), [&](auto zero) {
    const auto* upstream = const_data<decltype(zero)>(dense_grad);
    const T* slopes = const_data<T>(dense_slope);
    for (size_t i = 0; i < result.size(); ++i) result[i] = 2 * static_cast<T>(upstream[i]) * slopes[i];
  });
  return result;
}

// slope[tap][row] is the derivative of the distance by the sum of squares, grad[tap][row] that by the distance.
std::tuple<Tensors, Tensors> gaussian_distance_backward(const Tensor& grad, const Tensor& slope, const Tensors& x,
                                                        const Tensors& y, const std::vector<bool>& need_x,
                                                        const std::vector<bool>& need_y) {
  const std::vector<FlatPair> taps = flatten(x, y);
  const int64_t count = static_cast<int64_t>(taps.size()), batch = x[0].size(0);
  STD_TORCH_CHECK(need_x.size() == taps.size() && need_y.size() == taps.size() && grad.dim() == 2 && slope.dim() == 2 &&
                      grad.size(0) == count && grad.size(1) == batch && slope.size(0) == count &&
                      slope.size(1) == batch && slope.scalar_type() == accumulator_dtype(x[0].scalar_type()),
                  "kdops: the gradients, slopes and needs must be those of the taps.");
  std::vector<Gradient> grads_x, grads_y;
  for (size_t t = 0; t < taps.size(); ++t) {
    grads_x.emplace_back(need_x[t], x[t], taps[t].x, 1);
    grads_y.emplace_back(need_y[t], y[t], taps[t].y, 1);
    prepare(grads_x.back().rows);
    prepare(grads_y.back().rows);
  }
  for_dtype<float, double, BFloat16, Half>(x[0].scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto scales = factors<Accumulator<scalar_t>>(grad, slope);
    const auto piece_of = [](bool needed, const Gradient& gradient, const Piece& piece) -> scalar_t* {
      return needed ? data<scalar_t>(gradient.rows) + piece.row * gradient.rows.stride(0) + piece.begin : nullptr;
    };
    const Pieces pieces(x);
    pieces.for_each([&](int64_t index) {
      const Piece& piece = pieces.all[index];
      const FlatPair& tap = taps[piece.tap];
      scale_difference<scalar_t>(sample<scalar_t>(tap.x, piece.row) + piece.begin,
                                 sample<scalar_t>(tap.y, piece.row) + piece.begin, piece.end - piece.begin,
                                 scales[piece.tap * batch + piece.row],
                                 piece_of(need_x[piece.tap], grads_x[piece.tap], piece),
                                 piece_of(need_y[piece.tap], grads_y[piece.tap], piece));
    });
  });
  Tensors results_x, results_y;
  for (Gradient& gradient : grads_x) results_x.push_back(gradient.finish());
  for (Gradient& gradient : grads_y) results_y.push_back(gradient.finish());
  return {results_x, results_y};
}

}  // namespace
}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("gaussian_distance", TORCH_BOX(&kdops::gaussian_distance));
  m.impl("gaussian_distance_backward", TORCH_BOX(&kdops::gaussian_distance_backward));
}
