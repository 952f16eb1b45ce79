// SPDX-License-Identifier: BSD-3-Clause
//
// How operands of the pointwise product lie in memory. The product is C[r, q] = bias + sum over k of R[r, k] * Q[k, q]
// with k the input channel, in two roles:
//
//   rows R     the broadcast operand: pixels of the tile (channels_last) or output channels (NCHW)
//   columns Q  the vector operand: output channels (channels_last) or pixels of the tile (NCHW)
//
// Rows are cut into balanced blocks of at most kTileRows. A block of m rows is stored [k / kLanes][m][kLanes]: the
// microkernel then needs one moving pointer and constant offsets, and the channels_last depthwise stage can store the
// vectors that it computes as they are. k is padded to a multiple of kLanes; the padding is never read by the product.
// Columns are cut into panels of kTileColumns, the last one only as wide as needed in whole vectors, stored [k][width].
#pragma once

#include "vec.h"

namespace fusedsep {
namespace {

// Register tiles. A microkernel holds kTileRows x kTileVectors accumulators, kTileVectors columns and one broadcast
// row:
//   AVX2       6 x 2 + 2 + 1 = 15 of 16 registers
//   AVX-512   14 x 2 + 2 + 1 = 31 of 32
//   AArch64    6 x 2 vectors of two 4-lane registers: 24 + 4 + 1 = 29 of 32
//   SSE2       4 x 1 vectors of two 4-lane registers:  8 + 2 + 1 = 11 of 16
template <class V>
struct Tiling {
  using T = typename V::T;
  static constexpr int kLanes = V::kLanes;
  static constexpr int64_t kVectorBytes = kLanes * sizeof(T);
#if defined(__x86_64__) && !defined(__AVX__)  // sixteen 16-byte registers
  static constexpr int kTileRows = kVectorBytes == 64 ? 14 : 4;
  static constexpr int kTileVectors = kVectorBytes == 64 ? 2 : 1;
#else
  static constexpr int kTileRows = kVectorBytes == 64 ? 14 : 6;
  static constexpr int kTileVectors = 2;
#endif
  static constexpr int64_t kTileColumns = kTileVectors * kLanes;
  static_assert(kVectorBytes == 32 || kVectorBytes == 64, "the register budget above is for these two");
  static_assert(kTileRows * kTileVectors + kTileVectors + 1 <= (kVectorBytes == 64 ? 32 : 16), "register budget");

  // One column panel of this depth stays in L1 (32 KiB on the smallest processors) beside the rows that stream past it.
  static constexpr int64_t kPanelBytes = 16 * 1024;
  // Sums longer than this are formed in parts. The rounding error of a sum grows with the length of its chains, and
  // libraries cut theirs for the same reason as we do, the cache: a chain of 1024 would be less exact than they are.
  static constexpr int64_t kChain = 128;
  static constexpr int64_t kDepth = min_of(kChain, kPanelBytes / (kTileColumns * int64_t(sizeof(T))) / kLanes * kLanes);
  static_assert(kDepth >= kLanes, "a panel must hold at least one vector of k");

  // Rows of this many bytes stay in L2 (256 KiB on the smallest processors) while the column panels pass.
  static constexpr int64_t kRowsBytes = 128 * 1024;
};

// Elements [next, end) of a map that somebody reads soon, to be brought to L2.
template <typename T>
struct Ahead {
  const T *next, *end;
};

struct Block {
  int64_t begin, size;
};

// Block `i` of `rows` rows in balanced blocks of at most `tile_rows`: sizes differ by one at most.
FUSEDSEP_INLINE int64_t block_count(int64_t rows, int64_t tile_rows) { return ceil_div(rows, tile_rows); }
FUSEDSEP_INLINE Block block_at(int64_t rows, int64_t blocks, int64_t i) {
  const int64_t begin = i * rows / blocks;
  return {begin, (i + 1) * rows / blocks - begin};
}

// The blocks one after the other, without a division for each.
struct BlockWalk {
  Block block;
  int64_t rows, blocks, small, larger, error;

  FUSEDSEP_INLINE BlockWalk(int64_t rows, int64_t tile_rows)
      : rows(rows), blocks(block_count(rows, tile_rows)), small(rows / blocks), larger(rows % blocks), error(larger) {
    block = {0, small + (error >= blocks)};
  }
  FUSEDSEP_INLINE bool more() const { return block.begin < rows; }
  FUSEDSEP_INLINE void next() {
    block.begin += block.size;
    if (error >= blocks) error -= blocks;
    error += larger;
    block.size = small + (error >= blocks);
  }
};

// Sections of the packed weights, in elements from its start. Sections begin at multiples of 64 bytes.
template <class V>
struct PackedLayout {
  int64_t depthwise, pointwise_bias, pointwise, size;

  PackedLayout(int64_t in_channels, int64_t out_channels, bool channels_last) {
    constexpr int64_t kLine = 64 / int64_t(sizeof(typename V::T));
    const int64_t padded_in = round_up(in_channels, V::kLanes), padded_out = round_up(out_channels, V::kLanes);
    depthwise = 0;
    pointwise_bias = round_up(depthwise + 10 * padded_in, kLine);  // a bias and nine taps a channel
    pointwise = round_up(pointwise_bias + padded_out, kLine);
    size = round_up(pointwise + (channels_last ? in_channels * padded_out : padded_in * out_channels), kLine);
  }
};

}  // namespace
}  // namespace fusedsep
