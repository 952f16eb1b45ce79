// SPDX-License-Identifier: BSD-3-Clause
//
// A BN between the passes: from merged statistics to the values a channel, and from merged sums to the gradients of its
// tensors. One thread for each channel, in double.
#pragma once

#include <optional>

#include "columns-inl.h"

namespace fusedsep::cuda {

// Values a channel, [padded channels] each.
struct NormRows {
  float *center, *scale, *shift, *slope, *offset;
  Affine<float> affine() const { return {center, scale, shift}; }
};

template <typename T>
FUSEDSEP_DEVICE ChannelNorm channel_norm(const TrainingNorm<T>& norm, int64_t channel) {
  const bool batch = norm.statistics == Statistics::kBatch, none = norm.statistics == Statistics::kNone;
  const double mean = none ? 0.0 : batch ? double(norm.mean[channel]) : double(to_float(norm.fixed_mean[channel]));
  const double var = none ? 0.0 : batch ? double(norm.var[channel]) : double(to_float(norm.fixed_var[channel]));
  return {norm.statistics, mean, sqrt(var + norm.eps), number(norm.weight, channel, 1), number(norm.bias, channel, 0)};
}

// Statistics of the batch from `moments` where it is to take them; then the rows, and `normalization` unless it is
// null.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) norm_kernel(TrainingNorm<T> norm, MomentsOf moments, bool take_moments,
                                                             NormRows rows, float* normalization, float activation) {
  const int64_t channel = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x, padded_channels = padded(norm.channels);
  if (channel >= padded_channels) return;
  float center = 0, scale = 0, shift = 0;
  if (channel < norm.channels) {
    if (take_moments) {
      const MergedMoments merged = moments(0, channel);
      norm.mean[channel] = float(merged.mean + number(norm.bias, channel, 0));
      norm.var[channel] = merged.count == 0 ? 0.0f : float(merged.squares / merged.count);
    }
    const ChannelNorm own = channel_norm(norm, channel);
    const double beta = norm.statistics == Statistics::kNone ? 0 : number(norm.shift, channel, 0);
    center = float(own.center), scale = float(own.scale), shift = float(beta);
    if (normalization != nullptr) {
      normalization[channel] = center;
      normalization[norm.channels + channel] = scale;
      normalization[2 * norm.channels + channel] = shift;
      normalization[3 * norm.channels + channel] = activation;
    }
  }
  rows.center[channel] = center, rows.scale[channel] = scale, rows.shift[channel] = shift;
}
template <typename T>
void set_norm(const TrainingNorm<T>& norm, const std::optional<MomentsOf>& moments, const NormRows& rows,
              float* normalization, Activation activation, Stream stream) {
  launch(norm_kernel<T>, ceil_div(padded(norm.channels), kMergeThreads), kMergeThreads, 0, stream, norm,
         moments.value_or(MomentsOf{}), moments.has_value(), rows, normalization, float(int(activation)));
}

// From the sums of a gradient (slots of two rows) over `count` values: slope and offset of the rows, and gradients of
// bias, weight and shift, each unless it is null.
template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    norm_backward_kernel(TrainingNorm<T> norm, SumsOf sums, double count, NormRows rows, T* grad_bias, T* grad_weight,
                         T* grad_shift) {
  const int64_t channel = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x, padded_channels = padded(norm.channels);
  if (channel >= padded_channels) return;
  float slope = 0, offset = 0;
  if (channel < norm.channels) {
    const ChannelNorm own = channel_norm(norm, channel);
    const double sum = sums(0, channel), moment = sums(0, padded_channels + channel);
    if (count > 0) slope = float(own.slope(moment, count)), offset = float(ChannelNorm::offset(sum, count));
    if (grad_bias != nullptr) grad_bias[channel] = from_float<T>(float(own.grad_bias(sum)));
    if (grad_weight != nullptr) grad_weight[channel] = from_float<T>(float(own.grad_weight(moment)));
    if (grad_shift != nullptr) grad_shift[channel] = from_float<T>(float(sum));
  }
  rows.slope[channel] = slope, rows.offset[channel] = offset;
}
template <typename T>
Correction<float> norm_backward(const TrainingNorm<T>& norm, const SumsOf& sums, int64_t count, const NormRows& rows,
                                T* grad_bias, T* grad_weight, T* grad_shift, Stream stream) {
  launch(norm_backward_kernel<T>, ceil_div(padded(norm.channels), kMergeThreads), kMergeThreads, 0, stream, norm, sums,
         double(count), rows, grad_bias, grad_weight, grad_shift);
  if (norm.statistics != Statistics::kBatch || count == 0) return {nullptr, nullptr};
  return {rows.slope, rows.offset};
}

}  // namespace fusedsep::cuda
