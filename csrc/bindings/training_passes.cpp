// SPDX-License-Identifier: BSD-3-Clause
//
// The passes of training.h as operators, in LibTorch's stable ABI, for statistics that are shared between processes.
// Values a channel go in and out as float64 tensors: `statistics` [2, C] are mean and biased variance, `affine` [3, C]
// center, scale and shift, `correction` [2, C] slope and offset, `sums` [2, C] those of a gradient g and of
// g * (value - center).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "training_call.h"

namespace fusedsep {
namespace {

// Rows of a float64 [rows, C] tensor as padded arrays of T.
template <typename T>
std::vector<std::vector<T>> rows_of(const Tensor& values) {
  const int64_t channels = values.size(1), padded = padded_channels(channels);
  const double* data = values.const_data_ptr<double>();
  std::vector<std::vector<T>> rows;
  for (int64_t row = 0; row < values.size(0); ++row) {
    rows.emplace_back(size_t(padded), T(0));
    for (int64_t c = 0; c < channels; ++c) rows.back()[size_t(c)] = T(data[row * channels + c]);
  }
  return rows;
}

void check_rows(const char* name, const Tensor& values, int64_t rows, int64_t channels) {
  STD_TORCH_CHECK(values.dim() == 2 && values.size(0) == rows && values.size(1) == channels && values.is_contiguous() &&
                      values.is_cpu() && values.scalar_type() == ScalarType::Double,
                  name, " must be a contiguous float64 CPU tensor of shape [", rows, ", ", channels, "]");
}

// Two padded arrays as a float64 [2, C] tensor.
Tensor two_rows(const Channels& first, const Channels& second, int64_t channels) {
  Tensor result = empty_strided<2>({2, channels}, {channels, 1}, ScalarType::Double);
  double* data = result.mutable_data_ptr<double>();
  std::copy_n(first.data(), channels, data);
  std::copy_n(second.data(), channels, data + channels);
  return result;
}

template <typename T>
Affine<T> affine_of(const std::vector<std::vector<T>>& rows) {
  return {rows[0].data(), rows[1].data(), rows[2].data()};
}
template <typename T>
Correction<T> correction_of(const std::vector<std::vector<T>>& rows) {
  const auto is_zero = [](const std::vector<T>& row) {
    return std::all_of(row.begin(), row.end(), [](T value) { return value == 0; });
  };
  if (is_zero(rows[0]) && is_zero(rows[1])) return {nullptr, nullptr};
  return {rows[0].data(), rows[1].data()};
}

Tensor depthwise_statistics(const Tensor& x, const Tensor& dw_weight, int64_t stride, int64_t dilation,
                            int64_t pad_left, int64_t pad_right, int64_t pad_top, int64_t pad_bottom,
                            bool channels_last) {
  const Call call(x, dw_weight, 1, {stride, dilation, pad_left, pad_right, pad_top, pad_bottom, 0, 0}, channels_last);
  return dispatch(x, [&](auto zero) {
    using T = decltype(zero);
    auto run = run_of(call.params<T>(x.const_data_ptr<T>(), 0, 0, channels_last));
    const std::vector<T> no_weight(size_t(call.in_channels));
    run.pack(dw_weight.const_data_ptr<T>(), no_weight.data(), false);
    Channels mean(size_t(padded_channels(call.in_channels))), variance(mean.size());
    run.depthwise_statistics(mean.data(), variance.data());
    return two_rows(mean, variance, call.in_channels);
  });
}

std::tuple<Tensor, Tensor> separable_products(const Tensor& x, const Tensor& dw_weight, const Tensor& pw_weight,
                                              const Tensor& affine1, int64_t stride, int64_t dilation, int64_t pad_left,
                                              int64_t pad_right, int64_t pad_top, int64_t pad_bottom,
                                              int64_t activation, bool channels_last) {
  const Call call(x, dw_weight, pw_weight.size(0),
                  {stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, 0}, channels_last);
  check_pointwise_weight(call.in_channels, x.scalar_type(), pw_weight);
  check_rows("affine1", affine1, 3, call.in_channels);
  return dispatch(x, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    Tensor p = empty_map(call.out_sizes(), channels_last, x.scalar_type());
    auto run = run_of(call.params<T>(x.const_data_ptr<T>(), activation, 0, channels_last));
    const auto rows = rows_of<T>(affine1);
    run.params.affine1 = affine_of(rows);
    run.params.conv.y = p.mutable_data_ptr<T>();
    run.pack(dw_weight.const_data_ptr<T>(), pw_weight.const_data_ptr<T>(), false);
    Channels mean(size_t(padded_channels(call.out_channels))), variance(mean.size());
    run.forward(mean.data(), variance.data());
    return {p, two_rows(mean, variance, call.out_channels)};
  });
}

void check_product(const Tensor& p, const Tensor& affine2, int64_t activation, bool channels_last) {
  STD_TORCH_CHECK(p.dim() == 4 && p.size(1) >= 1 && p.is_cpu() &&
                      (p.scalar_type() == ScalarType::Float || p.scalar_type() == ScalarType::Double),
                  "p must be a float32 or float64 CPU tensor of shape [N, C, H, W]");
  check_dense_map("p", p, sizes_of(p), p.scalar_type(), channels_last);
  check_rows("affine2", affine2, 3, p.size(1));
  check_range("activation", activation, 0, 3);
}

Tensor normalize(const Tensor& p, const Tensor& affine2, int64_t activation, bool channels_last) {
  check_product(p, affine2, activation, channels_last);
  return dispatch(p, [&](auto zero) {
    using T = decltype(zero);
    Tensor y = empty_map(sizes_of(p), channels_last, p.scalar_type());
    auto run = run_of(params_of_product<T>(p, activation, channels_last));
    const auto rows = rows_of<T>(affine2);
    run.params.affine2 = affine_of(rows);
    run.params.y = y.mutable_data_ptr<T>();
    run.normalize();
    return y;
  });
}

Tensor normalize_backward_reduce(const Tensor& grad_y, const Tensor& p, const Tensor& affine2, int64_t activation,
                                 bool channels_last) {
  check_product(p, affine2, activation, channels_last);
  check_map("grad_y", grad_y, sizes_of(p), p.scalar_type());
  return dispatch(p, [&](auto zero) {
    using T = decltype(zero);
    const Tensor gradient = dense(grad_y, sizes_of(p), channels_last);
    auto run = run_of(params_of_product<T>(p, activation, channels_last));
    const auto rows = rows_of<T>(affine2);
    run.params.affine2 = affine_of(rows);
    run.params.grad_y = gradient.const_data_ptr<T>();
    Channels sum(size_t(padded_channels(p.size(1)))), moment(sum.size());
    run.normalize_backward_reduce(sum.data(), moment.data());
    return two_rows(sum, moment, p.size(1));
  });
}

std::tuple<Tensor, Tensor, Tensor> pointwise_backward(
    const Tensor& grad_y, const Tensor& x, const Tensor& p, const Tensor& dw_weight, const Tensor& pw_weight,
    const Tensor& affine1, const Tensor& affine2, const Tensor& correction2, int64_t stride, int64_t dilation,
    int64_t pad_left, int64_t pad_right, int64_t pad_top, int64_t pad_bottom, int64_t activation,
    int64_t pointwise_activation, bool channels_last, bool want_g1, bool want_weight) {
  const Call call(x, dw_weight, pw_weight.size(0),
                  {stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation},
                  channels_last);
  const ScalarType dtype = x.scalar_type();
  check_pointwise_weight(call.in_channels, x.scalar_type(), pw_weight);
  check_map("grad_y", grad_y, call.out_sizes(), dtype);
  check_dense_map("p", p, call.out_sizes(), dtype, channels_last);
  check_rows("affine1", affine1, 3, call.in_channels);
  check_rows("affine2", affine2, 3, call.out_channels);
  check_rows("correction2", correction2, 2, call.out_channels);
  return dispatch(x, [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(zero);
    const Tensor gradient = dense(grad_y, call.out_sizes(), channels_last);
    Tensor g1 = want_g1 ? empty_map(call.hidden_sizes(), channels_last, dtype) : nothing(dtype);
    Tensor grad_weight =
        want_weight ? empty_map({call.out_channels, call.in_channels, 1, 1}, false, dtype) : nothing(dtype);
    auto run = run_of(call.params<T>(x.const_data_ptr<T>(), activation, pointwise_activation, channels_last));
    const auto rows1 = rows_of<T>(affine1), rows2 = rows_of<T>(affine2), rows3 = rows_of<T>(correction2);
    run.params.affine1 = affine_of(rows1);
    run.params.affine2 = affine_of(rows2);
    run.params.correction2 = correction_of(rows3);
    run.params.conv.y = const_cast<T*>(p.const_data_ptr<T>());
    run.params.grad_y = gradient.const_data_ptr<T>();
    run.params.g1 = g1.mutable_data_ptr<T>();
    run.pack(dw_weight.const_data_ptr<T>(), pw_weight.const_data_ptr<T>(), true);
    Channels sum(size_t(padded_channels(call.in_channels))), moment(sum.size());
    run.pointwise_backward(want_g1 ? sum.data() : nullptr, moment.data(),
                           want_weight ? grad_weight.mutable_data_ptr<T>() : nullptr);
    return {g1, grad_weight, two_rows(sum, moment, call.in_channels)};
  });
}

std::tuple<Tensor, Tensor> depthwise_backward(const Tensor& g1, const Tensor& x, const Tensor& dw_weight,
                                              const Tensor& affine1, const Tensor& correction1, int64_t stride,
                                              int64_t dilation, int64_t pad_left, int64_t pad_right, int64_t pad_top,
                                              int64_t pad_bottom, bool channels_last, bool want_x, bool want_weight) {
  const Call call(x, dw_weight, 1, {stride, dilation, pad_left, pad_right, pad_top, pad_bottom, 0, 0}, channels_last);
  const ScalarType dtype = x.scalar_type();
  check_dense_map("g1", g1, call.hidden_sizes(), dtype, channels_last);
  check_rows("affine1", affine1, 3, call.in_channels);
  check_rows("correction1", correction1, 2, call.in_channels);
  return dispatch(x, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    Tensor grad_x = want_x ? empty_map(call.in_sizes(), channels_last, dtype) : nothing(dtype);
    Tensor grad_weight = want_weight ? empty_map({call.in_channels, 1, 3, 3}, false, dtype) : nothing(dtype);
    auto run = run_of(call.params<T>(x.const_data_ptr<T>(), 0, 0, channels_last));
    const auto rows1 = rows_of<T>(affine1), rows2 = rows_of<T>(correction1);
    run.params.affine1 = affine_of(rows1);
    run.params.correction1 = correction_of(rows2);
    run.params.g1 = const_cast<T*>(g1.const_data_ptr<T>());
    run.params.grad_x = want_x ? grad_x.mutable_data_ptr<T>() : nullptr;
    const std::vector<T> no_weight(size_t(call.in_channels));
    run.pack(dw_weight.const_data_ptr<T>(), no_weight.data(), true);
    run.depthwise_backward(want_weight ? grad_weight.mutable_data_ptr<T>() : nullptr);
    return {grad_x, grad_weight};
  });
}

}  // namespace
}  // namespace fusedsep

