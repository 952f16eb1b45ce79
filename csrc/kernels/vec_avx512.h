// SPDX-License-Identifier: BSD-3-Clause
//
// Sixteen floats or eight doubles in AVX-512F. Members as in vec_portable.h.
#pragma once

#include <immintrin.h>

#include "vec_avx2.h"

namespace fusedsep {
namespace {

// Bits [begin, end) of a lane mask; both may lie outside [0, lanes].
FUSEDSEP_INLINE uint32_t lane_bits(int64_t begin, int64_t end, int64_t lanes) {
  const int64_t first = max_of(0, min_of(begin, lanes)), last = max_of(0, min_of(end, lanes));
  return ((1u << last) - 1u) & ~((1u << first) - 1u);
}

struct Avx512F32 {
  using T = float;
  using Half = Avx2F32;
  static constexpr int kLanes = 16;
  __m512 v;

  using Mask = __mmask16;

  FUSEDSEP_INLINE static Avx512F32 zero() { return {_mm512_setzero_ps()}; }
  FUSEDSEP_INLINE static Avx512F32 broadcast(float value) { return {_mm512_set1_ps(value)}; }
  FUSEDSEP_INLINE static Avx512F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  FUSEDSEP_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }

  static constexpr bool kStreams = true;
  FUSEDSEP_INLINE void stream(float* p) const {
    inspect(p, lane_bits(0, kLanes, kLanes));
    _mm512_stream_ps(p, v);
  }
  FUSEDSEP_INLINE static void fence() { _mm_sfence(); }

  FUSEDSEP_INLINE static Mask mask(int64_t begin, int64_t end) { return (Mask)lane_bits(begin, end, kLanes); }
  FUSEDSEP_INLINE static Avx512F32 load(const float* p, Mask mask) {
    inspect(p, mask);
    return {_mm512_maskz_loadu_ps(mask, p)};
  }
  FUSEDSEP_INLINE void store(float* p, Mask mask) const {
    inspect(p, mask);
    _mm512_mask_storeu_ps(p, mask, v);
  }

  // The second vector starts at p + 15, so that nothing behind p[30] is read.
  FUSEDSEP_INLINE static Avx512F32 load_even(const float* p) { return interleave(load(p), load(p + 15)); }
  struct EvenMask {
    Mask low, high;
  };
  FUSEDSEP_INLINE static EvenMask even_mask(int64_t begin, int64_t end) {
    return {mask(begin, end), mask(begin - 15, end - 15)};
  }
  FUSEDSEP_INLINE static Avx512F32 load_even(const float* p, EvenMask mask) {
    return interleave(load(p, mask.low), load(p + 15, mask.high));
  }

  FUSEDSEP_INLINE static void zip(Avx512F32 a, Avx512F32 b, Avx512F32& low, Avx512F32& high) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    low.v = _mm512_permutex2var_ps(a.v, first, b.v);
    high.v = _mm512_permutex2var_ps(a.v, _mm512_add_epi32(first, _mm512_set1_epi32(8)), b.v);
  }

