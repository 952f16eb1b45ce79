// SPDX-License-Identifier: BSD-3-Clause
//
// How one call is cut into tiles of output pixels and spread over threads.
#pragma once

#include <cstdint>

namespace fusedsep {

struct PlanRequest {
  int64_t batch, in_channels, out_channels, out_pixels;
  int64_t kept_channels;  // elements that a pixel of a tile keeps in L2
  int64_t element_size;
  int64_t lanes, tile_rows, tile_columns;
  bool channels_last;
  int64_t threads;
};

struct Plan {
  int64_t tiles_per_image;  // of all images together in channels_last, where they follow on each other
  // Tiles hold whole units of pixels, the image's last tile what is left: lanes of a vector (NCHW) or single pixels.
  int64_t unit;
  // false: threads take whole tiles, with all channels. true: tile after tile, threads share the channels of each.
  bool share_tiles;
};

// The plan of least estimated time. Results do not depend on it.
//
// A core is taken to do 2 * lanes multiply-adds a cycle and to read packed weights, which it cannot keep in its own
// caches, at 16 bytes a cycle; the slower of the two bounds a tile. Meeting at a barrier costs 4000 cycles.
Plan make_plan(const PlanRequest& request);

struct Range {
  int64_t begin, end;
};

// Pixels of tile `i` of an image; never empty while tiles_per_image is at most ceil(out_pixels / unit).
Range tile_pixels(const Plan& plan, int64_t out_pixels, int64_t i);

}  // namespace fusedsep
