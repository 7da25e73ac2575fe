// What csrc/nss.cpp and csrc/nss.cu share: planes of an image, the weights of a window, and the operators.
//
// Every window's statistics are taken relative to its centre pixel and by axis: of each row the mean and variance, then
// of the column of rows the mean of means, and the mean of variances plus the variance of means. No step subtracts
// large numbers from each other, so no variance is negative and a constant image gives exactly 0.
#pragma once

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "common/tensors.h"

namespace kdops {

constexpr int64_t kMostTaps = 31;
constexpr double kTiny = 1e-8;  // inside the square root, so that a constant image has a gradient

// A tensor (B, C, H, W) of any strides.
struct Planes {
  int64_t batches, channels, height, width;
  int64_t batch_stride, channel_stride, row_stride, column_stride;

  explicit Planes(const Tensor& t)
      : batches(t.size(0)),
        channels(t.size(1)),
        height(t.size(2)),
        width(t.size(3)),
        batch_stride(t.stride(0)),
        channel_stride(t.stride(1)),
        row_stride(t.stride(2)),
        column_stride(t.stride(3)) {}

  C10_HOST_DEVICE int64_t count() const {
    return batches * channels;
  }

  C10_HOST_DEVICE int64_t begin(int64_t plane) const {
    return plane / channels * batch_stride + plane % channels * channel_stride;
  }
};

// Gaussian weights of one axis and, under replicate padding, what is added to them for the first and the last pixel of
// an axis, which stand for the padding as well: a window that reaches k pixels beyond holds the pixel k times more.
template <typename T>
struct Weights {
  T at[kMostTaps], first[kMostTaps], last[kMostTaps];
};

struct Window {
  int64_t radius;
  double sigma, c;
  bool replicate;

  Window(const Tensor& image, int64_t window, double sigma, double c, bool replicate)
      : radius(window / 2), sigma(sigma), c(c), replicate(replicate) {
    STD_TORCH_CHECK(image.dim() == 4, "kdops: image has ", image.dim(), " axes, but it must be (B, C, H, W).");
    STD_TORCH_CHECK(window % 2 == 1 && window >= 1 && window <= kMostTaps, "kdops: window is ", window,
                    ", but it must be odd and from 1 to ", kMostTaps, ".");
  }

  int64_t taps() const {
    return 2 * radius + 1;
  }

  template <typename T>
  Weights<T> weights() const {
    double weight[kMostTaps], total = 0, before = 0, after = 0;
    for (int64_t i = 0; i < taps(); ++i) {
      const auto distance = static_cast<double>(i - radius);
      weight[i] = std::exp(-distance * distance / (2 * sigma * sigma));
      total += weight[i];
    }
    Weights<T> result = {};
    for (int64_t i = 0; i < taps(); ++i) {
      const int64_t j = taps() - 1 - i;
      result.at[i] = static_cast<T>(weight[i] / total);
      result.last[i] = static_cast<T>(replicate ? before / total : 0);
      result.first[j] = static_cast<T>(replicate ? after / total : 0);
      before += weight[i];
      after += weight[j];
    }
    return result;
  }
};

// The operators, as kdops/nss/spec.py declares them; each device implements them.
std::tuple<Tensor, Tensor> mscn(const Tensor& image, int64_t window, double sigma, double c, bool replicate);
Tensor mscn_backward(const std::optional<Tensor>& grad_normalised, const std::optional<Tensor>& grad_std,
                     const Tensor& image, const Tensor& normalised, const Tensor& std, int64_t window, double sigma,
                     double c, bool replicate);

inline void implement_nss(torch::stable::detail::StableLibrary& library) {
  library.impl("mscn", TORCH_BOX(&mscn));
  library.impl("mscn_backward", TORCH_BOX(&mscn_backward));
}

// Contiguous, of the image's shape and dtype.
inline Tensor empty_map(const Tensor& image) {
  return torch::stable::new_empty(image, {image.size(0), image.size(1), image.size(2), image.size(3)});
}

inline bool fits(const Tensor& t, const Tensor& image) {
  bool same = t.dim() == 4 && t.scalar_type() == image.scalar_type();
  for (int64_t axis = 0; same && axis < 4; ++axis) same = t.size(axis) == image.size(axis);
  return same;
}

// Throws unless an upstream gradient fits the image.
inline void check_upstream(const std::optional<Tensor>& grad, const Tensor& image) {
  STD_TORCH_CHECK(!grad || fits(*grad, image), "kdops: a gradient has not the shape and dtype of the image.");
}

// Throws unless these can be what forward made of the image.
inline void check_results(const Tensor& normalised, const Tensor& std, const Tensor& image) {
  STD_TORCH_CHECK(fits(normalised, image) && fits(std, image),
                  "kdops: normalised or std has not the shape and dtype of the image.");
  STD_TORCH_CHECK(normalised.is_contiguous() && std.is_contiguous(),
                  "kdops: normalised and std must be contiguous, as forward makes them.");
}

}  // namespace kdops
