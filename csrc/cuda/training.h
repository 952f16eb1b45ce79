// SPDX-License-Identifier: BSD-3-Clause
//
// Training on a GPU: csrc/kernels/training.h says what is computed, forward.h what differs in general; this says how
// training differs.
//
// Maps      d and gd are never in memory but in the place of g1. h and gp are, while a call runs, as the rows that the
//           products of forward.h read: [pixel][padded channels], so that these are the products of the forward. The
//           input of a block that is kept as a product (x_normalization) is formed once a call.
// Sums      Over n: a thread adds up at most kThreadPixels values of a channel in float (for the pointwise weights: the
//           pixels of one split), everything above is added up in double, in the order of pixels. Statistics are sums
//           of distances from the first value of a thread, by Welford's formula, and merged by Chan's; those of p come
//           from the product itself, while a tile of it is in shared memory. There are no atomic operations, and
//           neither the split nor the order depends on anything but sizes and, for the pointwise weights and the
//           statistics of p, the processor: results are the same from run to run.
// Types     Values a channel and statistics are float, also of 16-bit maps.
// Float32   Products are exact: TF32 is not used.
#pragma once

#include "../kernels/channel_norm.h"
#include "../kernels/training.h"
#include "forward.h"

namespace fusedsep::cuda {

// A BN and the bias of the convolution in front of it.
template <typename T>
struct TrainingNorm {
  Statistics statistics;
  double eps;
  int64_t channels;
  const T *bias, *weight, *shift;  // null: 0, 1 and 0
  const T *fixed_mean, *fixed_var;
  float *mean, *var;  // of the batch, the mean with the bias: written by the forward, read by the backward
};
template <typename T>
struct TrainingModules {
  const T *dw_weight, *pw_weight;  // [in_channels][3][3], [out_channels][in_channels]
  TrainingNorm<T> norm1, norm2;
};

// Where to write gradients; null where one is not wanted.
template <typename T>
struct Gradients {
  T *x, *dw_weight, *dw_bias, *bn1_weight, *bn1_bias, *pw_weight, *pw_bias, *bn2_weight, *bn2_bias;
};

// Bytes of memory that a call needs meanwhile, aligned to 256.
template <typename T>
int64_t forward_scratch_bytes(const TrainingParams<T>& params, const Device& device);
template <typename T>
int64_t backward_scratch_bytes(const TrainingParams<T>& params, bool forms_x, const Device& device);

// p (in params.conv.y), the statistics of the batch in `modules`, y, and `normalization` [4][out_channels]: rows
// center2, scale2, shift2 and the code of the activation. Of params only geometry, x, activations and results are read.
template <typename T>
void training_forward(const TrainingParams<T>& params, const TrainingModules<T>& modules, float* normalization,
                      const Device& device, void* scratch, Stream stream);

// From params.grad_y, conv.x and conv.y. Where `x_normalization` is not null, conv.x is a product and this is what
// makes the input of it, as `normalization` says; with a negative code it is the input.
template <typename T>
void training_backward(const TrainingParams<T>& params, const TrainingModules<T>& modules, const float* x_normalization,
                       const Gradients<T>& gradients, const Device& device, void* scratch, Stream stream);

}  // namespace fusedsep::cuda
