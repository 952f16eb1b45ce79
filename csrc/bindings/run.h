// SPDX-License-Identifier: BSD-3-Clause
//
// Runs a planned call: tiles, threads and their scratch.
#pragma once

#include <algorithm>
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
  int64_t kernel;
  char reserved[8];

  // `out_channels` 0: of a depthwise convolution alone.
  PackedHeader(const Isa& kernels, int64_t in_channels, int64_t out_channels, bool channels_last, int64_t element_size,
               int64_t kernel = 3)
      : magic{'f', 'u', 's', 'e', 'd', 's', 'e', 'p'},
        isa{},
        in_channels(in_channels),
        out_channels(out_channels),
        channels_last(channels_last),
        element_size(int32_t(element_size)),
        kernel(kernel),
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
  void release() {
    memory_.reset();
    size_ = 0;
  }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

// The maps that are cut into tiles: in channels_last the pixels of all images follow on each other, as those of one.
struct TiledMaps {
  int64_t count, pixels;

  template <typename T>
  explicit TiledMaps(const SeparableParams<T>& p)
      : count(p.channels_last && p.batch > 0 ? 1 : p.batch),
        pixels(p.out_height * p.out_width * (p.channels_last && p.batch > 0 ? p.batch : 1)) {}
};

template <typename T>
bool reads_patches(const SeparableParams<T>& p) {
  return p.rows == Rows::kPatches || p.rows == Rows::kPatchesOfNchw;
}

// Numbers that a pixel of a tile keeps in L2 while the weights pass: of h, or of x where patches are read in place.
template <typename T>
int64_t kept_channels(const SeparableParams<T>& p) {
  return reads_patches(p) ? p.in_channels / 9 * p.stride * p.stride : p.in_channels;
}

template <typename T>
Plan plan_for(const SeparableKernels<T>& kernels, const SeparableParams<T>& params, int64_t threads) {
  const TiledMaps maps(params);
  return make_plan({maps.count, params.in_channels, params.out_channels, maps.pixels, kept_channels(params),
                    int64_t(sizeof(T)), kernels.lanes, kernels.tile_rows, kernels.tile_columns, params.channels_last,
                    threads});
}

// How much scratch the jobs of a plan need.
template <typename T>
struct ScratchSizes {
  int64_t jobs, workers;
  int64_t of_worker, size;  // elements

  ScratchSizes(const SeparableKernels<T>& kernels, const SeparableParams<T>& params, const Plan& plan,
               int64_t threads) {
    const TiledMaps maps(params);
    const int64_t tiles = plan.tiles_per_image, units = (maps.pixels + plan.unit - 1) / plan.unit;
    jobs = maps.count * tiles;
    workers = plan.share_tiles ? 1 : std::min(jobs, threads);
    const int64_t pixels = (units + tiles - 1) / tiles * plan.unit;
    of_worker = reads_patches(params) ? 0 : kernels.scratch_size(params.in_channels, pixels, params.channels_last);
    of_worker = (of_worker + 15) / 16 * 16;
    size = workers * of_worker;
  }
};

// `parallel_for(n, f)` calls f(begin, end) for ranges that cover [0, n), at most `threads` of them at a time.
template <typename T, class ParallelFor>
void run_separable(const SeparableKernels<T>& kernels, const SeparableParams<T>& params, const Plan& plan,
                   int64_t threads, const ParallelFor& parallel_for, T* scratch) {
  const TiledMaps maps(params);
  const int64_t tiles = plan.tiles_per_image;
  const ScratchSizes<T> sizes(kernels, params, plan, threads);
  const auto tile_at = [&](int64_t job) {
    const Range pixels = tile_pixels(plan, maps.pixels, job % tiles);
    return Tile{job / tiles, pixels.begin, pixels.end};
  };
  const int64_t panels = kernels.panel_count(params.out_channels, params.channels_last);

  if (plan.share_tiles) {
    const int64_t vectors = (params.in_channels + kernels.lanes - 1) / kernels.lanes;
    for (int64_t job = 0; job < sizes.jobs; ++job) {
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
  parallel_for(sizes.workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      T* own = scratch + worker * sizes.of_worker;
      for (int64_t job = worker * sizes.jobs / sizes.workers; job < (worker + 1) * sizes.jobs / sizes.workers; ++job) {
        const Tile tile = tile_at(job);
        kernels.depthwise(params, tile, 0, params.in_channels, own);
        kernels.pointwise(params, tile, 0, panels, own);
      }
    }
  });
}

