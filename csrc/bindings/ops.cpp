// SPDX-License-Identifier: BSD-3-Clause
//
// The operators of inference, in LibTorch's stable ABI: check, allocate, fill params, split work over torch's intra-op
// pool, call.
#include <torch/csrc/stable/library.h>

#include <optional>

#include "geometry.h"
#include "run.h"
#include "tensors.h"

namespace fusedsep {
namespace {

void check_vector(const char* name, const std::optional<Tensor>& vector, int64_t channels) {
  if (!vector.has_value()) return;
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels && vector->is_contiguous() &&
                      vector->scalar_type() == ScalarType::Double && vector->is_cpu(),
                  name, " must be a contiguous float64 CPU tensor of ", channels, " elements");
}

const double* data_or_null(const std::optional<Tensor>& vector) {
  return vector.has_value() ? vector->const_data_ptr<double>() : nullptr;
}

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
  STD_TORCH_CHECK(dw_weight.dim() == 4 && dw_weight.size(0) >= 1 && dw_weight.size(1) == 1 && dw_weight.size(2) == 3 &&
                      dw_weight.size(3) == 3 && dw_weight.is_contiguous() && dw_weight.is_cpu(),
                  "dw_weight must be a contiguous CPU tensor of shape [C, 1, 3, 3]");
  const int64_t in_channels = dw_weight.size(0);
  STD_TORCH_CHECK(pw_weight.dim() == 4 && pw_weight.size(0) >= 1 && pw_weight.size(1) == in_channels &&
                      pw_weight.size(2) == 1 && pw_weight.size(3) == 1 && pw_weight.is_contiguous() &&
                      pw_weight.is_cpu(),
                  "pw_weight must be a contiguous CPU tensor of shape [N, ", in_channels, ", 1, 1]");
  const int64_t out_channels = pw_weight.size(0);
  STD_TORCH_CHECK(pw_weight.scalar_type() == dw_weight.scalar_type(), "pw_weight must have the dtype of dw_weight");
  check_vector("dw_scale", dw_scale, in_channels);
  check_vector("dw_bias", dw_bias, in_channels);
  check_vector("pw_scale", pw_scale, out_channels);
  check_vector("pw_bias", pw_bias, out_channels);
  const auto pack_dtype = [&](auto zero) {
    using T = decltype(zero);
    return pack_as<T>({dw_weight.const_data_ptr<T>(), data_or_null(dw_scale), data_or_null(dw_bias),
                       pw_weight.const_data_ptr<T>(), data_or_null(pw_scale), data_or_null(pw_bias), in_channels,
                       out_channels, channels_last});
  };
  if (dw_weight.scalar_type() == ScalarType::Float) return pack_dtype(0.0f);
  STD_TORCH_CHECK(dw_weight.scalar_type() == ScalarType::Double, "dw_weight must be float32 or float64");
  return pack_dtype(0.0);
}

template <typename T>
Tensor separable_conv2d_as(const Tensor& x, const Tensor& packed, int64_t out_channels, const Geometry& g,
                           bool channels_last) {
  const std::array<int64_t, 4> sizes{x.size(0), x.size(1), x.size(2), x.size(3)};
  SeparableParams<T> params{};
  params.batch = sizes[0];
  params.in_channels = sizes[1];
  params.height = sizes[2];
  params.width = sizes[3];
  params.out_channels = out_channels;
  params.out_height = output_size("height", params.height, g.pad_top, g.pad_bottom, g);
  params.out_width = output_size("width", params.width, g.pad_left, g.pad_right, g);
  params.stride = g.stride;
  params.dilation = g.dilation;
  params.pad_top = g.pad_top;
  params.pad_left = g.pad_left;
  params.channels_last = channels_last;
  params.activation = Activation(g.activation);
  params.pointwise_activation = Activation(g.pointwise_activation);
  element_count(params.batch, out_channels, params.out_height, params.out_width);

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
                        int64_t pointwise_activation, bool channels_last) {
  const Geometry geometry{stride, dilation, pad_left, pad_right, pad_top, pad_bottom, activation, pointwise_activation};
  check_geometry(geometry);
  check_range("out_channels", out_channels, 1, int64_t(1) << 40);
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1 && x.is_cpu(), "x must be a CPU tensor of shape [N, C, H, W]");
  STD_TORCH_CHECK(is_dense(x, {x.size(0), x.size(1), x.size(2), x.size(3)}, channels_last), "x must be contiguous in ",
                  channels_last ? "channels_last" : "NCHW", " memory format");
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
  m.def(
      "separable_conv2d(Tensor x, Tensor packed, int out_channels, int stride, int dilation, int pad_left, "
      "int pad_right, int pad_top, int pad_bottom, int activation, int pointwise_activation, bool channels_last) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedsep, CPU, m) {
  m.impl("pack", TORCH_BOX(&fusedsep::pack));
  m.impl("separable_conv2d", TORCH_BOX(&fusedsep::separable_conv2d));
}