  FUSEDSEP_INLINE static Avx512F32 fma(Avx512F32 a, Avx512F32 b, Avx512F32 c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  FUSEDSEP_INLINE static Avx512F32 add(Avx512F32 a, Avx512F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx512F32 sub(Avx512F32 a, Avx512F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx512F32 mul(Avx512F32 a, Avx512F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx512F32 div(Avx512F32 a, Avx512F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx512F32 shift_to_exponent(Avx512F32 x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 23))};
  }
  // VMAXPS and VMINPS return their second operand when either is NaN.
  FUSEDSEP_INLINE static Avx512F32 max(Avx512F32 bound, Avx512F32 x) { return {_mm512_max_ps(bound.v, x.v)}; }
  FUSEDSEP_INLINE static Avx512F32 min(Avx512F32 bound, Avx512F32 x) { return {_mm512_min_ps(bound.v, x.v)}; }
  FUSEDSEP_INLINE static Avx512F32 select_above(Avx512F32 a, Avx512F32 b, Avx512F32 yes, Avx512F32 no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ), no.v, yes.v)};
  }

  FUSEDSEP_INLINE void accumulate(double* sums) const {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
    const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
    _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
    _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
  }
  // Pairs of rows, then fours, within the 128-bit quarters; then the quarters.
  FUSEDSEP_INLINE static void transpose(Avx512F32 rows[16]) {
    __m512 pair[16], quad[16];
    FUSEDSEP_UNROLL(8)
    for (int i = 0; i < 16; i += 2) {
      pair[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
      pair[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    FUSEDSEP_UNROLL(4)
    for (int i = 0; i < 16; i += 4) {
      quad[i] = _mm512_shuffle_ps(pair[i], pair[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
      quad[i + 1] = _mm512_shuffle_ps(pair[i], pair[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
      quad[i + 2] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
      quad[i + 3] = _mm512_shuffle_ps(pair[i + 1], pair[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
    }
    FUSEDSEP_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      const __m512 low_even = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0x88);
      const __m512 low_odd = _mm512_shuffle_f32x4(quad[i], quad[i + 4], 0xdd);
      const __m512 high_even = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0x88);
      const __m512 high_odd = _mm512_shuffle_f32x4(quad[i + 8], quad[i + 12], 0xdd);
      rows[i].v = _mm512_shuffle_f32x4(low_even, high_even, 0x88);
      rows[i + 4].v = _mm512_shuffle_f32x4(low_odd, high_odd, 0x88);
      rows[i + 8].v = _mm512_shuffle_f32x4(low_even, high_even, 0xdd);
      rows[i + 12].v = _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd);
    }
  }

 private:
  // Even lanes of `low`, then odd lanes of `high`.
  FUSEDSEP_INLINE static Avx512F32 interleave(Avx512F32 low, Avx512F32 high) {
    const __m512i lanes = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 17, 19, 21, 23, 25, 27, 29, 31);
    return {_mm512_permutex2var_ps(low.v, lanes, high.v)};
  }
};

struct Avx512F64 {
  using T = double;
  using Half = Avx2F64;
  static constexpr int kLanes = 8;
  __m512d v;

  using Mask = __mmask8;

  FUSEDSEP_INLINE static Avx512F64 zero() { return {_mm512_setzero_pd()}; }
  FUSEDSEP_INLINE static Avx512F64 broadcast(double value) { return {_mm512_set1_pd(value)}; }
  FUSEDSEP_INLINE static Avx512F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  FUSEDSEP_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }

  static constexpr bool kStreams = true;
  FUSEDSEP_INLINE void stream(double* p) const {
    inspect(p, lane_bits(0, kLanes, kLanes));
    _mm512_stream_pd(p, v);
  }
  FUSEDSEP_INLINE static void fence() { _mm_sfence(); }

  FUSEDSEP_INLINE static Mask mask(int64_t begin, int64_t end) { return (Mask)lane_bits(begin, end, kLanes); }
  FUSEDSEP_INLINE static Avx512F64 load(const double* p, Mask mask) {
    inspect(p, mask);
    return {_mm512_maskz_loadu_pd(mask, p)};
  }
  FUSEDSEP_INLINE void store(double* p, Mask mask) const {
    inspect(p, mask);
    _mm512_mask_storeu_pd(p, mask, v);
  }

  FUSEDSEP_INLINE static Avx512F64 load_even(const double* p) { return interleave(load(p), load(p + 7)); }
  struct EvenMask {
    Mask low, high;
  };
  FUSEDSEP_INLINE static EvenMask even_mask(int64_t begin, int64_t end) {
    return {mask(begin, end), mask(begin - 7, end - 7)};
  }
  FUSEDSEP_INLINE static Avx512F64 load_even(const double* p, EvenMask mask) {
    return interleave(load(p, mask.low), load(p + 7, mask.high));
  }

  FUSEDSEP_INLINE static void zip(Avx512F64 a, Avx512F64 b, Avx512F64& low, Avx512F64& high) {
    low.v = _mm512_permutex2var_pd(a.v, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), b.v);
    high.v = _mm512_permutex2var_pd(a.v, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), b.v);
  }

  FUSEDSEP_INLINE static Avx512F64 fma(Avx512F64 a, Avx512F64 b, Avx512F64 c) {
    return {_mm512_fmadd_pd(a.v, b.v, c.v)};
  }
  FUSEDSEP_INLINE static Avx512F64 add(Avx512F64 a, Avx512F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx512F64 sub(Avx512F64 a, Avx512F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx512F64 mul(Avx512F64 a, Avx512F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx512F64 div(Avx512F64 a, Avx512F64 b) { return {_mm512_div_pd(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx512F64 shift_to_exponent(Avx512F64 x) {
    return {_mm512_castsi512_pd(_mm512_slli_epi64(_mm512_castpd_si512(x.v), 52))};
  }
  FUSEDSEP_INLINE static Avx512F64 max(Avx512F64 bound, Avx512F64 x) { return {_mm512_max_pd(bound.v, x.v)}; }
  FUSEDSEP_INLINE static Avx512F64 min(Avx512F64 bound, Avx512F64 x) { return {_mm512_min_pd(bound.v, x.v)}; }
  FUSEDSEP_INLINE static Avx512F64 select_above(Avx512F64 a, Avx512F64 b, Avx512F64 yes, Avx512F64 no) {
    return {_mm512_mask_blend_pd(_mm512_cmp_pd_mask(a.v, b.v, _CMP_NLE_UQ), no.v, yes.v)};
  }

  FUSEDSEP_INLINE void accumulate(double* sums) const {
    _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), v));
  }
  FUSEDSEP_INLINE static void transpose(Avx512F64 rows[8]) {
    __m512d pair[8];
    FUSEDSEP_UNROLL(4)
    for (int i = 0; i < 8; i += 2) {
      pair[i] = _mm512_unpacklo_pd(rows[i].v, rows[i + 1].v);
      pair[i + 1] = _mm512_unpackhi_pd(rows[i].v, rows[i + 1].v);
    }
    FUSEDSEP_UNROLL(2)
    for (int i = 0; i < 2; ++i) {
      const __m512d low_even = _mm512_shuffle_f64x2(pair[i], pair[i + 2], 0x88);
      const __m512d low_odd = _mm512_shuffle_f64x2(pair[i], pair[i + 2], 0xdd);
      const __m512d high_even = _mm512_shuffle_f64x2(pair[i + 4], pair[i + 6], 0x88);
      const __m512d high_odd = _mm512_shuffle_f64x2(pair[i + 4], pair[i + 6], 0xdd);
      rows[i].v = _mm512_shuffle_f64x2(low_even, high_even, 0x88);
      rows[i + 2].v = _mm512_shuffle_f64x2(low_odd, high_odd, 0x88);
      rows[i + 4].v = _mm512_shuffle_f64x2(low_even, high_even, 0xdd);
      rows[i + 6].v = _mm512_shuffle_f64x2(low_odd, high_odd, 0xdd);
    }
  }

 private:
  FUSEDSEP_INLINE static Avx512F64 interleave(Avx512F64 low, Avx512F64 high) {
    return {_mm512_permutex2var_pd(low.v, _mm512_setr_epi64(0, 2, 4, 6, 9, 11, 13, 15), high.v)};
  }
};

}  // namespace
}  // namespace fusedsep