// How a depthwise convolution alone is split: lines of channels, and rows where those do not give every thread a few.
template <typename T>
struct MapSplit {
  int64_t lines, rows, parts, jobs;
  int64_t workers, of_worker, size;  // elements of scratch

  MapSplit(const SeparableKernels<T>& kernels, const SeparableParams<T>& params, int64_t threads)
      : lines((params.in_channels + kernels.line_channels - 1) / kernels.line_channels),
        rows(params.batch * params.out_height),
        parts(threads == 1 ? 1 : std::max(int64_t(1), std::min(rows, 2 * threads / lines))),
        jobs(lines * parts),
        workers(std::min(jobs, threads)),
        of_worker((kernels.depthwise_map_scratch_size(params) + 15) / 16 * 16),
        size(workers * of_worker) {}
};

template <typename T, class ParallelFor>
void run_depthwise_map(const SeparableKernels<T>& kernels, const SeparableParams<T>& params, int64_t threads,
                       const ParallelFor& parallel_for, T* scratch) {
  const MapSplit<T> split(kernels, params, threads);
  parallel_for(split.workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      const int64_t job_end = (worker + 1) * split.jobs / split.workers;
      for (int64_t job = worker * split.jobs / split.workers; job < job_end; ++job) {
        const int64_t channel = job / split.parts * kernels.line_channels, part = job % split.parts;
        kernels.depthwise_map(params, part * split.rows / split.parts, (part + 1) * split.rows / split.parts, channel,
                              std::min(channel + kernels.line_channels, params.in_channels),
                              scratch + worker * split.of_worker);
      }
    }
  });
}

// What is worth another thread where two maps become one.
constexpr int64_t kCombinedElements = 4096;

template <typename T, class ParallelFor>
void run_combine(const SeparableKernels<T>& kernels, const SeparableParams<T>& params, int64_t threads,
                 const ParallelFor& parallel_for) {
  const int64_t pixels = params.batch * params.out_height * params.out_width;
  const int64_t workers = std::max(int64_t(1), std::min(threads, pixels * params.out_channels / kCombinedElements));
  parallel_for(workers, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      kernels.combine(params, worker * pixels / workers, (worker + 1) * pixels / workers);
    }
  });
}

// A kernel that works on output rows: `max_pool` or `upsample`.
template <typename T, class ParallelFor>
void run_rows(void (*kernel)(const SeparableParams<T>&, int64_t, int64_t), const SeparableParams<T>& params,
              int64_t threads, const ParallelFor& parallel_for) {
  const int64_t rows = params.batch * params.out_height, workers = std::min(threads, rows);
  parallel_for(workers,
               [&](int64_t begin, int64_t end) { kernel(params, begin * rows / workers, end * rows / workers); });
}

// A separable convolution with scratch that the calling thread keeps.
template <typename T, class ParallelFor>
void run_separable(const SeparableKernels<T>& kernels, const SeparableParams<T>& params, const Plan& plan,
                   int64_t threads, const ParallelFor& parallel_for) {
  static thread_local Workspace workspace;
  const int64_t size = ScratchSizes<T>(kernels, params, plan, threads).size;
  if (size == 0) return;
  run_separable(kernels, params, plan, threads, parallel_for, static_cast<T*>(workspace.get(size_t(size) * sizeof(T))));
}

}  // namespace fusedsep
