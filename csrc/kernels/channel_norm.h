// SPDX-License-Identifier: BSD-3-Clause
//
// A BatchNorm and the bias of the convolution in front of it, for one channel and in double: how training.h's values a
// channel follow from the tensors of the modules, and gradients from the sums. The same on every device.
#pragma once

#include <cstdint>

namespace fusedsep {

enum class Statistics : int64_t { kNone = 0, kFixed = 1, kBatch = 2 };

struct ChannelNorm {
  Statistics statistics;
  double inverse, center, scale;

  // `mean` of the convolution with its bias; `deviation` is sqrt(variance + eps). Both, and `gamma`, are not read where
  // there is no BN.
  constexpr ChannelNorm(Statistics statistics, double mean, double deviation, double gamma, double bias)
      : statistics(statistics),
        inverse(statistics == Statistics::kNone ? 1 : 1 / deviation),
        center((statistics == Statistics::kNone ? 0 : mean) - bias),
        scale((statistics == Statistics::kNone ? 1 : gamma) * inverse) {}

  // From the sums of a gradient and of gradient * (value - center) over `count` values.
  constexpr double slope(double moment, double count) const { return inverse * inverse * moment / count; }
  static constexpr double offset(double sum, double count) { return sum / count; }
  constexpr double grad_weight(double moment) const { return inverse * moment; }
  // A bias in front of statistics of the batch changes nothing.
  constexpr double grad_bias(double sum) const { return statistics == Statistics::kBatch ? 0 : scale * sum; }
};

}  // namespace fusedsep
