// Locally normalised images on CUDA: a block holds a tile with its border in shared memory, from the image to the
// result.
//
// The same steps as on the CPU (csrc/nss.cpp): statistics of rows, of columns of rows, and the same way back. A thread
// makes a strip of neighbouring results along the axis of the step from one run of values in its registers, so that
// each value is read from shared memory about twice and not once per tap. No atomics.
#include <torch/csrc/stable/accelerator.h>

#include "common/launch.h"
#include "nss.h"

namespace kdops {
namespace {

// A tile is kRows rows of results. Of what lies between image and result it is kColumns wide, whatever the radius, so
// that a thread stays in its column and never divides.
constexpr int kRows = 32;
constexpr int kColumns = 64;
constexpr int kThreads = 256;

// Results of a strip: along a row, down a column, and down a column of the windows that reach into the tile. With any
// radius (0) a strip is a single result and its values stay in shared memory.
template <int Radius>
constexpr int kAlong = Radius ? 4 : 1;
template <int Radius>
constexpr int kDown = Radius ? kRows * kColumns / kThreads : 1;
template <int Radius>
constexpr int kDownWindows = Radius ? ((kRows + 2 * Radius) * kColumns + kThreads - 1) / kThreads : 1;

// Floats from one row of the image to the next, a whole number of 16-byte words.
__host__ __device__ constexpr int pitch(int columns) {
  return (columns + 3) / 4 * 4;
}

// body(row, first column) for strips of Count columns.
template <int Count, typename Body>
__device__ void for_rows(int rows, const Body& body) {
  constexpr int strips = kColumns / Count;
  for (int row = threadIdx.x / strips; row < rows; row += kThreads / strips) body(row, threadIdx.x % strips * Count);
}

// body(first row, column) for strips of Count rows; the last one overlaps another where they do not fit.
template <int Count, typename Body>
__device__ void for_columns(int rows, const Body& body) {
  for (int row = threadIdx.x / kColumns * Count; row < rows; row += kThreads / kColumns * Count)
    body(min(row, rows - Count), threadIdx.x % kColumns);
}

// The values of the windows of a strip of Count results, `step` apart: (n, i) is tap i of result n.
template <int Radius, int Count>
struct Strip {
  float values[Count + 2 * Radius];

  __device__ explicit Strip(const float* from, int step = 1) {
#pragma unroll
    for (int i = 0; i < Count + 2 * Radius; ++i) values[i] = from[i * step];
  }

  __device__ float operator()(int n, int i) const {
    return values[n + i];
  }
};

template <int Count>
struct Strip<0, Count> {
  const float* from;
  int step;

  __device__ explicit Strip(const float* from, int step = 1) : from(from), step(step) {}

  __device__ float operator()(int n, int i) const {
    return from[(n + i) * step];
  }
};

// Places of a rectangle along one axis of a plane, from `begin` on; those of the plane itself are first to last.
struct Axis {
  int first, last;
  int64_t stride;

  __device__ Axis(int64_t begin, int places, int64_t size, int64_t stride)
      : first(static_cast<int>(min(max(-begin, int64_t{0}), int64_t{places}))),
        last(static_cast<int>(min(size - 1 - begin, int64_t{places}))),
        stride(stride) {}

  __device__ bool holds(int place) const {
    return first <= place && place <= last;
  }

  __device__ int64_t offset(int place) const {
    return min(max(place, first), last) * stride;
  }
};

// A rectangle of a plane and, where it reaches beyond, of the plane's padding.
struct View {
  int64_t corner;
  Axis y, x;

  __device__ View(const Planes& planes, int64_t plane, int64_t top, int64_t left, int rows, int columns)
      : corner(planes.begin(plane) + top * planes.row_stride + left * planes.column_stride),
        y(top, rows, planes.height, planes.row_stride),
        x(left, columns, planes.width, planes.column_stride) {}

  __device__ bool holds(int row, int column) const {
    return y.holds(row) && x.holds(column);
  }

  // Where a place is in memory; of the padding, where the nearest pixel is.
  __device__ int64_t offset(int row, int column) const {
    return corner + y.offset(row) + x.offset(column);
  }

