// SPDX-License-Identifier: BSD-3-Clause
//
// What the operators of training have in common: geometry, checks of their tensors, and the run on torch's threads.
#pragma once

#include <algorithm>
#include <string>

#include "geometry.h"
#include "norm.h"
#include "run_training.h"
#include "tensors.h"

// Arguments of the schemas.
#define FUSEDSEP_GEOMETRY "int stride, int dilation, int pad_left, int pad_right, int pad_top, int pad_bottom, "

namespace fusedsep {

inline std::array<int64_t, 4> sizes_of(const Tensor& x) { return {x.size(0), x.size(1), x.size(2), x.size(3)}; }

inline Tensor nothing(ScalarType dtype) { return empty_strided<1>({0}, {1}, dtype); }

inline Tensor empty_map(const std::array<int64_t, 4>& sizes, bool channels_last, ScalarType dtype) {
  return empty_strided<4>(sizes, dense_strides(sizes, channels_last), dtype);
}

// The geometry of one call, from tensors that were checked.
struct Call {
  Geometry geometry;
  bool channels_last;
  int64_t batch, in_channels, height, width, out_channels, out_height, out_width;

  // `x` is in the memory format that `channels_last` tells, unless it may have `any_strides`.
  Call(const Tensor& x, const Tensor& dw_weight, int64_t outputs, const Geometry& g, bool channels_last,
       bool any_strides = false)
      : geometry(g), channels_last(channels_last), out_channels(outputs) {
    check_geometry(g);
    STD_TORCH_CHECK(x.dim() == 4 && x.size(1) >= 1 && x.is_cpu(), "x must be a CPU tensor of shape [N, C, H, W]");
    batch = x.size(0);
    in_channels = x.size(1);
    height = x.size(2);
    width = x.size(3);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double,
                    "x must be float32 or float64");
    STD_TORCH_CHECK(any_strides || is_dense(x, sizes_of(x), channels_last), "x must be contiguous in ",
                    channels_last ? "channels_last" : "NCHW", " memory format");
    STD_TORCH_CHECK(dw_weight.dim() == 4 && dw_weight.size(0) == in_channels && dw_weight.size(1) == 1 &&
                        dw_weight.size(2) == 3 && dw_weight.size(3) == 3 && dw_weight.is_contiguous() &&
                        dw_weight.is_cpu() && dw_weight.scalar_type() == x.scalar_type(),
                    "dw_weight must be a contiguous CPU tensor of shape [", in_channels,
                    ", 1, 3, 3] and the dtype of x");
    out_height = output_size("height", height, g.pad_top, g.pad_bottom, g);
    out_width = output_size("width", width, g.pad_left, g.pad_right, g);
    element_count(batch, std::max(in_channels, out_channels), out_height, out_width);
  }
  std::array<int64_t, 4> in_sizes() const { return {batch, in_channels, height, width}; }
  std::array<int64_t, 4> hidden_sizes() const { return {batch, in_channels, out_height, out_width}; }
  std::array<int64_t, 4> out_sizes() const { return {batch, out_channels, out_height, out_width}; }
  double count() const { return double(batch) * double(out_height) * double(out_width); }

  // NCHW fills vectors with pixels of a row. Where rows are shorter than two of the longest vectors, copies in
  // channels_last cost less than what the cut vectors lose. The fake kernels in fusedsep/_ops.py know this rule.
  bool runs_channels_last() const { return channels_last || width < 32; }

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

// Params of the passes that see p alone: one pixel of x stands for one of p.
template <typename T>
TrainingParams<T> params_of_product(const Tensor& p, int64_t activation, bool channels_last) {
  TrainingParams<T> params{};
  params.conv.y = const_cast<T*>(p.const_data_ptr<T>());
  params.conv.batch = p.size(0);
  params.conv.in_channels = params.conv.out_channels = p.size(1);
  params.conv.out_height = p.size(2);
  params.conv.out_width = p.size(3);
  params.conv.channels_last = channels_last;
  params.pointwise_activation = Activation(activation);
  return params;
}

inline void check_pointwise_weight(int64_t in_channels, ScalarType dtype, const Tensor& pw_weight) {
  STD_TORCH_CHECK(pw_weight.dim() == 4 && pw_weight.size(0) >= 1 && pw_weight.size(1) == in_channels &&
                      pw_weight.size(2) == 1 && pw_weight.size(3) == 1 && pw_weight.is_contiguous() &&
                      pw_weight.is_cpu() && pw_weight.scalar_type() == dtype,
                  "pw_weight must be a contiguous CPU tensor of shape [N, ", in_channels, ", 1, 1] and the dtype of x");
}

inline void check_vector(const std::string& name, const Vector& vector, int64_t channels, ScalarType dtype) {
  if (!vector.has_value()) return;
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels && vector->is_contiguous() && vector->is_cpu() &&
                      vector->scalar_type() == dtype,
                  name, " must be a contiguous CPU tensor of ", channels, " elements and the dtype of x");
}

