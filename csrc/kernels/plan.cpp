// SPDX-License-Identifier: BSD-3-Clause
#include "plan.h"

#include <algorithm>

#include "separable.h"

namespace fusedsep {
namespace {

// The tile of h stays in L2 (256 KiB on the smallest processors) beside the weights that pass.
constexpr int64_t kTileBytes = 128 * 1024;
constexpr double kWeightBytesPerCycle = 16;
constexpr double kBarrierCycles = 4000;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Cycles for one thread to take `pixels` through `out_channels`, in whole register tiles.
double tile_cycles(const PlanRequest& r, int64_t pixels, int64_t out_channels) {
  const int64_t rows = r.channels_last ? pixels : out_channels, columns = r.channels_last ? out_channels : pixels;
  const double register_tiles = double(ceil_div(rows, r.tile_rows)) * double(ceil_div(columns, r.lanes));
  const double pointwise = register_tiles * double(r.tile_rows) * double(r.in_channels) / 2;
  const double weights = double(r.in_channels) * double(out_channels) * double(r.element_size) / kWeightBytesPerCycle;
  return std::max(pointwise, weights);
}

double depthwise_cycles(const PlanRequest& r, int64_t pixels, int64_t channels) {
  return 9.0 * double(pixels) * double(ceil_div(channels, r.lanes)) / 2;
}

}  // namespace

Plan make_plan(const PlanRequest& r) {
  const int64_t unit = r.channels_last ? 1 : r.lanes;
  if (r.batch == 0) return {1, unit, false};  // nothing to split, and the tile count below divides by the batch
  // Enough pixels to fill a register tile, however deep the reduction is.
  const int64_t least = r.channels_last ? r.tile_rows : r.tile_columns;
  const int64_t fitting = kTileBytes / (r.kept_channels * r.element_size);
  const int64_t most = std::min(std::max(fitting, least), kMaxTilePixels) / unit;  // units of a tile
  const int64_t units = ceil_div(r.out_pixels, unit);
  const int64_t fewest_tiles = ceil_div(units, most);

  // Whole tiles: take the tile count, up to one that gives every thread a few, whose slowest thread finishes first.
  Plan best{fewest_tiles, unit, false};
  double best_cycles = -1;
  const int64_t most_tiles =
      std::min(std::max(fewest_tiles, ceil_div(4 * r.threads, r.batch)), ceil_div(r.out_pixels, least));
  for (int64_t tiles = fewest_tiles; tiles <= std::max(most_tiles, fewest_tiles); ++tiles) {
    const int64_t pixels = ceil_div(units, tiles) * unit;
    const double cycles = double(ceil_div(r.batch * tiles, r.threads)) *
                          (tile_cycles(r, pixels, r.out_channels) + depthwise_cycles(r, pixels, r.in_channels));
    if (best_cycles < 0 || cycles < best_cycles) {
      best = {tiles, unit, false};
      best_cycles = cycles;
    }
  }

  // Shared tiles: two barriers a tile, but each thread reads only its part of the weights.
  if (r.threads > 1) {
    const int64_t pixels = ceil_div(units, fewest_tiles) * unit;
    const double cycles = double(r.batch * fewest_tiles) *
                          (tile_cycles(r, pixels, ceil_div(r.out_channels, r.threads)) +
                           depthwise_cycles(r, pixels, ceil_div(r.in_channels, r.threads)) + 2 * kBarrierCycles);
    if (cycles < best_cycles) best = {fewest_tiles, unit, true};
  }
  return best;
}

Range tile_pixels(const Plan& plan, int64_t out_pixels, int64_t i) {
  const int64_t units = ceil_div(out_pixels, plan.unit), tiles = plan.tiles_per_image;
  return {i * units / tiles * plan.unit, std::min((i + 1) * units / tiles * plan.unit, out_pixels)};
}

}  // namespace fusedsep
