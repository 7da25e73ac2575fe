// Locally normalised images on CUDA: a block holds a tile with its border in shared memory, from the image to the
// result.
//
// The same steps as on the CPU (csrc/nss.cpp): statistics of rows and of columns of rows; back, sums over the columns
// of windows that cover a pixel and over rows of columns. A thread makes a strip of neighbouring results along the axis
// of the step from one run of values in its registers, so that each value is read from shared memory about twice and
// not once per tap. No atomics.
#include <cfloat>

#include "nss_strips.h"

namespace kdops {
namespace {

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

// use(first row, column, means relative to the pixels, stds) of the windows around each strip; x, offset and variance
// point to the first that the window of the first pixel covers.
template <int Radius, int Count, typename Use>
__device__ void column_statistics(const float* x, const float* offset, const float* variance,
                                  const Weights<float>& weights, int radius, const Use& use) {
  const int wide = pitch(kColumns + 2 * radius);
  for_columns<Count>([&](int row, int column) {
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
    use(row, column, means, stds);
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
  const Position tile(tiles, kColumns);
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
      normalised[to] = static_cast<scalar_t>(-means[n] * inverse(stds[n] + c));
      std[to] = static_cast<scalar_t>(stds[n]);
    }
  };
  column_statistics<Radius, count>(
      x + radius, offset, variance, weights, radius,
      [&](int row, int column, const float(&means)[count], const float(&stds)[count]) {
        if (results.whole())
          write(row, column, means, stds, true);
        else
          write(row, column, means, stds, false);
      });
}

// --- the way back ---

// What a window's results pass on: a, negated, to its mean, and b, twice, to its variance; d is its pixel less the
// mean.
struct Slopes {
  float a, b, d;

  __device__ Slopes(float normalised, float std, float of_normalised, float of_std, float c)
      : a(of_normalised * inverse(std + c)),
        b((of_std - a * normalised) * inverse(std)),
        d(normalised * min(std + c, FLT_MAX)) {}  // 0 where std overflows, and with it all that follows
};

// The parts of a block's shared memory: maps of the windows that reach into a tile, and the sums over their columns. A
// row begins `lead` before the tile's, of which only the last `radius` matter, so that words of 16 bytes are aligned.
struct Parts {
  int lead, across, rows;

  __host__ __device__ explicit Parts(int radius)
      : lead(pitch(radius)), across(kColumns - 2 * lead), rows(kRows + 2 * radius) {}

  __host__ __device__ int map() const {
    return rows * kColumns;
  }

  __host__ __device__ int floats() const {
    return 4 * map() + 2 * kRows * kColumns;
  }
};

// The maps x, a, b and d, one after the other. Windows beyond the plane pass nothing on.
template <bool Dense>
__device__ void load_windows(const Inputs& from, const Reader<Dense>& read, const Parts& parts, float c, float* maps) {
  constexpr int ahead = Dense ? 2 : 1;  // rows, all of whose values are read before the first is used
  for (int first = threadIdx.x / kQuads; first < parts.rows; first += ahead * kQuadRows) {
    Windows windows[ahead];
    bool held[ahead];
#pragma unroll
    for (int n = 0; n < ahead; ++n) held[n] = read(from, first + n * kQuadRows, windows[n]);
#pragma unroll
    for (int n = 0; n < ahead; ++n) {
      const int row = first + n * kQuadRows;
      if (row >= parts.rows) break;
      Quad* to = reinterpret_cast<Quad*>(maps + row * kColumns) + threadIdx.x % kQuads;
      Quad a = {}, b = {}, d = {};
      if (held[n]) {
#pragma unroll
        for (int l = 0; l < 4; ++l) {
          const Windows& w = windows[n];
          const Slopes slopes(w.normalised.at[l], w.std.at[l], w.of_normalised.at[l], w.of_std.at[l], c);
          a.at[l] = slopes.a, b.at[l] = slopes.b, d.at[l] = slopes.d;
        }
      }
      to[0] = held[n] ? windows[n].image : Quad{};
      to[parts.map() / 4] = a;
      to[2 * parts.map() / 4] = b;
      to[3 * parts.map() / 4] = d;
    }
  }
}

// add(n, weights) for those of `count` places of an axis, from `begin` on, that also stand for the padding: the first
// and the last of the axis.
template <typename Add>
__device__ void padding(const Weights<float>& weights, int begin, int count, int64_t size, const Add& add) {
  const int last = static_cast<int>(size) - 1 - begin;
  if (begin == 0) add(0, weights.first);
  if (0 <= last && last < count) add(last, weights.last);
}

// What the windows of each column pass on to the pixels of that column: to a pixel x of the same row, but any column,
// they pass sums + spreads (x - pixel).
template <int Radius>
__device__ void sum_columns(const float* maps, const Parts& parts, const Position& tile, int64_t height,
                            const Weights<float>& weights, int radius, bool replicate, float* sums, float* spreads) {
  const float *a = maps + parts.map(), *b = a + parts.map(), *d = b + parts.map();
  constexpr int count = kDown<Radius>;
  for_columns<count>([&](int row, int column) {
    const int at = row * kColumns + column;
    const Strip<Radius, count> x(maps + at, kColumns);
    float sum[count] = {}, spread[count] = {};
#pragma unroll
    for (int j = 0; j < count + 2 * radius; ++j) {
      const int window = at + j * kColumns;
#pragma unroll
      for (int n = 0; n < count; ++n) {
        const int i = j - n;
        if (i < 0 || i > 2 * radius) continue;
        sum[n] += weights.at[i] * (b[window] * ((x(n, radius) - x(n, i)) + d[window]) - a[window]);
        spread[n] += weights.at[i] * b[window];
      }
    }
#pragma unroll
    for (int n = 0; n < count; ++n) {
      sums[at + n * kColumns] = sum[n];
      spreads[at + n * kColumns] = spread[n];
    }
    if (!replicate) return;
    padding(weights, tile.top + row, count, height, [&](int n, const float* weight) {
      const int first = at + n * kColumns;
#pragma unroll 1
      for (int i = 0; i <= 2 * radius; ++i) {
        const int window = first + i * kColumns;
        const float deviation = (maps[first + radius * kColumns] - maps[window]) + d[window];
        sums[first] += weight[i] * (b[window] * deviation - a[window]);
        spreads[first] += weight[i] * b[window];
      }
    });
  });
}

// write(row, column, what four pixels receive from the columns of their windows, and directly).
template <int Radius, typename Write>
__device__ void sum_rows(const float* maps, const Parts& parts, const Position& tile, int64_t width,
                         const Weights<float>& weights, int radius, bool replicate, const float* sums,
                         const float* spreads, const Write& write) {
  for_rows<4>(kRows, [&](int row, int column) {
    if (column >= parts.across) return;
    const int at = row * kColumns + column, centre = at + radius * kColumns, skip = parts.lead - radius;
    const Run<Radius> x(maps + centre, skip), sum(sums + at, skip), spread(spreads + at, skip);
    Quad result = *reinterpret_cast<const Quad*>(maps + parts.map() + centre + parts.lead);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i <= 2 * radius; ++i)
        result.at[n] += weights.at[i] * (sum(n, i) + spread(n, i) * (x(n, radius) - x(n, i)));
    }
    if (replicate) {
      padding(weights, tile.left + column, 4, width, [&](int edge, const float* weight) {
        float more = 0;
#pragma unroll 1
        for (int i = 0; i <= 2 * radius; ++i) {
          const int window = skip + edge + i;
          const float beyond = maps[centre + parts.lead + edge] - maps[centre + window];
          more += weight[i] * (sums[at + window] + spreads[at + window] * beyond);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) result.at[n] += n == edge ? more : 0;
      });
    }
    write(row, column, result);
  });
}

