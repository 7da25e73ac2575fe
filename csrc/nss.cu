// Locally normalised images on CUDA: a block holds a tile with its border in shared memory, from the image to the
// result.
//
// The same steps as on the CPU (csrc/nss.cpp): statistics of rows, of columns of rows, and the same way back. A thread
// makes a strip of neighbouring results along the axis of the step from one run of values in its registers, so that
// each value is read from shared memory about twice and not once per tap. No atomics.
#include "nss_tiles.h"

namespace kdops {
namespace {

// Results of a strip: along a row, down a column, and down a column of the windows that reach into the tile. With any
// radius (0) a strip is a single result and its values stay in shared memory.
template <int Radius>
constexpr int kAlong = Radius ? 4 : 1;
template <int Radius>
constexpr int kDown = Radius ? kRows * kColumns / kThreads : 1;
template <int Radius>
constexpr int kDownWindows = Radius ? ((kRows + 2 * Radius) * kColumns + kThreads - 1) / kThreads : 1;

// body(row, first column) for strips of Count columns.
template <int Count, typename Body>
__device__ void for_rows(int rows, const Body& body) {
  constexpr int strips = kColumns / Count;
  for (int row = threadIdx.x / strips; row < rows; row += kThreads / strips) body(row, threadIdx.x % strips * Count);
}

// body(first row, column, how many of its rows belong to another strip) for strips of Count rows: where they do not fit, the
// last one begins earlier.
template <int Count, typename Body>
__device__ void for_columns(int rows, const Body& body) {
  for (int row = threadIdx.x / kColumns * Count; row < rows; row += kThreads / kColumns * Count)
    body(min(row, rows - Count), threadIdx.x % kColumns, row - min(row, rows - Count));
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

// To within two roundings and with subnormal numbers as 0, which is several times faster than exactly.
__device__ float quotient(float a, float b) {
#ifdef __CUDA_ARCH__
  float result;
  asm("div.approx.ftz.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a / b;
#endif
}

__device__ float root(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return sqrtf(x);
#endif
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

// use(first row, column, rows to leave out, means relative to the pixels, stds) of the windows around each strip of `rows`
// rows; x, offset and variance point to the first that the window of the first pixel covers.
template <int Radius, int Count, typename Use>
__device__ void column_statistics(const float* x, const float* offset, const float* variance, int rows,
                                  const Weights<float>& weights, int radius, const Use& use) {
  const int wide = pitch(kColumns + 2 * radius);
  for_columns<Count>(rows, [&](int row, int column, int others) {
    const Strip<Radius, Count> values(x + row * wide + column, wide);
    const Strip<Radius, Count> offsets(offset + row * kColumns + column, kColumns);
    const Strip<Radius, Count> variances(variance + row * kColumns + column, kColumns);
    float means[Count], stds[Count];
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
      means[n] = mean;
      stds[n] = root(square + static_cast<float>(kTiny));
    }
    use(row, column, others, means, stds);
  });
}

// Radius is that of the usual window, or 0 for any.
template <typename scalar_t, int Radius>
__global__ void __launch_bounds__(kThreads)
    normalise(const scalar_t* image, const Planes planes, const Tiles tiles,
              const __grid_constant__ Weights<float> weights, int any_radius, float c, bool replicate,
              scalar_t* normalised, scalar_t* std, const Planes out) {
  const int radius = Radius ? Radius : any_radius, rows = kRows + 2 * radius, columns = kColumns + 2 * radius;
  float *x = &block_memory()->x, *offset = x + rows * pitch(columns), *variance = offset + rows * kColumns;
  const Position tile(planes, tiles, kColumns);
  load_image(image, View(planes, tile, radius, rows, columns), rows, radius, replicate, x);
  __syncthreads();
  row_statistics<Radius>(x, rows, weights, radius, offset, variance);
  __syncthreads();
  const View results(out, tile, 0, kRows, kColumns);
  constexpr int count = kDown<Radius>;
  const auto write = [&](int row, int column, const float(&means)[count], const float(&stds)[count], bool whole) {
    int64_t to = results.offset(row, column);
#pragma unroll
    for (int n = 0; n < count; ++n, to += results.y.stride) {
      if (!whole && !results.holds(row + n, column)) continue;
      normalised[to] = static_cast<scalar_t>(quotient(-means[n], stds[n] + c));
      std[to] = static_cast<scalar_t>(stds[n]);
    }
  };
  column_statistics<Radius, count>(
      x + radius, offset, variance, kRows, weights, radius,
      [&](int row, int column, int, const float(&means)[count], const float(&stds)[count]) {
        if (results.whole())
          write(row, column, means, stds, true);
        else
          write(row, column, means, stds, false);
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

// Of the windows whose centres reach `radius` beyond a tile; 0 where there is no gradient, and in the padding.
template <typename scalar_t>
__device__ void load_upstream(const Upstream<scalar_t>& grad, const Position& tile, int radius, int rows, float* to) {
  if (grad.values)
    return load(grad.values, View(grad.planes, tile, radius, rows, kColumns), rows, kColumns, false, to);
  for (int n = threadIdx.x; n < rows * kColumns; n += kThreads) to[n] = 0;
}

// add(weights) of the windows that cover a pixel, at `position` along an axis of `size`: the first and the last also
// stand for the padding.
template <typename Add>
__device__ void covering(const Weights<float>& weights, int position, int64_t size, bool replicate,
                         const Add& add) {
  add(weights.at);
  if (replicate && position == 0) add(weights.first);
  if (replicate && position == static_cast<int>(size) - 1) add(weights.last);
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
__global__ void __launch_bounds__(kThreads, 3)
    gradients(const Upstream<scalar_t> of_normalised, const Upstream<scalar_t> of_std, const scalar_t* image,
              const Planes planes, const Tiles tiles, const __grid_constant__ Weights<float> weights, int any_radius,
              float c, bool replicate, scalar_t* gradient, const Planes out) {
  const int radius = Radius ? Radius : any_radius, across = kColumns - 2 * radius;
  const Parts parts(radius);
  const int wide = pitch(parts.columns);
  float *x = &block_memory()->x, *offset = x + parts.of_image(), *variance = offset + parts.rows * kColumns;
  float *of_variance = variance + parts.rows * kColumns, *mean = of_variance + kRows * kColumns;
  float *to_mean = mean + parts.windows * kColumns, *to_variance = to_mean + parts.windows * kColumns;
  float *of_mean = variance, *result = mean;  // in place of what is no longer needed
  const Position tile(planes, tiles, across);

  load_image(image, View(planes, tile, 2 * radius, parts.rows, parts.columns), parts.rows, radius, replicate, x);
  load_upstream(of_normalised, tile, radius, parts.windows, to_mean);
  load_upstream(of_std, tile, radius, parts.windows, to_variance);
  __syncthreads();
  row_statistics<Radius>(x, parts.rows, weights, radius, offset, variance);
  __syncthreads();
  constexpr int windows = kDownWindows<Radius>;
  column_statistics<Radius, windows>(
      x + radius, offset, variance, parts.windows, weights, radius,
      [&](int row, int column, int others, const float(&means)[windows], const float(&stds)[windows]) {
        int at = row * kColumns + column;
#pragma unroll
        for (int n = 0; n < windows; ++n, at += kColumns) {
          if (n < others) continue;  // upstream gradients are replaced: once
          const float factor = quotient(1, stds[n] + c), slope = to_mean[at] * factor;
          mean[at] = means[n];
          to_mean[at] = slope;
          to_variance[at] = quotient(to_variance[at] + slope * (means[n] * factor), stds[n]);
        }
      });
  __syncthreads();
  for_columns<kDown<Radius>>(kRows, [&](int row, int column, int) {
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
  if (threadIdx.x % kColumns >= across) return;
  walk(View(out, tile, 0, kRows, across), kRows, [&](int row, int64_t at, bool held) {
    if (held) gradient[at] = static_cast<scalar_t>(result[row * kColumns + threadIdx.x % kColumns]);
  });
}

int64_t blocks(const Planes& planes, const Tiles& tiles) {
  return planes.count() * tiles.along * tiles.down;
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
  const OnDevice guard(image);
  const Window shape(image, window, sigma, c, replicate);
  Tensor normalised = empty_map(image), std = empty_map(image);
  const Planes planes(image);
  const Tiles tiles(planes, kColumns);
  const auto radius = static_cast<int>(shape.radius);
  const int rows = kRows + 2 * radius, floats = rows * (pitch(kColumns + 2 * radius) + 2 * kColumns);
  for_dtype<float, BFloat16, Half>(image.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    with_radius(radius, [&](auto usual) {
      launch(current_stream(image), blocks(planes, tiles), kThreads, sizeof(float) * floats,
             normalise<scalar_t, usual>, const_data<scalar_t>(image), planes, tiles, shape.weights<float>(), radius,
             static_cast<float>(c), replicate, data<scalar_t>(normalised), data<scalar_t>(std), Planes(std));
    });
  });
  return {normalised, std};
}

Tensor mscn_backward(const std::optional<Tensor>& grad_normalised, const std::optional<Tensor>& grad_std,
                     const Tensor& image, int64_t window, double sigma, double c, bool replicate) {
  const OnDevice guard(image);
  const Window shape(image, window, sigma, c, replicate);
  check_upstream(grad_normalised, image);
  check_upstream(grad_std, image);
  Tensor gradient = torch::stable::empty_like(image);
  const Planes planes(image), out(gradient);
  const auto radius = static_cast<int>(shape.radius);
  const Tiles tiles(planes, kColumns - 2 * radius);
  for_dtype<float, BFloat16, Half>(image.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    const Upstream<scalar_t> of_normalised(grad_normalised, image), of_std(grad_std, image);
    with_radius(radius, [&](auto usual) {
      launch(current_stream(image), blocks(planes, tiles), kThreads, sizeof(float) * Parts(radius).floats(),
             gradients<scalar_t, usual>, of_normalised, of_std, const_data<scalar_t>(image), planes, tiles, shape.weights<float>(), radius, static_cast<float>(c), replicate,
             data<scalar_t>(gradient), out);
    });
  });
  return gradient;
}

}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CUDA, m) {
  kdops::implement_nss(m);
}
