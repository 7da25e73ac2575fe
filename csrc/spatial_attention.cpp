// Spatial attention on the CPU: its operators. Results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "spatial_attention_backward.h"
#include "spatial_attention_forward.h"

namespace kdops::attention {
namespace {

Sizes check(const Map& query, const Map& key, const Map& value) {
  STD_TORCH_CHECK(
      query.tensor.scalar_type() == key.tensor.scalar_type() && key.tensor.scalar_type() == value.tensor.scalar_type(),
      "kdops: query, key and value differ in dtype.");
  STD_TORCH_CHECK(query.batches == key.batches && key.batches == value.batches && query.channels == key.channels &&
                      key.positions == value.positions,
                  "kdops: query, key and value do not fit together.");
  STD_TORCH_CHECK(query.channels > 0 && value.channels > 0 && query.positions > 0 && key.positions > 0,
                  "kdops: attention needs at least one channel and one position.");
  return {query.batches, query.positions, key.positions, query.channels, value.channels};
}

double scale_or_default(std::optional<double> scale, const Sizes& sizes) {
  return scale ? *scale : 1 / std::sqrt(static_cast<double>(sizes.channels));
}

std::tuple<Tensor, Tensor, Tensor> spatial_attention(const Tensor& query, const Tensor& key,
                                                     std::optional<Tensor> value, std::optional<double> scale, bool over_query) {
  const Map q(query), k(key), v(value ? *value : key);
  const Sizes sizes = check(q, k, v);
  std::vector<int64_t> shape = MapGradient::sizes(query);
  shape[1] = sizes.value_channels;
  Tensor out = torch::stable::new_empty(query, shape);
  const int64_t softmaxes = over_query ? sizes.columns : sizes.rows;
  Tensor statistics =
      torch::stable::new_empty(query, {sizes.batches, 2, softmaxes}, accumulator_dtype(query.scalar_type()));
  Tensor logits = torch::stable::new_empty(query, {sizes.keep_logits() ? sizes.batches * sizes.logits() : 0},
                                           accumulator_dtype(query.scalar_type()));
  for_dtype<float, double, BFloat16, Half>(query.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = Accumulator<scalar_t>;
    const T factor = static_cast<T>(scale_or_default(scale, sizes));
    T* const stats = data<T>(statistics);
    T* const kept = sizes.keep_logits() ? data<T>(logits) : nullptr;
    scalar_t* const result = data<scalar_t>(out);
    const auto values = packed_channels<scalar_t>(v);
    const auto rows = packed_positions<kRows, scalar_t>(q, sizes.channels, factor);
    const auto columns = packed_positions<kColumns, scalar_t>(k, sizes.channels);
    if (!over_query) {
      return attend_all<scalar_t, Normalize::kRows>(sizes, rows.get(), columns.get(), values.get(), nullptr, kept,
                                                    result, stats);
    }
    // Statistics first, with query and key in each other's place. The factor stays with the query: so the logits have
    // the same bits.
    const Sizes swapped{sizes.batches, sizes.columns, sizes.rows, sizes.channels, 0};
    const auto key_rows = packed_positions<kRows, scalar_t>(k, sizes.channels);
    const auto query_columns = packed_positions<kColumns, scalar_t>(q, sizes.channels, factor);
    attend_all<scalar_t, Normalize::kStatistics>(swapped, key_rows.get(), query_columns.get(), nullptr, nullptr,
                                                 nullptr, nullptr, stats);
    const auto known = padded_statistics(stats, sizes.batches, sizes.columns, kColumns);
    attend_all<scalar_t, Normalize::kColumns>(sizes, rows.get(), columns.get(), values.get(), known.get(), kept,
                                              result, nullptr);
  });
  return {out, statistics, logits};
}

std::tuple<Tensor, Tensor, Tensor> spatial_attention_backward(const Tensor& grad, const Tensor& query,
                                                              const Tensor& key, std::optional<Tensor> value,
                                                              const Tensor& out, const Tensor& statistics,
                                                              const Tensor& logits, std::optional<double> scale,
                                                              bool over_query, bool need_query, bool need_key,
                                                              bool need_value) {
  const Map q(query), k(key), v(value ? *value : key), g(grad), o(out);
  const Sizes sizes = check(q, k, v);
  STD_TORCH_CHECK(logits.numel() == (sizes.keep_logits() ? sizes.batches * sizes.logits() : 0),
                  "kdops: the logits must be those that forward returned.");
  MapGradient grad_query(need_query, query), grad_key(need_key, key), grad_value(need_value, value ? *value : key);
  for_dtype<float, double, BFloat16, Half>(query.scalar_type(), [&](auto zero) {
    using scalar_t = decltype(zero);
    using T = Accumulator<scalar_t>;
    if (sizes.batches == 0 || !(need_query || need_key || need_value)) return;
    const auto run = over_query ? gradients<scalar_t, true> : gradients<scalar_t, false>;
    run(sizes, Given{q, k, v, g, o, !value}, const_data<T>(statistics),
        sizes.keep_logits() ? const_data<T>(logits) : nullptr, static_cast<T>(scale_or_default(scale, sizes)),
        Wanted{grad_query.map, grad_key.map, grad_value.map});
  });
  return {grad_query.finish(), grad_key.finish(), grad_value.finish()};
}

}  // namespace
}  // namespace kdops::attention

STABLE_TORCH_LIBRARY_IMPL(kdops, CPU, m) {
  m.impl("spatial_attention", TORCH_BOX(&kdops::attention::spatial_attention));
  m.impl("spatial_attention_backward", TORCH_BOX(&kdops::attention::spatial_attention_backward));
}
