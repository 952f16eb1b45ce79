// SPDX-License-Identifier: BSD-3-Clause
//
// Runs several layers in one call, from one buffer into another and back.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <utility>
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
  return (reads_patches(layer) ? layer.in_channels / 9 : layer.in_channels) * layer.height * layer.width;
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

// Consecutive layers, each of which takes what the one before it gives. They have all but their maps and batch filled
// in. Layer i adds the map of layer `residuals[i]`: -1 is the input, anything less is none. A layer where there is a
// `gated[i]` reads that map, times what the layer before it gives.
template <typename T>
class LayerRun {
 public:
  LayerRun(const SeparableKernels<T>& kernels, std::vector<SeparableParams<T>> layers, std::vector<int64_t> residuals,
           std::vector<int64_t> gated, int64_t images_at_once)
      : kernels_(kernels),
        layers_(std::move(layers)),
        residuals_(std::move(residuals)),
        gated_(std::move(gated)),
        images_at_once_(images_at_once),
        maps_(out_sizes(layers_), residuals_, gated_) {}

  int64_t in_size() const { return fusedsep::in_size(layers_.front()); }
  int64_t out_size() const { return fusedsep::out_size(layers_.back()); }

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
  void run(const T* x, T* y, int64_t images, int64_t threads, const ParallelFor& parallel_for, T* memory) const {
    const int64_t most = std::min(images, images_at_once_);
    for (int64_t image = 0; image < images; image += most) {
      run_at_once(x + image * in_size(), y + image * out_size(), std::min(most, images - image), most, threads,
                  parallel_for, memory);
    }
  }

 private:
  static std::vector<int64_t> out_sizes(const std::vector<SeparableParams<T>>& layers) {
    std::vector<int64_t> sizes;
    for (const auto& layer : layers) sizes.push_back(fusedsep::out_size(layer));
    return sizes;
  }

  template <class ParallelFor>
  void run_at_once(const T* x, T* y, int64_t images, int64_t most, int64_t threads, const ParallelFor& parallel_for,
                   T* memory) const {
    const auto map_of = [&](int64_t i) -> T* { return i < 0 ? nullptr : memory + most * maps_.offset(size_t(i)); };
    T* const scratch = memory + most * maps_.total();
    const T* in = x;
    for (size_t i = 0; i < layers_.size(); ++i) {
      SeparableParams<T> layer = layers_[i];
      layer.batch = images;
      layer.x = in;
      layer.y = i + 1 == layers_.size() ? y : map_of(int64_t(i));
      layer.residual = residuals_[i] == -1 ? x : map_of(residuals_[i]);
      if (gated_[i] >= -1) {
        layer.gate = in;
        layer.x = gated_[i] == -1 ? x : map_of(gated_[i]);
      }
      if (layer.rows == Rows::kDepthwiseMap) {
        run_depthwise_map(kernels_, layer, threads, parallel_for, scratch);
      } else {
        run_separable(kernels_, layer, plan_for(kernels_, layer, threads), threads, parallel_for, scratch);
      }
      in = layer.y;
    }
  }

  const SeparableKernels<T>& kernels_;
  std::vector<SeparableParams<T>> layers_;
  std::vector<int64_t> residuals_, gated_;
  int64_t images_at_once_;
  MapPlan maps_;
};

template <typename T>
class ChainRunner {
 public:
  // Layers, residuals and gated as of a LayerRun.
  ChainRunner(const SeparableKernels<T>& kernels, const std::vector<SeparableParams<T>>& layers,
              const std::vector<int64_t>& residuals, const std::vector<int64_t>& gated) {
    const size_t head = head_of(layers, residuals, gated);
    const auto part = [&](size_t begin, size_t end, int64_t images_at_once) {
      const auto of = [&](const auto& all) {
        return std::decay_t<decltype(all)>(all.begin() + int64_t(begin), all.begin() + int64_t(end));
      };
      parts_.emplace_back(kernels, of(layers), of(residuals), of(gated), images_at_once);
    };
    int64_t most = 1;
    for (size_t i = 0; i < head; ++i) most = std::max(most, in_size(layers[i]) + out_size(layers[i]));
    part(0, head, images_of(most));
    if (head == layers.size()) return;
    images_of_head_ = images_of(in_size(layers[head]));
    part(head, layers.size(), images_of_head_);
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

  // As many as fit in kImagesBytes, of so many elements each.
  static int64_t images_of(int64_t elements) {
    return std::max(int64_t(1), kImagesBytes / (elements * int64_t(sizeof(T))));
  }

  // The first layer of the products of means at the end; their number of layers where there are none, or no others.
  static size_t head_of(const std::vector<SeparableParams<T>>& layers, const std::vector<int64_t>& residuals,
                        const std::vector<int64_t>& gated) {
    for (size_t i = layers.size(); i-- > 1;) {
      if (residuals[i] >= -1 || gated[i] >= -1) break;
      if (layers[i].rows == Rows::kMeans) return i;
      if (layers[i].rows != Rows::kPixels) break;
    }
    return layers.size();
  }

  bool has_head() const { return parts_.size() > 1; }

  // What the layers of the head read: of several images, so that its weights, which are many, pass once for these.
  int64_t head_size(int64_t images) const {
    return has_head() ? (std::min(images, images_of_head_) * parts_.back().in_size() + 15) / 16 * 16 : 0;
  }

  int64_t workspace_size(int64_t images, int64_t threads) const {
    int64_t size = 0;
    for (const auto& part : parts_) {
      for (const int64_t count : {std::min(images, images_of_head_), images % images_of_head_}) {
        if (count > 0) size = std::max(size, part.workspace_size(count, threads));
      }
    }
    return head_size(images) + size;
  }

  template <class ParallelFor>
  void run_images(const T* x, T* y, int64_t begin, int64_t end, int64_t threads, const ParallelFor& parallel_for,
                  T* memory) const {
    const LayerRun<T>&body = parts_.front(), &last = parts_.back();
    T* const rest = memory + head_size(end - begin);
    for (int64_t image = begin, images; image < end; image += images) {
      images = std::min(images_of_head_, end - image);
      T* const out = y + image * last.out_size();
      body.run(x + image * body.in_size(), has_head() ? memory : out, images, threads, parallel_for, rest);
      if (has_head()) last.run(memory, out, images, threads, parallel_for, rest);
    }
  }

  std::vector<LayerRun<T>> parts_;  // all but the head, and the head
  int64_t images_of_head_ = std::numeric_limits<int64_t>::max();
};

}  // namespace fusedsep
