// SPDX-License-Identifier: BSD-3-Clause
//
// The weight gradient of a whole 3x3 convolution of few channels, for a tile: training.h's gW2[o,k]. A vector of gp has
// neighbouring output channels of a pixel; it is multiplied with the value of each tap there, broadcast from where it
// lies in the image, as in convolution-inl.h. Nothing is transposed, and the patches are never stored.
#pragma once

#include "convolution-inl.h"
#include "pointwise-backward-inl.h"

namespace fusedsep {
namespace {

// C[tap.weight][0..NV * kLanes) += sum over pixels m of x[m * step + tap.x] * gp[m][0..NV * kLanes) for M taps
//
// Registers are those of the pointwise microkernel: M x NV accumulators + NV vectors of gp + 1 broadcast.
template <class V, int M, int NV>
__attribute__((noinline)) void tap_gradient(const Tap* taps, const typename V::T* x, int64_t step, int64_t pixels,
                                            const typename V::T* gp, int64_t pitch, typename V::T* c) {
  constexpr int L = V::kLanes;
  V sum[M][NV];
  int64_t offset[M];
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) {
    offset[m] = taps[m].x;
    FUSEDSEP_UNROLL(4)
    for (int n = 0; n < NV; ++n) sum[m][n] = V::zero();
  }
  FUSEDSEP_UNROLL(1)
  for (const typename V::T* const end = gp + pixels * pitch; gp < end; gp += pitch, x += step) {
    V gradient[NV];
    FUSEDSEP_UNROLL(4)
    for (int n = 0; n < NV; ++n) gradient[n] = V::load(gp + n * L);
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) {
      const V value = V::broadcast(x[offset[m]]);
      FUSEDSEP_UNROLL(4)
      for (int n = 0; n < NV; ++n) sum[m][n] = V::fma(value, gradient[n], sum[m][n]);
    }
  }
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) {
    FUSEDSEP_UNROLL(4)
    for (int n = 0; n < NV; ++n) {
      typename V::T* const p = c + taps[m].weight * pitch + n * L;
      V::add(V::load(p), sum[m][n]).store(p);
    }
  }
}

template <class V>
struct TapGradients {
  using T = typename V::T;
  using Function = void (*)(const Tap*, const T*, int64_t, int64_t, const T*, int64_t, T*);
  static constexpr int kRows = Tiling<V>::kTileRows, kVectors = Tiling<V>::kTileVectors;
  // table[vectors - 1][taps - 1]
  Function table[kVectors][kRows];

  constexpr TapGradients() : table{} { fill<kRows, kVectors>(); }

  template <int M, int NV>
  constexpr void fill() {
    table[NV - 1][M - 1] = tap_gradient<V, M, NV>;
    if constexpr (M > 1) {
      fill<M - 1, NV>();
    } else if constexpr (NV > 1) {
      fill<kRows, NV - 1>();
    }
  }
};

// Sections of its scratch: gp of the tile, and the sums over the tile.
template <class V>
struct ConvolutionScratch {
  int64_t gp = 0, totals, size;

  ConvolutionScratch(int64_t in_channels, int64_t out_channels, int64_t pixels) {
    const int64_t pitch = round_up(out_channels, V::kLanes);
    totals = round_up(pixels * pitch, 16);
    size = totals + in_channels * pitch;
  }
};

template <class V>
int64_t convolution_scratch_size(int64_t in_channels, int64_t out_channels, int64_t pixels) {
  return ConvolutionScratch<V>(in_channels, out_channels, pixels).size;
}

template <class V>
void convolution_backward(const TrainingParams<typename V::T>& p, const Tile& tile, typename V::T* scratch,
                          double* sums) {
  using T = typename V::T;
  static constexpr TapGradients<V> kTapGradients;
  const ConvolutionScratch<V> layout(p.conv.in_channels, p.conv.out_channels, tile.end - tile.begin);
  const int64_t pitch = round_up(p.conv.out_channels, V::kLanes), padded = round_up(p.conv.out_channels, 16);
  T *gp = scratch + layout.gp, *totals = scratch + layout.totals;

  product_gradient<V, true>(p, tile, [&](const Strip& strip) { return in_map<V, true>(gp, pitch, strip); });
  for (int64_t i = 0; i < p.conv.in_channels * pitch; ++i) totals[i] = 0;
  for_each_patch_part<V>(p.conv, [&](const Patch<T>& patch) {
    for_each_run<V, false>(p.conv, patch, tile, [&](const Run<T>& run, const TapList<V>& taps, int64_t pixel) {
      const int64_t blocks = block_count(taps.count, Tiling<V>::kTileRows);
      for (int64_t q = 0; q < pitch; q += Tiling<V>::kTileColumns) {
        const int64_t vectors = min_of(int64_t(Tiling<V>::kTileVectors), (pitch - q) / V::kLanes);
        for (int64_t b = 0; b < blocks; ++b) {
          const Block block = block_at(taps.count, blocks, b);
          kTapGradients.table[vectors - 1][block.size - 1](taps.taps + block.begin, run.x, run.step, run.count,
                                                           gp + pixel * pitch + q, pitch, totals + q);
        }
      }
    });
  });
  for (int64_t k = 0; k < p.conv.in_channels; ++k) {
    for (int64_t o = 0; o < p.conv.out_channels; ++o) sums[k * padded + o] += double(totals[k * pitch + o]);
  }
}

}  // namespace
}  // namespace fusedsep
