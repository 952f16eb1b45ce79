// SPDX-License-Identifier: BSD-3-Clause
//
// The forward pass on a GPU: csrc/kernels/separable.h says what is computed and how maps lie; this says how it differs.
//
// Types     T is float, float16 or bfloat16; sums and values a channel are float. h has the type of x, as it has in a
//           network of separate layers, and products of the 16-bit types are those of the tensor cores. With
//           `allow_tf32` float products are, too, and round both operands to TF32.
// Packed    As csrc/cuda/packed.h has it, on the device; aligned to 16 bytes, as scratch is.
// Order     y is one chain of multiply-adds over the input channels, in order (in tensor cores: over groups of
//           neighbours), whatever the plan: results depend neither on the batch nor on the split.
// Sizes     Channels of x, its rows and columns with their padding and the images are fewer than 2^30, pixels of a
// result
//           fewer than 2^31 an image; elements may be more than 2^31.
// Pointers  To memory of one device, which is the current one. x, y, packed and scratch do not overlap.
// Launches  Are asynchronous, on `stream`, neither allocate nor wait, and may be captured in a graph.
// Throws    std::runtime_error where CUDA refuses a launch.
#pragma once

#include "packed.h"
#include "tiles.h"
#include "types.h"

namespace fusedsep::cuda {

const Device& device_of(int index);

// Whether packed weights may be read.
inline bool is_aligned(const float* packed) { return reinterpret_cast<uintptr_t>(packed) % 16 == 0; }

// Writes Packed::size() floats: weights, and affine maps of the given scale and bias.
template <typename T>
void pack(const PackParams<T>& params, float* packed, Stream stream);

// The same from the tensors of the four modules, in one launch; null pointers for what is absent, and for all of a BN
// besides the bias of its convolution. Computed in double, as fusedsep/_fold.py does, and rounded once.
template <typename T>
struct NormTensors {
  const T *bias, *weight, *shift, *mean, *var;
  double eps;
};
template <typename T>
struct ModuleTensors {
  const T *depthwise_weight, *pointwise_weight;
  int64_t in_channels, out_channels;
  NormTensors<T> bn1, bn2;
};
template <typename T>
void pack(const ModuleTensors<T>& tensors, float* packed, Stream stream);

// The cheapest plan on that device.
template <typename T>
Plan plan_of(const SeparableParams<T>& params, bool allow_tf32, const Device& device);
// That separable_forward wants by that plan.
template <typename T>
int64_t scratch_elements(const SeparableParams<T>& params, const Plan& plan);

// y = act2(affine2(p)). allow_tf32 only where the device has it.
template <typename T>
void separable_forward(const SeparableParams<T>& params, const Plan& plan, bool allow_tf32, const Device& device,
                       T* scratch, Stream stream);

// The product of an unfused forward alone: y of h in rows of padded(params.in_channels) elements; x is not read. Unless
// `moments` is null, it gets the means of each run of moment_pixels() pixels and the squared differences from them:
// [run][2][padded out_channels].
template <typename T>
void multiply_rows(const SeparableParams<T>& params, const T* rows, double* moments, const Device& device,
                   Stream stream);
template <typename T>
int64_t moment_pixels(const SeparableParams<T>& params, const Device& device);

}  // namespace fusedsep::cuda
