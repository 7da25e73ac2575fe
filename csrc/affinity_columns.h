// The columns of a feature map, one for each position, divided by their norm + eps; and the way back to the map.
#pragma once

#include <cmath>

#include "common/maps.h"
#include "common/parallel.h"

namespace kdops {

constexpr int64_t kNormalised = 64;  // positions of a task
constexpr int64_t kReturned = 16;    // likewise on the way back, where each is far from the next in memory

// hat = x / (norm + eps) of `count` positions, at most kNormalised; channels of hat are `pitch` apart.
template <typename scalar_t, typename T>
KDOPS_CLONED void normalise(const scalar_t* from, int64_t channel_stride, int64_t position_stride, int64_t channels,
                            int64_t count, T eps, T* hat, int64_t pitch, T* norms) {
  T x[kNormalised] = {}, divisor[kNormalised];
  double sums[kNormalised] = {}, scale[kNormalised];
  const auto load = [&](int64_t c) KDOPS_INLINE_LAMBDA {
    const scalar_t* const row = from + c * channel_stride;
    if (position_stride == 1 && count == kNormalised) {
      for (int64_t i = 0; i < kNormalised; ++i) x[i] = widen(row[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) x[i] = widen(row[i * position_stride]);
    }
  };
  std::fill(scale, scale + kNormalised, std::is_same_v<scalar_t, double> ? 0.0 : 1.0);
  if constexpr (std::is_same_v<scalar_t, double>) {  // squares of the others neither overflow nor underflow in float64
    for (int64_t c = 0; c < channels; ++c) {
      load(c);
      for (int64_t i = 0; i < kNormalised; ++i) scale[i] = std::abs(x[i]) > scale[i] ? std::abs(x[i]) : scale[i];
    }
    for (double& largest : scale) largest = largest > 0 ? largest : 1;
  }
  for (int64_t c = 0; c < channels; ++c) {
    load(c);
    for (int64_t i = 0; i < kNormalised; ++i) {
      const double part = std::is_same_v<scalar_t, double> ? x[i] / scale[i] : x[i];
      sums[i] += part * part;
    }
  }
  for (int64_t i = 0; i < kNormalised; ++i) {
    const T norm = static_cast<T>(scale[i] * std::sqrt(sums[i]));
    divisor[i] = norm + eps;
    if (i < count) norms[i] = norm;
  }
  for (int64_t c = 0; c < channels; ++c) {
    load(c);
    for (int64_t i = 0; i < count; ++i) hat[c * pitch + i] = x[i] / divisor[i];
  }
}

// From factor times the gradient of `hat` to that of the columns, of `count` positions, at most kReturned. A norm of 0
// has the gradient 0, as in torch.
template <typename scalar_t, typename T>
KDOPS_CLONED void through_norm(const T* of_hat, int64_t hat_channel, int64_t hat_position, const T* hat, int64_t pitch,
                               const T* norms, T eps, T factor, int64_t channels, int64_t count, scalar_t* to,
                               int64_t channel_stride, int64_t position_stride) {
  double inner[kReturned] = {};
  T along[kReturned], divisor[kReturned];
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      inner[i] += static_cast<double>(of_hat[c * hat_channel + i * hat_position]) * hat[c * pitch + i];
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    divisor[i] = norms[i] + eps;
    along[i] = static_cast<T>(inner[i] * (divisor[i] / (norms[i] != 0 ? norms[i] : T(1))));
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t i = 0; i < count; ++i) {
      const T across = of_hat[c * hat_channel + i * hat_position] - hat[c * pitch + i] * along[i];
      narrow(static_cast<Accumulator<scalar_t>>(factor * across / divisor[i]),
             to[c * channel_stride + i * position_stride]);
    }
  }
}

// Maps (B, C, N) -> hat (B, C, N) and norms (B, N), in the type of sums or, if `wide`, in float64.
inline std::tuple<Tensor, Tensor> affinity_columns(const Tensor& maps, double eps, bool wide) {
  const auto dtype = wide ? ScalarType::Double : accumulator_dtype(maps.scalar_type());
  const Map map(maps);
  Tensor hat = torch::stable::new_empty(maps, {map.batches, map.channels, map.positions}, dtype);
  Tensor norms = torch::stable::new_empty(maps, {map.batches, map.positions}, dtype);
  const int64_t blocks = panels(map.positions, kNormalised);
  for_dtype<float, double, BFloat16, Half>(maps.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto run = [&](auto sum) {
      using T = decltype(sum);
      T* const result = data<T>(hat);
      T* const norm = data<T>(norms);
      for_each_task<T>(map.batches * blocks, 0, [&](int64_t task, T*) {
        const int64_t batch = task / blocks, first = task % blocks * kNormalised;
        normalise(const_data<scalar_t>(map.tensor) + batch * map.batch_stride + first * map.position_stride,
                  map.channel_stride, map.position_stride, map.channels, std::min(kNormalised, map.positions - first),
                  static_cast<T>(eps), result + batch * map.channels * map.positions + first, map.positions,
                  norm + batch * map.positions + first);
      });
    };
    wide ? run(double{}) : run(Accumulator<scalar_t>{});
  });
  return {hat, norms};
}

// Writes factor (B,) times the gradient of the maps to `out` (B, C, N); of_hat has any strides.
inline void affinity_columns_backward(const Tensor& out, const Tensor& of_hat, const Tensor& hat, const Tensor& norms,
                                      double eps, const Tensor& factor) {
  const Map to(out), from(of_hat);
  const int64_t blocks = panels(to.positions, kReturned);
  for_dtype<float, double, BFloat16, Half>(out.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const auto run = [&](auto sum) {
      using T = decltype(sum);
      for_each_task<T>(to.batches * blocks, 0, [&](int64_t task, T*) {
        const int64_t batch = task / blocks, first = task % blocks * kReturned;
        through_norm(const_data<T>(from.tensor) + batch * from.batch_stride + first * from.position_stride,
                     from.channel_stride, from.position_stride,
                     const_data<T>(hat) + batch * hat.stride(0) + first, hat.stride(1),
                     const_data<T>(norms) + batch * to.positions + first, static_cast<T>(eps),
                     const_data<T>(factor)[batch], to.channels, std::min(kReturned, to.positions - first),
                     data<scalar_t>(to.tensor) + batch * to.batch_stride + first * to.position_stride,
                     to.channel_stride, to.position_stride);
      });
    };
    hat.scalar_type() == ScalarType::Double ? run(double{}) : run(Accumulator<scalar_t>{});
  });
}

}  // namespace kdops
