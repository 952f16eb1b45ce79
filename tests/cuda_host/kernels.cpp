// SPDX-License-Identifier: BSD-3-Clause
//
// The launchers of csrc/cuda, compiled for the host with the emulation, as functions for ctypes.
#include <memory>
#include <type_traits>
#include <vector>

#include "calls.h"
#include "forward.h"
#include "mma.h"

namespace {

using fusedsep::Activation;
using fusedsep::bfloat16;
using fusedsep::float16;

}  // namespace

extern "C" {

const char* error_message() { return message; }

void set_thread_order(int order) { fusedsep::emulation::thread_order = order; }

int64_t packed_size(int type, int64_t in_channels, int64_t out_channels) {
  return type == 0 ? fusedsep::cuda::Packed<float>::size(in_channels, out_channels)
                   : fusedsep::cuda::Packed<float16>::size(in_channels, out_channels);
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

// `norms` are the tensors of NormTensors of either BN, in their order.
int pack_modules(int type, const void* dw_weight, const void* pw_weight, const void* const* norms, const double* eps,
                 int64_t in_channels, int64_t out_channels, float* packed) {
  return guarded(type, [&](auto zero) {
    using T = decltype(zero);
    const auto norm = [&](int which) {
      const auto tensor = [&](int i) { return static_cast<const T*>(norms[5 * which + i]); };
      return fusedsep::cuda::NormTensors<T>{tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), eps[which]};
    };
    fusedsep::cuda::pack(
        fusedsep::cuda::ModuleTensors<T>{static_cast<const T*>(dw_weight), static_cast<const T*>(pw_weight),
                                         in_channels, out_channels, norm(0), norm(1)},
        packed, nullptr);
  });
}

// `sizes` are the numbers of SeparableParams in their order, from batch to pad_left. `plan` is its three numbers, of
// which the first is negative where the device is to choose; `chosen` gets the plan.
int separable_forward(int type, const void* x, void* y, const float* packed, const int64_t* sizes, bool channels_last,
                      int activation, int pointwise_activation, bool allow_tf32, const int64_t* plan,
                      int64_t multiprocessors, int64_t* chosen) {
  return guarded(type, [&](auto zero) {
    using T = decltype(zero);
    using namespace fusedsep::cuda;
    const int64_t* n = sizes;
    const fusedsep::SeparableParams<T> params{static_cast<const T*>(x),
                                              static_cast<T*>(y),
                                              packed,
                                              n[0],
                                              n[1],
                                              n[2],
                                              n[3],
                                              n[4],
                                              n[5],
                                              n[6],
                                              n[7],
                                              n[8],
                                              n[9],
                                              n[10],
                                              channels_last,
                                              Activation(activation),
                                              Activation(pointwise_activation)};
    const Device device{multiprocessors, 227 * 1024};
    const Plan own = plan[0] < 0 ? plan_of(params, allow_tf32, device) : Plan{int(plan[0]), plan[1] != 0, plan[2]};
    chosen[0] = own.shape, chosen[1] = own.fused, chosen[2] = own.slices;
    if (y == nullptr) return;
    // Not initialized: filled with NaN.
    std::vector<unsigned char> scratch(size_t(scratch_elements(params, own)) * sizeof(T) + 16, 0xff);
    void* aligned = scratch.data();
    size_t space = scratch.size();
    std::align(16, space - 16, aligned, space);
    fusedsep::cuda::separable_forward(params, own, allow_tf32, device, static_cast<T*>(aligned), nullptr);
  });
}

// The products of a warp, as csrc/cuda/mma.h has them, of 32 x 16 sums.
int multiply_step(int type, const void* a, const void* b, float* sums) {
  return guarded(type, [&](auto zero) {
    for (int lane = 0; lane < 32; ++lane) {
      float own[2][2][4] = {};
      fusedsep::cuda::multiply_step<decltype(zero)>(static_cast<const unsigned char*>(a), 32,
                                                    static_cast<const unsigned char*>(b), 32, lane, own);
      const fusedsep::cuda::Fragment fragment(lane);
      for (int m = 0; m < 2; ++m) {
        for (int n = 0; n < 2; ++n) {
          for (int i = 0; i < 4; ++i) {
            sums[(16 * m + fragment.row_of(i)) * 16 + 8 * n + fragment.column_of(i)] = own[m][n][i];
          }
        }
      }
    }
  });
}

void round_to_tf32(const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = fusedsep::cuda::to_tf32(from[i]);
}

// The 16-bit types, a number at a time.
void round_to(int type, const float* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = type == 1 ? fusedsep::cuda::to_float(fusedsep::cuda::from_float<float16>(from[i]))
                      : fusedsep::cuda::to_float(fusedsep::cuda::from_float<bfloat16>(from[i]));
  }
}

}  // extern "C"
