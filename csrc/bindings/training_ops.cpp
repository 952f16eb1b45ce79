// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of training, in LibTorch's stable ABI: forward and backward as one call each, and the passes that they
// consist of (training.h), for statistics that are shared between processes.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "geometry.h"
#include "run_training.h"
#include "tensors.h"

namespace fusedsep {
namespace {

enum class Statistics : int64_t { kNone = 0, kFixed = 1, kBatch = 2 };

// Values a channel in double, padded with zeros.
using Channels = std::vector<double>;

template <typename T>
Channels channels_of(const std::optional<Tensor>& vector, int64_t padded, double otherwise, int64_t channels) {
  Channels values(size_t(padded), 0.0);
  const T* data = vector.has_value() ? vector->const_data_ptr<T>() : nullptr;
  for (int64_t c = 0; c < channels; ++c) values[size_t(c)] = data == nullptr ? otherwise : double(data[c]);
  return values;
}

template <typename T>
std::vector<T> rounded(const Channels& values) {
  return std::vector<T>(values.begin(), values.end());
}

// One BatchNorm and the bias of the convolution in front of it, as the affine map of training.h.
template <typename T>
class Norm {
 public:
  Norm(const std::optional<Tensor>& conv_bias, const std::optional<Tensor>& weight, const std::optional<Tensor>& shift,
       Statistics statistics, double eps, int64_t channels)
      : statistics(statistics),
        channels_(channels),
        padded_((channels + 15) / 16 * 16),
        eps_(eps),
        bias_(channels_of<T>(conv_bias, padded_, 0, channels)),
        gamma_(channels_of<T>(weight, padded_, 1, channels)),
        shift_(
            rounded<T>(channels_of<T>(statistics == Statistics::kNone ? std::nullopt : shift, padded_, 0, channels))) {}

  const Statistics statistics;

  // Mean of the convolution with its bias, and biased variance: of the batch, or fixed; not read where there is no BN.
  void set_statistics(const T* mean, const T* variance) {
    Channels center(bias_.size()), scale(bias_.size());
    inverse_.assign(bias_.size(), 0.0);
    for (size_t c = 0; c < size_t(channels_); ++c) {
      center[c] = (statistics == Statistics::kNone ? 0 : double(mean[c])) - bias_[c];
      inverse_[c] = statistics == Statistics::kNone ? 1 : 1 / std::sqrt(double(variance[c]) + eps_);
      scale[c] = (statistics == Statistics::kNone ? 1 : gamma_[c]) * inverse_[c];
    }
    center_ = rounded<T>(center);
    scale_ = rounded<T>(scale);
    double_scale_ = scale;
  }
  // Rounds statistics of the convolution without its bias, and takes them.
  void set_batch_statistics(const Channels& mean, const Channels& variance, T* mean_out, T* variance_out) {
    for (size_t c = 0; c < size_t(channels_); ++c) {
      mean_out[c] = T(mean[c] + bias_[c]);
      variance_out[c] = T(variance[c]);
    }
    set_statistics(mean_out, variance_out);
  }
  Affine<T> affine() const { return {center_.data(), scale_.data(), shift_.data()}; }

  // From the sums of the gradient over `count` values.
  Correction<T> correction(const Channels& sum, const Channels& moment, double count) {
    if (statistics != Statistics::kBatch || count == 0) return {nullptr, nullptr};
    Channels slope(bias_.size(), 0.0), offset(bias_.size(), 0.0);
    for (size_t c = 0; c < size_t(channels_); ++c) {
      slope[c] = inverse_[c] * inverse_[c] * moment[c] / count;
      offset[c] = sum[c] / count;
    }
    slope_ = rounded<T>(slope);
    offset_ = rounded<T>(offset);
    return {slope_.data(), offset_.data()};
  }

