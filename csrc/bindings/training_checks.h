// SPDX-License-Identifier: BSD-3-Clause
//
// What the operators of training have in common on every device: geometry, and checks of their tensors.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "../kernels/channel_norm.h"
#include "../kernels/training.h"
#include "geometry.h"
#include "tensors.h"

// Arguments of the schemas.
#define FUSEDSEP_GEOMETRY "int stride, int dilation, int pad_left, int pad_right, int pad_top, int pad_bottom, "

namespace fusedsep {

using Vector = std::optional<Tensor>;

inline std::array<int64_t, 4> sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

inline Tensor nothing(ScalarType dtype, const Place& place = Place::cpu()) {
  return empty_strided<1>({0}, {1}, dtype, place);
}

// The format that the kernels run in. NCHW fills vectors with pixels of a row. Where rows are shorter than two of the
// longest vectors, copies in channels_last cost less than what the cut vectors lose. The fake kernels in
// fusedsep/_ops.py know this rule.
inline bool runs_channels_last(bool channels_last, int64_t width) { return channels_last || width < 32; }

// `x` is in the memory format that `channels_last` tells, unless it may have `any_strides`.
inline void check_input(const Tensor& x, bool channels_last, bool any_strides, const Place& place = Place::cpu()) {
  STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1 && place.has(x), "x must be a ", place.name,
                  " tensor of shape [N, C, H, W]");
  const ScalarType dtype = x.scalar_type();
  if (place.is_cpu()) {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, "x must be float32 or float64");
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
                    "x must be float32, float16 or bfloat16");
  }
  STD_TORCH_CHECK(any_strides || is_dense(x, sizes_of(x), channels_last), "x must be contiguous in ",
                  channels_last ? "channels_last" : "NCHW", " memory format");
}

// The geometry of one call, from tensors that were checked.
struct Call {
  Place place;
  Geometry geometry;
  bool channels_last;
  int64_t batch, in_channels, height, width, out_channels, out_height, out_width;

  // As check_input() takes them.
  Call(const Tensor& x, const Tensor& dw_weight, int64_t outputs, const Geometry& g, bool channels_last,
       bool any_strides = false, const Place& place = Place::cpu())
      : place(place), geometry(g), channels_last(channels_last), out_channels(outputs) {
    check_geometry(g);
    check_input(x, channels_last, any_strides, place);
    batch = x.size(0);
    in_channels = x.size(1);
    height = x.size(2);
    width = x.size(3);
    STD_TORCH_CHECK(dw_weight.dim() == 4 && dw_weight.size(0) == in_channels && dw_weight.size(1) == 1 &&
                        dw_weight.size(2) == 3 && dw_weight.size(3) == 3 && dw_weight.is_contiguous() &&
                        place.has(dw_weight) && dw_weight.scalar_type() == x.scalar_type(),
                    "dw_weight must be a contiguous ", place.name, " tensor of shape [", in_channels,
                    ", 1, 3, 3] and the dtype of x");
    out_height = output_size("height", height, g.pad_top, g.pad_bottom, g);
    out_width = output_size("width", width, g.pad_left, g.pad_right, g);
    element_count(batch, std::max(in_channels, out_channels), out_height, out_width);
  }
  std::array<int64_t, 4> in_sizes() const { return {batch, in_channels, height, width}; }
  std::array<int64_t, 4> hidden_sizes() const { return {batch, in_channels, out_height, out_width}; }
  std::array<int64_t, 4> out_sizes() const { return {batch, out_channels, out_height, out_width}; }
  double count() const { return double(batch) * double(out_height) * double(out_width); }

  bool runs_channels_last() const { return fusedsep::runs_channels_last(channels_last, width); }

  // Of kernels that run in one memory format, on maps that are in it.
  template <typename T>
  TrainingParams<T> params(const T* x, int64_t activation, int64_t pointwise_activation, bool in_channels_last) const {
    TrainingParams<T> params{};
    params.conv = {x,
                   nullptr,
                   nullptr,
                   batch,
                   in_channels,
                   height,
                   width,
                   out_channels,
                   out_height,
                   out_width,
                   geometry.stride,
                   geometry.dilation,
                   geometry.pad_top,
                   geometry.pad_left,
                   in_channels_last,
                   Activation::kNone,
                   Activation::kNone};
    params.activation = Activation(activation);
    params.pointwise_activation = Activation(pointwise_activation);
    return params;
  }
};

