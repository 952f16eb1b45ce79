// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of inference on a GPU: those of ../ops.cpp, registered for CUDA. Launches go to the current stream of
// the device of x.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../../cuda/forward.h"
#include "../separable_call.h"
#include "limits.h"
#include "stream.h"

namespace fusedsep {
namespace {

namespace accelerator = torch::stable::accelerator;

Tensor pack(const Tensor& dw_weight, const std::optional<Tensor>& dw_scale, const std::optional<Tensor>& dw_bias,
            const Tensor& pw_weight, const std::optional<Tensor>& pw_scale, const std::optional<Tensor>& pw_bias,
            bool channels_last) {
  const Place place = Place::cuda(dw_weight);
  const PackCall call(dw_weight, dw_scale, dw_bias, pw_weight, pw_scale, pw_bias, place);
  return cuda::dispatch("dw_weight", dw_weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const accelerator::DeviceGuard guard(place.index);
    const int64_t size = cuda::Packed<T>::size(call.in_channels, call.out_channels);
    Tensor packed = empty_strided<1>({size}, {1}, ScalarType::Float, place);
    cuda::pack(call.params<T>(channels_last), packed.mutable_data_ptr<float>(), cuda::current_stream(place.index));
    return packed;
  });
}

Tensor pack_modules(const Tensor& dw_weight, const std::optional<Tensor>& dw_bias,
                    const std::optional<Tensor>& bn1_weight, const std::optional<Tensor>& bn1_bias,
                    const std::optional<Tensor>& bn1_mean, const std::optional<Tensor>& bn1_var,
                    const Tensor& pw_weight, const std::optional<Tensor>& pw_bias,
                    const std::optional<Tensor>& bn2_weight, const std::optional<Tensor>& bn2_bias,
                    const std::optional<Tensor>& bn2_mean, const std::optional<Tensor>& bn2_var, double bn1_eps,
                    double bn2_eps) {
  const Place place = Place::cuda(dw_weight);
  const std::optional<Tensor> nothing;
  const PackCall call(dw_weight, nothing, nothing, pw_weight, nothing, nothing, place);
  const auto check = [&](const char* name, const std::optional<Tensor>& vector, int64_t channels) {
    STD_TORCH_CHECK(
        !vector.has_value() || (vector->dim() == 1 && vector->size(0) == channels && vector->is_contiguous() &&
                                place.has(*vector) && vector->scalar_type() == dw_weight.scalar_type()),
        name, " must be a contiguous CUDA tensor of ", channels, " elements with the dtype of dw_weight");
  };
  check("dw_bias", dw_bias, call.in_channels), check("bn1_weight", bn1_weight, call.in_channels);
  check("bn1_bias", bn1_bias, call.in_channels), check("bn1_mean", bn1_mean, call.in_channels);
  check("bn1_var", bn1_var, call.in_channels);
  check("pw_bias", pw_bias, call.out_channels), check("bn2_weight", bn2_weight, call.out_channels);
  check("bn2_bias", bn2_bias, call.out_channels), check("bn2_mean", bn2_mean, call.out_channels);
  check("bn2_var", bn2_var, call.out_channels);
  STD_TORCH_CHECK(bn1_mean.has_value() == bn1_var.has_value() && bn2_mean.has_value() == bn2_var.has_value(),
                  "a BN must have both of its statistics, or neither");
  return cuda::dispatch("dw_weight", dw_weight.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const auto data = [](const std::optional<Tensor>& vector) {
      return vector.has_value() ? static_cast<const T*>(vector->const_data_ptr()) : nullptr;
    };
    const accelerator::DeviceGuard guard(place.index);
    const int64_t size = cuda::Packed<T>::size(call.in_channels, call.out_channels);
    Tensor packed = empty_strided<1>({size}, {1}, ScalarType::Float, place);
    cuda::pack(
        cuda::ModuleTensors<T>{
            static_cast<const T*>(dw_weight.const_data_ptr()),
            static_cast<const T*>(pw_weight.const_data_ptr()),
            call.in_channels,
            call.out_channels,
            {data(dw_bias), data(bn1_weight), data(bn1_bias), data(bn1_mean), data(bn1_var), bn1_eps},
            {data(pw_bias), data(bn2_weight), data(bn2_bias), data(bn2_mean), data(bn2_var), bn2_eps}},
        packed.mutable_data_ptr<float>(), cuda::current_stream(place.index));
    return packed;
  });
}

Tensor separable_conv2d(const Tensor& x, const Tensor& packed, int64_t out_channels, int64_t stride, int64_t dilation,
                        int64_t pad_left, int64_t pad_right, int64_t pad_top, int64_t pad_bottom, int64_t activation,
                        int64_t pointwise_activation, bool channels_last, bool allow_tf32) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  const Place place = Place::cuda(x);
  check_separable_conv2d(x, out_channels, geometry, channels_last, place);
  cuda::check_input_size(x, geometry);
  return cuda::dispatch("x", x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int64_t size = cuda::Packed<T>::size(x.size(1), out_channels);
    STD_TORCH_CHECK(packed.dim() == 1 && packed.is_contiguous() && place.has(packed) &&
                        packed.scalar_type() == ScalarType::Float && packed.size(0) == size &&
                        cuda::is_aligned(packed.const_data_ptr<float>()),
                    "packed must be what fusedsep::pack returned on the device of x for ", x.size(1), " -> ",
                    out_channels, " channels and the dtype of x");
    SeparableParams<T> params = separable_params<T>(x, out_channels, geometry, channels_last);
    cuda::check_map_size("the result", params.out_height, params.out_width);
    const accelerator::DeviceGuard guard(place.index);
    const std::array<int64_t, 4> sizes{params.batch, out_channels, params.out_height, params.out_width};
    Tensor y = empty_strided<4>(sizes, dense_strides(sizes, channels_last), x.scalar_type(), place);
    params.x = static_cast<const T*>(x.const_data_ptr());
    params.y = static_cast<T*>(y.mutable_data_ptr());
    params.packed = packed.const_data_ptr<float>();
    if (params.batch == 0) return y;
    const cuda::Device& device = cuda::device_of(place.index);
    const bool tf32 = allow_tf32 && device.has_tf32;
    const cuda::Plan plan = cuda::plan_of(params, tf32, device);
    // Goes back to torch's allocator at the end of this call, in the order of the stream.
    Tensor scratch = empty_strided<1>({cuda::scratch_elements(params, plan)}, {1}, x.scalar_type(), place);
    cuda::separable_forward(params, plan, tf32, device, static_cast<T*>(scratch.mutable_data_ptr()),
                            cuda::current_stream(place.index));
    return y;
  });
}

}  // namespace
}  // namespace fusedsep

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CUDA, m) {
  m.impl("pack", TORCH_BOX(&fusedsep::pack));
  m.impl("pack_modules", TORCH_BOX(&fusedsep::pack_modules));
  m.impl("separable_conv2d", TORCH_BOX(&fusedsep::separable_conv2d));
}
