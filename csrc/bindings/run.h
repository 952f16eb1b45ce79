// SPDX-License-Identifier: BSD-3-Clause
//
// Runs a planned call: tiles, threads and their scratch.
#pragma once

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "../kernels/isa.h"
#include "../kernels/plan.h"
#include "../kernels/separable.h"

namespace fusedsep {

// Written in front of the packed weights, so that weights packed for other kernels are refused and not misread.
struct PackedHeader {
  char magic[8];
  char isa[16];
  int64_t in_channels, out_channels;
  int32_t channels_last, element_size;
  char reserved[16];

  PackedHeader(const Isa& kernels, int64_t in_channels, int64_t out_channels, bool channels_last, int64_t element_size)
      : magic{'f', 'u', 's', 'e', 'd', 's', 'e', 'p'},
        isa{},
        in_channels(in_channels),
        out_channels(out_channels),
        channels_last(channels_last),
        element_size(int32_t(element_size)),
        reserved{} {
    std::strncpy(isa, kernels.name, sizeof(isa) - 1);
  }
  bool operator==(const PackedHeader& other) const { return std::memcmp(this, &other, sizeof(other)) == 0; }
};
static_assert(sizeof(PackedHeader) == 64, "the weights behind it stay aligned to 64 bytes");

// Memory that a calling thread keeps between calls: allocating it anew would fault its pages in every time.
class Workspace {
 public:
  // 64-byte aligned. Throws std::bad_alloc.
  void* get(size_t bytes) {
    if (bytes > size_) {
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_.reset();
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, rounded));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

template <typename T>
Plan plan_for(const SeparableKernels<T>& kernels, const SeparableParams<T>& params, int64_t threads) {
  return make_plan({params.batch, params.in_channels, params.out_channels, params.out_height * params.out_width,
                    int64_t(sizeof(T)), kernels.lanes, kernels.tile_rows, kernels.tile_columns, params.channels_last,
                    threads});
}

// `parallel_for(n, f)` calls f(begin, end) for ranges that cover [0, n), at most `threads` of them at a time.
template <typename T, class ParallelFor>
void run_separable(const SeparableKernels<T>& kernels, const SeparableParams<T>& params, const Plan& plan,
                   int64_t threads, const ParallelFor& parallel_for) {
  static thread_local Workspace workspace;
  const int64_t out_pixels = params.out_height * params.out_width, tiles = plan.tiles_per_image;
  const int64_t jobs = params.batch * tiles;
  if (jobs == 0) return;
  const int64_t units = (out_pixels + plan.unit - 1) / plan.unit;
  const int64_t most_pixels = (units + tiles - 1) / tiles * plan.unit;
  const int64_t scratch_size =
      (kernels.scratch_size(params.in_channels, most_pixels, params.channels_last) + 15) / 16 * 16;
  const auto tile_at = [&](int64_t job) {
    const Range pixels = tile_pixels(plan, out_pixels, job % tiles);
    return Tile{job / tiles, pixels.begin, pixels.end};
  };
  const int64_t panels = kernels.panel_count(params.out_channels, params.channels_last);

  if (plan.share_tiles) {
    T* scratch = static_cast<T*>(workspace.get(size_t(scratch_size) * sizeof(T)));
    const int64_t vectors = (params.in_channels + kernels.lanes - 1) / kernels.lanes;
    for (int64_t job = 0; job < jobs; ++job) {
      const Tile tile = tile_at(job);
      parallel_for(vectors, [&](int64_t begin, int64_t end) {
        const int64_t channel_end = end == vectors ? params.in_channels : end * kernels.lanes;
        kernels.depthwise(params, tile, begin * kernels.lanes, channel_end, scratch);
      });
      parallel_for(panels, [&](int64_t begin, int64_t end) { kernels.pointwise(params, tile, begin, end, scratch); });
    }
    return;
  }
  // One range of jobs, and one scratch, for each worker.
  const int64_t workers = jobs < threads ? jobs : threads;
  T* const scratch = static_cast<T*>(workspace.get(size_t(workers * scratch_size) * sizeof(T)));
  parallel_for(workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      T* own = scratch + worker * scratch_size;
      for (int64_t job = worker * jobs / workers; job < (worker + 1) * jobs / workers; ++job) {
        const Tile tile = tile_at(job);
        kernels.depthwise(params, tile, 0, params.in_channels, own);
        kernels.pointwise(params, tile, 0, panels, own);
      }
    }
  });
}

}  // namespace fusedsep
