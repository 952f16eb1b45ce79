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
  const T* prefetch;  // what is read later, to be brought to L2 meanwhile: `prefetch_step` elements for each k
  int64_t prefetch_step;
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
      FUSEDSEP_UNROLL(8)
      for (int n = 0; n < NV; ++n) {
        const typename V::T* p = c + m * c_stride + n * L;
        sum[m][n] = V::add(whole || n + 1 < NV ? V::load(p) : V::load(p, mask), sum[m][n]);
      }
    }
  }
  if (epilogue.last) {
    FUSEDSEP_UNROLL(16)
    for (int m = 0; m < M; ++m) {
      FUSEDSEP_UNROLL(8)
      for (int n = 0; n < NV; ++n) {
        const V bias = kBiasPerRow ? V::broadcast(epilogue.bias[m]) : V::load(epilogue.bias + n * L);
        sum[m][n] = V::add(bias, sum[m][n]);
      }
    }
    activate_tile<M * NV>(epilogue.activation, &sum[0][0]);
  }
  FUSEDSEP_UNROLL(16)
  for (int m = 0; m < M; ++m) {
    FUSEDSEP_UNROLL(8)
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
  const typename V::T* ahead = epilogue.prefetch;
  const int64_t ahead_step = epilogue.prefetch_step;
  while (depth > 0) {
    const int64_t steps = min_of(depth, L);
    FUSEDSEP_UNROLL(1)
    for (int64_t k = 0; k < steps; ++k) {
      V column[NV];
      FUSEDSEP_UNROLL(4)
      for (int n = 0; n < NV; ++n) {
        column[n] = V::load(columns + n * L);
        if (n * sizeof(V) % 64 == 0) __builtin_prefetch(ahead + n * L, 0, 2);
      }
      FUSEDSEP_UNROLL(16)
      for (int m = 0; m < M; ++m) {
        const V row = V::broadcast(rows[m * L]);
        FUSEDSEP_UNROLL(4)
        for (int n = 0; n < NV; ++n) sum[m][n] = V::fma(row, column[n], sum[m][n]);
      }
      rows += 1;
      columns += NV * L;
      ahead += ahead_step;
    }
    rows += (M - 1) * L;
    depth -= L;
  }

  finish<V, M, NV, kBiasPerRow>(sum, c, c_stride, column_count, epilogue);
}

// The same for a single row and P whole panels, `panel` elements apart. With those of one panel alone, each of its two
// sums would wait for the last addition, and memory for one stream of weights: no other row hides either.
template <class V, int P, bool kBiasPerRow>
__attribute__((noinline)) void row_microkernel(int64_t depth, const typename V::T* row, const typename V::T* columns,
                                               int64_t panel, typename V::T* c,
                                               const Epilogue<typename V::T>& epilogue) {
  constexpr int L = V::kLanes, kVectors = Tiling<V>::kTileVectors, NV = P * kVectors;
  V sum[1][NV];
  FUSEDSEP_UNROLL(8)
  for (int n = 0; n < NV; ++n) sum[0][n] = V::zero();
  FUSEDSEP_UNROLL(1)
  for (int64_t k = 0; k < depth; ++k, columns += kVectors * L) {
    const V value = V::broadcast(row[k]);
    FUSEDSEP_UNROLL(8)
    for (int n = 0; n < NV; ++n) {
      sum[0][n] = V::fma(value, V::load(columns + n / kVectors * panel + n % kVectors * L), sum[0][n]);
    }
  }
  finish<V, 1, NV, kBiasPerRow>(sum, c, 0, NV * L, epilogue);
}

template <class V, bool kBiasPerRow>
struct Microkernels {
  using T = typename V::T;
  using Function = void (*)(int64_t, const T*, const T*, T*, int64_t, int64_t, const Epilogue<T>&);
  static constexpr int kRows = Tiling<V>::kTileRows, kVectors = Tiling<V>::kTileVectors;

  using RowFunction = void (*)(int64_t, const T*, const T*, int64_t, T*, const Epilogue<T>&);
  static constexpr int kRowPanels = 4;

  Function table[kVectors][kRows];    // [vectors - 1][rows - 1]
  RowFunction row_table[kRowPanels];  // [panels - 1]