  // Gradients of gamma, beta and the bias of the convolution. A bias in front of statistics of the batch changes
  // nothing.
  Tensor grad_weight(const Channels& moment) const {
    return vector([&](size_t c) { return inverse_[c] * moment[c]; });
  }
  Tensor grad_shift(const Channels& sum) const {
    return vector([&](size_t c) { return sum[c]; });
  }
  Tensor grad_bias(const Channels& sum) const {
    return vector([&](size_t c) { return statistics == Statistics::kBatch ? 0 : double_scale_[c] * sum[c]; });
  }

  int64_t padded() const { return padded_; }

 private:
  template <class F>
  Tensor vector(const F& f) const {
    Tensor result = empty_strided<1>({channels_}, {1}, kScalarType<T>);
    T* data = result.mutable_data_ptr<T>();
    for (size_t c = 0; c < size_t(channels_); ++c) data[c] = T(f(c));
    return result;
  }
  int64_t channels_, padded_;
  double eps_;
  Channels bias_, gamma_, inverse_, double_scale_;
  std::vector<T> shift_, center_, scale_, slope_, offset_;
};

std::array<int64_t, 4> sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

Tensor nothing(ScalarType dtype) { return empty_strided<1>({0}, {1}, dtype); }

Tensor empty_map(const std::array<int64_t, 4>& sizes, bool channels_last, ScalarType dtype) {
  return empty_strided<4>(sizes, dense_strides(sizes, channels_last), dtype);
}

// The geometry of one call, from tensors that were checked.
struct Call {
  Geometry geometry;
  bool channels_last;
  int64_t batch, in_channels, height, width, out_channels, out_height, out_width;

  Call(const Tensor& x, const Tensor& dw_weight, int64_t outputs, const Geometry& g, bool channels_last)
      : geometry(g), channels_last(channels_last), out_channels(outputs) {
    check_geometry(g);
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1 && x.is_cpu(), "x must be a CPU tensor of shape [N, C, H, W]");
    batch = x.size(0);
    in_channels = x.size(1);
    height = x.size(2);
    width = x.size(3);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                    "x must be float32 or float64");
    STD_TORCH_CHECK(is_dense(x, sizes_of(x), channels_last), "x must be contiguous in ",
                    channels_last ? "channels_last" : "NCHW", " memory format");
    STD_TORCH_CHECK(dw_weight.dim() == 4 && dw_weight.size(0) == in_channels && dw_weight.size(1) == 1 &&
                        dw_weight.size(2) == 3 && dw_weight.size(3) == 3 && dw_weight.is_contiguous() &&
                        dw_weight.is_cpu() && dw_weight.scalar_type() == x.scalar_type(),
                    "dw_weight must be a contiguous CPU tensor of shape [", in_channels,
                    ", 1, 3, 3] and the dtype of x");
    out_height = output_size("height", height, g.pad_top, g.pad_bottom, g);
    out_width = output_size("width", width, g.pad_left, g.pad_right, g);
    element_count(batch, std::max(in_channels, out_channels), out_height, out_width);
  }
  std::array<int64_t, 4> in_sizes() const { return {batch, in_channels, height, width}; }
  std::array<int64_t, 4> hidden_sizes() const { return {batch, in_channels, out_height, out_width}; }
  std::array<int64_t, 4> out_sizes() const { return {batch, out_channels, out_height, out_width}; }
  double count() const { return double(batch) * double(out_height) * double(out_width); }

  template <typename T>
  TrainingParams<T> params(const Tensor& x, int64_t activation, int64_t pointwise_activation) const {
    TrainingParams<T> params{};
    params.conv = {x.const_data_ptr<T>(),
                   nullptr,
                   nullptr,
                   batch,
                   in_channels,
                   height,
                   width,
                   out_channels,
                   out_height,
                   out_width,
                   geometry.stride,
                   geometry.dilation,
                   geometry.pad_top,
                   geometry.pad_left,
                   channels_last,
                   Activation::kNone,
                   Activation::kNone};
    params.activation = Activation(activation);
    params.pointwise_activation = Activation(pointwise_activation);
    return params;
  }
};