  template <typename scalar_t>
  __device__ float value(const scalar_t* values, int row, int column, bool replicate) const {
    return replicate || holds(row, column) ? static_cast<float>(values[offset(row, column)]) : 0.0f;
  }
};

// The tile of this block: results are `across` columns wide.
struct Position {
  int64_t plane, top, left;

  __device__ Position(const Planes& planes, int across) {
    const int64_t tiles_x = (planes.width + across - 1) / across, tiles_y = (planes.height + kRows - 1) / kRows;
    const int64_t block = blockIdx.x;
    plane = block / (tiles_x * tiles_y);
    top = block / tiles_x % tiles_y * kRows;
    left = block % tiles_x * across;
  }

  // The rectangle that reaches `border` beyond the tile on every side.
  __device__ View view(const Planes& planes, int border, int rows, int columns) const {
    return View(planes, plane, top - border, left - border, rows, columns);
  }
};

template <typename scalar_t>
__device__ void load(const scalar_t* image, const View& view, int rows, int columns, bool replicate, float* tile) {
  for (int column = threadIdx.x % kColumns; column < columns; column += kColumns) {
#pragma unroll 4
    for (int row = threadIdx.x / kColumns; row < rows; row += kThreads / kColumns)
      tile[row * pitch(columns) + column] = view.value(image, row, column, replicate);
  }
}

// Of the window around each pixel of `rows` rows, along the row: the mean relative to the pixel, and the variance.
template <int Radius>
__device__ void row_statistics(const float* x, int rows, const Weights<float>& weights, int radius, float* offset,
                               float* variance) {
  constexpr int count = kAlong<Radius>;
  for_rows<count>(rows, [&](int row, int column) {
    const Strip<Radius, count> values(x + row * pitch(kColumns + 2 * radius) + column);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      const float centre = values(n, radius);
      float mean = 0, square = 0;
#pragma unroll
      for (int i = 0; i <= 2 * radius; ++i) mean += weights.at[i] * (values(n, i) - centre);
#pragma unroll
      for (int i = 0; i <= 2 * radius; ++i) {
        const float deviation = (values(n, i) - centre) - mean;
        square += weights.at[i] * (deviation * deviation);
      }
      offset[row * kColumns + column + n] = mean;
      variance[row * kColumns + column + n] = square;
    }
  });
}

// use(row, column, mean relative to the pixel, std) of the window around each pixel of `rows` rows; x, offset and
// variance point to the first that the window of the first pixel covers.
template <int Radius, int Count, typename Use>
__device__ void column_statistics(const float* x, const float* offset, const float* variance, int rows,
                                  const Weights<float>& weights, int radius, const Use& use) {
  const int wide = pitch(kColumns + 2 * radius);
  for_columns<Count>(rows, [&](int row, int column) {
    const Strip<Radius, Count> values(x + row * wide + column, wide);
    const Strip<Radius, Count> offsets(offset + row * kColumns + column, kColumns);
    const Strip<Radius, Count> variances(variance + row * kColumns + column, kColumns);
#pragma unroll
    for (int n = 0; n < Count; ++n) {
      const float centre = values(n, radius);
      float mean = 0, square = 0;
#pragma unroll
      for (int i = 0; i <= 2 * radius; ++i) mean += weights.at[i] * ((values(n, i) - centre) + offsets(n, i));
#pragma unroll
      for (int i = 0; i <= 2 * radius; ++i) {
        const float deviation = ((values(n, i) - centre) + offsets(n, i)) - mean;
        square += weights.at[i] * (variances(n, i) + deviation * deviation);
      }
      use(row + n, column, mean, sqrtf(square + static_cast<float>(kTiny)));
    }
  });
}

// Radius is that of the usual window, or 0 for any.
template <typename scalar_t, int Radius>
__global__ void __launch_bounds__(kThreads)
    normalise(const scalar_t* image, const Planes planes, const __grid_constant__ Weights<float> weights,
              int any_radius, float c, bool replicate, scalar_t* normalised, scalar_t* std, const Planes out) {
  extern __shared__ float4 shared[];
  const int radius = Radius ? Radius : any_radius, rows = kRows + 2 * radius, columns = kColumns + 2 * radius;
  float *x = &shared[0].x, *offset = x + rows * pitch(columns), *variance = offset + rows * kColumns;
  const Position tile(planes, kColumns);
  load(image, tile.view(planes, radius, rows, columns), rows, columns, replicate, x);
  __syncthreads();
  row_statistics<Radius>(x, rows, weights, radius, offset, variance);
  __syncthreads();
  const View results = tile.view(out, 0, kRows, kColumns);
  column_statistics<Radius, kDown<Radius>>(
      x + radius, offset, variance, kRows, weights, radius, [&](int row, int column, float mean, float deviation) {
        if (!results.holds(row, column)) return;
        const int64_t to = results.offset(row, column);
        normalised[to] = static_cast<scalar_t>(-mean / (deviation + c));
        std[to] = static_cast<scalar_t>(deviation);
      });
}

// An upstream gradient, or none.
template <typename scalar_t>
struct Upstream {
  const scalar_t* values;
  Planes planes;

