// Cross-entropy between two softmaxes over a codebook, on the CPU: its operators. A task is a block of rows, so nothing
// of size rows x codes exists. Results do not depend on the number of threads.
#include "codebook.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "common/parallel.h"

namespace kdops::codebook {
namespace {

constexpr int64_t kGroups = 16;            // of rows, each with its own sum of the codebook's gradient
constexpr int64_t kGroupBytes = 64 << 20;  // of all these sums, roughly
constexpr int64_t kScaledRows = 32;        // whose lines stay in the L1 cache, even if they are a power of two apart

template <typename scalar_t>
struct Networks {
  using T = Accumulator<scalar_t>;
  Rows<scalar_t> student, teacher;
  Sizes sizes;
  Codes<T> codes;

  Networks(const Map& student, const Map& teacher, const Map& codebook, double temperature, bool want_values)
      : student(student),
        teacher(teacher),
        sizes(Sizes::of<T>(this->student.count, student.channels, codebook.batches)),
        codes(Codes<T>::template of<scalar_t>(codebook, temperature, want_values)) {}

  // Packs the rows from `first` on and makes their logits.
  void logits(int64_t first, T* rows, T* logits) const {
    pack_rows(student, first, sizes, rows);
    pack_rows(teacher, first, sizes, rows + sizes.packed_rows() / 2);
    block_logits(rows, codes, sizes, logits);
  }
};

// Loss (M,), statistics (5, M) and, where not null, slopes of the loss (M, D).
template <typename scalar_t, typename T>
void cross_entropy(const Networks<scalar_t>& given, T* loss, T* statistics, T* student_slopes, T* teacher_slopes) {
  const Sizes& sizes = given.sizes;
  const Statistics<T> stats(statistics, sizes.rows);
  const int64_t width = padded(sizes.channels, kColumns);
  const int64_t scratch_size = sizes.packed_rows() + sizes.logits() + sizes.block_rows() * width;
  for_each_task<T>(sizes.blocks(), scratch_size, [&](int64_t task, T* rows) {
    const int64_t first = task * sizes.block_rows(), count = std::min(sizes.block_rows(), sizes.rows - first);
    T* const logits = rows + sizes.packed_rows();
    T* const sums = logits + sizes.logits();
    given.logits(first, rows, logits);
    block_statistics(logits, sizes, first, count, stats);
    for (int64_t row = first; row < first + count; ++row) {
      loss[row] = std::log(stats.student_sum[row]) - stats.expected[row];
    }
    if (!student_slopes && !teacher_slopes) return;
    block_weights<T>(logits, sizes, first, count, {statistics, sizes.rows}, nullptr);
    for (T* const slopes : {student_slopes, teacher_slopes}) {
      if (!slopes) continue;
      const T* const weights = logits + (slopes == teacher_slopes) * sizes.block_rows() * kColumns;
      weighted_codes(weights, given.codes.values.get(), sizes, sums);
      for (int64_t row = 0; row < count; ++row) {
        T* const to = slopes + (first + row) * sizes.channels;
        for (int64_t c = 0; c < sizes.channels; ++c) to[c] = given.codes.factor * sums[row * width + c];
      }
    }
  });
}

// gradient = upstream * slopes, row by row.
template <typename scalar_t, typename T>
KDOPS_CLONED void scale_rows(const T* slopes, const T* upstream, const Rows<scalar_t>& to, int64_t first,
                             int64_t count) {
  const int64_t channels = to.channels, stride = to.channel_stride;
  scalar_t* at[kScaledRows];
  for (int64_t i = 0; i < count; ++i) at[i] = to.at(first + i);
  slopes += first * channels, upstream += first;
  for (int64_t i = 0; stride == 1 && i < count; ++i) {
    for (int64_t c = 0; c < channels; ++c) narrow(slopes[i * channels + c] * upstream[i], at[i][c]);
  }
  for (int64_t c = 0; stride != 1 && c < channels; ++c) {
    for (int64_t i = 0; i < count; ++i) narrow(slopes[i * channels + c] * upstream[i], at[i][c * stride]);
  }
}

// (sums of all groups in order - code * their last channel) * factor, for a panel of codes.
template <typename scalar_t, typename T>
KDOPS_CLONED void finish_codes(T* sums, int64_t groups, int64_t group_size, const Rows<const scalar_t>& codes,
                               const Rows<scalar_t>& to, int64_t first, T factor) {
  const int64_t channels = codes.channels, size = padded(channels + 1, kRows) * kColumns;
  for (int64_t group = 1; group < groups; ++group) {
    for (int64_t i = 0; i < size; ++i) sums[i] += sums[group * group_size + i];
  }
  for (int64_t code = 0; code < std::min(kColumns, codes.count - first); ++code) {
    const T weight = sums[channels * kColumns + code];
    for (int64_t c = 0; c < channels; ++c) {
      const T value = widen(codes.at(first + code)[c * codes.channel_stride]);
      narrow(factor * (sums[c * kColumns + code] - value * weight), to.at(first + code)[c * to.channel_stride]);
    }
  }
}

// The codebook's gradient: a sum over the rows of each group, then over the groups.
template <typename scalar_t, typename T>
void codebook_gradient(const Networks<scalar_t>& given, const T* upstream, const T* statistics, const Map& codebook,
                       const Map& result) {
  const Sizes& sizes = given.sizes;
  const int64_t size = sizes.code_panels() * sizes.row_channels() * kColumns;
  const int64_t most = std::clamp<int64_t>(kGroupBytes / static_cast<int64_t>(sizeof(T)) / size, 1, kGroups);
  const int64_t groups = std::clamp<int64_t>(sizes.blocks(), 1, most);
  const Buffer<T> all_sums = allocate<T>(groups * size);
  for_each_task<T>(groups, sizes.packed_rows() + sizes.logits(), [&](int64_t group, T* rows) {
    T* const logits = rows + sizes.packed_rows();
    T* const sums = all_sums.get() + group * size;
    std::fill(sums, sums + size, T(0));
    for (int64_t block = group * sizes.blocks() / groups; block < (group + 1) * sizes.blocks() / groups; ++block) {
      const int64_t first = block * sizes.block_rows(), count = std::min(sizes.block_rows(), sizes.rows - first);
      given.logits(first, rows, logits);
      block_weights<T>(logits, sizes, first, count, {statistics, sizes.rows}, upstream);
      add_weighted_rows(rows, logits, sizes, sums);
    }
  });
  const Rows<const scalar_t> codes(codebook);
  const Rows<scalar_t> to(result);
  for_each_task<T>(sizes.code_panels(), 0, [&](int64_t panel, T*) {
    finish_codes(all_sums.get() + panel * sizes.row_channels() * kColumns, groups, size, codes, to, panel * kColumns,
                 given.codes.factor);
  });
}

// --- operators ---

void check(const Map& student, const Map& teacher, const Map& codebook) {
  STD_TORCH_CHECK(student.tensor.scalar_type() == teacher.tensor.scalar_type() &&
                      teacher.tensor.scalar_type() == codebook.tensor.scalar_type(),
                  "kdops: student, teacher and codebook differ in dtype.");
  STD_TORCH_CHECK(student.batches == teacher.batches && student.positions == teacher.positions &&
                      student.channels == teacher.channels && student.channels == codebook.channels &&
                      codebook.tensor.dim() == 2,
                  "kdops: student, teacher and codebook do not fit together.");
  STD_TORCH_CHECK(codebook.batches > 0 && codebook.channels > 0,
                  "kdops: a codebook needs at least one code and one channel.");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> codebook_cross_entropy(const Tensor& student, const Tensor& teacher,
                                                                  const Tensor& codebook, double temperature,
                                                                  bool need_student, bool need_teacher) {
  const Map s(student), t(teacher), e(codebook);
  check(s, t, e);
  const int64_t rows = s.batches * s.positions;
  const auto numbers = [&](std::vector<int64_t> shape) {
    return torch::stable::new_empty(student, shape, accumulator_dtype(student.scalar_type()));
  };
  const auto slopes = [&](bool needed) { return needed ? numbers({rows, s.channels}) : numbers({0}); };
  Tensor loss = numbers({rows}), statistics = numbers({5, rows});
  Tensor student_slopes = slopes(need_student), teacher_slopes = slopes(need_teacher);
  for_dtype<float, double, BFloat16, Half>(student.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = Accumulator<scalar_t>;
    if (rows == 0) return;
    cross_entropy<scalar_t>(Networks<scalar_t>(s, t, e, temperature, need_student || need_teacher), data<T>(loss),
                            data<T>(statistics), need_student ? data<T>(student_slopes) : nullptr,
                            need_teacher ? data<T>(teacher_slopes) : nullptr);
  });
  return {loss, statistics, student_slopes, teacher_slopes};
}

std::tuple<Tensor, Tensor, Tensor> codebook_cross_entropy_backward(const Tensor& grad, const Tensor& student,
                                                                   const Tensor& teacher, const Tensor& codebook,
                                                                   const Tensor& statistics,
                                                                   const Tensor& student_slopes,
                                                                   const Tensor& teacher_slopes, double temperature,
                                                                   bool need_student, bool need_teacher,
                                                                   bool need_codebook) {
  const Map s(student), t(teacher), e(codebook);
  check(s, t, e);
  const Tensor upstream = torch::stable::contiguous(grad);
  const int64_t rows = s.batches * s.positions;
  MapGradient of_student(need_student, student), of_teacher(need_teacher, teacher);
  MapGradient of_codebook(need_codebook, codebook);
  for_dtype<float, double, BFloat16, Half>(student.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = Accumulator<scalar_t>;
    const auto scale = [&](const MapGradient& to, const Tensor& slopes) {
      if (!to.map || rows == 0) return;
      STD_TORCH_CHECK(slopes.numel() == rows * s.channels, "kdops: forward did not keep the slopes of this input.");
      const Rows<scalar_t> into(*to.map);
      for_each_task<T>(panels(rows, kScaledRows), 0, [&](int64_t task, T*) {
        const int64_t first = task * kScaledRows;
        scale_rows(const_data<T>(slopes), const_data<T>(upstream), into, first, std::min(kScaledRows, rows - first));
      });
    };
    scale(of_student, student_slopes);
    scale(of_teacher, teacher_slopes);
    if (need_codebook) {
      codebook_gradient<scalar_t>(Networks<scalar_t>(s, t, e, temperature, false), const_data<T>(upstream),
                                  const_data<T>(statistics), e, *of_codebook.map);
    }
  });
  return {of_student.finish(), of_teacher.finish(), of_codebook.finish()};
}

}  // namespace
}  // namespace kdops::codebook

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("codebook_cross_entropy", TORCH_BOX(&kdops::codebook::codebook_cross_entropy));
  m.impl("codebook_cross_entropy_backward", TORCH_BOX(&kdops::codebook::codebook_cross_entropy_backward));
}