void check_pointwise_weight(const Tensor& x, const Tensor& pw_weight) {
  STD_TORCH_CHECK(pw_weight.dim() == 4 && pw_weight.size(0) >= 1 && pw_weight.size(1) == x.size(1) &&
                      pw_weight.size(2) == 1 && pw_weight.size(3) == 1 && pw_weight.is_contiguous() &&
                      pw_weight.is_cpu() && pw_weight.scalar_type() == x.scalar_type(),
                  "pw_weight must be a contiguous CPU tensor of shape [N, ", x.size(1), ", 1, 1] and the dtype of x");
}

void check_vector(const char* name, const std::optional<Tensor>& vector, int64_t channels, ScalarType dtype) {
  if (!vector.has_value()) return;
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels && vector->is_contiguous() && vector->is_cpu() &&
                      vector->scalar_type() == dtype,
                  name, " must be a contiguous CPU tensor of ", channels, " elements and the dtype of x");
}

void check_norm(const char* name, const std::optional<Tensor>& mean, const std::optional<Tensor>& variance,
                int64_t mode, bool wants_statistics) {
  check_range((std::string(name) + "_mode").c_str(), mode, 0, 2);
  STD_TORCH_CHECK(!wants_statistics || (mean.has_value() && variance.has_value()), name, "_mean and ", name,
                  "_var must be given in ", name, "_mode ", mode);
}

void check_map(const char* name, const Tensor& map, const std::array<int64_t, 4>& sizes, ScalarType dtype) {
  STD_TORCH_CHECK(map.dim() == 4 && sizes_of(map) == sizes && map.is_cpu() && map.scalar_type() == dtype, name,
                  " must be a CPU tensor of shape [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3],
                  "] and the dtype of x");
}

void check_dense_map(const char* name, const Tensor& map, const std::array<int64_t, 4>& sizes, ScalarType dtype,
                     bool channels_last) {
  check_map(name, map, sizes, dtype);
  STD_TORCH_CHECK(is_dense(map, sizes, channels_last), name, " must be contiguous in ",
                  channels_last ? "channels_last" : "NCHW", " memory format");
}

template <typename T>
auto run_of(const TrainingParams<T>& params) {
  static const TorchParallelFor parallel_for;
  return TrainingRun<T, TorchParallelFor>(active_isa().training<T>(), params, torch::stable::get_num_threads(),
                                          parallel_for);
}

// f(T()) for the element type of `x`.
template <class F>
auto dispatch(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Float ? f(0.0f) : f(0.0);
}

// ------------------------------------------------------------------------------------------------- forward and
// backward

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Vector = std::optional<Tensor>;

// mean and variance of one BN for the caller: what `measure` finds, or nothing.
template <typename T, class F>
std::pair<Tensor, Tensor> take_statistics(Norm<T>& norm, int64_t channels, const Vector& fixed_mean,
                                          const Vector& fixed_variance, const F& measure) {
  if (norm.statistics == Statistics::kBatch) {
    Channels mean(size_t(norm.padded())), variance(size_t(norm.padded()));
    measure(mean.data(), variance.data());
    Tensor mean_out = empty_strided<1>({channels}, {1}, kScalarType<T>);
    Tensor variance_out = empty_strided<1>({channels}, {1}, kScalarType<T>);
    norm.set_batch_statistics(mean, variance, mean_out.mutable_data_ptr<T>(), variance_out.mutable_data_ptr<T>());
    return {mean_out, variance_out};
  }
  measure(nullptr, nullptr);
  const bool fixed = norm.statistics == Statistics::kFixed;
  norm.set_statistics(fixed ? fixed_mean->const_data_ptr<T>() : nullptr,
                      fixed ? fixed_variance->const_data_ptr<T>() : nullptr);
  return {nothing(kScalarType<T>), nothing(kScalarType<T>)};
}

