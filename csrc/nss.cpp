// Locally normalised images on the CPU: tiles that stay in cache, with a border as wide as the window needs.
//
// Forward: statistics of rows, then of columns of rows (csrc/nss.h). Backward takes them from forward's results and
// goes the other way: what a pixel receives from the windows above and below, then from the columns of those to its
// left and right. Every number comes from one place, so the result does not depend on the number of threads.
#include "nss.h"

#include <limits>

#include "common/parallel.h"
#include "common/simd.h"

namespace kdops {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kTileColumns = 256;

template <typename T>
struct Lanes {
  T at[kLanes<T>] = {};
};

// --- loading ---

template <typename scalar_t, typename T>
KDOPS_CLONED void load_row(const scalar_t* __restrict from, int64_t stride, int64_t count, T* __restrict to) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = widen(from[i * stride]);
  }
}

template <typename scalar_t, typename T>
KDOPS_CLONED void store_row(const T* __restrict from, int64_t count, scalar_t* __restrict to, int64_t stride) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i * stride]);
  }
}

// Rows [top, top + rows) and columns [left, left + columns) of a plane, which may reach beyond it: there with its
// border pixels if `replicate`, else the number `beyond`. `pitch` numbers are written of every row.
template <typename scalar_t, typename T>
void load_padded(const scalar_t* plane, const Planes& planes, int64_t top, int64_t left, int64_t rows, int64_t columns,
                 bool replicate, T* tile, int64_t pitch, T beyond = 0) {
  const int64_t begin = std::clamp<int64_t>(-left, 0, columns);
  const int64_t end = std::clamp(planes.width - left, begin, columns);
  for (int64_t row = 0; row < rows; ++row, tile += pitch) {
    const int64_t y = std::clamp<int64_t>(top + row, 0, planes.height - 1);
    if (!replicate && y != top + row) {
      std::fill(tile, tile + pitch, beyond);
      continue;
    }
    const scalar_t* from = plane + y * planes.row_stride;
    load_row(from + (left + begin) * planes.column_stride, planes.column_stride, end - begin, tile + begin);
    const T before = replicate ? T(widen(from[0])) : beyond;
    const T after = replicate ? T(widen(from[(planes.width - 1) * planes.column_stride])) : beyond;
    std::fill(tile, tile + begin, before);
    std::fill(tile + end, tile + columns, after);
    std::fill(tile + columns, tile + pitch, beyond);
  }
}

// --- statistics ---

// Of the window around each of `count` pixels of a row, whose first pixel is x[radius]: the mean relative to the pixel,
// and the variance.
template <typename T, typename Radius>
KDOPS_CLONED void row_statistics(const T* __restrict x, int64_t count, const T* __restrict weight, Radius radius,
                                 T* __restrict offset, T* __restrict variance) {
  for (int64_t t = 0; t < count; t += kLanes<T>) {
    const T* centre = x + radius + t;
    Lanes<T> mean, square;
    for (int64_t i = 0; i <= 2 * radius; ++i) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes<T>; ++l) mean.at[l] += weight[i] * (x[t + i + l] - centre[l]);
    }
    for (int64_t i = 0; i <= 2 * radius; ++i) {
#pragma omp simd
      for (int64_t l = 0; l < kLanes<T>; ++l) {
        const T deviation = (x[t + i + l] - centre[l]) - mean.at[l];
        square.at[l] += weight[i] * (deviation * deviation);
      }
    }
#pragma omp simd
    for (int64_t l = 0; l < kLanes<T>; ++l) offset[t + l] = mean.at[l], variance[t + l] = square.at[l];
  }
}

