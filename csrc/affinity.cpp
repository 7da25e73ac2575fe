// The distance between two affinity matrices D = S^T S - T^T T, tile by tile: no tile of either matrix leaves the cache.
//
// S and T are normalised feature maps (C channels, N positions). Positions are cut into strips; a tile is a pair of strips. D is
// symmetric, so half of the tiles are enough. Forward: tiles in any order, summed in a fixed one. Backward: a tile adds to the gradients of
// both of its strips, so tiles run in rounds of pairs that share no strip, as in a tournament. Neither depends on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

#include "affinity_columns.h"
#include "common/maps.h"
#include "common/parallel.h"
#include "common/products.h"

namespace kdops {
namespace {

constexpr int64_t kSide = 240;  // positions of a strip, at most: whole panels of rows and of columns; a float tile takes 225 KiB
constexpr int64_t kStep = 48;   // of the length of a strip: the least common multiple of both panels

struct Strips {
  int64_t positions, side, count;

  explicit Strips(int64_t positions) : positions(positions) {
    side = padded(panels(positions, panels(positions, std::clamp(padded(panels(positions, 8), kStep), 2 * kStep, kSide))), kStep);
    count = panels(positions, side);
  }
  int64_t size(int64_t strip) const {
    return std::min(side, positions - strip * side);
  }
};

struct Pair {
  int64_t rows, columns;  // strips; rows <= columns
};

// All tiles on and above the diagonal, as rounds of tiles that share no strip.
std::vector<std::vector<Pair>> tournament(int64_t strips) {
  std::vector<std::vector<Pair>> rounds(1);
  for (int64_t strip = 0; strip < strips; ++strip) rounds[0].push_back({strip, strip});
  const int64_t circle = strips + strips % 2 - 1;  // one strip stays outside, the others move around it; an odd one out rests
  for (int64_t round = 0; round < circle; ++round) {
    auto& pairs = rounds.emplace_back();
    const auto add = [&](int64_t a, int64_t b) {
      if (std::max(a, b) < strips) pairs.push_back({std::min(a, b), std::max(a, b)});
    };
    add(circle, round);
    for (int64_t k = 1; k <= circle / 2; ++k) add((round + k) % circle, (round - k + circle) % circle);
  }
  return rounds;
}

// One network's normalised columns, packed (common/maps.h) for both sides of a tile.
template <typename T>
struct Packed {
  int64_t channels, row_panels, column_panels;
  Buffer<T> rows, columns;

  explicit Packed(const Map& map)
      : channels(map.channels),
        row_panels(panels(map.positions, kRows)),
        column_panels(panels(map.positions, kColumns)),
        rows(packed_positions<kRows, T>(map, map.channels)),
        columns(packed_positions<kColumns, T>(map, map.channels)) {}

  const T* row(int64_t batch, int64_t position) const {
    return rows.get() + (batch * row_panels + position / kRows) * channels * kRows;
  }
  const T* column(int64_t batch, int64_t position) const {
    return columns.get() + (batch * column_panels + position / kColumns) * channels * kColumns;
  }
};

// The operands of a tile: panels of rows and of columns of both networks.
template <typename T>
struct Tile {
  const T *student_rows, *student_columns, *teacher_rows, *teacher_columns;
  int64_t student_channels, teacher_channels, row_panels, column_panels;

  Tile(const Packed<T>& student, const Packed<T>& teacher, const Strips& strips, int64_t batch, Pair pair)
      : student_rows(student.row(batch, pair.rows * strips.side)),
        student_columns(student.column(batch, pair.columns * strips.side)),
        teacher_rows(teacher.row(batch, pair.rows * strips.side)),
        teacher_columns(teacher.column(batch, pair.columns * strips.side)),
        student_channels(student.channels),
        teacher_channels(teacher.channels),
        row_panels(panels(strips.size(pair.rows), kRows)),
        column_panels(panels(strips.size(pair.columns), kColumns)) {}

