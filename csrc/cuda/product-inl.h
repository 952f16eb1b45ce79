// SPDX-License-Identifier: BSD-3-Clause
//
// The product of a block: rows of pixels in shared memory by rows of weights that are copied there chunk by chunk.
#pragma once

#include "mma.h"
#include "tiles.h"

namespace fusedsep::cuda {

// The sums of a thread, in the part of its warp. A thread has kOwn columns; own(j) and row(i) are places in the tile.
// Products of the tensor cores, or of the FMA units, which floats are multiplied with unless TF32 is allowed. Either is
// one chain of multiply-adds over k, in order, whatever the shape.
template <class S, typename T, bool kTensorCores>
struct Product;

template <class S, typename T>
struct Product<S, T, true> {
  static constexpr int kOwn = S::kWarpColumns / 4;
  int lane, first_row, first_column;
  float sums[S::kWarpPixels / 16][S::kWarpColumns / 8][4] = {};

  FUSEDSEP_DEVICE Product()
      : lane(int(threadIdx.x) % 32),
        first_row(int(threadIdx.x) / 32 / S::kColumnWarps * S::kWarpPixels),
        first_column(int(threadIdx.x) / 32 % S::kColumnWarps * S::kWarpColumns) {}

  FUSEDSEP_DEVICE void step(const unsigned char* rows, int row_pitch, const unsigned char* columns) {
    multiply_step<T>(rows + first_row * row_pitch, row_pitch, columns + first_column * kChunkPitch, kChunkPitch, lane,
                     sums);
  }
  FUSEDSEP_DEVICE int own(int j) const { return first_column + j / 2 * 8 + Fragment(lane).column_of(j); }
  // f(row, sums) for each row, with the sums of its columns own(0), own(1), ...
  template <class F>
  FUSEDSEP_DEVICE void each_row(const F& f) const {
#pragma unroll
    for (int m = 0; m < S::kWarpPixels / 16; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float row[kOwn];
#pragma unroll
        for (int j = 0; j < kOwn; ++j) row[j] = sums[m][j / 2][2 * half + j % 2];
        f(first_row + 16 * m + Fragment(lane).row_of(2 * half), row);
      }
    }
  }
};

// A warp is 8 threads along its pixels by 4 along its columns, and a thread's are as far apart: the addresses of a load
// are neighbouring rows then.
template <class S>
struct Product<S, float, false> {
  static constexpr int kOwn = S::kWarpColumns / 4, kRows = S::kWarpPixels / 8;
  int first_row, first_column;
  float sums[kRows][kOwn] = {};

  FUSEDSEP_DEVICE Product()
      : first_row(int(threadIdx.x) / 32 / S::kColumnWarps * S::kWarpPixels + int(threadIdx.x) % 32 / 4),
        first_column(int(threadIdx.x) / 32 % S::kColumnWarps * S::kWarpColumns + int(threadIdx.x) % 4) {}

  FUSEDSEP_DEVICE void step(const unsigned char* rows, int row_pitch, const unsigned char* columns) {
#pragma unroll
    for (int byte = 0; byte < kStepBytes; byte += 16) {
      Vector<float> column[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        column[j] = load(reinterpret_cast<const float*>(columns + own(j) * kChunkPitch + byte));
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Vector<float> row = load(reinterpret_cast<const float*>(rows + (first_row + 8 * i) * row_pitch + byte));
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
          for (int j = 0; j < kOwn; ++j) sums[i][j] = fmaf(row.values[k], column[j].values[k], sums[i][j]);
        }
      }
    }
  }
  FUSEDSEP_DEVICE int own(int j) const { return first_column + 4 * j; }
  template <class F>
  FUSEDSEP_DEVICE void each_row(const F& f) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float row[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) row[j] = sums[i][j];
      f(first_row + 8 * i, row);
    }
  }
};

// Rows of `length` bytes in memory, zero behind that and from row `count` on.
struct Rows2d {
  const unsigned char* memory;
  int64_t count, length;
};

