// Locally normalised images on CUDA: a block holds a tile with its border in shared memory, from the image to the
// result.
//
// The same steps as on the CPU (csrc/nss.cpp): statistics of rows, of columns of rows, and the same way back. No
// atomics.
#include <torch/csrc/stable/accelerator.h>

#include "common/launch.h"
#include "nss.h"

namespace kdops {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;  // rows and columns of the results of a block

// body(row, column) for every element of a rectangle, over the threads of a block.
template <typename Body>
__device__ void for_each(int rows, int columns, const Body& body) {
  for (int i = threadIdx.x; i < rows * columns; i += kThreads) body(i / columns, i % columns);
}

// A rectangle of a plane: its first row and column there, which may lie beyond the border.
struct Corner {
  int64_t top, left;
};

// The tile of this block.
struct Position {
  int64_t plane;
  Corner corner;

  __device__ explicit Position(const Planes& planes) {
    const int64_t across = (planes.width + kTile - 1) / kTile, down = (planes.height + kTile - 1) / kTile;
    const int64_t block = blockIdx.x;
    plane = block / (across * down);
    corner = {block / across % down * kTile, block % across * kTile};
  }
};

// The pixel at a place of the plane or of its padding; zero beyond it unless `replicate`.
template <typename scalar_t>
__device__ float padded(const scalar_t* plane, const Planes& planes, int64_t y, int64_t x, bool replicate) {
  const int64_t inside_y = min(max(y, int64_t{0}), planes.height - 1);
  const int64_t inside_x = min(max(x, int64_t{0}), planes.width - 1);
  if (!replicate && (inside_y != y || inside_x != x)) return 0;
  return plane[inside_y * planes.row_stride + inside_x * planes.column_stride];
}

template <typename scalar_t>
__device__ void load(const scalar_t* plane, const Planes& planes, Corner corner, int rows, int columns, bool replicate,
                     float* tile) {
  for_each(rows, columns, [&](int row, int column) {
    tile[row * columns + column] = padded(plane, planes, corner.top + row, corner.left + column, replicate);
  });
}

// Statistics of rows: x is `rows` x (`columns` + 2 radius), the results `rows` x `columns`.
__device__ void row_statistics(const float* x, int rows, int columns, const float* weight, int radius, float* offset,
                               float* variance) {
  const int pitch = columns + 2 * radius;
  for_each(rows, columns, [&](int row, int column) {
    const float* window = x + row * pitch + column;
    const float centre = window[radius];
    float mean = 0, square = 0;
    for (int i = 0; i <= 2 * radius; ++i) mean += weight[i] * (window[i] - centre);
    for (int i = 0; i <= 2 * radius; ++i) {
      const float deviation = (window[i] - centre) - mean;
      square += weight[i] * (deviation * deviation);
    }
    offset[row * columns + column] = mean;
    variance[row * columns + column] = square;
  });
}

struct Statistics {
  float mean, std;  // the mean relative to the pixel
};

// Of the window around a pixel: x, offset and variance point to the first row that it covers, at the pixel's column.
__device__ Statistics column_statistics(const float* x, int x_pitch, const float* offset, const float* variance,
                                        int pitch, const float* weight, int radius) {
  const float centre = x[radius * x_pitch];
  float mean = 0, square = 0;
  for (int i = 0; i <= 2 * radius; ++i) mean += weight[i] * ((x[i * x_pitch] - centre) + offset[i * pitch]);
  for (int i = 0; i <= 2 * radius; ++i) {
    const float deviation = ((x[i * x_pitch] - centre) + offset[i * pitch]) - mean;
    square += weight[i] * (variance[i * pitch] + deviation * deviation);
  }
  return {mean, sqrtf(square + static_cast<float>(kTiny))};
}

// Radius is that of the usual window, or 0 for any.
template <typename scalar_t, int Radius>
__global__ void __launch_bounds__(kThreads)
    normalise(const scalar_t* image, const Planes planes, const __grid_constant__ Weights<float> weights,
              int any_radius, float c, bool replicate, scalar_t* normalised, scalar_t* std) {
  extern __shared__ float shared[];
  const int radius = Radius ? Radius : any_radius, wide = kTile + 2 * radius;
  float *x = shared, *offset = x + wide * wide, *variance = offset + wide * kTile;
  const Position tile(planes);
  const Corner border{tile.corner.top - radius, tile.corner.left - radius};
  load(image + planes.begin(tile.plane), planes, border, wide, wide, replicate, x);
  __syncthreads();
  row_statistics(x, wide, kTile, weights.at, radius, offset, variance);
  __syncthreads();
  for_each(kTile, kTile, [&](int row, int column) {
    const int64_t to_y = tile.corner.top + row, to_x = tile.corner.left + column;
    if (to_y >= planes.height || to_x >= planes.width) return;
    const int at = row * kTile + column;
    const Statistics of = column_statistics(x + row * wide + column + radius, wide, offset + at, variance + at, kTile,
                                            weights.at, radius);
    const int64_t to = (tile.plane * planes.height + to_y) * planes.width + to_x;
    normalised[to] = static_cast<scalar_t>(-of.mean / (of.std + c));
    std[to] = static_cast<scalar_t>(of.std);
  });
}

// An upstream gradient, or none.
template <typename scalar_t>
struct Upstream {
  const scalar_t* values;
  Planes planes;

