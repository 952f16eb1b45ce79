// SPDX-License-Identifier: BSD-3-Clause
//
// The launchers of csrc/cuda, compiled for the host with the emulation, as functions for ctypes.
#include <cstdio>
#include <type_traits>

#include "forward-inl.h"

namespace {

using fusedsep::Activation;
using fusedsep::bfloat16;
using fusedsep::float16;

char message[256];

// f(T()) for the type of that number; what it throws is kept for `error_message`.
template <class F>
int guarded(int type, const F& f) {
  try {
    if (type == 0) f(0.0f);
    if (type == 1) f(float16());
    if (type == 2) f(bfloat16());
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, sizeof(message), "%s", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

const char* error_message() { return message; }

void set_thread_order(int order) { fusedsep::emulation::thread_order = order; }

int64_t packed_size(int64_t in_channels, int64_t out_channels) {
  return fusedsep::cuda::Packed<float>::size(in_channels, out_channels);
}

int choose_shape(int64_t pixels, int64_t columns, int64_t element_size, int64_t stride, int64_t multiprocessors) {
  return fusedsep::cuda::choose_shape(pixels, columns, element_size, stride, {multiprocessors});
}

int pack(int type, const void* dw_weight, const double* dw_scale, const double* dw_bias, const void* pw_weight,
         const double* pw_scale, const double* pw_bias, int64_t in_channels, int64_t out_channels, float* packed) {
  return guarded(type, [&](auto zero) {
    using T = decltype(zero);
    fusedsep::cuda::pack<T>({static_cast<const T*>(dw_weight), dw_scale, dw_bias, static_cast<const T*>(pw_weight),
                             pw_scale, pw_bias, in_channels, out_channels, false},
                            packed, nullptr);
  });
}

// `sizes` are the numbers of SeparableParams in their order, from batch to pad_left.
int separable_forward(int type, const void* x, void* y, const float* packed, const int64_t* sizes, bool channels_last,
                      int activation, int pointwise_activation, int shape) {
  return guarded(type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t* n = sizes;
    fusedsep::cuda::separable_forward<T>(
        {static_cast<const T*>(x), static_cast<T*>(y), packed, n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8],
         n[9], n[10], channels_last, Activation(activation), Activation(pointwise_activation)},
        shape, {80}, nullptr);
  });
}

// The 16-bit types, a number at a time.
void round_to(int type, const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = type == 1 ? fusedsep::cuda::to_float(fusedsep::cuda::from_float<float16>(from[i]))
                      : fusedsep::cuda::to_float(fusedsep::cuda::from_float<bfloat16>(from[i]));
  }
}

}  // extern "C"
