// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of training on a GPU: those of ../training_ops.cpp, registered for CUDA. Statistics of the batch and
// the normalization are float32, also of 16-bit maps. Nothing here waits for the device.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../../cuda/training.h"
#include "../training_checks.h"
#include "limits.h"
#include "stream.h"

namespace fusedsep {
namespace {

template <typename T>
T* data_of(const Vector& vector) {
  return vector.has_value() ? static_cast<T*>(const_cast<void*>(vector->const_data_ptr())) : nullptr;
}
template <typename T>
T* data_of(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(const_cast<void*>(tensor.const_data_ptr()));
}

// `mean` and `var` are those of the batch.
template <typename T>
cuda::TrainingModules<T> modules_of(const Modules& m, const Call& call, float* mean1, float* var1, float* mean2,
                                    float* var2) {
  const auto fixed = [](int64_t mode, const Vector& vector) {
    return mode == int64_t(Statistics::kFixed) ? data_of<const T>(vector) : nullptr;
  };
  return {
      data_of<const T>(m.dw_weight),
      data_of<const T>(m.pw_weight),
      {Statistics(m.bn1_mode), m.bn1_eps, call.in_channels, data_of<const T>(m.dw_bias), data_of<const T>(m.bn1_weight),
       data_of<const T>(m.bn1_bias), fixed(m.bn1_mode, m.bn1_mean), fixed(m.bn1_mode, m.bn1_var), mean1, var1},
      {Statistics(m.bn2_mode), m.bn2_eps, call.out_channels, data_of<const T>(m.pw_bias),
       data_of<const T>(m.bn2_weight), data_of<const T>(m.bn2_bias), fixed(m.bn2_mode, m.bn2_mean),
       fixed(m.bn2_mode, m.bn2_var), mean2, var2}};
}

// Goes back to torch's allocator at the end of a call, in the order of the stream.
Tensor scratch_of(int64_t bytes, const Place& place) { return empty_strided<1>({bytes}, {1}, ScalarType::Byte, place); }

Seven separable_conv2d_training(const Tensor& x, const Tensor& dw_weight, const Vector& dw_bias,
                                const Vector& bn1_weight, const Vector& bn1_bias, const Vector& bn1_mean,
                                const Vector& bn1_var, const Tensor& pw_weight, const Vector& pw_bias,
                                const Vector& bn2_weight, const Vector& bn2_bias, const Vector& bn2_mean,
                                const Vector& bn2_var, int64_t bn1_mode, double bn1_eps, int64_t bn2_mode,
                                double bn2_eps, int64_t stride, int64_t dilation, int64_t pad_left, int64_t pad_right,
                                int64_t pad_top, int64_t pad_bottom, int64_t activation, int64_t pointwise_activation,
                                bool channels_last) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  const Place place = Place::cuda(x);
  const Call call(x, dw_weight, pw_weight.size(0), geometry, channels_last, false, place);
  const ScalarType dtype = x.scalar_type();
  const Modules modules{dw_weight,  dw_bias,  bn1_weight, bn1_bias, bn1_mean, bn1_var, pw_weight, pw_bias,
                        bn2_weight, bn2_bias, bn2_mean,   bn2_var,  bn1_mode, bn1_eps, bn2_mode,  bn2_eps};
  modules.check(call, dtype, false);
  cuda::check_input_size(x, geometry);
  cuda::check_map_size("x", call.height, call.width);
  cuda::check_map_size("the result", call.out_height, call.out_width);
  return cuda::dispatch("x", dtype, [&](auto zero) -> Seven {
    using T = decltype(zero);
    const torch::stable::accelerator::DeviceGuard guard(place.index);
    const auto statistics = [&](int64_t mode, int64_t channels) {
      const int64_t size = mode == int64_t(Statistics::kBatch) ? channels : 0;
      return empty_strided<1>({size}, {1}, ScalarType::Float, place);
    };
    Tensor y = empty_map(call.out_sizes(), channels_last, dtype, place),
           p = empty_map(call.out_sizes(), channels_last, dtype, place);
    Tensor mean1 = statistics(bn1_mode, call.in_channels), var1 = statistics(bn1_mode, call.in_channels);
    Tensor mean2 = statistics(bn2_mode, call.out_channels), var2 = statistics(bn2_mode, call.out_channels);
    Tensor normalization = empty_strided<2>({4, call.out_channels}, {call.out_channels, 1}, ScalarType::Float, place);
    TrainingParams<T> params = call.params<T>(data_of<const T>(x), activation, pointwise_activation, channels_last);
    params.conv.y = data_of<T>(p);
    params.y = data_of<T>(y);
    const cuda::Device device = cuda::device_of(place.index);
    Tensor scratch = scratch_of(cuda::forward_scratch_bytes(params, device), place);
    cuda::training_forward(params,
                           modules_of<T>(modules, call, data_of<float>(mean1), data_of<float>(var1),
                                         data_of<float>(mean2), data_of<float>(var2)),
                           normalization.mutable_data_ptr<float>(), device, scratch.mutable_data_ptr(),
                           cuda::current_stream(place.index));
    return {y, p, mean1, var1, mean2, var2, normalization};
  });
}

Nine separable_conv2d_training_backward(const Tensor& grad_y, const Tensor& x, const Vector& x_normalization,
                                        const Tensor& p, const Tensor& dw_weight, const Vector& dw_bias,
                                        const Vector& bn1_weight, const Vector& bn1_bias, const Vector& bn1_mean,
                                        const Vector& bn1_var, const Tensor& pw_weight, const Vector& pw_bias,
                                        const Vector& bn2_weight, const Vector& bn2_bias, const Vector& bn2_mean,
                                        const Vector& bn2_var, int64_t bn1_mode, double bn1_eps, int64_t bn2_mode,
                                        double bn2_eps, int64_t stride, int64_t dilation, int64_t pad_left,
                                        int64_t pad_right, int64_t pad_top, int64_t pad_bottom, int64_t activation,
                                        int64_t pointwise_activation, bool channels_last, int64_t wanted) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  const Place place = Place::cuda(x);
  const Call call(x, dw_weight, pw_weight.size(0), geometry, channels_last, true, place);
  const ScalarType dtype = x.scalar_type();
  const Modules modules{dw_weight,  dw_bias,  bn1_weight, bn1_bias, bn1_mean, bn1_var, pw_weight, pw_bias,
                        bn2_weight, bn2_bias, bn2_mean,   bn2_var,  bn1_mode, bn1_eps, bn2_mode,  bn2_eps};
  modules.check(call, dtype, true);
  check_map("grad_y", grad_y, call.out_sizes(), dtype, place);
  check_map("p", p, call.out_sizes(), dtype, place);
  STD_TORCH_CHECK(!x_normalization.has_value() ||
                      (x_normalization->dim() == 2 && x_normalization->size(0) == 4 &&
                       x_normalization->size(1) == call.in_channels && x_normalization->is_contiguous() &&
                       place.has(*x_normalization) && x_normalization->scalar_type() == ScalarType::Float),
                  "x_normalization must be a contiguous float32 CUDA tensor of shape [4, ", call.in_channels, "]");
  cuda::check_input_size(x, geometry);
  cuda::check_map_size("x", call.height, call.width);
  cuda::check_map_size("the result", call.out_height, call.out_width);
  return cuda::dispatch("x", dtype, [&](auto zero) -> Nine {
    using T = decltype(zero);
    const torch::stable::accelerator::DeviceGuard guard(place.index);
    const Tensor own_x = dense(x, call.in_sizes(), channels_last, place);
    const Tensor own_p = dense(p, call.out_sizes(), channels_last, place);
    const Tensor own_grad_y = dense(grad_y, call.out_sizes(), channels_last, place);
    const auto wants = [wanted](int i) { return (wanted >> i & 1) != 0; };
    const auto map_of = [&](int i, const std::array<int64_t, 4>& sizes, bool in_channels_last) {
      return wants(i) ? empty_map(sizes, in_channels_last, dtype, place) : nothing(dtype, place);
    };
    const auto vector_of = [&](int i, int64_t channels) {
      return empty_strided<1>({wants(i) ? channels : 0}, {1}, dtype, place);
    };
    const int64_t in = call.in_channels, out = call.out_channels;
    Nine result{map_of(kX, call.in_sizes(), channels_last),
                map_of(kDwWeight, {in, 1, 3, 3}, false),
                vector_of(kDwBias, in),
                vector_of(kBn1Weight, in),
                vector_of(kBn1Bias, in),
                map_of(kPwWeight, {out, in, 1, 1}, false),
                vector_of(kPwBias, out),
                vector_of(kBn2Weight, out),
                vector_of(kBn2Bias, out)};
    const auto gradients =
        std::apply([](const auto&... tensors) { return cuda::Gradients<T>{data_of<T>(tensors)...}; }, result);
    TrainingParams<T> params = call.params<T>(data_of<const T>(own_x), activation, pointwise_activation, channels_last);
    params.conv.y = data_of<T>(own_p);
    params.grad_y = data_of<const T>(own_grad_y);
    const cuda::Device& device = cuda::device_of(place.index);
    Tensor scratch = scratch_of(cuda::backward_scratch_bytes(params, x_normalization.has_value(), device), place);
    const auto statistics = [](int64_t mode, const Vector& vector) {
      return mode == int64_t(Statistics::kBatch) ? data_of<float>(vector) : nullptr;
    };
    cuda::training_backward(params,
                            modules_of<T>(modules, call, statistics(bn1_mode, bn1_mean), statistics(bn1_mode, bn1_var),
                                          statistics(bn2_mode, bn2_mean), statistics(bn2_mode, bn2_var)),
                            data_of<const float>(x_normalization), gradients, device, scratch.mutable_data_ptr(),
                            cuda::current_stream(place.index));
    return result;
  });
}

}  // namespace
}  // namespace fusedsep

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CUDA, m) {
  m.impl("separable_conv2d_training", TORCH_BOX(&fusedsep::separable_conv2d_training));
  m.impl("separable_conv2d_training_backward", TORCH_BOX(&fusedsep::separable_conv2d_training_backward));
}