  Upstream(const std::optional<Tensor>& grad, const Tensor& image)
      : values(grad ? const_data<scalar_t>(*grad) : nullptr), planes(grad ? *grad : image) {}
};

// add(weights) of the windows that cover a pixel, at `position` along an axis of `size`: the first and the last also
// stand for the padding.
template <typename Add>
__device__ void covering(const Weights<float>& weights, int64_t position, int64_t size, bool replicate,
                         const Add& add) {
  add(weights.at);
  if (replicate && position == 0) add(weights.first);
  if (replicate && position == size - 1) add(weights.last);
}

// The parts of a block's shared memory: what is made of `rows` of the image, of `windows` rows of windows, and of kRows.
struct Parts {
  int rows, columns, windows;

  __host__ __device__ explicit Parts(int radius)
      : rows(kRows + 4 * radius), columns(kColumns + 2 * radius), windows(kRows + 2 * radius) {}

  __host__ __device__ int of_image() const {
    return rows * pitch(columns);
  }

  __host__ __device__ int floats() const {
    return of_image() + (2 * rows + 3 * windows + kRows) * kColumns;
  }
};

template <typename scalar_t, int Radius>
__global__ void __launch_bounds__(kThreads, 2)
    gradients(const Upstream<scalar_t> of_normalised, const Upstream<scalar_t> of_std, const scalar_t* image,
              const Planes planes, const __grid_constant__ Weights<float> weights, int any_radius, float c,
              bool replicate, scalar_t* gradient, const Planes out) {
  extern __shared__ float4 shared[];
  const int radius = Radius ? Radius : any_radius, across = kColumns - 2 * radius;
  const Parts parts(radius);
  const int wide = pitch(parts.columns);
  float *x = &shared[0].x, *offset = x + parts.of_image(), *variance = offset + parts.rows * kColumns;
  float *of_variance = variance + parts.rows * kColumns, *mean = of_variance + kRows * kColumns;
  float *to_mean = mean + parts.windows * kColumns, *to_variance = to_mean + parts.windows * kColumns;
  float *of_mean = variance, *result = mean;  // in place of what is no longer needed
  const Position tile(planes, across);

  load(image, tile.view(planes, 2 * radius, parts.rows, parts.columns), parts.rows, parts.columns, replicate, x);
  __syncthreads();
  row_statistics<Radius>(x, parts.rows, weights, radius, offset, variance);
  __syncthreads();
  const View at_normalised = tile.view(of_normalised.planes, radius, parts.windows, kColumns);
  const View at_std = tile.view(of_std.planes, radius, parts.windows, kColumns);
  column_statistics<Radius, kDownWindows<Radius>>(
      x + radius, offset, variance, parts.windows, weights, radius,
      [&](int row, int column, float of_window, float std) {
        const int at = row * kColumns + column;
        float from_normalised = 0, from_std = 0;
        if (of_normalised.values) from_normalised = at_normalised.value(of_normalised.values, row, column, false);
        if (of_std.values) from_std = at_std.value(of_std.values, row, column, false);
        const float factor = 1 / (std + c), slope = from_normalised * factor;
        mean[at] = of_window;
        to_mean[at] = slope;
        to_variance[at] = (from_std + slope * (of_window * factor)) / std;
      });
  __syncthreads();
  for_columns<kDown<Radius>>(kRows, [&](int row, int column) {
    constexpr int count = kDown<Radius>;
    const int at = row * kColumns + column;
    const Strip<Radius, count> values(x + (row + radius) * wide + column + radius, wide);
    const Strip<Radius, count> means(mean + at, kColumns), slopes(to_variance + at, kColumns);
    const Strip<Radius, count> direct(to_mean + at, kColumns);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      const float own = offset[at + (n + 2 * radius) * kColumns];
      float sum = 0, spread = 0;
      covering(weights, tile.top + row + n, planes.height, replicate, [&](const float* weight) {
#pragma unroll
        for (int i = 0; i <= 2 * radius; ++i) {
          const float deviation = ((values(n, radius) - values(n, i)) + own) - means(n, i);
          sum += weight[i] * (slopes(n, i) * deviation - direct(n, i));
          spread += weight[i] * slopes(n, i);
        }
      });
      of_mean[at + n * kColumns] = sum;
      of_variance[at + n * kColumns] = spread;
    }
  });
  __syncthreads();
  for_rows<kAlong<Radius>>(kRows, [&](int row, int column) {
    constexpr int count = kAlong<Radius>;
    if (column >= across) return;
    const int at = row * kColumns + column;
    const Strip<Radius, count> values(x + (row + 2 * radius) * wide + column + radius);
    const Strip<Radius, count> offsets(offset + at + 2 * radius * kColumns), means(of_mean + at), slopes(of_variance + at);
#pragma unroll
    for (int n = 0; n < count; ++n) {
      float sum = to_mean[at + n + radius * kColumns + radius];
      covering(weights, tile.left + column + n, planes.width, replicate, [&](const float* weight) {
#pragma unroll
        for (int i = 0; i <= 2 * radius; ++i) {
          const float deviation = (values(n, radius) - values(n, i)) - offsets(n, i);
          sum += weight[i] * (means(n, i) + slopes(n, i) * deviation);
        }
      });
      result[at + n] = sum;
    }
  });
  __syncthreads();
  const View results = tile.view(out, 0, kRows, across);
  for_columns<1>(kRows, [&](int row, int column) {
    if (column < across && results.holds(row, column))
      gradient[results.offset(row, column)] = static_cast<scalar_t>(result[row * kColumns + column]);
  });
}