// Of the window around each pixel of a row, from the statistics of the rows that it covers, the first of which these
// point to: the mean relative to the pixel, and the standard deviation.
template <typename T, typename Radius>
KDOPS_CLONED void column_statistics(const T* __restrict x, const T* __restrict offset, const T* __restrict variance,
                                    int64_t pitch, int64_t count, const T* __restrict weight, Radius radius,
                                    T* __restrict relative_mean, T* __restrict std) {
  for (int64_t t = 0; t < count; t += kLanes<T>) {
    const T* centre = x + radius * pitch + t;
    Lanes<T> mean, square;
    for (int64_t i = 0; i <= 2 * radius; ++i) {
      const int64_t at = i * pitch + t;
#pragma omp simd
      for (int64_t l = 0; l < kLanes<T>; ++l) mean.at[l] += weight[i] * ((x[at + l] - centre[l]) + offset[at + l]);
    }
    for (int64_t i = 0; i <= 2 * radius; ++i) {
      const int64_t at = i * pitch + t;
#pragma omp simd
      for (int64_t l = 0; l < kLanes<T>; ++l) {
        const T deviation = ((x[at + l] - centre[l]) + offset[at + l]) - mean.at[l];
        square.at[l] += weight[i] * (variance[at + l] + deviation * deviation);
      }
    }
#pragma omp simd
    for (int64_t l = 0; l < kLanes<T>; ++l) {
      relative_mean[t + l] = mean.at[l];
      std[t + l] = std::sqrt(square.at[l] + static_cast<T>(kTiny));
    }
  }
}

// relative_mean becomes (pixel - mean) / (std + c).
template <typename T>
KDOPS_CLONED void normalise(T* __restrict relative_mean, const T* __restrict std, int64_t count, T c) {
#pragma omp simd
  for (int64_t t = 0; t < count; ++t) relative_mean[t] = -relative_mean[t] / (std[t] + c);
}

// --- the way back ---

// In place, from the results of windows and their upstream gradients to what they pass on: b, twice, to the variance,
// and a, negated, to the mean; d is the pixel less the mean. Where std overflows, all three are 0.
template <typename T>
KDOPS_CLONED void slopes(int64_t count, T c, T* __restrict normalised_to_d, const T* __restrict std,
                         T* __restrict of_normalised_to_a, T* __restrict of_std_to_b) {
#pragma omp simd
  for (int64_t t = 0; t < count; ++t) {
    const T scale = std[t] + c, a = of_normalised_to_a[t] / scale;
    of_std_to_b[t] = (of_std_to_b[t] - a * normalised_to_d[t]) / std[t];
    of_normalised_to_a[t] = a;
    normalised_to_d[t] *= std::min(scale, std::numeric_limits<T>::max());
  }
}

// What the windows of each column pass on to the pixel x of one row in that column, and what they add for each unit
// that another pixel of the row exceeds it. a, b and d point to the first row of windows that cover the pixels.
template <typename T, typename Radius>
KDOPS_CLONED void gather_columns(const T* __restrict x, const T* __restrict a, const T* __restrict b,
                                 const T* __restrict d, int64_t pitch, int64_t count, const T* __restrict weight,
                                 Radius radius, T* __restrict sums, T* __restrict spreads) {
  for (int64_t t = 0; t < count; t += kLanes<T>) {
    Lanes<T> sum, spread;
    for (int64_t i = 0; i <= 2 * radius; ++i) {
      const int64_t at = i * pitch + t;
      const T* centre = x + (i - radius) * pitch + t;
#pragma omp simd
      for (int64_t l = 0; l < kLanes<T>; ++l) {
        sum.at[l] += weight[i] * (b[at + l] * ((x[t + l] - centre[l]) + d[at + l]) - a[at + l]);
        spread.at[l] += weight[i] * b[at + l];
      }
    }
#pragma omp simd
    for (int64_t l = 0; l < kLanes<T>; ++l) sums[t + l] = sum.at[l], spreads[t + l] = spread.at[l];
  }
}

// gradient[t] = direct[t] + what pixel x[t] receives from the columns of the windows that cover it, the first of which
// sums and spreads point to.
template <typename T, typename Radius>
KDOPS_CLONED void gather_rows(const T* __restrict x, const T* __restrict sums, const T* __restrict spreads,
                              const T* __restrict direct, int64_t count, const T* __restrict weight, Radius radius,
                              T* __restrict gradient) {
  for (int64_t t = 0; t < count; t += kLanes<T>) {
    Lanes<T> sum;
    for (int64_t i = 0; i <= 2 * radius; ++i) {
      const int64_t at = t + i;
#pragma omp simd
      for (int64_t l = 0; l < kLanes<T>; ++l) {
        sum.at[l] += weight[i] * (sums[at + l] + spreads[at + l] * (x[t + l] - x[at - radius + l]));
      }
    }
#pragma omp simd
    for (int64_t l = 0; l < kLanes<T>; ++l) gradient[t + l] = direct[t + l] + sum.at[l];
  }
}