Six separable_conv2d_training(const Tensor& x, const Tensor& dw_weight, const Vector& dw_bias, const Vector& bn1_weight,
                              const Vector& bn1_bias, const Vector& bn1_mean, const Vector& bn1_var,
                              const Tensor& pw_weight, const Vector& pw_bias, const Vector& bn2_weight,
                              const Vector& bn2_bias, const Vector& bn2_mean, const Vector& bn2_var, int64_t bn1_mode,
                              double bn1_eps, int64_t bn2_mode, double bn2_eps, int64_t stride, int64_t dilation,
                              int64_t pad_left, int64_t pad_right, int64_t pad_top, int64_t pad_bottom,
                              int64_t activation, int64_t pointwise_activation, bool channels_last) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  const Call call(x, dw_weight, pw_weight.size(0), geometry, channels_last);
  const ScalarType dtype = x.scalar_type();
  check_pointwise_weight(x, pw_weight);
  const std::tuple<const char*, const Vector*, int64_t> vectors[] = {
      {"dw_bias", &dw_bias, call.in_channels},        {"bn1_weight", &bn1_weight, call.in_channels},
      {"bn1_bias", &bn1_bias, call.in_channels},      {"bn1_mean", &bn1_mean, call.in_channels},
      {"bn1_var", &bn1_var, call.in_channels},        {"pw_bias", &pw_bias, call.out_channels},
      {"bn2_weight", &bn2_weight, call.out_channels}, {"bn2_bias", &bn2_bias, call.out_channels},
      {"bn2_mean", &bn2_mean, call.out_channels},     {"bn2_var", &bn2_var, call.out_channels}};
  for (const auto& [name, vector, channels] : vectors) check_vector(name, *vector, channels, dtype);
  check_norm("bn1", bn1_mean, bn1_var, bn1_mode, bn1_mode == 1);
  check_norm("bn2", bn2_mean, bn2_var, bn2_mode, bn2_mode == 1);

  return dispatch(x, [&](auto zero) -> Six {
    using T = decltype(zero);
    Tensor p = empty_map(call.out_sizes(), channels_last, dtype), y = empty_map(call.out_sizes(), channels_last, dtype);
    Norm<T> norm1(dw_bias, bn1_weight, bn1_bias, Statistics(bn1_mode), bn1_eps, call.in_channels);
    Norm<T> norm2(pw_bias, bn2_weight, bn2_bias, Statistics(bn2_mode), bn2_eps, call.out_channels);
    auto run = run_of(call.params<T>(x, activation, pointwise_activation));
    run.params.conv.y = p.mutable_data_ptr<T>();
    run.params.y = y.mutable_data_ptr<T>();
    const bool keep_d = norm1.statistics == Statistics::kBatch;  // two passes want it
    Tensor d = keep_d ? empty_map(call.hidden_sizes(), channels_last, dtype) : nothing(dtype);
    run.params.d = keep_d ? d.mutable_data_ptr<T>() : nullptr;
    run.pack(dw_weight.const_data_ptr<T>(), pw_weight.const_data_ptr<T>(), false);

    const auto [mean1, var1] =
        take_statistics(norm1, call.in_channels, bn1_mean, bn1_var, [&](double* mean, double* variance) {
          if (mean != nullptr) run.depthwise_statistics(mean, variance);
        });
    run.params.affine1 = norm1.affine();
    const auto [mean2, var2] = take_statistics(norm2, call.out_channels, bn2_mean, bn2_var,
                                               [&](double* mean, double* variance) { run.forward(mean, variance); });
    run.params.affine2 = norm2.affine();
    run.normalize();
    return {y, p, mean1, var1, mean2, var2};
  });
}

