// SPDX-License-Identifier: BSD-3-Clause
//
// The forward pass on a GPU: csrc/kernels/separable.h says what is computed and how maps lie; this says how it differs.
//
// Types     T is float, float16 or bfloat16; sums, weights and values a channel are float.
// Packed    As csrc/cuda/packed.h has it, on the device; aligned to 16 bytes.
// Order     y is one chain of multiply-adds over the input channels, in order, whatever the tile: results do not
//           depend on the device, the batch or the split.
// Sizes     Channels of x are at most 2^30, its rows and columns with their padding fewer; elements may be more
//           than 2^31.
// Pointers  To memory of one device, which is the current one. x, y and packed do not overlap.
// Launches  Are asynchronous, on `stream`, neither allocate nor wait, and may be captured in a graph.
// Throws    std::runtime_error where CUDA refuses a launch.
#pragma once

#include "packed.h"
#include "tiles.h"
#include "types.h"

namespace fusedsep::cuda {

// The current device.
Device current_device();

// Writes Packed::size() floats: weights, and affine maps of the given scale and bias.
template <typename T>
void pack(const PackParams<T>& params, float* packed, Stream stream);

// y = act2(affine2(p)).
// shape: below kShapes; a negative one leaves the choice to the device.
template <typename T>
void separable_forward(const SeparableParams<T>& params, int shape, const Device& device, Stream stream);

template <typename T>
int shape_of(const SeparableParams<T>& params, int shape, const Device& device) {
  if (shape >= 0) return shape;
  const int64_t pixels = params.batch * params.out_height * params.out_width;
  return choose_shape(pixels, params.out_channels, sizeof(T), params.stride, device);
}

}  // namespace fusedsep::cuda