inline void check_norm(const std::string& name, int64_t channels, ScalarType dtype, const Vector& weight,
                       const Vector& bias, const Vector& mean, const Vector& variance, int64_t mode,
                       bool with_batch_statistics) {
  check_range((name + "_mode").c_str(), mode, 0, 2);
  check_vector(name + "_weight", weight, channels, dtype);
  check_vector(name + "_bias", bias, channels, dtype);
  check_vector(name + "_mean", mean, channels, dtype);
  check_vector(name + "_var", variance, channels, dtype);
  const bool wanted =
      mode == int64_t(Statistics::kFixed) || (mode == int64_t(Statistics::kBatch) && with_batch_statistics);
  STD_TORCH_CHECK(!wanted || (mean.has_value() && variance.has_value()), name, "_mean and ", name,
                  "_var must be given in ", name, "_mode ", mode);
}

inline void check_map(const char* name, const Tensor& map, const std::array<int64_t, 4>& sizes, ScalarType dtype) {
  STD_TORCH_CHECK(map.dim() == 4 && sizes_of(map) == sizes && map.is_cpu() && map.scalar_type() == dtype, name,
                  " must be a CPU tensor of shape [", sizes[0], ", ", sizes[1], ", ", sizes[2], ", ", sizes[3],
                  "] and the dtype of x");
}

inline void check_dense_map(const char* name, const Tensor& map, const std::array<int64_t, 4>& sizes, ScalarType dtype,
                            bool channels_last) {
  check_map(name, map, sizes, dtype);
  STD_TORCH_CHECK(is_dense(map, sizes, channels_last), name, " must be contiguous in ",
                  channels_last ? "channels_last" : "NCHW", " memory format");
}

// Images from one memory format to the other.
template <typename T>
void transpose_images(const T* from, const std::array<int64_t, 4>& sizes, bool to_channels_last, T* to) {
  const int64_t channels = sizes[1], pixels = sizes[2] * sizes[3], image = channels * pixels;
  const auto& kernels = active_isa().training<T>();
  TorchParallelFor()(sizes[0], [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      kernels.transpose(from + i * image, to_channels_last ? channels : pixels, to_channels_last ? pixels : channels,
                        to + i * image);
    }
  });
}

// A map that is read, in the memory format that the kernels want.
template <typename T>
class Incoming {
 public:
  Incoming(const Tensor& map, const std::array<int64_t, 4>& sizes, bool channels_last, bool wants_channels_last)
      : map_(map) {
    if (channels_last == wants_channels_last || sizes[2] * sizes[3] == 1) return;
    map_ = empty_map(sizes, wants_channels_last, map.scalar_type());
    transpose_images(map.const_data_ptr<T>(), sizes, wants_channels_last, map_.mutable_data_ptr<T>());
  }
  const T* data() const { return map_.const_data_ptr<T>(); }
  const Tensor& map() const { return map_; }

 private:
  Tensor map_;
};

template <typename T>
auto run_of(const TrainingParams<T>& params) {
  static const TorchParallelFor parallel_for;
  return TrainingRun<T, TorchParallelFor>(active_isa().training<T>(), params, torch::stable::get_num_threads(),
                                          parallel_for);
}

