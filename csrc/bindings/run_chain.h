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

// Where the maps between the layers lie in one workspace.
//
// A map that only the next layer reads is dead after it: such maps lie at the two ends of one area in turns, which
// holds the largest two neighbours. A map that a later layer adds to its own lies in a second area, at the first place
// that is free for as long as it is needed.
class MapPlan {
 public:
  // `sizes[i]` is that of the map that layer i writes; `residuals[i]` the layer whose map layer i adds, `gated[i]` that
  // whose map it reads times a factor, or -1 or less. The last map is the output, which lies elsewhere.
  MapPlan(const std::vector<int64_t>& sizes, const std::vector<int64_t>& residuals, const std::vector<int64_t>& gated) {
    const int64_t count = std::max(int64_t(0), int64_t(sizes.size()) - 1);
    std::vector<int64_t> last_use(size_t(count), 0);
    for (int64_t i = 0; i < count; ++i) last_use[size_t(i)] = i + 1;
    for (const auto* reads : {&residuals, &gated}) {
      for (int64_t i = 0; i < int64_t(reads->size()); ++i) {
        const int64_t map = (*reads)[size_t(i)];
        if (map >= 0) last_use[size_t(map)] = std::max(last_use[size_t(map)], i);
      }
    }
    const auto is_held = [&](int64_t i) { return last_use[size_t(i)] > i + 1; };
    const auto size = [&](int64_t i) { return (sizes[size_t(i)] + 15) / 16 * 16; };
    int64_t area = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (is_held(i)) continue;
      area = std::max(area, size(i) + (i > 0 && !is_held(i - 1) ? size(i - 1) : 0));
    }
    total_ = area;
    offsets_.resize(size_t(count));
    for (int64_t i = 0; i < count; ++i) {
      int64_t& offset = offsets_[size_t(i)];
      if (!is_held(i)) {
        offset = i % 2 == 0 ? 0 : area - size(i);
        continue;
      }
      offset = area;
      for (int64_t j = 0; j < i; ++j) {  // from the first place on, past every map that is in the way
        if (!is_held(j) || last_use[size_t(j)] < i) continue;
        const int64_t begin = offsets_[size_t(j)], end = begin + size(j);
        if (begin < offset + size(i) && offset < end) {
          offset = end;
          j = -1;
        }
      }
      total_ = std::max(total_, offset + size(i));
    }
  }

  int64_t total() const { return total_; }
  int64_t offset(size_t i) const { return offsets_[i]; }

 private:
  std::vector<int64_t> offsets_;
  int64_t total_ = 0;
};

template <typename T>
class ChainRunner {
 public:
  // Layers have all but their maps and batch filled in; each takes what the one before it gives, and adds the map of
  // layer `residuals[i]`: -1 is the input of the chain, anything less is none. A layer where there is a `gated[i]`
  // reads that map, times what the layer before it gives.
  ChainRunner(const SeparableKernels<T>& kernels, std::vector<SeparableParams<T>> layers,
              std::vector<int64_t> residuals, std::vector<int64_t> gated)
      : kernels_(kernels),
        layers_(std::move(layers)),
        residuals_(std::move(residuals)),
        gated_(std::move(gated)),
        maps_(out_sizes(layers_), residuals_, gated_) {
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

  static std::vector<int64_t> out_sizes(const std::vector<SeparableParams<T>>& layers) {
    std::vector<int64_t> sizes;
    for (const auto& layer : layers) sizes.push_back(out_size(layer));
    return sizes;
  }

  // The maps of the images that are worked on at once, and the scratch of the layer that needs most.
  int64_t workspace_size(int64_t images, int64_t threads) const {
    const int64_t most = std::min(images, images_at_once_);
    int64_t scratch = 0;
    for (SeparableParams<T> layer : layers_) {
      for (const int64_t batch : {most, images % most}) {
        if (batch == 0) continue;
        layer.batch = batch;
        const int64_t size = layer.rows == Rows::kDepthwiseMap
                                 ? MapSplit<T>(kernels_, layer, threads).size
                                 : ScratchSizes<T>(kernels_, layer, plan_for(kernels_, layer, threads), threads).size;
        scratch = std::max(scratch, size);
      }
    }
    return most * maps_.total() + scratch;
  }

  template <class ParallelFor>
  void run_images(const T* x, T* y, int64_t begin, int64_t end, int64_t threads, const ParallelFor& parallel_for,
                  T* memory) const {
    const int64_t most = std::min(end - begin, images_at_once_);
    for (int64_t image = begin; image < end; image += most) {
      const int64_t images = std::min(most, end - image);
      const auto map_of = [&](int64_t i) -> T* { return i < 0 ? nullptr : memory + most * maps_.offset(size_t(i)); };
      const T* const images_in = x + image * in_size(layers_.front());
      const T* in = images_in;
      for (size_t i = 0; i < layers_.size(); ++i) {
        SeparableParams<T> layer = layers_[i];
        layer.batch = images;
        layer.x = in;
        layer.y = i + 1 == layers_.size() ? y + image * out_size(layer) : map_of(int64_t(i));
        layer.residual = residuals_[i] == -1 ? images_in : map_of(residuals_[i]);
        if (gated_[i] >= -1) {
          layer.gate = in;
          layer.x = gated_[i] == -1 ? images_in : map_of(gated_[i]);
        }
        T* const scratch = memory + most * maps_.total();
        if (layer.rows == Rows::kDepthwiseMap) {
          run_depthwise_map(kernels_, layer, threads, parallel_for, scratch);
        } else {
          run_separable(kernels_, layer, plan_for(kernels_, layer, threads), threads, parallel_for, scratch);
        }
        in = layer.y;
      }
    }
  }

  const SeparableKernels<T>& kernels_;
  std::vector<SeparableParams<T>> layers_;
  std::vector<int64_t> residuals_, gated_;
  MapPlan maps_;
  int64_t images_at_once_ = 1;
};

}  // namespace fusedsep