inline void check_pointwise_weight(int64_t in_channels, ScalarType dtype, const Tensor& pw_weight,
                                   const Place& place = Place::cpu()) {
  STD_TORCH_CHECK(pw_weight.dim() == 4 && pw_weight.size(0) >= 1 && pw_weight.size(1) == in_channels &&
                      pw_weight.size(2) == 1 && pw_weight.size(3) == 1 && pw_weight.is_contiguous() &&
                      place.has(pw_weight) && pw_weight.scalar_type() == dtype,
                  "pw_weight must be a contiguous ", place.name, " tensor of shape [N, ", in_channels,
                  ", 1, 1] and the dtype of x");
}

inline void check_vector(const std::string& name, const Vector& vector, int64_t channels, ScalarType dtype,
                         const Place& place, const char* named = "the dtype of x") {
  if (!vector.has_value()) return;
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels && vector->is_contiguous() && place.has(*vector) &&
                      vector->scalar_type() == dtype,
                  name, " must be a contiguous ", place.name, " tensor of ", channels, " elements and ", named);
}

// Statistics of the batch: of 16-bit maps they are float32.
inline ScalarType statistics_type(ScalarType dtype) {
  return dtype == ScalarType::Half || dtype == ScalarType::BFloat16 ? ScalarType::Float : dtype;
}

// The tensors and the mode of a BN; statistics of the batch are there `with_batch_statistics`, in the backward.
inline void check_norm(const std::string& name, int64_t channels, const Vector& weight, const Vector& bias,
                       const Vector& mean, const Vector& variance, int64_t mode, ScalarType dtype,
                       bool with_batch_statistics, const Place& place = Place::cpu()) {
  check_range((name + "_mode").c_str(), mode, 0, 2);
  check_vector(name + "_weight", weight, channels, dtype, place);
  check_vector(name + "_bias", bias, channels, dtype, place);
  const bool batch = mode == int64_t(Statistics::kBatch) && with_batch_statistics;
  const ScalarType own = batch ? statistics_type(dtype) : dtype;
  const char* const named = own == dtype ? "the dtype of x" : "float32";
  check_vector(name + "_mean", mean, channels, own, place, named);
  check_vector(name + "_var", variance, channels, own, place, named);
  const bool wanted = batch || mode == int64_t(Statistics::kFixed);
  STD_TORCH_CHECK(!wanted || (mean.has_value() && variance.has_value()), name, "_mean and ", name,
                  "_var must be given in ", name, "_mode ", mode);
}

// The arguments that stand for the four modules.
struct Modules {
  const Tensor& dw_weight;
  const Vector &dw_bias, &bn1_weight, &bn1_bias, &bn1_mean, &bn1_var;
  const Tensor& pw_weight;
  const Vector &pw_bias, &bn2_weight, &bn2_bias, &bn2_mean, &bn2_var;
  int64_t bn1_mode;
  double bn1_eps;
  int64_t bn2_mode;
  double bn2_eps;

  void check(const Call& call, ScalarType dtype, bool with_batch_statistics) const {
    check_pointwise_weight(call.in_channels, dtype, pw_weight, call.place);
    const auto check = [&](const char* name, int64_t channels, const Vector& weight, const Vector& bias,
                           const Vector& mean, const Vector& variance, int64_t mode) {
      check_norm(name, channels, weight, bias, mean, variance, mode, dtype, with_batch_statistics, call.place);
    };
    check("bn1", call.in_channels, bn1_weight, bn1_bias, bn1_mean, bn1_var, bn1_mode);
    check("bn2", call.out_channels, bn2_weight, bn2_bias, bn2_mean, bn2_var, bn2_mode);
    check_vector("dw_bias", dw_bias, call.in_channels, dtype, call.place);
    check_vector("pw_bias", pw_bias, call.out_channels, dtype, call.place);
  }
};

// What the operators return, and places in it of the gradients, which are the bits of `wanted`, too.
using Seven = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Nine = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
enum { kX, kDwWeight, kDwBias, kBn1Weight, kBn1Bias, kPwWeight, kPwBias, kBn2Weight, kBn2Bias };

inline void check_map(const char* name, const Tensor& map, const std::array<int64_t, 4>& sizes, ScalarType dtype,
                      const Place& place = Place::cpu()) {
  STD_TORCH_CHECK(map.dim() == 4 && sizes_of(map) == sizes && place.has(map) && map.scalar_type() == dtype, name,
                  " must be a ", place.name, " tensor of shape [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ",
                  sizes[3], "] and the dtype of x");
}

inline void check_dense_map(const char* name, const Tensor& map, const std::array<int64_t, 4>& sizes, ScalarType dtype,
                            bool channels_last) {
  check_map(name, map, sizes, dtype);
  STD_TORCH_CHECK(is_dense(map, sizes, channels_last), name, " must be contiguous in ",
                  channels_last ? "channels_last" : "NCHW", " memory format");
}

}  // namespace fusedsep
