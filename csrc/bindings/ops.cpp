// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of inference, in LibTorch's stable ABI: check, allocate, fill params, split work over torch's intra-op
// pool, call.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "run.h"
#include "separable_call.h"

namespace fusedsep {
namespace {

// A header, and room for the weights behind it.
template <typename T>
struct Packed {
  Tensor tensor;
  T* weights;

  Packed(const PackedHeader& header, int64_t size)
      : tensor(empty_strided<1>({int64_t(sizeof(header) / sizeof(T)) + size}, {1}, kScalarType<T>)) {
    T* data = tensor.mutable_data_ptr<T>();
    std::memcpy(data, &header, sizeof(header));
    weights = data + sizeof(header) / sizeof(T);
  }
};

template <typename T>
Tensor pack_as(const PackParams<T>& params) {
  const Isa& isa = active_isa();
  const auto& kernels = isa.separable<T>();
  Packed<T> packed(PackedHeader(isa, params.in_channels, params.out_channels, params.channels_last, sizeof(T)),
                   kernels.packed_size(params.in_channels, params.out_channels, params.channels_last));
  kernels.pack(params, packed.weights);
  return packed.tensor;
}

Tensor pack(const Tensor& dw_weight, const std::optional<Tensor>& dw_scale, const std::optional<Tensor>& dw_bias,
            const Tensor& pw_weight, const std::optional<Tensor>& pw_scale, const std::optional<Tensor>& pw_bias,
            bool channels_last) {
  const PackCall call(dw_weight, dw_scale, dw_bias, pw_weight, pw_scale, pw_bias, Place::cpu());
  const auto pack_dtype = [&](auto zero) {
    using T = decltype(zero);
    return pack_as<T>(call.params<T>(channels_last));
  };
  if (dw_weight.scalar_type() == ScalarType::Float) return pack_dtype(0.0f);
  STD_TORCH_CHECK(dw_weight.scalar_type() == ScalarType::Double, "dw_weight must be float32 or float64");
  return pack_dtype(0.0);
}

// Of a depthwise convolution alone, for a chain.
Tensor pack_depthwise(const Tensor& weight, const std::optional<Tensor>& scale, const std::optional<Tensor>& bias) {
  const int64_t kernel = weight.dim() == 4 ? weight.size(2) : 0;
  STD_TORCH_CHECK(kernel >= 3 && kernel <= 11 && kernel % 2 == 1 && weight.size(3) == kernel && weight.size(0) >= 1 &&
                      weight.size(1) == 1 && weight.is_contiguous() && weight.is_cpu(),
                  "weight must be a contiguous CPU tensor of shape [C, 1, K, K] with K odd and from 3 to 11");
  const int64_t channels = weight.size(0);
  check_vector("scale", scale, channels, Place::cpu());
  check_vector("bias", bias, channels, Place::cpu());
  const auto pack_dtype = [&](auto zero) {
    using T = decltype(zero);
    PackParams<T> params{};
    params.depthwise_weight = weight.const_data_ptr<T>();
    params.depthwise_scale = vector_data(scale);
    params.depthwise_bias = vector_data(bias);
    params.in_channels = channels;
    params.channels_last = true;
    const Isa& isa = active_isa();
    const auto& kernels = isa.separable<T>();
    Packed<T> packed(PackedHeader(isa, channels, 0, true, sizeof(T), kernel),
                     kernels.depthwise_map_packed_size(channels, kernel));
    kernels.pack_depthwise_map(params, kernel, packed.weights);
    return packed.tensor;
  };
  if (weight.scalar_type() == ScalarType::Float) return pack_dtype(0.0f);
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Double, "weight must be float32 or float64");
  return pack_dtype(0.0);
}

template <typename T>
Tensor separable_conv2d_as(const Tensor& x, const Tensor& packed, int64_t out_channels, const Geometry& g,
                           bool channels_last) {
  SeparableParams<T> params = separable_params<T>(x, out_channels, g, channels_last);
  const Isa& isa = active_isa();
  const auto& kernels = isa.separable<T>();
  const PackedHeader header(isa, params.in_channels, out_channels, channels_last, sizeof(T));
  const int64_t header_size = int64_t(sizeof(header) / sizeof(T));
  STD_TORCH_CHECK(packed.dim() == 1 && packed.is_contiguous() && packed.is_cpu() &&
                      packed.scalar_type() == x.scalar_type() && packed.size(0) >= header_size,
                  "packed must be what fusedsep::pack returned, of the dtype of x");
  const T* data = packed.const_data_ptr<T>();
  const int64_t size = kernels.packed_size(params.in_channels, out_channels, channels_last);
  STD_TORCH_CHECK(packed.size(0) == header_size + size && std::memcmp(data, &header, sizeof(header)) == 0,
                  "packed must have been packed for isa ", isa.name, ", ", params.in_channels, " -> ", out_channels,
                  " channels and this memory format; pack the weights again");

  const std::array<int64_t, 4> out_sizes{params.batch, out_channels, params.out_height, params.out_width};
  Tensor y = empty_strided<4>(out_sizes, dense_strides(out_sizes, channels_last), x.scalar_type());
  params.x = x.const_data_ptr<T>();
  params.y = y.mutable_data_ptr<T>();
  params.packed = data + header_size;
  const int64_t threads = torch::stable::get_num_threads();
  run_separable(kernels, params, plan_for(kernels, params, threads), threads, TorchParallelFor());
  return y;
}

Tensor separable_conv2d(const Tensor& x, const Tensor& packed, int64_t out_channels, int64_t stride, int64_t dilation,
                        int64_t pad_left, int64_t pad_right, int64_t pad_top, int64_t pad_bottom, int64_t activation,
                        int64_t pointwise_activation, bool channels_last, bool /* allow_tf32: on a GPU */) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  check_separable_conv2d(x, out_channels, geometry, channels_last, Place::cpu());
  if (x.scalar_type() == ScalarType::Float) {
    return separable_conv2d_as<float>(x, packed, out_channels, geometry, channels_last);
  }
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "x must be float32 or float64");
  return separable_conv2d_as<double>(x, packed, out_channels, geometry, channels_last);
}

}  // namespace
}  // namespace fusedsep

STABLE_TORCH_LIBRARY(fusedsep, m) {
  m.def(
      "pack(Tensor dw_weight, Tensor? dw_scale, Tensor? dw_bias, Tensor pw_weight, Tensor? pw_scale, Tensor? pw_bias, "
      "bool channels_last) -> Tensor");
  m.def("pack_depthwise(Tensor weight, Tensor? scale, Tensor? bias) -> Tensor");
  // On a GPU alone: `pack` with the BN of the modules folded, in one launch.
  m.def(
      "pack_modules(Tensor dw_weight, Tensor? dw_bias, Tensor? bn1_weight, Tensor? bn1_bias, Tensor? bn1_mean, "
      "Tensor? bn1_var, Tensor pw_weight, Tensor? pw_bias, Tensor? bn2_weight, Tensor? bn2_bias, Tensor? bn2_mean, "
      "Tensor? bn2_var, float bn1_eps, float bn2_eps) -> Tensor");
  m.def(
      "separable_conv2d(Tensor x, Tensor packed, int out_channels, int stride, int dilation, int pad_left, "
      "int pad_right, int pad_top, int pad_bottom, int activation, int pointwise_activation, bool channels_last, "
      "bool allow_tf32=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) {
  m.impl("pack", TORCH_BOX(&fusedsep::pack));
  m.impl("pack_depthwise", TORCH_BOX(&fusedsep::pack_depthwise));
  m.impl("separable_conv2d", TORCH_BOX(&fusedsep::separable_conv2d));
}
