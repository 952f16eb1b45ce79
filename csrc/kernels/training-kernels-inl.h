// SPDX-License-Identifier: BSD-3-Clause
//
// The table of training.h over one vector type.
#pragma once

#include "convolution-backward-inl.h"
#include "depthwise-backward-inl.h"
#include "pointwise-backward-inl.h"
#include "training-inl.h"

namespace fusedsep {
namespace {

template <class V>
TrainingKernels<typename V::T> training_kernels() {
  using T = typename V::T;
  using Params = TrainingParams<T>;
  TrainingKernels<T> kernels{};
  kernels.lanes = V::kLanes;
  kernels.tile_rows = Tiling<V>::kTileRows;
  kernels.tile_columns = Tiling<V>::kTileColumns;
  kernels.packed_size = training_packed_size<V>;
  kernels.pack = pack_training<V>;
  kernels.transpose = transpose<V>;
  kernels.scratch_size = training_scratch_size<V>;
  kernels.depthwise_statistics = [](const Params& p, const Tile& tile, T* scratch, double* sums) {
    const auto run = p.conv.channels_last ? depthwise_statistics<V, true> : depthwise_statistics<V, false>;
    run(p, tile, scratch, sums);
  };
  kernels.forward = [](const Params& p, const Tile& tile, T* scratch, double* sums) {
    const auto run = p.conv.channels_last ? forward<V, true> : forward<V, false>;
    run(p, tile, scratch, sums);
  };
  kernels.normalize = [](const Params& p, const Tile& tile) {
    const auto run = p.conv.channels_last ? normalize<V, true> : normalize<V, false>;
    run(p, tile);
  };
  kernels.normalize_backward_reduce = [](const Params& p, const Tile& tile, double* sums) {
    const auto run = p.conv.channels_last ? normalize_backward_reduce<V, true> : normalize_backward_reduce<V, false>;
    run(p, tile, sums);
  };
  kernels.pointwise_backward = [](const Params& p, const Tile& tile, T* scratch, double* sums,
                                  const WeightGradient<T>* gradient, int64_t offset) {
    const auto run = p.conv.channels_last ? pointwise_backward<V, true> : pointwise_backward<V, false>;
    run(p, tile, scratch, sums, gradient, offset);
  };
  kernels.weight_gradient_sizes = weight_gradient_sizes<V>;
  kernels.weight_gradient_blocks = weight_gradient_blocks<V>;
  kernels.weight_gradient = weight_gradient<V>;
  kernels.convolution_scratch_size = convolution_scratch_size<V>;
  kernels.convolution_backward = convolution_backward<V>;
  kernels.depthwise_map_packed_size = depthwise_map_packed_size<V>;
  kernels.pack_taps = pack_taps<V>;
  kernels.depthwise_map_scratch_size = [](const Params& p) { return depthwise_map_scratch_size<V>(p.conv); };
  kernels.line_channels = kLineVectors<V> * V::kLanes;
  kernels.depthwise_map_forward = depthwise_map_forward<V>;
  kernels.depthwise_backward_channels = depthwise_backward_channels<V>;
  kernels.depthwise_backward_scratch_size = depthwise_backward_scratch_size<V>;
  kernels.depthwise_backward = depthwise_backward<V>;
  return kernels;
}

}  // namespace
}  // namespace fusedsep
