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

template <typename T>
Tensor pack_as(const PackParams<T>& params) {
  const Isa& isa = active_isa();
  const auto& kernels = isa.separable<T>();
  const PackedHeader header(isa, params.in_channels, params.out_channels, params.channels_last, sizeof(T));
  const int64_t header_size = int64_t(sizeof(header) / sizeof(T));
  const int64_t size = kernels.packed_size(params.in_channels, params.out_channels, params.channels_last);
  Tensor packed = empty_strided<1>({header_size + size}, {1}, kScalarType<T>);
  T* data = packed.mutable_data_ptr<T>();
  std::memcpy(data, &header, sizeof(header));
  kernels.pack(params, data + header_size);
  return packed;
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
  m.impl("separable_conv2d", TORCH_BOX(&fusedsep::separable_conv2d));
}