// The input of a block in the backward. It may be kept as the raw product of the block that it came from, and what
// makes x of it: `normalization` [4, C], rows of center, scale, shift and the code of the activation. A negative code
// says that `map` is x itself, and so does no `normalization`. `map` may have any strides: a product is in the format
// that its block ran in, and whoever kept it may have laid it out anew.
template <typename T>
class KeptInput {
 public:
  KeptInput(const Tensor& map, const Vector& normalization, const Call& call, bool wants_channels_last)
      : map_(map), normalized_(is_normalized(normalization, call.in_channels)) {
    const std::array<int64_t, 4> sizes = call.in_sizes();
    if (!is_dense(map, sizes, wants_channels_last)) {
      map_ = is_dense(map, sizes, !wants_channels_last)
                 ? Incoming<T>(map, sizes, !wants_channels_last, wants_channels_last).map()
                 : dense(map, sizes, wants_channels_last);
    }
    if (!normalized_) return;
    const T* rows = normalization->const_data_ptr<T>();
    activation_ = Activation(int64_t(rows[3 * call.in_channels]));
    for (int64_t row = 0; row < 3; ++row) {
      rows_.emplace_back(size_t(padded_channels(call.in_channels)), T(0));
      std::copy_n(rows + row * call.in_channels, call.in_channels, rows_.back().data());
    }
    if (wants_channels_last) return;
    auto run = run_of(params_of_product<T>(map_, int64_t(activation_), false));
    const Tensor x = empty_map(sizes, false, kScalarType<T>);
    run.params.affine2 = affine();
    run.params.y = x.mutable_data_ptr<T>();
    run.normalize();
    map_ = x;
    normalized_ = false;
  }
  // For the passes of the backward.
  void set(TrainingParams<T>& params) const {
    params.conv.x = map_.template const_data_ptr<T>();
    if (!normalized_) return;
    params.x_affine = affine();
    params.x_activation = activation_;
  }

 private:
  static bool is_normalized(const Vector& normalization, int64_t channels) {
    if (!normalization.has_value()) return false;
    STD_TORCH_CHECK(normalization->dim() == 2 && normalization->size(0) == 4 && normalization->size(1) == channels &&
                        normalization->is_contiguous() && normalization->is_cpu() &&
                        normalization->scalar_type() == kScalarType<T>,
                    "x_normalization must be a contiguous CPU tensor of shape [4, ", channels, "] and the dtype of x");
    const T code = normalization->const_data_ptr<T>()[3 * channels];
    STD_TORCH_CHECK(code < 0 || code == T(0) || code == T(1) || code == T(2) || code == T(3),
                    "row 3 of x_normalization must hold the code of an activation, or -1");
    return code >= 0;
  }
  Affine<T> affine() const { return {rows_[0].data(), rows_[1].data(), rows_[2].data()}; }

  Tensor map_;
  bool normalized_;
  Activation activation_ = Activation::kNone;
  std::vector<std::vector<T>> rows_;
};

// A map that the kernels write in the memory format that they want.
template <typename T>
class Outgoing {
 public:
  Outgoing(const std::array<int64_t, 4>& sizes, bool channels_last, bool wants_channels_last)
      : sizes_(sizes),
        channels_last_(channels_last),
        map_(empty_map(sizes, channels_last, kScalarType<T>)),
        written_(channels_last == wants_channels_last || sizes[2] * sizes[3] == 1
                     ? map_
                     : empty_map(sizes, wants_channels_last, kScalarType<T>)) {}
  T* data() { return written_.mutable_data_ptr<T>(); }
  // When it is written.
  Tensor map() {
    if (map_.get() != written_.get()) {
      transpose_images(written_.const_data_ptr<T>(), sizes_, channels_last_, map_.mutable_data_ptr<T>());
    }
    return map_;
  }

 private:
  std::array<int64_t, 4> sizes_;
  bool channels_last_;
  Tensor map_, written_;
};

// f(T()) for the element type of `x`.
template <class F>
auto dispatch(const Tensor& x, const F& f) {
  return x.scalar_type() == ScalarType::Float ? f(0.0f) : f(0.0);
}

}  // namespace fusedsep