  Upstream(const std::optional<Tensor>& grad, const Tensor& image)
      : values(grad ? const_data<scalar_t>(*grad) : nullptr), planes(grad ? *grad : image) {}

  __device__ float at(int64_t plane, int64_t y, int64_t x) const {
    return values == nullptr ? 0 : padded(values + planes.begin(plane), planes, y, x, false);
  }
};

// The weight of a pixel, at `position` along an axis of `size`, in the window i - radius away.
__device__ float covering(const Weights<float>& weights, int i, int64_t position, int64_t size) {
  float weight = weights.at[i];
  if (position == 0) weight += weights.first[i];
  if (position == size - 1) weight += weights.last[i];
  return weight;
}

template <typename scalar_t, int Radius>
__global__ void __launch_bounds__(kThreads)
    gradients(const Upstream<scalar_t> of_normalised, const Upstream<scalar_t> of_std, const scalar_t* image,
              const Planes planes, const __grid_constant__ Weights<float> weights, int any_radius, float c,
              bool replicate, scalar_t* gradient, const Planes out) {
  extern __shared__ float shared[];
  const int radius = Radius ? Radius : any_radius;
  const int wide = kTile + 2 * radius, widest = kTile + 4 * radius;  // of windows, and of what they cover
  float *x = shared, *offset = x + widest * widest, *variance = offset + widest * wide;
  float *mean = variance + widest * wide, *to_mean = mean + wide * wide, *to_variance = to_mean + wide * wide;
  float *of_mean = to_variance + wide * wide, *of_variance = of_mean + kTile * wide;
  const Position tile(planes);
  const int64_t top = tile.corner.top, left = tile.corner.left;

  load(image + planes.begin(tile.plane), planes, {top - 2 * radius, left - 2 * radius}, widest, widest, replicate, x);
  __syncthreads();
  row_statistics(x, widest, wide, weights.at, radius, offset, variance);
  __syncthreads();
  for_each(wide, wide, [&](int row, int column) {
    const int at = row * wide + column;
    const Statistics of = column_statistics(x + row * widest + column + radius, widest, offset + at, variance + at,
                                            wide, weights.at, radius);
    const int64_t from_y = top - radius + row, from_x = left - radius + column;
    const float factor = 1 / (of.std + c), slope = of_normalised.at(tile.plane, from_y, from_x) * factor;
    mean[at] = of.mean;
    to_mean[at] = slope;
    to_variance[at] = (of_std.at(tile.plane, from_y, from_x) + slope * (of.mean * factor)) / of.std;
  });
  __syncthreads();
  for_each(kTile, wide, [&](int row, int column) {
    const int here = (row + 2 * radius) * widest + column + radius;
    const float own = offset[(row + 2 * radius) * wide + column];
    float sum = 0, spread = 0;
    for (int i = 0; i <= 2 * radius; ++i) {
      const int at = (row + i) * wide + column;
      const float deviation = ((x[here] - x[here + (i - radius) * widest]) + own) - mean[at];
      const float weight = covering(weights, i, top + row, planes.height);
      sum += weight * (to_variance[at] * deviation - to_mean[at]);
      spread += weight * to_variance[at];
    }
    of_mean[row * wide + column] = sum;
    of_variance[row * wide + column] = spread;
  });
  __syncthreads();
  for_each(kTile, kTile, [&](int row, int column) {
    const int64_t to_y = top + row, to_x = left + column;
    if (to_y >= planes.height || to_x >= planes.width) return;
    const int here = (row + 2 * radius) * widest + column + 2 * radius;
    float sum = to_mean[(row + radius) * wide + column + radius];
    for (int i = 0; i <= 2 * radius; ++i) {
      const int at = row * wide + column + i;
      const float deviation = (x[here] - x[here + i - radius]) - offset[(row + 2 * radius) * wide + column + i];
      sum += covering(weights, i, to_x, planes.width) * (of_mean[at] + of_variance[at] * deviation);
    }
    gradient[out.begin(tile.plane) + to_y * out.row_stride + to_x * out.column_stride] = static_cast<scalar_t>(sum);
  });
}

int64_t blocks(const Planes& planes) {
  return planes.count() * ((planes.height + kTile - 1) / kTile) * ((planes.width + kTile - 1) / kTile);
}

// Calls run with the radius as a constant: 3, of the usual window, or 0 for any.
template <typename Run>
void with_radius(int64_t radius, const Run& run) {
  if (radius == 3) return run(std::integral_constant<int, 3>{});
  run(std::integral_constant<int, 0>{});
}

}  // namespace

