// SPDX-License-Identifier: BSD-3-Clause
//
// Maps from one memory format to the other.
#pragma once

#include <algorithm>
#include <array>

#include "../kernels/isa.h"
#include "tensors.h"

namespace fusedsep {

// What is worth another thread, and stays in L1 and L2 while the channels pass.
constexpr int64_t kStripPixels = 128;

template <typename T>
void transpose_images(const T* from, const std::array<int64_t, 4>& sizes, bool to_channels_last, T* to) {
  const int64_t channels = sizes[1], pixels = sizes[2] * sizes[3], strips = (pixels + kStripPixels - 1) / kStripPixels;
  const auto& kernels = active_isa().training<T>();
  TorchParallelFor()(sizes[0] * strips, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      const int64_t image = strip / strips * channels * pixels, first = strip % strips * kStripPixels;
      const int64_t count = std::min(kStripPixels, pixels - first);
      if (to_channels_last) {
        kernels.transpose(from + image + first, pixels, channels, count, to + image + first * channels, channels);
      } else {
        kernels.transpose(from + image + first * channels, channels, count, channels, to + image + first, pixels);
      }
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

}  // namespace fusedsep
