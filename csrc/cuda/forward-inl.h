// SPDX-License-Identifier: BSD-3-Clause
//
// A block computes the outputs of S::kPixels pixels and S::kColumns channels: for kDepth input channels at a time it
// fills one of two buffers with their depthwise results and their weights, and multiplies what is in the other. One
// barrier a step lies between the two; in between, warps that still fill and warps that already multiply overlap.
#pragma once

#include "depthwise-inl.h"
#include "product-inl.h"

namespace fusedsep::cuda {

template <class S>
struct ForwardShared {
  Step<S> steps[2];
  Origin origins[S::kPixels];
};

template <class S, bool kChannelsLast, typename T>
__global__ void __launch_bounds__(S::kThreads, 512 / S::kThreads)
    forward_kernel(SeparableParams<T> p, bool x_vectors, bool y_vectors) {
  FUSEDSEP_SHARED(ForwardShared<S>, shared);
  static_assert(sizeof(ForwardShared<S>) <= 48 * 1024, "what every device offers without asking for more");
  // Blocks of the same pixels follow on each other, so that x comes from L2.
  const int64_t slices = ceil_div(p.out_channels, S::kColumns);
  const int64_t first_pixel = blockIdx.x / slices * S::kPixels, first_column = blockIdx.x % slices * S::kColumns;
  const Packed<const float> weights(p.packed, p.in_channels, p.out_channels);
  const auto fill = [&](Step<S>& step, int first) {
    depthwise<S, kChannelsLast>(p, weights, shared.origins, x_vectors, first, step.pixels);
    copy_weights(weights.product, weights.out_padded, first, first_column, step);
  };

  for (int i = int(threadIdx.x); i < S::kPixels; i += S::kThreads) shared.origins[i] = origin_of(p, first_pixel + i);
  __syncthreads();
  fill(shared.steps[0], 0);
  __syncthreads();
  const Position<S, kChannelsLast> position;
  Sums<S> sums = {};
  int current = 0;
  const int channels = int(p.in_channels);
  for (int first = 0; first < channels; first += S::kDepth) {
    if (first + S::kDepth < channels) fill(shared.steps[1 - current], first + S::kDepth);
    multiply(shared.steps[current], position, sums);
    __syncthreads();
    current = 1 - current;
  }
  write_map<S, kChannelsLast>(p.y, p.batch, p.out_channels, p.out_height * p.out_width, y_vectors, first_pixel,
                              first_column, position, sums, [&](float sum, int64_t column) {
                                return activate(p.pointwise_activation,
                                                affine(weights.affine2, weights.out_padded, column, sum));
                              });
}

// Whether a map may be read or written kVector elements at a time, channels or pixels as its format has them.
template <typename T>
bool has_vectors(const T* map, int64_t channels, int64_t map_pixels, bool channels_last) {
  return is_vector_aligned(map) && (channels_last ? channels : map_pixels) % kVector == 0;
}

template <typename T>
void separable_forward(const SeparableParams<T>& p, int shape, const Device& device, Stream stream) {
  with_shape(shape_of(p, shape, device), [&](auto chosen) {
    using S = decltype(chosen);
    const int64_t map_pixels = p.out_height * p.out_width;
    const int64_t blocks = ceil_div(p.batch * map_pixels, S::kPixels) * ceil_div(p.out_channels, S::kColumns);
    const bool x_vectors = has_vectors(p.x, p.in_channels, p.height * p.width, p.channels_last);
    const bool y_vectors = has_vectors(p.y, p.out_channels, map_pixels, p.channels_last);
    launch(p.channels_last ? forward_kernel<S, true, T> : forward_kernel<S, false, T>, blocks, S::kThreads, stream, p,
           x_vectors, y_vectors);
  });
}

// One thread for each padded weight of the product, and for each tap and value a channel.
template <typename T>
__global__ void pack_kernel(PackParams<T> p, float* memory) {
  const Packed<float> packed(memory, p.in_channels, p.out_channels);
  const int64_t index = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t c = index / packed.out_padded, o = index % packed.out_padded;
  if (c < packed.in_padded) {
    packed.product[index] =
        c < p.in_channels && o < p.out_channels ? to_float(p.pointwise_weight[o * p.in_channels + c]) : 0.0f;
  }
  const auto pack_affine = [index](float* rows, int64_t padded, int64_t channels, const double* scale,
                                   const double* bias) {
    if (index >= padded) return;
    const bool is_channel = index < channels;
    rows[index] = 0;
    rows[padded + index] = is_channel ? (scale == nullptr ? 1.0f : float(scale[index])) : 0.0f;
    rows[2 * padded + index] = is_channel && bias != nullptr ? float(bias[index]) : 0.0f;
  };
  pack_affine(packed.affine1, packed.in_padded, p.in_channels, p.depthwise_scale, p.depthwise_bias);
  pack_affine(packed.affine2, packed.out_padded, p.out_channels, p.pointwise_scale, p.pointwise_bias);
  if (index < packed.in_padded) {
    for (int tap = 0; tap < 9; ++tap) {
      packed.taps[tap * packed.in_padded + index] =
          index < p.in_channels ? to_float(p.depthwise_weight[index * 9 + tap]) : 0.0f;
    }
  }
}

template <typename T>
void pack(const PackParams<T>& p, float* packed, Stream stream) {
  constexpr int kThreads = 256;
  launch(pack_kernel<T>, ceil_div(padded(p.in_channels) * padded(p.out_channels), kThreads), kThreads, stream, p,
         packed);
}

}  // namespace fusedsep::cuda