STABLE_TORCH_LIBRARY_FRAGMENT(fusedsep, m) {
  m.def("depthwise_statistics(Tensor x, Tensor dw_weight, " FUSEDSEP_GEOMETRY
        "bool channels_last) -> Tensor statistics");
  m.def("separable_products(Tensor x, Tensor dw_weight, Tensor pw_weight, Tensor affine1, " FUSEDSEP_GEOMETRY
        "int activation, bool channels_last) -> (Tensor p, Tensor statistics)");
  m.def("normalize(Tensor p, Tensor affine2, int activation, bool channels_last) -> Tensor y");
  m.def(
      "normalize_backward_reduce(Tensor grad_y, Tensor p, Tensor affine2, int activation, bool channels_last) "
      "-> Tensor sums");
  m.def(
      "pointwise_backward(Tensor grad_y, Tensor x, Tensor p, Tensor dw_weight, Tensor pw_weight, Tensor affine1, "
      "Tensor affine2, Tensor correction2, " FUSEDSEP_GEOMETRY
      "int activation, int pointwise_activation, bool channels_last, bool want_g1, bool want_weight) "
      "-> (Tensor g1, Tensor grad_pw_weight, Tensor sums1)");
  m.def(
      "depthwise_backward(Tensor g1, Tensor x, Tensor dw_weight, Tensor affine1, Tensor correction1, " FUSEDSEP_GEOMETRY
      "bool channels_last, bool want_x, bool want_weight) -> (Tensor grad_x, Tensor grad_dw_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) {
  m.impl("depthwise_statistics", TORCH_BOX(&fusedsep::depthwise_statistics));
  m.impl("separable_products", TORCH_BOX(&fusedsep::separable_products));
  m.impl("normalize", TORCH_BOX(&fusedsep::normalize));
  m.impl("normalize_backward_reduce", TORCH_BOX(&fusedsep::normalize_backward_reduce));
  m.impl("pointwise_backward", TORCH_BOX(&fusedsep::pointwise_backward));
  m.impl("depthwise_backward", TORCH_BOX(&fusedsep::depthwise_backward));
}
