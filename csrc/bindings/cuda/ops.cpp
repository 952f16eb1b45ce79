// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of inference on a GPU: those of ../ops.cpp, registered for CUDA. Launches go to the current stream of
// the device of x.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../../cuda/forward.h"
#include "../separable_call.h"
#include "stream.h"

namespace fusedsep {
namespace {

namespace accelerator = torch::stable::accelerator;

// f(T()) for the element type.
template <class F>
auto dispatch(const char* name, ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) return f(0.0f);
  if (dtype == ScalarType::Half) return f(float16());
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16, name, " must be float32, float16 or bfloat16");
  return f(bfloat16());
}

Tensor pack(const Tensor& dw_weight, const std::optional<Tensor>& dw_scale, const std::optional<Tensor>& dw_bias,
            const Tensor& pw_weight, const std::optional<Tensor>& pw_scale, const std::optional<Tensor>& pw_bias,
            bool channels_last) {
  const Place place = Place::cuda(dw_weight);
  const PackCall call(dw_weight, dw_scale, dw_bias, pw_weight, pw_scale, pw_bias, place);
  return dispatch("dw_weight", dw_weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const accelerator::DeviceGuard guard(place.index);
    const int64_t size = cuda::Packed<float>::size(call.in_channels, call.out_channels);
    Tensor packed = empty_strided<1>({size}, {1}, ScalarType::Float, place);
    cuda::pack(call.params<T>(channels_last), packed.mutable_data_ptr<float>(), cuda::current_stream(place.index));
    return packed;
  });
}

Tensor separable_conv2d(const Tensor& x, const Tensor& packed, int64_t out_channels, int64_t stride, int64_t dilation,
                        int64_t pad_left, int64_t pad_right, int64_t pad_top, int64_t pad_bottom, int64_t activation,
                        int64_t pointwise_activation, bool channels_last) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  const Place place = Place::cuda(x);
  check_separable_conv2d(x, out_channels, geometry, channels_last, place);
  // Rows and columns of taps, and channels, fit in an int.
  constexpr int64_t kMost = int64_t(1) << 30;
  check_range("channels of x", x.size(1), 1, kMost);
  STD_TORCH_CHECK(x.size(2) + pad_top + pad_bottom < kMost && x.size(3) + pad_left + pad_right < kMost,
                  "x must have fewer than 2^30 rows and columns with its padding on a GPU");
  const int64_t size = cuda::Packed<float>::size(x.size(1), out_channels);
  STD_TORCH_CHECK(packed.dim() == 1 && packed.is_contiguous() && place.has(packed) &&
                      packed.scalar_type() == ScalarType::Float && packed.size(0) == size,
                  "packed must be what fusedsep::pack returned on the device of x for ", x.size(1), " -> ",
                  out_channels, " channels");
  return dispatch("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    SeparableParams<T> params = separable_params<T>(x, out_channels, geometry, channels_last);
    const accelerator::DeviceGuard guard(place.index);
    const std::array<int64_t, 4> sizes{params.batch, out_channels, params.out_height, params.out_width};
    Tensor y = empty_strided<4>(sizes, dense_strides(sizes, channels_last), x.scalar_type(), place);
    params.x = static_cast<const T*>(x.const_data_ptr());
    params.y = static_cast<T*>(y.mutable_data_ptr());
    params.packed = packed.const_data_ptr<float>();
    if (params.batch > 0) cuda::separable_forward(params, -1, cuda::current_device(), cuda::current_stream(place.index));
    return y;
  });
}

}  // namespace
}  // namespace fusedsep

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CUDA, m) {
  m.impl("pack", TORCH_BOX(&fusedsep::pack));
  m.impl("separable_conv2d", TORCH_BOX(&fusedsep::separable_conv2d));
}
