// SPDX-License-Identifier: BSD-3-Clause
//
// Statistics of the values that one thread sees.
#pragma once

#include "device.h"

namespace fusedsep::cuda {

// Mean and squared differences from it of the values of a thread, by B. Welford's formula ("Note on a Method for
// Calculating Corrected Sums of Squares and Products", 1962) and around the first of them, so that a large mean is not
// rounded at every step.
template <int kGroup>
struct Moments {
  int count = 0;
  float first[kGroup] = {}, mean[kGroup] = {}, squares[kGroup] = {};

  FUSEDSEP_DEVICE void add(const float (&values)[kGroup]) {
    const float share = 1.0f / float(++count);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (count == 1) first[i] = values[i];
      const float value = values[i] - first[i], apart = value - mean[i];
      mean[i] = fmaf(apart, share, mean[i]);
      squares[i] = fmaf(apart, value - mean[i], squares[i]);
    }
  }
};

}  // namespace fusedsep::cuda
