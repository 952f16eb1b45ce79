// SPDX-License-Identifier: BSD-3-Clause
//
// The pointwise product over one tile: C = act(bias + R Q), operands as layout-inl.h stores them.
#pragma once

#include "activation-inl.h"
#include "layout-inl.h"
#include "separable.h"

namespace fusedsep {
namespace {

// What one call of the microkernel does besides multiplying.
template <typename T>
struct Epilogue {
  const T* bias;  // of the tile's first row or column
  bool first;     // C holds nothing yet; otherwise the sums so far
  bool last;      // add the bias and apply the activation
  Activation activation;
  const T* prefetch;  // what the calls that follow read as `columns`, to be brought to L2 meanwhile
};

// C[0..M, 0..columns) = act(bias + (C + sum)), what of it the epilogue asks for. Column tails go through a mask.
template <class V, int M, int NV, bool kBiasPerRow>
FUSEDSEP_INLINE void finish(V sum[M][NV], typename V::T* c, int64_t c_stride, int64_t column_count,
                            const Epilogue<typename V::T>& epilogue) {
  constexpr int L = V::kLanes;
  const bool whole = column_count == NV * L;
  const auto mask = V::mask(0, column_count - (NV - 1) * L);  // of the last vector
  if (!epilogue.first) {
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) {
      FUSEDSEP_UNROLL(4)
      for (int n = 0; n < NV; ++n) {
        const typename V::T* p = c + m * c_stride + n * L;
        sum[m][n] = V::add(whole || n + 1 < NV ? V::load(p) : V::load(p, mask), sum[m][n]);
      }
    }
  }
  if (epilogue.last) {
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) {
      FUSEDSEP_UNROLL(4)
      for (int n = 0; n < NV; ++n) {
        const V bias = kBiasPerRow ? V::broadcast(epilogue.bias[m]) : V::load(epilogue.bias + n * L);
        sum[m][n] = V::add(bias, sum[m][n]);
      }
    }
    switch (epilogue.activation) {
#define FUSEDSEP_ACTIVATE(name)                                                                              \
  case Activation::name:                                                                                     \
    FUSEDSEP_UNROLL(16) for (int m = 0; m < M; ++m) {                                                        \
      FUSEDSEP_UNROLL(4) for (int n = 0; n < NV; ++n) { sum[m][n] = activate(Activation::name, sum[m][n]); } \
    }                                                                                                        \
    break;
      FUSEDSEP_ACTIVATE(kRelu)
      FUSEDSEP_ACTIVATE(kRelu6)
      FUSEDSEP_ACTIVATE(kHardswish)
#undef FUSEDSEP_ACTIVATE
      default:  // none, or one of sigmoid-inl.h
        break;
    }
  }
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) {
    FUSEDSEP_UNROLL(4)
    for (int n = 0; n < NV; ++n) {
      typename V::T* p = c + m * c_stride + n * L;
      if (whole || n + 1 < NV) {
        sum[m][n].store(p);
      } else {
        sum[m][n].store(p, mask);
      }
    }
  }
}

// Asks for the lines of C before they are needed: they come while the product is formed, and `finish` stores to L1. Of
// the smaller tiles the queue of stores holds all.
template <class V, int M, int NV>
FUSEDSEP_INLINE void prefetch_for_writing(const typename V::T* c, int64_t c_stride) {
  if constexpr (sizeof(V) < 64) return;
  FUSEDSEP_UNROLL(1)  // or the addresses of all lines would be kept for `finish`, in memory
  for (int m = 0; m < M; ++m, c += c_stride) {
    FUSEDSEP_UNROLL(4)
    for (int n = 0; n < NV; ++n) {
      if (n * sizeof(V) % 64 == 0) __builtin_prefetch(c + n * V::kLanes, 1, 3);
    }
  }
}

// C[0..M, 0..columns) = act(bias + (C + R[0..M, 0..depth) Q[0..depth, 0..NV * kLanes)))
//
// Registers: M x NV accumulators + NV columns + 1 broadcast. For each k: NV + M loads and M x NV FMAs, so that full
// tiles are bound by the FMAs. Row tails are instantiations with a smaller M.
template <class V, int M, int NV, bool kBiasPerRow>
__attribute__((noinline)) void microkernel(int64_t depth, const typename V::T* rows, const typename V::T* columns,
                                           typename V::T* c, int64_t c_stride, int64_t column_count,
                                           const Epilogue<typename V::T>& epilogue) {
  constexpr int L = V::kLanes;
  V sum[M][NV];
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) {
    FUSEDSEP_UNROLL(4)
    for (int n = 0; n < NV; ++n) sum[m][n] = V::zero();
  }

  if (epilogue.first) prefetch_for_writing<V, M, NV>(c, c_stride);
  const int64_t ahead = epilogue.prefetch - columns;  // a narrower panel may end before this one: only a hint is lost
  while (depth > 0) {
    const int64_t steps = min_of(depth, L);
    FUSEDSEP_UNROLL(1)
    for (int64_t k = 0; k < steps; ++k) {
      V column[NV];
      FUSEDSEP_UNROLL(4)
      for (int n = 0; n < NV; ++n) {
        column[n] = V::load(columns + n * L);
        if (n * sizeof(V) % 64 == 0) __builtin_prefetch(columns + ahead + n * L, 0, 2);
      }
      FUSEDSEP_UNROLL(16)
      for (int m = 0; m < M; ++m) {
        const V row = V::broadcast(rows[m * L]);
        FUSEDSEP_UNROLL(4)
        for (int n = 0; n < NV; ++n) sum[m][n] = V::fma(row, column[n], sum[m][n]);
      }
      rows += 1;
      columns += NV * L;
    }
    rows += (M - 1) * L;
    depth -= L;
  }

  finish<V, M, NV, kBiasPerRow>(sum, c, c_stride, column_count, epilogue);
}