// --- operators ---

std::tuple<Tensor, Tensor> mscn(const Tensor& image, int64_t window, double sigma, double c, bool replicate) {
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  const Window shape(image, window, sigma, c, replicate);
  Tensor normalised = empty_map(image), std = empty_map(image);
  const Planes planes(image);
  const int64_t wide = kTile + 2 * shape.radius;
  for_dtype<float, BFloat16, Half>(image.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    with_radius(shape.radius, [&](auto radius) {
      launch(current_stream(image), blocks(planes), kThreads, sizeof(float) * wide * (wide + 2 * kTile),
             normalise<scalar_t, radius>, const_data<scalar_t>(image), planes, shape.weights<float>(),
             static_cast<int>(shape.radius), static_cast<float>(c), replicate, data<scalar_t>(normalised),
             data<scalar_t>(std));
    });
  });
  return {normalised, std};
}

Tensor mscn_backward(const std::optional<Tensor>& grad_normalised, const std::optional<Tensor>& grad_std,
                     const Tensor& image, int64_t window, double sigma, double c, bool replicate) {
  const torch::stable::accelerator::DeviceGuard guard(image.get_device_index());
  const Window shape(image, window, sigma, c, replicate);
  check_upstream(grad_normalised, image);
  check_upstream(grad_std, image);
  Tensor gradient = torch::stable::empty_like(image);
  const Planes planes(image), out(gradient);
  const int64_t wide = kTile + 2 * shape.radius, widest = kTile + 4 * shape.radius;
  const int64_t floats = widest * (widest + 2 * wide) + wide * (3 * wide + 2 * kTile);
  for_dtype<float, BFloat16, Half>(image.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const Upstream<scalar_t> of_normalised(grad_normalised, image), of_std(grad_std, image);
    with_radius(shape.radius, [&](auto radius) {
      launch(current_stream(image), blocks(planes), kThreads, sizeof(float) * floats, gradients<scalar_t, radius>,
             of_normalised, of_std, const_data<scalar_t>(image), planes, shape.weights<float>(),
             static_cast<int>(shape.radius), static_cast<float>(c), replicate, data<scalar_t>(gradient), out);
    });
  });
  return gradient;
}

}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CUDA, m) {
  kdops::implement_nss(m);
}