// The same for one pixel, without vectors: the first and the last of a row stand for the padding as well.
template <typename T>
T at_the_edge(const T* x, const T* sums, const T* spreads, const T* weight, int64_t radius) {
  T sum = 0;
  for (int64_t i = 0; i <= 2 * radius; ++i) sum += weight[i] * (sums[i] + spreads[i] * (x[0] - x[i - radius]));
  return sum;
}

// --- tiles ---

struct Tile {
  int64_t plane, top, left, rows, columns;
};

class Tiling {
 public:
  explicit Tiling(const Planes& planes)
      : planes_(planes),
        down_((planes.height + kTileRows - 1) / kTileRows),
        across_((planes.width + kTileColumns - 1) / kTileColumns) {}

  int64_t count() const {
    return planes_.count() * down_ * across_;
  }

  int64_t rows() const {
    return std::min(kTileRows, planes_.height);
  }

  // From one row of scratch to the next: columns with `border` more at either side, and lanes that hang over.
  template <typename T>
  int64_t pitch(int64_t border) const {
    const int64_t columns = std::min(kTileColumns, planes_.width) + 2 * border;
    return (columns + 2 * kLanes<T>) / kLanes<T> * kLanes<T>;
  }

  Tile operator[](int64_t task) const {
    const int64_t top = task / across_ % down_ * kTileRows, left = task % across_ * kTileColumns;
    return {task / (down_ * across_), top, left, std::min(kTileRows, planes_.height - top),
            std::min(kTileColumns, planes_.width - left)};
  }

 private:
  const Planes& planes_;
  int64_t down_, across_;
};

template <typename scalar_t, typename Radius>
void forward(const scalar_t* image, const Planes& planes, const Window& window, Radius radius, scalar_t* normalised,
             scalar_t* std) {
  using T = Accumulator<scalar_t>;
  const Tiling tiling(planes);
  const int64_t pitch = tiling.pitch<T>(radius), most = (tiling.rows() + 2 * radius) * pitch;
  const Weights<T> weights = window.weights<T>();
  for_each_task<T>(tiling.count(), 3 * most + 2 * pitch, [&](int64_t task, T* x) {
    T *offset = x + most, *variance = offset + most, *mean = variance + most, *deviation = mean + pitch;
    const Tile tile = tiling[task];
    load_padded(image + planes.begin(tile.plane), planes, tile.top - radius, tile.left - radius, tile.rows + 2 * radius,
                tile.columns + 2 * radius, window.replicate, x, pitch);
    for (int64_t row = 0; row < tile.rows + 2 * radius; ++row) {
      const int64_t at = row * pitch;
      row_statistics(x + at, tile.columns, weights.at, radius, offset + at, variance + at);
    }
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t at = row * pitch;
      column_statistics(x + at + radius, offset + at, variance + at, pitch, tile.columns, weights.at, radius, mean,
                        deviation);
      normalise(mean, deviation, tile.columns, static_cast<T>(window.c));
      const int64_t to = (tile.plane * planes.height + tile.top + row) * planes.width + tile.left;
      store_row(mean, tile.columns, normalised + to, 1);
      store_row(deviation, tile.columns, std + to, 1);
    }
  });
}

// What backward reads: a tensor, or none, which stands for zeros.
template <typename T>
struct Source {
  const T* values = nullptr;
  Planes planes;

  explicit Source(const Tensor& t) : values(const_data<T>(t)), planes(t) {}

  Source(const std::optional<Tensor>& t, const Tensor& alike) : planes(alike) {
    if (t) *this = Source(*t);
  }

  // A tile with its border, `beyond` where that is not of the plane.
  void load(const Tile& tile, int64_t border, T* to, int64_t pitch, T beyond = 0) const {
    const int64_t rows = tile.rows + 2 * border;
    if (values == nullptr) return std::fill(to, to + rows * pitch, T(0));
    load_padded(values + planes.begin(tile.plane), planes, tile.top - border, tile.left - border, rows,
                tile.columns + 2 * border, false, to, pitch, beyond);
  }
};

template <typename T>
struct Sources {
  Source<T> image, normalised, std, of_normalised, of_std;
};