// Of results that are `across` columns wide.
int64_t blocks(const Planes& planes, int64_t across) {
  return planes.count() * ((planes.height + kRows - 1) / kRows) * ((planes.width + across - 1) / across);
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
  const auto radius = static_cast<int>(shape.radius);
  const int rows = kRows + 2 * radius, floats = rows * (pitch(kColumns + 2 * radius) + 2 * kColumns);
  for_dtype<float, BFloat16, Half>(image.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    with_radius(radius, [&](auto usual) {
      launch(current_stream(image), blocks(planes, kColumns), kThreads, sizeof(float) * floats,
             normalise<scalar_t, usual>, const_data<scalar_t>(image), planes, shape.weights<float>(), radius,
             static_cast<float>(c), replicate, data<scalar_t>(normalised), data<scalar_t>(std), Planes(std));
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
  const auto radius = static_cast<int>(shape.radius);
  for_dtype<float, BFloat16, Half>(image.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const Upstream<scalar_t> of_normalised(grad_normalised, image), of_std(grad_std, image);
    with_radius(radius, [&](auto usual) {
      launch(current_stream(image), blocks(planes, kColumns - 2 * radius), kThreads,
             sizeof(float) * Parts(radius).floats(), gradients<scalar_t, usual>, of_normalised, of_std,
             const_data<scalar_t>(image), planes, shape.weights<float>(), radius, static_cast<float>(c), replicate,
             data<scalar_t>(gradient), out);
    });
  });
  return gradient;
}

}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CUDA, m) {
  kdops::implement_nss(m);
}
