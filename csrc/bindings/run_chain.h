// SPDX-License-Identifier: BSD-3-Clause
//
// Runs several layers in one call, from one buffer into another and back.
#pragma once

#include <algorithm>
#include <vector>

#include "run.h"

namespace fusedsep {

// Maps of a few images stay in the L2 of the thread that works on them, beside weights that pass.
constexpr int64_t kImagesBytes = 1024 * 1024;
// A thread keeps a workspace up to this size from call to call.
constexpr size_t kKeptBytes = 64 * 1024 * 1024;

// Elements of one image's input and output of a layer.
template <typename T>
int64_t in_size(const SeparableParams<T>& layer) {
  const bool patches = layer.rows == Rows::kPatches || layer.rows == Rows::kPatchesOfNchw;
  return (patches ? layer.in_channels / 9 : layer.in_channels) * layer.height * layer.width;
}
template <typename T>
int64_t out_size(const SeparableParams<T>& layer) {
  return layer.out_channels * layer.out_height * layer.out_width;
}

template <typename T>
class ChainRunner {
 public:
  // Layers have all but x, y and batch filled in; each takes what the one before it gives.
  ChainRunner(const SeparableKernels<T>& kernels, std::vector<SeparableParams<T>> layers)
      : kernels_(kernels), layers_(std::move(layers)) {
    for (size_t i = 0; i + 1 < layers_.size(); ++i) map_size_ = std::max(map_size_, out_size(layers_[i]));
    map_size_ = (map_size_ + 15) / 16 * 16;
    int64_t most = 1;
    for (const auto& layer : layers_) most = std::max(most, in_size(layer) + out_size(layer));
    images_at_once_ = std::max(int64_t(1), kImagesBytes / (most * int64_t(sizeof(T))));
  }

  // While there are images for every thread, each thread takes its own through all layers and waits for nobody. What
  // is left over is cut into tiles, layer by layer.
  template <class ParallelFor>
  void run(const T* x, T* y, int64_t batch, int64_t threads, const ParallelFor& parallel_for) const {
    if (batch == 0) return;
    static thread_local Workspace workspace;
    const int64_t own = threads > 1 ? batch / threads : 0, rest = batch - own * threads;
    const int64_t own_size = own > 0 ? workspace_size(own, 1) : 0;
    const int64_t rest_size = rest > 0 ? workspace_size(rest, threads) : 0;
    const size_t bytes = size_t(std::max(own_size * threads, rest_size)) * sizeof(T);
    T* memory = static_cast<T*>(workspace.get(bytes));
    if (own > 0) {
      parallel_for(threads, [&](int64_t begin, int64_t end) {
        for (int64_t thread = begin; thread < end; ++thread) {
          run_images(x, y, thread * own, (thread + 1) * own, 1, InThisThread(), memory + thread * own_size);
        }
      });
    }
    run_images(x, y, batch - rest, batch, threads, parallel_for, memory);
    if (bytes > kKeptBytes) workspace.release();
  }

 private:
  struct InThisThread {
    template <class F>
    void operator()(int64_t count, const F& f) const {
      f(0, count);
    }
  };

  // Two maps of each of the images that are worked on at once, and the scratch of the layer that needs most.
  int64_t workspace_size(int64_t images, int64_t threads) const {
    const int64_t most = std::min(images, images_at_once_);
    int64_t scratch = 0;
    for (SeparableParams<T> layer : layers_) {
      for (const int64_t batch : {most, images % most}) {
        if (batch == 0) continue;
        layer.batch = batch;
        scratch = std::max(scratch, ScratchSizes<T>(kernels_, layer, plan_for(kernels_, layer, threads), threads).size);
      }
    }
    return 2 * most * map_size_ + scratch;
  }

  template <class ParallelFor>
  void run_images(const T* x, T* y, int64_t begin, int64_t end, int64_t threads, const ParallelFor& parallel_for,
                  T* memory) const {
    const int64_t most = std::min(end - begin, images_at_once_);
    for (int64_t image = begin; image < end; image += most) {
      const int64_t images = std::min(most, end - image);
      T* maps[2] = {memory, memory + most * map_size_};
      const T* in = x + image * in_size(layers_.front());
      for (size_t i = 0; i < layers_.size(); ++i) {
        SeparableParams<T> layer = layers_[i];
        layer.batch = images;
        layer.x = in;
        layer.y = i + 1 == layers_.size() ? y + image * out_size(layer) : maps[i % 2];
        run_separable(kernels_, layer, plan_for(kernels_, layer, threads), threads, parallel_for,
                      memory + 2 * most * map_size_);
        in = layer.y;
      }
    }
  }

  const SeparableKernels<T>& kernels_;
  std::vector<SeparableParams<T>> layers_;
  int64_t map_size_ = 0;  // elements of the largest map between two layers
  int64_t images_at_once_ = 1;
};

}  // namespace fusedsep