template <typename T, typename Radius>
void backward(const Sources<T>& from, const Window& window, Radius radius, T* gradient, const Planes& gradients) {
  const Planes& planes = from.image.planes;
  const Tiling tiling(planes);
  const int64_t pitch = tiling.pitch<T>(radius), most = (tiling.rows() + 2 * radius) * pitch;
  const Weights<T> weights = window.weights<T>();
  for_each_task<T>(tiling.count(), 5 * most + 3 * pitch, [&](int64_t task, T* x) {
    T *a = x + most, *b = a + most, *d = b + most, *std = d + most;
    T *sums = std + most, *spreads = sums + pitch, *result = spreads + pitch;
    const Tile tile = tiling[task];
    const int64_t rows = tile.rows + 2 * radius, columns = tile.columns + 2 * radius;  // of windows
    from.image.load(tile, radius, x, pitch);
    from.normalised.load(tile, radius, d, pitch);
    from.std.load(tile, radius, std, pitch, 1);  // windows beyond the plane pass nothing on
    from.of_normalised.load(tile, radius, a, pitch);
    from.of_std.load(tile, radius, b, pitch);
    slopes(rows * pitch, static_cast<T>(window.c), d, std, a, b);
    for (int64_t row = 0; row < tile.rows; ++row) {
      const int64_t at = row * pitch, centre = at + radius * pitch, y = tile.top + row;
      const T* pixel = x + centre + radius;  // the first of the row
      T weight[kMostTaps];
      for (int64_t i = 0; i <= 2 * radius; ++i) {
        weight[i] =
            weights.at[i] + (y == 0 ? weights.first[i] : 0) + (y == planes.height - 1 ? weights.last[i] : 0);
      }
      gather_columns(x + centre, a + at, b + at, d + at, pitch, columns, weight, radius, sums, spreads);
      gather_rows(pixel, sums, spreads, a + centre + radius, tile.columns, weights.at, radius, result);
      const auto add_edge = [&](int64_t t, const T* extra) {
        result[t] += at_the_edge(pixel + t, sums + t, spreads + t, extra, radius);
      };
      if (window.replicate && tile.left == 0) add_edge(0, weights.first);
      if (window.replicate && tile.left + tile.columns == planes.width) add_edge(tile.columns - 1, weights.last);
      store_row(result, tile.columns,
                gradient + gradients.begin(tile.plane) + y * gradients.row_stride + tile.left * gradients.column_stride,
                gradients.column_stride);
    }
  });
}

// Calls run with the radius: of the usual window of 7 as a constant, whose loops the compiler unrolls.
template <typename Run>
void with_radius(int64_t radius, const Run& run) {
  if (radius == 3) return run(std::integral_constant<int64_t, 3>{});
  run(radius);
}

}  // namespace

// --- operators ---

std::tuple<Tensor, Tensor> mscn(const Tensor& image, int64_t window, double sigma, double c, bool replicate) {
  const Window shape(image, window, sigma, c, replicate);
  Tensor normalised = empty_map(image), std = empty_map(image);
  for_dtype<float, double, BFloat16, Half>(image.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    with_radius(shape.radius, [&](auto radius) {
      forward(const_data<scalar_t>(image), Planes(image), shape, radius, data<scalar_t>(normalised),
              data<scalar_t>(std));
    });
  });
  return {normalised, std};
}

Tensor mscn_backward(const std::optional<Tensor>& grad_normalised, const std::optional<Tensor>& grad_std,
                     const Tensor& image, const Tensor& normalised, const Tensor& std, int64_t window, double sigma,
                     double c, bool replicate) {
  const Window shape(image, window, sigma, c, replicate);
  check_results(normalised, std, image);
  check_upstream(grad_normalised, image);
  check_upstream(grad_std, image);
  Tensor gradient = torch::stable::empty_like(image);
  for_dtype<float, double>(image.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Sources<T> sources{Source<T>(image), Source<T>(normalised), Source<T>(std),
                             Source<T>(grad_normalised, image), Source<T>(grad_std, image)};
    with_radius(shape.radius, [&](auto radius) {
      backward(sources, shape, radius, data<T>(gradient), Planes(gradient));
    });
  });
  return gradient;
}

}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  kdops::implement_nss(m);
}