  // Both products are summed in the same order, so equal networks differ by exactly 0. Where a position does not exist, D is 0.
  KDOPS_INLINE Block<T> difference(int64_t row, int64_t column) const {
    Block<T> student, teacher;
    clear(student);
    clear(teacher);
    multiply_add<1, 1>(student, student_rows + row * student_channels * kRows, kRows, student_channels,
                       student_columns + column * student_channels * kColumns);
    multiply_add<1, 1>(teacher, teacher_rows + row * teacher_channels * kRows, kRows, teacher_channels,
                       teacher_columns + column * teacher_channels * kColumns);
    for (int64_t i = 0; i < kRows; ++i) {
      for (int64_t v = 0; v < kVectors<T>; ++v) student.at[i][v] -= teacher.at[i][v];
    }
    return student;
  }
};

// d to the slope of |d|^P: the sign for P = 1 (0 at a tie and, as in torch, at NaN), d, half of it, for P = 2.
template <typename T, int P>
KDOPS_INLINE void to_slope(Vector<T>& d) {
  const Vector<T> zero = {}, one = zero + 1;
  if constexpr (P == 1) d = d > 0 ? one : d < 0 ? -one : zero;
}

// The sum of |D|^P over a tile; with Keep its slopes too, with `pitch` from row to row.
template <typename T, int P, bool Keep>
KDOPS_CLONED double tile_distance(const Tile<T>& tile, T* slopes, int64_t pitch) {
  double sum = 0;
  for (int64_t column = 0; column < tile.column_panels; ++column) {
    Vector<T> lanes = {};
    for (int64_t row = 0; row < tile.row_panels; ++row) {
      const Block<T> block = tile.difference(row, column);
      for (int64_t i = 0; i < kRows; ++i) {
        for (int64_t v = 0; v < kVectors<T>; ++v) {
          Vector<T> d = block.at[i][v];
          lanes += P == 2 ? d * d : d > 0 ? d : -d;
          if constexpr (Keep) {
            to_slope<T, P>(d);
            vector(slopes + (row * kRows + i) * pitch + column * kColumns + v * kLanes<T>) = d;
          }
        }
      }
    }
    for (int64_t lane = 0; lane < kLanes<T>; ++lane) sum += lanes[lane];
  }
  return sum;
}

// The slopes of a tile, rows kSide apart.
template <typename T, int P>
KDOPS_CLONED void tile_slopes(const Tile<T>& tile, T* slopes) {
  for (int64_t column = 0; column < tile.column_panels; ++column) {
    for (int64_t row = 0; row < tile.row_panels; ++row) {
      Block<T> block = tile.difference(row, column);
      for (int64_t i = 0; P == 1 && i < kRows; ++i) {
        for (Vector<T>& d : block.at[i]) to_slope<T, P>(d);
      }
      store(block, slopes + row * kRows * kSide + column * kColumns, kSide);
    }
  }
}

// One network's columns packed as [C / 16][N][16], and the sums over positions that become its gradient, (N, C padded to 16).
template <typename T>
struct Side {
  const T* values;
  T* sums;
  int64_t panel_size, channel_panels;
};

// sums[rows] += slopes @ values[columns]; off the diagonal also sums[columns] += slopes^T @ values[rows].
template <typename T>
KDOPS_CLONED void add_products(const T* slopes, const Side<T>& side, int64_t rows, int64_t row_count, int64_t columns, int64_t column_count) {
  const int64_t pitch = side.channel_panels * kColumns;
  const auto update = [&](int64_t panel, int64_t position, const auto& product) KDOPS_INLINE_LAMBDA {
    T* const to = side.sums + position * pitch + panel * kColumns;
    Block<T> block;
    load(block, to, pitch);
    product(block, side.values + panel * side.panel_size);
    store(block, to, pitch);
  };
  for (int64_t panel = 0; panel < side.channel_panels; ++panel) {
    for (int64_t i = 0; i < row_count; i += kRows) {
      update(panel, rows + i, [&](Block<T>& block, const T* values) KDOPS_INLINE_LAMBDA {
        multiply_add<kSide, kColumns>(block, slopes + i * kSide, kColumns, panels(column_count, kColumns), values + columns * kColumns);
      });
    }
    for (int64_t j = 0; rows != columns && j < column_count; j += kRows) {
      update(panel, columns + j, [&](Block<T>& block, const T* values) KDOPS_INLINE_LAMBDA {
        multiply_add<1, 1>(block, slopes + j, kSide, row_count, values + rows * kColumns);
      });
    }
  }
}

// --- the whole problem -----------------------------------------------------------------------------------------------------------

// The slopes of all tiles, (positions padded to whole panels)^2 of every sample, 0 below the diagonal.
template <typename T>
struct Slopes {
  T* kept;  // null: none are
  int64_t pitch, side;

