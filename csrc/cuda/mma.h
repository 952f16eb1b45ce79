// SPDX-License-Identifier: BSD-3-Clause
//
// Products of a warp over operands in shared memory: 16 pixels x 8 columns a tile, kStepBytes of k at a time, with the
// numbers in the places that the tensor cores give them. Where those cannot (on the host, and before sm_80 for all but
// float16) plain multiply-adds compute the same sums in the same places.
#pragma once

#include <type_traits>

#include "element.h"

namespace fusedsep::cuda {

// 16 numbers of the 16-bit types, 8 floats; two rows of ldmatrix.
constexpr int kStepBytes = 32;

// Lane of a warp -> where sum i of its four lies in a tile of 16 x 8.
struct Fragment {
  int row, column;
  FUSEDSEP_DEVICE explicit Fragment(int lane) : row(lane / 4), column(lane % 4 * 2) {}
  FUSEDSEP_DEVICE int row_of(int i) const { return row + i / 2 * 8; }
  FUSEDSEP_DEVICE int column_of(int i) const { return column + i % 2; }
};

// float with the ten bits of a TF32 significand, rounded to nearest, ties away from zero.
FUSEDSEP_DEVICE float to_tf32(float value) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 800
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(value));
  return float_of(rounded);
#endif
#endif
  const uint32_t bits = bits_of(value);
  return (bits & 0x7f800000) == 0x7f800000 ? value : float_of((bits + 0x1000) & ~0x1fffu);
}

template <typename T>
FUSEDSEP_DEVICE float operand(T value) {
  return to_float(value);
}
template <>
FUSEDSEP_DEVICE float operand(float value) {
  return to_tf32(value);
}

template <typename T, int kRows, int kColumns>
FUSEDSEP_DEVICE void multiply_plainly(const unsigned char* a, int a_pitch, const unsigned char* b, int b_pitch,
                                      int lane, float (&sums)[kRows][kColumns][4]) {
  const Fragment fragment(lane);
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < kColumns; ++n) {
      for (int i = 0; i < 4; ++i) {
        const T* row = reinterpret_cast<const T*>(a + (16 * m + fragment.row_of(i)) * a_pitch);
        const T* column = reinterpret_cast<const T*>(b + (8 * n + fragment.column_of(i)) * b_pitch);
        for (int k = 0; k < kStepBytes / int(sizeof(T)); ++k) {
          sums[m][n][i] = fmaf(operand(row[k]), operand(column[k]), sums[m][n][i]);
        }
      }
    }
  }
}

#ifdef __CUDACC__

// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l % 8 of matrix l / 8.
FUSEDSEP_DEVICE void load_matrices(const unsigned char* row, uint32_t (&registers)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(unsigned(__cvta_generic_to_shared(row))));
}

FUSEDSEP_DEVICE void mma(float16, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const uint32_t b[2] = {b0, b1};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}
#if __CUDA_ARCH__ >= 800
FUSEDSEP_DEVICE void mma(bfloat16, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
FUSEDSEP_DEVICE void mma(float, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

#endif

// sums[m][n] += product of kRows tiles of 16 pixels, a row each from `a` on, and kColumns (even) tiles of 8 columns
// from `b` on; pitches in bytes. Floats are rounded to TF32.
template <typename T, int kRows, int kColumns>
FUSEDSEP_DEVICE void multiply_step(const unsigned char* a, int a_pitch, const unsigned char* b, int b_pitch, int lane,
                                   float (&sums)[kRows][kColumns][4]) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 800
  constexpr bool kHasMma = true;
#else
  constexpr bool kHasMma = std::is_same_v<T, float16>;
#endif
  if constexpr (kHasMma) {
    uint32_t rows[kRows][4], columns[kColumns / 2][4];
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      load_matrices(a + (16 * m + lane % 16) * a_pitch + lane / 16 * 16, rows[m]);
    }
#pragma unroll
    for (int n = 0; n < kColumns / 2; ++n) {
      load_matrices(b + (16 * n + lane / 16 * 8 + lane % 8) * b_pitch + lane / 8 % 2 * 16, columns[n]);
    }
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int m = 0; m < kRows; ++m) rows[m][i] = bits_of(to_tf32(float_of(rows[m][i])));
#pragma unroll
        for (int n = 0; n < kColumns / 2; ++n) columns[n][i] = bits_of(to_tf32(float_of(columns[n][i])));
      }
    }
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        mma(T(), sums[m][n], rows[m], columns[n / 2][n % 2 * 2], columns[n / 2][n % 2 * 2 + 1]);
      }
    }
    return;
  }
#endif
  multiply_plainly<T>(a, a_pitch, b, b_pitch, lane, sums);
}

}  // namespace fusedsep::cuda
