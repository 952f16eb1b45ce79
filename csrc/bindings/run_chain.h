// SPDX-License-Identifier: BSD-3-Clause
//
// Runs several layers in one call, from one buffer into another and back.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

#include "run.h"

namespace fusedsep {

// Maps of a few images stay in the L2 of the thread that works on them, beside weights that pass.
constexpr int64_t kImagesBytes = 1024 * 1024;
// A thread keeps a workspace up to this size from call to call.
constexpr size_t kKeptBytes = 64 * 1024 * 1024;

// Channels of a map from `begin` on. Map 0 is the input of a chain; -1: none.
struct Span {
  int64_t map = -1, begin = 0;
};

// A layer of a chain, with all but its maps and batch filled in, and where those are.
template <typename T>
struct Layer {
  SeparableParams<T> params;
  Span input, output, residual, gate;

  // The maps that it reads; -1 among them: none.
  std::array<int64_t, 3> reads() const { return {input.map, residual.map, gate.map}; }
};

// Where the maps between the layers lie in one workspace.
//
// A map that only the layer behind its own reads is dead after it: such maps lie at the two ends of one area in turns,
// which holds the largest two neighbours. What lives longer lies in a second area, at the first place that is free for
// as long as it is needed.
class MapPlan {
 public:
  // A map lives from the first layer that writes it to the last one that reads or writes it. The output of the chain
  // lies elsewhere.
  template <typename T>
  explicit MapPlan(const std::vector<Layer<T>>& layers) {
    for (size_t i = 0; i < layers.size(); ++i) {
      const SeparableParams<T>& params = layers[i].params;
      Map& written = map(layers[i].output.map);
      if (written.size == 0) {
        written.first = int64_t(i);
        written.size = (y_pitch_of(params) * params.out_height * params.out_width + 15) / 16 * 16;
      }
      written.last = int64_t(i);
      for (const int64_t read : layers[i].reads()) {
        if (read > 0) map(read).last = int64_t(i);
      }
    }
    map(layers.back().output.map).size = 0;

    std::vector<int64_t> by_layer(layers.size(), -1);  // the maps that are dead after the next layer
    for (size_t i = 0; i < maps_.size(); ++i) {
      if (maps_[i].size > 0 && !maps_[i].is_held()) by_layer[size_t(maps_[i].first)] = int64_t(i);
    }
    int64_t area = 0;
    const auto size_at = [&](size_t i) { return by_layer[i] < 0 ? 0 : maps_[size_t(by_layer[i])].size; };
    for (size_t i = 0; i < layers.size(); ++i) area = std::max(area, size_at(i) + (i > 0 ? size_at(i - 1) : 0));
    for (size_t i = 0; i < layers.size(); ++i) {
      if (by_layer[i] >= 0) maps_[size_t(by_layer[i])].offset = i % 2 == 0 ? 0 : area - size_at(i);
    }
    total_ = area;
    for (size_t i = 0; i < maps_.size(); ++i) {
      if (maps_[i].size > 0 && maps_[i].is_held()) place(i, area);
    }
  }

  int64_t total() const { return total_; }
  int64_t offset(int64_t map) const { return maps_[size_t(map)].offset; }

 private:
  struct Map {
    int64_t size = 0, first = 0, last = 0, offset = -1;

    bool is_held() const { return last > first + 1; }
  };

  Map& map(int64_t number) {
    if (maps_.size() <= size_t(number)) maps_.resize(size_t(number) + 1);
    return maps_[size_t(number)];
  }

  // At the first place from `area` on, past every map that is in the way.
  void place(size_t number, int64_t area) {
    Map& own = maps_[number];
    int64_t offset = area;
    for (size_t i = 0; i < maps_.size(); ++i) {
      const Map& other = maps_[i];
      const bool in_the_way = other.offset >= area && other.size > 0 && other.first <= own.last &&
                              own.first <= other.last && other.offset < offset + own.size &&
                              offset < other.offset + other.size;
      if (!in_the_way) continue;
      offset = other.offset + other.size;
      i = size_t(-1);  // from the first one again
    }
    own.offset = offset;
    total_ = std::max(total_, offset + own.size);
  }

  std::vector<Map> maps_;
  int64_t total_ = 0;
};

// Layers in an order in which each reads what those in front of it write. The last one writes the output, alone or
// with others.
template <typename T>
class LayerRun {
 public:
  LayerRun(const SeparableKernels<T>& kernels, std::vector<Layer<T>> layers, int64_t images_at_once)
      : kernels_(kernels), layers_(std::move(layers)), images_at_once_(images_at_once), maps_(layers_) {
    const SeparableParams<T>&first = layers_.front().params, &last = layers_.back().params;
    in_size_ = x_pitch_of(first) * first.height * first.width;
    out_size_ = y_pitch_of(last) * last.out_height * last.out_width;
  }

  // Elements of one image.
  int64_t in_size() const { return in_size_; }
  int64_t out_size() const { return out_size_; }

