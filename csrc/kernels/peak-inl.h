// SPDX-License-Identifier: BSD-3-Clause
//
// Multiply-adds that wait for no memory and not for each other: how fast this processor could be.
#pragma once

#include "layout-inl.h"

namespace fusedsep {
namespace {

// Accumulators that fill the registers as those of the microkernel do, so that an addition is done before its sum is
// needed again. With SSE2 (see Tiling) the microkernel has four, where six and both operands fit.
template <class V>
constexpr int kAccumulators = int(max_of(Tiling<V>::kTileRows * Tiling<V>::kTileVectors, 6));

template <class V>
constexpr int64_t multiply_adds_per_round() {
  return kAccumulators<V> * V::kLanes;
}

// `rounds` times x = x * factor + addend for each accumulator; their sum, so that none of it can be left away. They
// begin at 0, 1, 2, ...: equal ones would be computed once.
template <class V>
float multiply_adds(int64_t rounds, float factor, float addend) {
  const V factors = V::broadcast(factor), addends = V::broadcast(addend);
  V x[kAccumulators<V>];
  FUSEDSEP_UNROLL(32)
  for (int i = 0; i < kAccumulators<V>; ++i) x[i] = V::broadcast(float(i));
  FUSEDSEP_UNROLL(1)
  for (int64_t round = 0; round < rounds; ++round) {
    FUSEDSEP_UNROLL(32)
    for (int i = 0; i < kAccumulators<V>; ++i) x[i] = V::fma(x[i], factors, addends);
  }
  double sums[V::kLanes] = {}, sum = 0;
  for (int i = 0; i < kAccumulators<V>; ++i) x[i].accumulate(sums);
  for (int lane = 0; lane < V::kLanes; ++lane) sum += sums[lane];
  return float(sum);
}

}  // namespace
}  // namespace fusedsep