  constexpr Microkernels()
      : table{},
        row_table{row_microkernel<V, 1, kBiasPerRow>, row_microkernel<V, 2, kBiasPerRow>,
                  row_microkernel<V, 3, kBiasPerRow>, row_microkernel<V, 4, kBiasPerRow>} {
    fill<kRows, kVectors>();
  }

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

// What is to be brought to L2 next of product.ahead; null: nothing.
template <typename T>
Ahead<T>* coming_of(Product<T>& product) {
  for (Ahead<T>& ahead : product.ahead) {
    if (ahead.next < ahead.end) return &ahead;
  }
  return nullptr;
}

// The depth of one chain of sums (layout-inl.h): parts as equal as whole vectors allow.
template <class V>
int64_t depth_step_of(int64_t depth) {
  return round_up(ceil_div(depth, ceil_div(depth, Tiling<V>::kDepth)), V::kLanes);
}

// The whole panels of a product of a single row, which is the `row`-th; the column behind them.
template <class V, bool kBiasPerRow>
int64_t multiply_row(const Product<typename V::T>& product, int64_t row, const Microkernels<V, kBiasPerRow>& kernels) {
  using T = typename V::T;
  constexpr int64_t kColumns = Tiling<V>::kTileColumns;
  const int64_t depth_step = depth_step_of<V>(product.depth), panel = product.depth * kColumns;
  const T* const rows = product.rows + row * round_up(product.depth, V::kLanes);
  int64_t q = product.column_begin;
  while (const int64_t panels = min_of(kernels.kRowPanels, (product.column_end - q) / kColumns)) {
    T* const c = product.c + row * product.c_stride + q;
    for (int64_t k = 0; k < product.depth; k += depth_step) {
      const int64_t depth = min_of(depth_step, product.depth - k);
      const bool last = product.bias != nullptr && k + depth == product.depth;
      const T* const bias = last ? product.bias + (kBiasPerRow ? row : q) : nullptr;
      const Epilogue<T> epilogue{bias, k == 0 && !product.accumulate, last, product.activation, nullptr, 0};
      kernels.row_table[panels - 1](depth, rows + k, product.columns + q * product.depth + k * kColumns, panel, c,
                                    epilogue);
    }
    q += panels * kColumns;
  }
  return q;
}

// Calls during which the next panel comes to L2: in the first alone, its lines would be waited for all at once.
constexpr int64_t kPanelCalls = 4;

// Loops, outermost first: depth (a column panel fits L1), row blocks (they fit L2), column panels, row blocks within.
template <class V, bool kBiasPerRow>
void multiply(Product<typename V::T> product) {
  using T = typename V::T;
  using Tile = Tiling<V>;
  static constexpr Microkernels<V, kBiasPerRow> kMicrokernels;

  const int64_t padded_depth = round_up(product.depth, V::kLanes);
  const int64_t depth_step = depth_step_of<V>(product.depth);
  const int64_t blocks = block_count(product.row_count, Tile::kTileRows);
  const int64_t blocks_in_l2 =
      max_of(1, Tile::kRowsBytes / (depth_step * int64_t(sizeof(T)) * int64_t(Tile::kTileRows)));

  if (product.block_end - product.block_begin == 1) {
    const Block block = block_at(product.row_count, blocks, product.block_begin);
    if (block.size == 1) product.column_begin = multiply_row<V>(product, block.begin, kMicrokernels);
  }
  for (int64_t k = 0; k < product.depth; k += depth_step) {
    const int64_t depth = min_of(depth_step, product.depth - k);
    const bool last = product.bias != nullptr && k + depth == product.depth;
    Epilogue<T> epilogue{nullptr, k == 0 && !product.accumulate, last, product.activation, nullptr, 0};
    for (int64_t group = product.block_begin; group < product.block_end; group += blocks_in_l2) {
      const int64_t group_end = min_of(group + blocks_in_l2, product.block_end);
      for (int64_t q = product.column_begin; q < product.column_end; q += Tile::kTileColumns) {
        const int64_t column_count = min_of(Tile::kTileColumns, product.column_end - q);
        const int64_t vectors = ceil_div(column_count, V::kLanes);
        const T* panel = product.columns + q * product.depth + k * vectors * V::kLanes;
        const T* const next = next_panel<V>(product, q, k, depth_step);
        const int64_t calls = min_of(kPanelCalls, ceil_div(group_end - group, 2));
        for (int64_t b = group; b < group_end; ++b) {
          const Block block = block_at(product.row_count, blocks, b);
          const int64_t size = depth * vectors * V::kLanes, call = b - group;
          Ahead<T>* const coming = coming_of(product);
          if (call < calls) {
            epilogue.prefetch = next + call * size / calls;
            epilogue.prefetch_step = ceil_div(vectors * V::kLanes, calls);
          } else if (coming != nullptr) {
            epilogue.prefetch = coming->next;
            epilogue.prefetch_step = vectors * V::kLanes;
            coming->next += size;
          } else {
            epilogue.prefetch = panel;
            epilogue.prefetch_step = 0;
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
