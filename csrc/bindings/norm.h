// SPDX-License-Identifier: BSD-3-Clause
//
// A BatchNorm and the bias of the convolution in front of it, as the affine map of training.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "../kernels/channel_norm.h"
#include "../kernels/training.h"
#include "training_checks.h"

namespace fusedsep {

// Values a channel in double, padded with zeros.
using Channels = std::vector<double>;

template <typename T>
Channels channels_of(const Vector& vector, int64_t padded, double otherwise, int64_t channels) {
  Channels values(size_t(padded), 0.0);
  const T* data = vector.has_value() ? vector->const_data_ptr<T>() : nullptr;
  for (int64_t c = 0; c < channels; ++c) values[size_t(c)] = data == nullptr ? otherwise : double(data[c]);
  return values;
}

template <typename T>
std::vector<T> rounded(const Channels& values) {
  return std::vector<T>(values.begin(), values.end());
}

template <typename T>
class Norm {
 public:
  Norm(const Vector& conv_bias, const Vector& weight, const Vector& shift, Statistics statistics, double eps,
       int64_t channels)
      : statistics(statistics),
        channels_(channels),
        padded_(padded_channels(channels)),
        eps_(eps),
        bias_(channels_of<T>(conv_bias, padded_, 0, channels)),
        gamma_(channels_of<T>(weight, padded_, 1, channels)),
        shift_(
            rounded<T>(channels_of<T>(statistics == Statistics::kNone ? std::nullopt : shift, padded_, 0, channels))) {}

  const Statistics statistics;

  // Mean of the convolution with its bias, and biased variance: of the batch, or fixed; not read where there is no BN.
  void set_statistics(const T* mean, const T* variance) {
    Channels center(bias_.size()), scale(bias_.size());
    norms_.clear();
    for (size_t c = 0; c < size_t(channels_); ++c) {
      const bool none = statistics == Statistics::kNone;
      norms_.emplace_back(statistics, none ? 0 : double(mean[c]), none ? 1 : std::sqrt(double(variance[c]) + eps_),
                          gamma_[c], bias_[c]);
      center[c] = norms_[c].center;
      scale[c] = norms_[c].scale;
    }
    center_ = rounded<T>(center);
    scale_ = rounded<T>(scale);
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
      slope[c] = norms_[c].slope(moment[c], count);
      offset[c] = ChannelNorm::offset(sum[c], count);
    }
    slope_ = rounded<T>(slope);
    offset_ = rounded<T>(offset);
    return {slope_.data(), offset_.data()};
  }

  // Gradients of gamma, beta and the bias of the convolution.
  Tensor grad_weight(const Channels& moment) const {
    return vector([&](size_t c) { return norms_[c].grad_weight(moment[c]); });
  }
  Tensor grad_shift(const Channels& sum) const {
    return vector([&](size_t c) { return sum[c]; });
  }
  Tensor grad_bias(const Channels& sum) const {
    return vector([&](size_t c) { return norms_[c].grad_bias(sum[c]); });
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
  Channels bias_, gamma_;
  std::vector<ChannelNorm> norms_;
  std::vector<T> shift_, center_, scale_, slope_, offset_;
};

// What makes y of p, as KeptInput takes it.
template <typename T>
Tensor normalization_of(const Norm<T>& norm, int64_t channels, int64_t activation) {
  Tensor rows = empty_strided<2>({4, channels}, {channels, 1}, kScalarType<T>);
  T* data = rows.mutable_data_ptr<T>();
  const Affine<T> affine = norm.affine();
  std::copy_n(affine.center, channels, data);
  std::copy_n(affine.scale, channels, data + channels);
  std::copy_n(affine.shift, channels, data + 2 * channels);
  std::fill_n(data + 3 * channels, channels, T(activation));
  return rows;
}

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

}  // namespace fusedsep
