// SPDX-License-Identifier: BSD-3-Clause
//
// Tensors of the stable ABI: memory formats, allocation, and the loop over torch's intra-op pool.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <array>

namespace fusedsep {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
constexpr ScalarType kScalarType = sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;

// The device that the tensors of a call are on.
struct Place {
  const char* name;
  int32_t type, index;

  static Place cpu() { return {"CPU", aoti_torch_device_type_cpu(), 0}; }
  static Place cuda(const Tensor& x) { return {"CUDA", aoti_torch_device_type_cuda(), x.get_device_index()}; }
  bool has(const Tensor& x) const {
    int32_t its_type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &its_type));
    return its_type == type && (is_cpu() || x.get_device_index() == index);
  }
  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
};

template <size_t kRank>
Tensor empty_strided(const std::array<int64_t, kRank>& sizes, const std::array<int64_t, kRank>& strides,
                     ScalarType dtype, const Place& place = Place::cpu()) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(kRank), sizes.data(), strides.data(), int32_t(dtype),
                                                  place.type, place.index, &handle));
  return Tensor(handle);
}

inline std::array<int64_t, 4> dense_strides(const std::array<int64_t, 4>& sizes, bool channels_last) {
  const auto [batch, channels, height, width] = sizes;
  if (channels_last) return {height * width * channels, 1, width * channels, channels};
  return {channels * height * width, height * width, width, 1};
}

inline Tensor empty_map(const std::array<int64_t, 4>& sizes, bool channels_last, ScalarType dtype,
                        const Place& place = Place::cpu()) {
  return empty_strided<4>(sizes, dense_strides(sizes, channels_last), dtype, place);
}

// Dense in the memory format; strides of dimensions of size one, and of empty tensors, do not matter, as everywhere in
// torch.
inline bool is_dense(const Tensor& x, const std::array<int64_t, 4>& sizes, bool channels_last) {
  if (x.numel() == 0) return true;
  const auto strides = dense_strides(sizes, channels_last);
  for (int d = 0; d < 4; ++d) {
    if (sizes[d] > 1 && x.stride(d) != strides[d]) return false;
  }
  return true;
}

// `x` itself where it is dense in the memory format, otherwise a copy that is.
inline Tensor dense(const Tensor& x, const std::array<int64_t, 4>& sizes, bool channels_last,
                    const Place& place = Place::cpu()) {
  if (is_dense(x, sizes, channels_last)) return x;
  Tensor copy = empty_strided<4>(sizes, dense_strides(sizes, channels_last), x.scalar_type(), place);
  torch::stable::copy_(copy, x);
  return copy;
}

struct TorchParallelFor {
  template <class F>
  void operator()(int64_t count, const F& f) const {
    torch::stable::parallel_for(0, count, 1, f);
  }
};

}  // namespace fusedsep