Nine separable_conv2d_training_backward(const Tensor& grad_y, const Tensor& x, const Tensor& p, const Tensor& dw_weight,
                                        const Vector& dw_bias, const Vector& bn1_weight, const Vector& bn1_bias,
                                        const Vector& bn1_mean, const Vector& bn1_var, const Tensor& pw_weight,
                                        const Vector& pw_bias, const Vector& bn2_weight, const Vector& bn2_bias,
                                        const Vector& bn2_mean, const Vector& bn2_var, int64_t bn1_mode, double bn1_eps,
                                        int64_t bn2_mode, double bn2_eps, int64_t stride, int64_t dilation,
                                        int64_t pad_left, int64_t pad_right, int64_t pad_top, int64_t pad_bottom,
                                        int64_t activation, int64_t pointwise_activation, bool channels_last,
                                        int64_t wanted) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  const Call call(x, dw_weight, pw_weight.size(0), geometry, channels_last);
  const ScalarType dtype = x.scalar_type();
  check_pointwise_weight(x, pw_weight);
  check_map("grad_y", grad_y, call.out_sizes(), dtype);
  check_dense_map("p", p, call.out_sizes(), dtype, channels_last);
  const std::tuple<const char*, const Vector*, int64_t> vectors[] = {
      {"dw_bias", &dw_bias, call.in_channels},        {"bn1_weight", &bn1_weight, call.in_channels},
      {"bn1_bias", &bn1_bias, call.in_channels},      {"bn1_mean", &bn1_mean, call.in_channels},
      {"bn1_var", &bn1_var, call.in_channels},        {"pw_bias", &pw_bias, call.out_channels},
      {"bn2_weight", &bn2_weight, call.out_channels}, {"bn2_bias", &bn2_bias, call.out_channels},
      {"bn2_mean", &bn2_mean, call.out_channels},     {"bn2_var", &bn2_var, call.out_channels}};
  for (const auto& [name, vector, channels] : vectors) check_vector(name, *vector, channels, dtype);
  check_norm("bn1", bn1_mean, bn1_var, bn1_mode, bn1_mode != 0);
  check_norm("bn2", bn2_mean, bn2_var, bn2_mode, bn2_mode != 0);

  enum { kX, kDwWeight, kDwBias, kBn1Weight, kBn1Bias, kPwWeight, kPwBias, kBn2Weight, kBn2Bias };
  const auto wants = [wanted](int i) { return (wanted >> i & 1) != 0; };
  const bool wants_depthwise = wants(kX) || wants(kDwWeight);
  const bool wants_g1 = wants_depthwise || wants(kDwBias) || wants(kBn1Weight) || wants(kBn1Bias);

  return dispatch(x, [&](auto zero) -> Nine {
    using T = decltype(zero);
    const Tensor gradient = dense(grad_y, call.out_sizes(), channels_last);
    Norm<T> norm1(dw_bias, bn1_weight, bn1_bias, Statistics(bn1_mode), bn1_eps, call.in_channels);
    Norm<T> norm2(pw_bias, bn2_weight, bn2_bias, Statistics(bn2_mode), bn2_eps, call.out_channels);
    norm1.set_statistics(bn1_mode == 0 ? nullptr : bn1_mean->const_data_ptr<T>(),
                         bn1_mode == 0 ? nullptr : bn1_var->const_data_ptr<T>());
    norm2.set_statistics(bn2_mode == 0 ? nullptr : bn2_mean->const_data_ptr<T>(),
                         bn2_mode == 0 ? nullptr : bn2_var->const_data_ptr<T>());
    auto run = run_of(call.params<T>(x, activation, pointwise_activation));
    run.params.conv.y = const_cast<T*>(p.const_data_ptr<T>());
    run.params.grad_y = gradient.const_data_ptr<T>();
    run.params.affine1 = norm1.affine();
    run.params.affine2 = norm2.affine();

    Channels sum2(size_t(norm2.padded())), moment2(sum2.size());
    run.normalize_backward_reduce(sum2.data(), moment2.data());
    run.params.correction2 = norm2.correction(sum2, moment2, call.count());

    Tensor grad_x = nothing(dtype), grad_dw_weight = nothing(dtype), grad_pw_weight = nothing(dtype),
           g1 = nothing(dtype);
    Channels sum1(size_t(norm1.padded())), moment1(sum1.size());
    if (wants_g1 || wants(kPwWeight)) {
      run.pack(dw_weight.const_data_ptr<T>(), pw_weight.const_data_ptr<T>(), true);
      if (wants_g1) g1 = empty_map(call.hidden_sizes(), channels_last, dtype);
      if (wants(kPwWeight)) grad_pw_weight = empty_map({call.out_channels, call.in_channels, 1, 1}, false, dtype);
      run.params.g1 = g1.mutable_data_ptr<T>();
      run.pointwise_backward(wants_g1 ? sum1.data() : nullptr, moment1.data(),
                             wants(kPwWeight) ? grad_pw_weight.mutable_data_ptr<T>() : nullptr);
    }
    if (wants_depthwise) {
      run.params.correction1 = norm1.correction(sum1, moment1, call.count());
      if (wants(kX)) grad_x = empty_map(call.in_sizes(), channels_last, dtype);
      if (wants(kDwWeight)) grad_dw_weight = empty_map({call.in_channels, 1, 3, 3}, false, dtype);
      run.params.grad_x = wants(kX) ? grad_x.mutable_data_ptr<T>() : nullptr;
      run.depthwise_backward(wants(kDwWeight) ? grad_dw_weight.mutable_data_ptr<T>() : nullptr);
    }
    return {grad_x,
            grad_dw_weight,
            wants(kDwBias) ? norm1.grad_bias(sum1) : nothing(dtype),
            wants(kBn1Weight) ? norm1.grad_weight(moment1) : nothing(dtype),
            wants(kBn1Bias) ? norm1.grad_shift(sum1) : nothing(dtype),
            grad_pw_weight,
            wants(kPwBias) ? norm2.grad_bias(sum2) : nothing(dtype),
            wants(kBn2Weight) ? norm2.grad_weight(moment2) : nothing(dtype),
            wants(kBn2Bias) ? norm2.grad_shift(sum2) : nothing(dtype)};
  });
}

