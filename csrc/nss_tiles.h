// The tiles of csrc/nss.cu: which part of a plane a block works on, and how its threads read and write that.
#pragma once

#include "common/launch.h"
#include "nss.h"

namespace kdops {
namespace {

// A tile is kRows rows of results. Of what lies between image and result it is kColumns wide, whatever the radius, so
// that a thread stays in its column and never divides.
constexpr int kRows = 32;
constexpr int kColumns = 64;
constexpr int kThreads = 256;
constexpr int kStep = kThreads / kColumns;  // a thread takes every so manieth row of its column

// Four neighbouring places of a row, which are one word where they are aligned. Of these, a row has kQuads, and a
// thread takes every kQuadRows-th row.
struct alignas(16) Quad {
  float at[4];
};
constexpr int kQuads = kColumns / 4;
constexpr int kQuadRows = kThreads / kQuads;

// Floats from one row of the image to the next, a whole number of 16-byte words.
__host__ __device__ constexpr int pitch(int columns) {
  return (columns + 3) / 4 * 4;
}

// Places of a rectangle along one axis of a plane, from `begin` on; those of the plane itself are first to last.
struct Axis {
  int first, last;
  bool whole;  // all of them
  int64_t stride;

  __device__ Axis(int begin, int places, int64_t size, int64_t stride)
      : first(min(max(-begin, 0), places)),
        last(min(static_cast<int>(size) - 1 - begin, places)),
        whole(begin >= 0 && begin + places <= static_cast<int>(size)),
        stride(stride) {}

  __device__ bool holds(int place) const {
    return first <= place && place <= last;
  }

  __device__ int64_t nearest(int place) const {
    return min(max(place, first), last) * stride;
  }
};

// Divides numbers below 2^31, in four instructions where a division takes twenty.
struct Divisor {
  unsigned value, factor, shift;

  explicit Divisor(int64_t divisor) : value(static_cast<unsigned>(divisor)), shift(31) {
    while (int64_t{1} << (shift - 31) < divisor) ++shift;
    factor = static_cast<unsigned>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }

  __device__ unsigned divide(unsigned number) const {
    return static_cast<unsigned>(static_cast<uint64_t>(number) * factor >> shift);
  }
};

// The tiles of all planes: how many there are along a row and down a column of a plane.
struct Tiles {
  Divisor along, down, channels;

  Tiles(const Planes& planes, int across)
      : along((planes.width + across - 1) / across),
        down((planes.height + kRows - 1) / kRows),
        channels(planes.channels) {
    constexpr int64_t most = int64_t{1} << 30;
    STD_TORCH_CHECK(planes.height <= most && planes.width <= most, "kdops: an image of ", planes.height, " x ",
                    planes.width, " pixels, but on CUDA a side has at most ", most, ".");
  }
};

// The tile of this block: results are `across` columns wide. In 32 bits: launch() and Tiles see to that.
struct Position {
  unsigned plane, batch, channel;
  int top, left;

  __device__ Position(const Tiles& tiles, int across) {
    const unsigned row = tiles.along.divide(blockIdx.x);
    plane = tiles.down.divide(row);
    batch = tiles.channels.divide(plane);
    channel = plane - batch * tiles.channels.value;
    top = static_cast<int>(row - plane * tiles.down.value) * kRows;
    left = static_cast<int>(blockIdx.x - row * tiles.along.value) * across;
  }
};

// A rectangle of a plane, `border` beyond a tile on every side, and where it reaches beyond the plane, of its padding.
struct View {
  int64_t corner;
  Axis y, x;

  __device__ View(const Planes& planes, const Position& tile, int border, int rows, int columns)
      : corner(tile.batch * planes.batch_stride + tile.channel * planes.channel_stride +
               (tile.top - border) * planes.row_stride + (tile.left - border) * planes.column_stride),
        y(tile.top - border, rows, planes.height, planes.row_stride),
        x(tile.left - border, columns, planes.width, planes.column_stride) {}

  __device__ bool whole() const {
    return y.whole && x.whole;
  }

  __device__ bool holds(int row, int column) const {
    return y.holds(row) && x.holds(column);
  }

  // Where a place of the plane is in memory.
  __device__ int64_t offset(int row, int column) const {
    return corner + row * y.stride + column * x.stride;
  }