  Slopes(T* kept, const Strips& strips) : kept(kept), pitch(padded(strips.positions, kStep)), side(strips.side) {}

  T* of(int64_t batch, Pair pair) const {
    return kept ? kept + (batch * pitch + pair.rows * side) * pitch + pair.columns * side : nullptr;
  }
};

template <typename T>
void distances(const Map& student_map, const Map& teacher_map, int64_t p, double* result, T* kept) {
  const Packed<T> student(student_map), teacher(teacher_map);
  const Strips strips(student_map.positions);
  const Slopes<T> slopes(kept, strips);
  std::vector<Pair> pairs;
  for (const auto& round : tournament(strips.count)) pairs.insert(pairs.end(), round.begin(), round.end());
  const auto kernel = kept ? p == 1 ? tile_distance<T, 1, true> : tile_distance<T, 2, true>
                      : p == 1 ? tile_distance<T, 1, false>
                               : tile_distance<T, 2, false>;
  const int64_t batches = student_map.batches, count = pairs.size();
  const Buffer<double> sums = allocate<double>(batches * count);
  for_each_task<T>(batches * count, 0, [&](int64_t task, T*) {
    const int64_t batch = task / count;
    const Pair pair = pairs[task % count];
    sums[task] = kernel(Tile<T>(student, teacher, strips, batch, pair), slopes.of(batch, pair), slopes.pitch);
  });
  for (int64_t batch = 0; batch < batches; ++batch) {
    result[batch] = 0;
    for (int64_t i = 0; i < count; ++i) result[batch] += (pairs[i].rows == pairs[i].columns ? 1 : 2) * sums[batch * count + i];
  }
}

template <typename T>
struct Wanted {
  Buffer<T> values;
  T* sums;
  int64_t panel_size, channel_panels, rows;  // of a sample