// ---------------------------------------------------------------------------------------------------------------
// passes

// Rows of a float64 [rows, C] tensor as padded arrays of T.
template <typename T>
std::vector<std::vector<T>> rows_of(const Tensor& values) {
  const int64_t channels = values.size(1), padded = (channels + 15) / 16 * 16;
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

int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }

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
    auto run = run_of(call.params<T>(x, 0, 0));
    const std::vector<T> no_weight(size_t(call.in_channels));
    run.pack(dw_weight.const_data_ptr<T>(), no_weight.data(), false);
    Channels mean(size_t(padded(call.in_channels))), variance(mean.size());
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
  check_pointwise_weight(x, pw_weight);
  check_rows("affine1", affine1, 3, call.in_channels);
  return dispatch(x, [&](auto zero) -> std::tuple<Tensor, Tensor> {
    using T = decltype(zero);
    Tensor p = empty_map(call.out_sizes(), channels_last, x.scalar_type());
    auto run = run_of(call.params<T>(x, activation, 0));
    const auto rows = rows_of<T>(affine1);
    run.params.affine1 = affine_of(rows);
    run.params.conv.y = p.mutable_data_ptr<T>();
    run.pack(dw_weight.const_data_ptr<T>(), pw_weight.const_data_ptr<T>(), false);
    Channels mean(size_t(padded(call.out_channels))), variance(mean.size());
    run.forward(mean.data(), variance.data());
    return {p, two_rows(mean, variance, call.out_channels)};
  });
}