  // The maps of the images that are worked on at once, and the scratch of the layer that needs most.
  int64_t workspace_size(int64_t images, int64_t threads) const {
    const int64_t most = std::min(images, images_at_once_);
    int64_t scratch = 0;
    for (const Layer<T>& layer : layers_) {
      SeparableParams<T> params = layer.params;
      for (const int64_t batch : {most, images % most}) {
        if (batch == 0) continue;
        params.batch = batch;
        scratch = std::max(scratch, scratch_size(params, threads));
      }
    }
    return most * maps_.total() + scratch;
  }

  template <class ParallelFor>
  void run(const T* x, T* y, int64_t images, int64_t threads, const ParallelFor& parallel_for, T* memory) const {
    const int64_t most = std::min(images, images_at_once_);
    for (int64_t image = 0; image < images; image += most) {
      run_at_once(x + image * in_size_, y + image * out_size_, std::min(most, images - image), most, threads,
                  parallel_for, memory);
    }
  }

 private:
  int64_t scratch_size(const SeparableParams<T>& params, int64_t threads) const {
    switch (params.rows) {
      case Rows::kSum:
      case Rows::kInterleaved:
      case Rows::kMaxPool:
      case Rows::kUpsample:
        return 0;
      case Rows::kDepthwiseMap:
        return MapSplit<T>(kernels_, params, threads).size;
      default:
        return ScratchSizes<T>(kernels_, params, plan_for(kernels_, params, threads), threads).size;
    }
  }

  template <class ParallelFor>
  void run_at_once(const T* x, T* y, int64_t images, int64_t most, int64_t threads, const ParallelFor& parallel_for,
                   T* memory) const {
    const int64_t output = layers_.back().output.map;
    const auto written = [&](const Span& span) -> T* {
      return (span.map == output ? y : memory + most * maps_.offset(span.map)) + span.begin;
    };
    const auto read = [&](const Span& span) -> const T* {
      return span.map < 0 ? nullptr : span.map == 0 ? x + span.begin : written(span);
    };
    T* const scratch = memory + most * maps_.total();
    for (const Layer<T>& layer : layers_) {
      SeparableParams<T> params = layer.params;
      params.batch = images;
      params.x = read(layer.input);
      params.y = written(layer.output);
      params.residual = read(layer.residual);
      params.gate = read(layer.gate);
      switch (params.rows) {
        case Rows::kSum:
        case Rows::kInterleaved:
          run_combine(kernels_, params, threads, parallel_for);
          break;
        case Rows::kMaxPool:
          run_rows(kernels_.max_pool, params, threads, parallel_for);
          break;
        case Rows::kUpsample:
          run_rows(kernels_.upsample, params, threads, parallel_for);
          break;
        case Rows::kDepthwiseMap:
          run_depthwise_map(kernels_, params, threads, parallel_for, scratch);
          break;
        default:
          run_separable(kernels_, params, plan_for(kernels_, params, threads), threads, parallel_for, scratch);
      }
    }
  }

  const SeparableKernels<T>& kernels_;
  std::vector<Layer<T>> layers_;
  int64_t images_at_once_, in_size_, out_size_;
  MapPlan maps_;
};

template <typename T>
class ChainRunner {
 public:
  // Layers as of a LayerRun.
  ChainRunner(const SeparableKernels<T>& kernels, const std::vector<Layer<T>>& layers) {
    const size_t head = head_of(layers);
    int64_t most = 1;
    for (size_t i = 0; i < head; ++i) most = std::max(most, in_size(layers[i]) + out_size(layers[i]));
    parts_.emplace_back(kernels, std::vector<Layer<T>>(layers.begin(), layers.begin() + int64_t(head)),
                        images_of(most));
    if (head == layers.size()) return;
    images_of_head_ = images_of(in_size(layers[head]));
    std::vector<Layer<T>> last(layers.begin() + int64_t(head), layers.end());
    const int64_t before = last.front().input.map;  // what the head reads is its map 0
    for (Layer<T>& layer : last) {
      layer.input.map -= before;
      layer.output.map -= before;
    }
    parts_.emplace_back(kernels, std::move(last), images_of_head_);
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

  // Elements of one image that a layer reads, and that it writes.
  static int64_t in_size(const Layer<T>& layer) {
    const SeparableParams<T>& p = layer.params;
    return (reads_patches(p) ? p.in_channels / 9 : p.in_channels) * p.height * p.width;
  }
  static int64_t out_size(const Layer<T>& layer) {
    return layer.params.out_channels * layer.params.out_height * layer.params.out_width;
  }

  // The first layer of the products of means at the end, each of which reads what the one before it writes; their
  // number where there are none, or no others.
  static size_t head_of(const std::vector<Layer<T>>& layers) {
    for (size_t i = layers.size(); i-- > 1;) {
      const Layer<T>&layer = layers[i], &before = layers[i - 1];
      const bool reads_all_before = layer.input.map == before.output.map && layer.input.begin == before.output.begin &&
                                    layer.params.x_pitch == layer.params.in_channels &&
                                    layer.params.in_channels == before.params.out_channels;
      const bool is_alone = layer.params.y_pitch == layer.params.out_channels && layer.residual.map < 0;
      if (!reads_all_before || !is_alone || layer.gate.map >= 0) break;
      if (layer.params.rows == Rows::kMeans) return i;
      if (layer.params.rows != Rows::kPixels) break;
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