  Side<T> side(int64_t batch) const {
    return {values.get() + batch * channel_panels * panel_size, sums + batch * rows * channel_panels * kColumns, panel_size, channel_panels};
  }
};

template <typename T>
using MakeSlopes = std::function<void(int64_t batch, Pair pair, T* slopes)>;  // of a tile, rows kSide apart

template <typename T>
void gradients(int64_t batches, const Strips& strips, const std::vector<Wanted<T>>& wanted, const MakeSlopes<T>& make) {
  for (const auto& pairs : tournament(strips.count)) {
    const int64_t count = pairs.size();
    for_each_task<T>(batches * count, kSide * kSide, [&](int64_t task, T* slopes) {
      const int64_t batch = task / count;
      const Pair pair = pairs[task % count];
      make(batch, pair, slopes);
      for (const Wanted<T>& each : wanted) {
        add_products(slopes, each.side(batch), pair.rows * strips.side, strips.size(pair.rows), pair.columns * strips.side,
                     strips.size(pair.columns));
      }
    });
  }
}

// Made again.
template <typename T>
MakeSlopes<T> slopes_of(const Packed<T>& student, const Packed<T>& teacher, const Strips& strips, int64_t p) {
  const auto kernel = p == 1 ? tile_slopes<T, 1> : tile_slopes<T, 2>;
  return [&, kernel](int64_t batch, Pair pair, T* slopes) { kernel(Tile<T>(student, teacher, strips, batch, pair), slopes); };
}

// As forward has kept them.
template <typename T>
MakeSlopes<T> kept_slopes(const Slopes<const T>& kept, const Strips& strips) {
  return [&](int64_t batch, Pair pair, T* slopes) {
    const T* from = kept.of(batch, pair);
    const int64_t rows = padded(strips.size(pair.rows), kRows), columns = padded(strips.size(pair.columns), kColumns);
    for (int64_t row = 0; row < rows; ++row) std::copy_n(from + row * kept.pitch, columns, slopes + row * kSide);
  };
}

void check(const Tensor& student, const Tensor& teacher, int64_t p) {
  STD_TORCH_CHECK(p == 1 || p == 2, "kdops: p is ", p, ", but it must be 1 or 2.");
  STD_TORCH_CHECK(student.dim() == 3 && teacher.dim() == 3 && student.size(0) == teacher.size(0) && student.size(2) == teacher.size(2) &&
                      student.scalar_type() == teacher.scalar_type(),
                  "kdops: student and teacher must be (B, Cs, N) and (B, Ct, N) of one dtype.");
  STD_TORCH_CHECK(student.scalar_type() == ScalarType::Float || student.scalar_type() == ScalarType::Double,
                  "kdops: affinities are taken of float32 or float64 columns, but not of ", toString(student.scalar_type()), ".");
}

// Normalised columns (B, C, N) -> (B,) float64, slopes (B, N padded, N padded) or (0,).
std::tuple<Tensor, Tensor> affinity_tiles(const Tensor& student, const Tensor& teacher, int64_t p, bool keep_slopes) {
  check(student, teacher, p);
  const int64_t batches = student.size(0), pitch = padded(student.size(2), kStep);
  Tensor result = torch::stable::new_empty(student, {batches}, ScalarType::Double);
  Tensor slopes = keep_slopes ? torch::stable::new_zeros(student, {batches, pitch, pitch}) : torch::stable::new_empty(student, {0});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    distances<T>(Map(student), Map(teacher), p, data<double>(result), keep_slopes ? data<T>(slopes) : nullptr);
  };
  student.scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
  return {result, slopes};
}

// -> sums over the columns j of slope(D_ij) times column j, (B, N padded, C padded) or (0,): the gradients but for a factor.
std::tuple<Tensor, Tensor> affinity_tiles_backward(const Tensor& student, const Tensor& teacher, const Tensor& slopes, int64_t p,
                                                   bool need_student, bool need_teacher) {
  check(student, teacher, p);
  const Strips strips(student.size(2));
  const auto run = [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    std::vector<Wanted<T>> wanted;
    const auto want = [&](const Tensor& columns, bool needed) {
      if (!needed) return torch::stable::new_empty(columns, {0});
      const int64_t channel_panels = panels(columns.size(1), kColumns), rows = strips.count * strips.side;
      Tensor sums = torch::stable::new_zeros(columns, {columns.size(0), rows, channel_panels * kColumns});
      wanted.push_back({packed_channels<T>(Map(columns)), data<T>(sums), padded(columns.size(2), kColumns) * kColumns, channel_panels, rows});
      return sums;
    };
    const Tensor of_student = want(student, need_student), of_teacher = want(teacher, need_teacher);
    if (slopes.numel() > 0) {
      const Slopes<const T> kept(const_data<T>(slopes), strips);
      gradients<T>(student.size(0), strips, wanted, kept_slopes<T>(kept, strips));
    } else {
      const Packed<T> packed_student{Map(student)}, packed_teacher{Map(teacher)};
      gradients<T>(student.size(0), strips, wanted, slopes_of<T>(packed_student, packed_teacher, strips, p));
    }
    return {of_student, of_teacher};
  };
  return student.scalar_type() == ScalarType::Float ? run(float{}) : run(double{});
}

}  // namespace
}  // namespace kdops

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("affinity_columns", TORCH_BOX(&kdops::affinity_columns));
  m.impl("affinity_columns_backward", TORCH_BOX(&kdops::affinity_columns_backward));
  m.impl("affinity_tiles", TORCH_BOX(&kdops::affinity_tiles));
  m.impl("affinity_tiles_backward", TORCH_BOX(&kdops::affinity_tiles_backward));
}