// As many blocks as shared memory holds share a multiprocessor.
template <int Radius, bool Dense>
__global__ void __launch_bounds__(kThreads, Radius ? 4 : 2)
    gradients(const __grid_constant__ Inputs from, const Tiles tiles, const __grid_constant__ Weights<float> weights,
              int any_radius, float c, bool replicate, float* gradient, const __grid_constant__ Planes planes) {
  const int radius = Radius ? Radius : any_radius;
  const Parts parts(radius);
  float *maps = &block_memory()->x, *sums = maps + 4 * parts.map(), *spreads = sums + kRows * kColumns;
  const Position tile(tiles, parts.across);
  load_windows(from, Reader<Dense>(planes, tile, radius, parts.lead, parts.rows), parts, c, maps);
  __syncthreads();
  sum_columns<Radius>(maps, parts, tile, planes.height, weights, radius, replicate, sums, spreads);
  __syncthreads();
  const View results(planes, tile, 0, kRows, parts.across);
  sum_rows<Radius>(maps, parts, tile, planes.width, weights, radius, replicate, sums, spreads,
                   [&](int row, int column, const Quad& result) {
                     float* to = gradient + results.offset(row, column);
                     if constexpr (Dense) {
                       if (results.holds(row, column)) store(to, result);
                     } else {
#pragma unroll
                       for (int n = 0; n < 4; ++n)
                         if (results.holds(row, column + n)) to[n * results.x.stride] = result.at[n];
                     }
                   });
}

int64_t blocks(const Planes& planes, const Tiles& tiles) {
  return planes.count() * tiles.along.value * tiles.down.value;
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
                     const Tensor& image, const Tensor& normalised, const Tensor& std, int64_t window, double sigma,
                     double c, bool replicate) {
  const OnDevice guard(image);
  const Window shape(image, window, sigma, c, replicate);
  check_results(normalised, std, image);
  check_upstream(grad_normalised, image);
  check_upstream(grad_std, image);
  Tensor gradient = torch::stable::empty_like(image);
  for_dtype<float>(image.scalar_type(), [&](auto) {
    const Inputs inputs{Source(image), Source(normalised), Source(std), Source(grad_normalised, image),
                        Source(grad_std, image)};
    const Planes planes(gradient);
    const auto radius = static_cast<int>(shape.radius);
    const Tiles tiles(planes, Parts(radius).across);
    with_radius(radius, [&](auto usual) {
      launch(current_stream(image), blocks(planes, tiles), kThreads, sizeof(float) * Parts(radius).floats(),
             inputs.dense() ? gradients<usual, true> : gradients<usual, false>, inputs, tiles, shape.weights<float>(),
             radius, static_cast<float>(c), replicate, data<float>(gradient), planes);
    });
  });
  return gradient;
}

}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CUDA, m) {
  kdops::implement_nss(m);
}