template <class V, bool kBiasPerRow>
struct Microkernels {
  using T = typename V::T;
  using Function = void (*)(int64_t, const T*, const T*, T*, int64_t, int64_t, const Epilogue<T>&);
  static constexpr int kRows = Tiling<V>::kTileRows, kVectors = Tiling<V>::kTileVectors;

  // table[vectors - 1][rows - 1]
  Function table[kVectors][kRows];

  constexpr Microkernels() : table{} { fill<kRows, kVectors>(); }

  template <int M, int NV>
  constexpr void fill() {
    table[NV - 1][M - 1] = microkernel<V, M, NV, kBiasPerRow>;
    if constexpr (M > 1) {
      fill<M - 1, NV>();
    } else if constexpr (NV > 1) {
      fill<kRows, NV - 1>();
    }
  }
};

// One product: rows in blocks [block_begin, block_end) of `rows`, columns [column_begin, column_end) of `columns`.
// column_begin is a multiple of kTileColumns, and so is column_end unless it is the last column.
template <typename T>
struct Product {
  const T* rows;      // origin of all row blocks
  int64_t row_count;  // that the blocks balance
  int64_t block_begin, block_end;
  const T* columns;  // origin of all column panels
  int64_t column_begin, column_end;
  int64_t depth;  // input channels
  T* c;           // element [0, 0]
  int64_t c_stride;
  const T* bias;  // of row 0 or column 0; null: neither bias nor activation
  Activation activation;
  bool accumulate;         // C += instead of C =
  Ahead<T> ahead[2] = {};  // brought to L2 meanwhile, so that memory and arithmetic overlap
};

// The panel that is read after that of columns `q` from depth `k` on; itself if it is the last one.
template <class V>
const typename V::T* next_panel(const Product<typename V::T>& product, int64_t q, int64_t k, int64_t depth_step) {
  q += Tiling<V>::kTileColumns;
  if (q >= product.column_end) {
    q = product.column_begin;
    k = k + depth_step < product.depth ? k + depth_step : 0;
  }
  const int64_t vectors = ceil_div(min_of(Tiling<V>::kTileColumns, product.column_end - q), V::kLanes);
  return product.columns + q * product.depth + k * vectors * V::kLanes;
}

// The depth of one chain of sums (layout-inl.h): parts as equal as whole vectors allow.
template <class V>
int64_t depth_step_of(int64_t depth) {
  return round_up(ceil_div(depth, ceil_div(depth, Tiling<V>::kDepth)), V::kLanes);
}

// Loops, outermost first: depth (a column panel fits L1), row blocks (they fit L2), column panels, row blocks within.
template <class V, bool kBiasPerRow>
void multiply(const Product<typename V::T>& product) {
  using T = typename V::T;
  using Tile = Tiling<V>;
  static constexpr Microkernels<V, kBiasPerRow> kMicrokernels;

  const int64_t padded_depth = round_up(product.depth, V::kLanes);
  const int64_t depth_step = depth_step_of<V>(product.depth);
  const int64_t blocks = block_count(product.row_count, Tile::kTileRows);
  const int64_t blocks_in_l2 =
      max_of(1, Tile::kRowsBytes / (depth_step * int64_t(sizeof(T)) * int64_t(Tile::kTileRows)));

  Ahead<T> coming[2] = {product.ahead[0], product.ahead[1]};
  for (int64_t k = 0; k < product.depth; k += depth_step) {
    const int64_t depth = min_of(depth_step, product.depth - k);
    const bool last = product.bias != nullptr && k + depth == product.depth;
    Epilogue<T> epilogue{nullptr, k == 0 && !product.accumulate, last, product.activation, nullptr};
    for (int64_t group = product.block_begin; group < product.block_end; group += blocks_in_l2) {
      const int64_t group_end = min_of(group + blocks_in_l2, product.block_end);
      for (int64_t q = product.column_begin; q < product.column_end; q += Tile::kTileColumns) {
        const int64_t column_count = min_of(Tile::kTileColumns, product.column_end - q);
        const int64_t vectors = ceil_div(column_count, V::kLanes);
        const T* panel = product.columns + q * product.depth + k * vectors * V::kLanes;
        const T* const next = next_panel<V>(product, q, k, depth_step);
        for (int64_t b = group; b < group_end; ++b) {
          const Block block = block_at(product.row_count, blocks, b);
          epilogue.prefetch = b == group ? next : panel;
          for (Ahead<T>& ahead : coming) {
            if (b == group || ahead.next >= ahead.end) continue;
            epilogue.prefetch = ahead.next;
            ahead.next += depth * vectors * V::kLanes;
            break;
          }
          if (last) epilogue.bias = product.bias + (kBiasPerRow ? block.begin : q);
          kMicrokernels.table[vectors - 1][block.size - 1](
              depth, product.rows + block.begin * padded_depth + k * block.size, panel,
              product.c + block.begin * product.c_stride + q, product.c_stride, column_count, epilogue);
        }
      }
    }
  }
}

}  // namespace
}  // namespace fusedsep