// Params of the passes that see p alone: one pixel of x stands for one of p.
template <typename T>
TrainingParams<T> params_of_product(const Tensor& p, int64_t activation, bool channels_last) {
  TrainingParams<T> params{};
  params.conv.y = const_cast<T*>(p.const_data_ptr<T>());
  params.conv.batch = p.size(0);
  params.conv.in_channels = params.conv.out_channels = p.size(1);
  params.conv.out_height = p.size(2);
  params.conv.out_width = p.size(3);
  params.conv.channels_last = channels_last;
  params.pointwise_activation = Activation(activation);
  return params;
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
    Channels sum(size_t(padded(p.size(1)))), moment(sum.size());
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
  check_pointwise_weight(x, pw_weight);
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
    auto run = run_of(call.params<T>(x, activation, pointwise_activation));
    const auto rows1 = rows_of<T>(affine1), rows2 = rows_of<T>(affine2), rows3 = rows_of<T>(correction2);
    run.params.affine1 = affine_of(rows1);
    run.params.affine2 = affine_of(rows2);
    run.params.correction2 = correction_of(rows3);
    run.params.conv.y = const_cast<T*>(p.const_data_ptr<T>());
    run.params.grad_y = gradient.const_data_ptr<T>();
    run.params.g1 = g1.mutable_data_ptr<T>();
    run.pack(dw_weight.const_data_ptr<T>(), pw_weight.const_data_ptr<T>(), true);
    Channels sum(size_t(padded(call.in_channels))), moment(sum.size());
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
    auto run = run_of(call.params<T>(x, 0, 0));
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

// Modes of a BN: 0 none, 1 fixed statistics, 2 statistics of the batch.
STABLE_TORCH_LIBRARY_FRAGMENT(fusedsep, m) {
#define FUSEDSEP_GEOMETRY "int stride, int dilation, int pad_left, int pad_right, int pad_top, int pad_bottom, "
#define FUSEDSEP_MODULES                                                                                         \
  "Tensor dw_weight, Tensor? dw_bias, Tensor? bn1_weight, Tensor? bn1_bias, Tensor? bn1_mean, Tensor? bn1_var, " \
  "Tensor pw_weight, Tensor? pw_bias, Tensor? bn2_weight, Tensor? bn2_bias, Tensor? bn2_mean, Tensor? bn2_var, " \
  "int bn1_mode, float bn1_eps, int bn2_mode, float bn2_eps, " FUSEDSEP_GEOMETRY                                 \
  "int activation, int pointwise_activation, bool channels_last"
  m.def("separable_conv2d_training(Tensor x, " FUSEDSEP_MODULES
        ") -> (Tensor y, Tensor p, Tensor mean1, Tensor var1, Tensor mean2, Tensor var2)");
  m.def("separable_conv2d_training_backward(Tensor grad_y, Tensor x, Tensor p, " FUSEDSEP_MODULES
        ", int wanted) -> (Tensor grad_x, Tensor grad_dw_weight, Tensor grad_dw_bias, Tensor grad_bn1_weight, "
        "Tensor grad_bn1_bias, Tensor grad_pw_weight, Tensor grad_pw_bias, Tensor grad_bn2_weight, "
        "Tensor grad_bn2_bias)");
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
#undef FUSEDSEP_GEOMETRY
#undef FUSEDSEP_MODULES
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) {
  m.impl("separable_conv2d_training", TORCH_BOX(&fusedsep::separable_conv2d_training));
  m.impl("separable_conv2d_training_backward", TORCH_BOX(&fusedsep::separable_conv2d_training_backward));
  m.impl("depthwise_statistics", TORCH_BOX(&fusedsep::depthwise_statistics));
  m.impl("separable_products", TORCH_BOX(&fusedsep::separable_products));
  m.impl("normalize", TORCH_BOX(&fusedsep::normalize));
  m.impl("normalize_backward_reduce", TORCH_BOX(&fusedsep::normalize_backward_reduce));
  m.impl("pointwise_backward", TORCH_BOX(&fusedsep::pointwise_backward));
  m.impl("depthwise_backward", TORCH_BOX(&fusedsep::depthwise_backward));
}