  // Where a place is in memory; of the padding, where the nearest pixel is.
  __device__ int64_t nearest(int row, int column) const {
    return corner + y.nearest(row) + x.nearest(column);
  }
};

// body(row, where it is in memory, whether it is of the plane) for the rows of a view that this thread takes in its
// column.
template <typename Body>
__device__ void walk(const View& view, int rows, const Body& body) {
  const int first = threadIdx.x / kColumns, column = threadIdx.x % kColumns, steps = (rows + kStep - 1) / kStep;
  if (view.whole()) {
    int64_t at = view.offset(first, column);
#pragma unroll 11  // those of the usual window: all are read before the first is used
    for (int step = 0; step < steps; ++step, at += kStep * view.y.stride)
      if (first + step * kStep < rows) body(first + step * kStep, at, true);
  } else {
#pragma unroll 4
    for (int row = first; row < rows; row += kStep) body(row, view.nearest(row, column), view.holds(row, column));
  }
}

// The first kColumns of a view's columns.
template <typename scalar_t>
__device__ void load(const scalar_t* values, const View& view, int rows, int pitch, bool replicate, float* tile) {
  walk(view, rows, [&](int row, int64_t at, bool held) {
    tile[row * pitch + threadIdx.x % kColumns] = replicate || held ? static_cast<float>(values[at]) : 0.0f;
  });
}

// An image with its border: kColumns + 2 * radius columns.
template <typename scalar_t>
__device__ void load_image(const scalar_t* image, const View& view, int rows, int radius, bool replicate, float* tile) {
  const int wide = pitch(kColumns + 2 * radius);
  load(image, view, rows, wide, replicate, tile);
  for (int n = threadIdx.x; n < rows * 2 * radius; n += kThreads) {
    const int row = n / (2 * radius), column = kColumns + n % (2 * radius);
    const bool held = replicate || view.holds(row, column);
    tile[row * wide + column] = held ? static_cast<float>(image[view.nearest(row, column)]) : 0.0f;
  }
}

// A tensor (B, C, H, W) of float32, or none, which stands for zeros.
struct Source {
  const float* values = nullptr;
  Planes planes;
  bool dense = true;  // contiguous, and aligned to a Quad

  explicit Source(const Tensor& t)
      : values(const_data<float>(t)),
        planes(t),
        dense(t.is_contiguous() && reinterpret_cast<uintptr_t>(values) % sizeof(Quad) == 0) {}

  Source(const std::optional<Tensor>& t, const Tensor& alike) : planes(alike) {
    if (t) *this = Source(*t);
  }
};

// What backward reads, each (B, C, H, W); upstream gradients may be none.
struct Inputs {
  Source image, normalised, std, of_normalised, of_std;

  // Whether one place in memory does for all of them, and no Quad crosses the border of a plane.
  bool dense() const {
    return image.planes.width % 4 == 0 && image.dense && normalised.dense && std.dense && of_normalised.dense &&
           of_std.dense;
  }
};

// Of four neighbouring windows, what Inputs hold.
struct Windows {
  Quad image, normalised, std, of_normalised, of_std;
};

// Reads this thread's windows of a tile and of what is around it, `rows` rows in all.
template <bool Dense>
class Reader {
  unsigned batch, channel;
  int y, x, bottom, width;
  int64_t at;  // Dense: of the first row, in Quads

 public:
  __device__ Reader(const Planes& planes, const Position& tile, int above, int before, int rows)
      : batch(tile.batch),
        channel(tile.channel),
        y(tile.top - above),
        x(tile.left - before + static_cast<int>(threadIdx.x) % kQuads * 4),
        bottom(min(static_cast<int>(planes.height), y + rows)),
        width(static_cast<int>(planes.width)),
        at((tile.plane * planes.height + y) * (planes.width / 4) + x / 4) {}

  // False, and nothing is read, where the plane has no such windows.
  __device__ bool operator()(const Inputs& from, int row, Windows& to) const {
    if (!within(y + row, bottom) || (Dense && !within(x, width))) return false;
    if constexpr (Dense) {
      const int64_t place = at + static_cast<int64_t>(row) * (width / 4);
      const auto quad = [&](const Source& source) { return reinterpret_cast<const Quad*>(source.values)[place]; };
      to = {quad(from.image), quad(from.normalised), quad(from.std), {}, {}};
      if (from.of_normalised.values) to.of_normalised = quad(from.of_normalised);
      if (from.of_std.values) to.of_std = quad(from.of_std);
    } else {
      to = {four(from.image, row), four(from.normalised, row), four(from.std, row, 1), four(from.of_normalised, row),
            four(from.of_std, row)};
    }
    return true;
  }

 private:
  static __device__ bool within(int place, int size) {
    return static_cast<unsigned>(place) < static_cast<unsigned>(size);
  }

  // `beyond` stands for what the plane does not hold.
  __device__ Quad four(const Source& from, int row, float beyond = 0) const {
    Quad result = {beyond, beyond, beyond, beyond};
    if (from.values == nullptr) return result;
    const Planes& p = from.planes;
    const float* values = from.values + batch * p.batch_stride + channel * p.channel_stride + (y + row) * p.row_stride;
#pragma unroll
    for (int l = 0; l < 4; ++l)
      if (within(x + l, width)) result.at[l] = values[(x + l) * p.column_stride];
    return result;
  }
};

}  // namespace
}  // namespace kdops