// Chunk number `chunk` of kRows rows.
template <int kRows, int kThreads>
FUSEDSEP_DEVICE void copy_chunk(const Rows2d& from, int chunk, unsigned char* to) {
  constexpr int kVectors = kChunkBytes / 16;
  static_assert(kRows * kVectors % kThreads == 0 && kThreads % kVectors == 0);
  constexpr int kStep = kThreads / kVectors;  // rows
  const int first_row = int(threadIdx.x) / kVectors, vector = int(threadIdx.x) % kVectors * 16;
  const int64_t byte = int64_t(chunk) * kChunkBytes + vector;
  const unsigned char* source = from.memory + first_row * from.length + byte;
  const int64_t count = byte < from.length ? from.count : 0;
  to += first_row * kChunkPitch + vector;
#pragma unroll
  for (int row = 0; row < kRows; row += kStep) {
    const bool valid = first_row + row < count;
    copy_async(to + row * kChunkPitch, valid ? source : from.memory, valid);
    source += kStep * from.length;
  }
}

// The chunks of a product on their way through kStages places in shared memory: those of kColumns rows of weights and,
// unless h is in shared memory as a whole, of kPixels rows of it.
template <class S, bool kFused>
struct Pipeline {
  static constexpr int kStage = (S::kColumns + (kFused ? 0 : S::kPixels)) * kChunkPitch;
  Rows2d pixels, weights;
  unsigned char* stages;
  int chunks;

  FUSEDSEP_DEVICE void copy(int chunk, int place) const {
    unsigned char* const stage = stages + place * kStage;
    if (chunk < chunks) {
      copy_chunk<S::kColumns, S::kThreads>(weights, chunk, stage);
      if constexpr (!kFused) copy_chunk<S::kPixels, S::kThreads>(pixels, chunk, stage + S::kColumns * kChunkPitch);
    }
    end_group();
  }
  FUSEDSEP_DEVICE void start() const {
#pragma unroll
    for (int chunk = 0; chunk < kStages - 1; ++chunk) copy(chunk, chunk);
  }
  // product += h by weights, after start(). `rows` are those of h in shared memory, `row_pitch` bytes apart. Afterwards
  // all threads are done with the stages.
  template <class P>
  FUSEDSEP_DEVICE void run(const unsigned char* rows, int row_pitch, P& product) const {
    int place = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for_groups<kStages - 2>();
      __syncthreads();
      copy(chunk + kStages - 1, place == 0 ? kStages - 1 : place - 1);
      const unsigned char* const stage = stages + place * kStage;
      const unsigned char* const row = kFused ? rows + chunk * kChunkBytes : stage + S::kColumns * kChunkPitch;
#pragma unroll
      for (int byte = 0; byte < kChunkBytes; byte += kStepBytes) {
        product.step(row + byte, kFused ? row_pitch : kChunkPitch, stage + byte);
      }
      place = place == kStages - 1 ? 0 : place + 1;
    }
    wait_for_groups<0>();
    __syncthreads();
  }
};

// Writes a tile of a map that lies in shared memory, [pixel][column] in channels_last and [column][pixel] in NCHW, with
// rows of `pitch` elements.
template <class S, typename T>
FUSEDSEP_DEVICE void write_tile(const T* tile, int pitch, const SeparableParams<T>& p, bool vectors,
                                int64_t first_pixel, int64_t first_column) {
  const int rows = p.channels_last ? S::kPixels : S::kColumns, columns = p.channels_last ? S::kColumns : S::kPixels;
  const Pixels<T> pixels(p, first_pixel);
  const auto place = [&](int row, int column) -> T* {
    const PixelPlace pixel = pixels[p.channels_last ? row : column];
    const int64_t channel = first_column + (p.channels_last ? column : row);
    if (pixel.image >= p.batch || channel >= p.out_channels) return nullptr;
    return p.y + (p.channels_last ? (pixel.image * pixels.map + pixel.inside) * p.out_channels + channel
                                  : (pixel.image * p.out_channels + channel) * pixels.map + pixel.inside);
  };
  const int wide = vectors ? kWide<T> : 1;
  for (int i = int(threadIdx.x) * wide; i < rows * columns; i += S::kThreads * wide) {
    T* const to = place(i / columns, i % columns);
    const T* const from = tile + i / columns * pitch + i % columns;
    if (to == nullptr) continue;
    vectors ? store(to, load(from)) : void(*to = *from);
  }
}

}  // namespace fusedsep::cuda
