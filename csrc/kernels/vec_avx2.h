// SPDX-License-Identifier: BSD-3-Clause
//
// Eight floats or four doubles in AVX2 with FMA. Members as in vec_portable.h.
#pragma once

#include <immintrin.h>

#include "vec.h"

namespace fusedsep {
namespace {

// Eight set words, then eight clear ones on either side: a window on it is a mask of any lane range.
alignas(64) constexpr int32_t kMaskWords[24] = {0,  0,  0,  0,  0, 0, 0, 0, -1, -1, -1, -1,
                                                -1, -1, -1, -1, 0, 0, 0, 0, 0,  0,  0,  0};
alignas(64) constexpr int64_t kMaskQuads[12] = {0, 0, 0, 0, -1, -1, -1, -1, 0, 0, 0, 0};

FUSEDSEP_INLINE int64_t clamp_lane(int64_t lane, int64_t lanes) { return max_of(0, min_of(lane, lanes)); }

struct Avx2F32 {
  using T = float;
  using Half = Avx2F32;
  static constexpr int kLanes = 8;
  __m256 v;

  using Mask = __m256i;

  FUSEDSEP_INLINE static Avx2F32 zero() { return {_mm256_setzero_ps()}; }
  FUSEDSEP_INLINE static Avx2F32 broadcast(float value) { return {_mm256_set1_ps(value)}; }
  FUSEDSEP_INLINE static Avx2F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  FUSEDSEP_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }

  static constexpr bool kStreams = true;
  FUSEDSEP_INLINE void stream(float* p) const {
    inspect(p, (1u << kLanes) - 1u);
    _mm256_stream_ps(p, v);
  }
  FUSEDSEP_INLINE static void fence() { _mm_sfence(); }

  FUSEDSEP_INLINE static Mask mask(int64_t begin, int64_t end) {
    const int32_t* words = kMaskWords + 8;
    const __m256i from_begin = _mm256_loadu_si256((const __m256i*)(words - clamp_lane(begin, kLanes)));
    const __m256i until_end = _mm256_loadu_si256((const __m256i*)(words + kLanes - clamp_lane(end, kLanes)));
    return _mm256_and_si256(from_begin, until_end);
  }
  FUSEDSEP_INLINE static Avx2F32 load(const float* p, Mask mask) {
    inspect(p, lanes_of(mask));
    return {_mm256_maskload_ps(p, mask)};
  }
  FUSEDSEP_INLINE void store(float* p, Mask mask) const {
    inspect(p, lanes_of(mask));
    _mm256_maskstore_ps(p, mask, v);
  }

  // The second vector starts at p + 7, so that nothing behind p[14] is read.
  FUSEDSEP_INLINE static Avx2F32 load_even(const float* p) { return interleave(load(p), load(p + 7)); }
  struct EvenMask {
    Mask low, high;
  };
  FUSEDSEP_INLINE static EvenMask even_mask(int64_t begin, int64_t end) {
    return {mask(begin, end), mask(begin - 7, end - 7)};
  }
  FUSEDSEP_INLINE static Avx2F32 load_even(const float* p, EvenMask mask) {
    return interleave(load(p, mask.low), load(p + 7, mask.high));
  }

  FUSEDSEP_INLINE static void zip(Avx2F32 a, Avx2F32 b, Avx2F32& low, Avx2F32& high) {
    const __m256 even = _mm256_unpacklo_ps(a.v, b.v), odd = _mm256_unpackhi_ps(a.v, b.v);  // within 128-bit halves
    low.v = _mm256_permute2f128_ps(even, odd, 0x20);
    high.v = _mm256_permute2f128_ps(even, odd, 0x31);
  }

  FUSEDSEP_INLINE static Avx2F32 fma(Avx2F32 a, Avx2F32 b, Avx2F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  FUSEDSEP_INLINE static Avx2F32 add(Avx2F32 a, Avx2F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx2F32 sub(Avx2F32 a, Avx2F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx2F32 mul(Avx2F32 a, Avx2F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx2F32 div(Avx2F32 a, Avx2F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx2F32 shift_to_exponent(Avx2F32 x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 23))};
  }
  // VMAXPS and VMINPS return their second operand when either is NaN.
  FUSEDSEP_INLINE static Avx2F32 max(Avx2F32 bound, Avx2F32 x) { return {_mm256_max_ps(bound.v, x.v)}; }
  FUSEDSEP_INLINE static Avx2F32 min(Avx2F32 bound, Avx2F32 x) { return {_mm256_min_ps(bound.v, x.v)}; }
  FUSEDSEP_INLINE static Avx2F32 select_above(Avx2F32 a, Avx2F32 b, Avx2F32 yes, Avx2F32 no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_NLE_UQ))};
  }

  FUSEDSEP_INLINE void accumulate(double* sums) const {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(v)), high = _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), low));
    _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), high));
  }
  FUSEDSEP_INLINE static void transpose(Avx2F32 rows[8]) {
    __m256 pair[8], quad[8];
    FUSEDSEP_UNROLL(4)
    for (int i = 0; i < 8; i += 2) {
      pair[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
      pair[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
    }
    FUSEDSEP_UNROLL(2)
    for (int i = 0; i < 8; i += 4) {
      quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], _MM_SHUFFLE(1, 0, 1, 0));
      quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], _MM_SHUFFLE(3, 2, 3, 2));
      quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], _MM_SHUFFLE(1, 0, 1, 0));
      quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], _MM_SHUFFLE(3, 2, 3, 2));
    }
    FUSEDSEP_UNROLL(4)
    for (int i = 0; i < 4; ++i) {
      rows[i].v = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x20);
      rows[i + 4].v = _mm256_permute2f128_ps(quad[i], quad[i + 4], 0x31);
    }
  }

 private:
  FUSEDSEP_INLINE static uint32_t lanes_of(Mask mask) {
    return uint32_t(_mm256_movemask_ps(_mm256_castsi256_ps(mask)));
  }
  // Even lanes of `low`, then odd lanes of `high`.
  FUSEDSEP_INLINE static Avx2F32 interleave(Avx2F32 low, Avx2F32 high) {
    const __m256 mixed = _mm256_shuffle_ps(low.v, high.v, _MM_SHUFFLE(3, 1, 2, 0));
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), _MM_SHUFFLE(3, 1, 2, 0)))};
  }
};

struct Avx2F64 {
  using T = double;
  using Half = Avx2F64;
  static constexpr int kLanes = 4;
  __m256d v;

  using Mask = __m256i;

  FUSEDSEP_INLINE static Avx2F64 zero() { return {_mm256_setzero_pd()}; }
  FUSEDSEP_INLINE static Avx2F64 broadcast(double value) { return {_mm256_set1_pd(value)}; }
  FUSEDSEP_INLINE static Avx2F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  FUSEDSEP_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }

  static constexpr bool kStreams = true;
  FUSEDSEP_INLINE void stream(double* p) const {
    inspect(p, (1u << kLanes) - 1u);
    _mm256_stream_pd(p, v);
  }
  FUSEDSEP_INLINE static void fence() { _mm_sfence(); }

  FUSEDSEP_INLINE static Mask mask(int64_t begin, int64_t end) {
    const int64_t* quads = kMaskQuads + 4;
    const __m256i from_begin = _mm256_loadu_si256((const __m256i*)(quads - clamp_lane(begin, kLanes)));
    const __m256i until_end = _mm256_loadu_si256((const __m256i*)(quads + kLanes - clamp_lane(end, kLanes)));
    return _mm256_and_si256(from_begin, until_end);
  }
  FUSEDSEP_INLINE static Avx2F64 load(const double* p, Mask mask) {
    inspect(p, lanes_of(mask));
    return {_mm256_maskload_pd(p, mask)};
  }
  FUSEDSEP_INLINE void store(double* p, Mask mask) const {
    inspect(p, lanes_of(mask));
    _mm256_maskstore_pd(p, mask, v);
  }

  FUSEDSEP_INLINE static Avx2F64 load_even(const double* p) { return interleave(load(p), load(p + 3)); }
  struct EvenMask {
    Mask low, high;
  };
  FUSEDSEP_INLINE static EvenMask even_mask(int64_t begin, int64_t end) {
    return {mask(begin, end), mask(begin - 3, end - 3)};
  }
  FUSEDSEP_INLINE static Avx2F64 load_even(const double* p, EvenMask mask) {
    return interleave(load(p, mask.low), load(p + 3, mask.high));
  }

  FUSEDSEP_INLINE static void zip(Avx2F64 a, Avx2F64 b, Avx2F64& low, Avx2F64& high) {
    const __m256d even = _mm256_unpacklo_pd(a.v, b.v), odd = _mm256_unpackhi_pd(a.v, b.v);
    low.v = _mm256_permute2f128_pd(even, odd, 0x20);
    high.v = _mm256_permute2f128_pd(even, odd, 0x31);
  }

  FUSEDSEP_INLINE static Avx2F64 fma(Avx2F64 a, Avx2F64 b, Avx2F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  FUSEDSEP_INLINE static Avx2F64 add(Avx2F64 a, Avx2F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx2F64 sub(Avx2F64 a, Avx2F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx2F64 mul(Avx2F64 a, Avx2F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx2F64 div(Avx2F64 a, Avx2F64 b) { return {_mm256_div_pd(a.v, b.v)}; }
  FUSEDSEP_INLINE static Avx2F64 shift_to_exponent(Avx2F64 x) {
    return {_mm256_castsi256_pd(_mm256_slli_epi64(_mm256_castpd_si256(x.v), 52))};
  }
  FUSEDSEP_INLINE static Avx2F64 max(Avx2F64 bound, Avx2F64 x) { return {_mm256_max_pd(bound.v, x.v)}; }
  FUSEDSEP_INLINE static Avx2F64 min(Avx2F64 bound, Avx2F64 x) { return {_mm256_min_pd(bound.v, x.v)}; }
  FUSEDSEP_INLINE static Avx2F64 select_above(Avx2F64 a, Avx2F64 b, Avx2F64 yes, Avx2F64 no) {
    return {_mm256_blendv_pd(no.v, yes.v, _mm256_cmp_pd(a.v, b.v, _CMP_NLE_UQ))};
  }

  FUSEDSEP_INLINE void accumulate(double* sums) const {
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), v));
  }
  FUSEDSEP_INLINE static void transpose(Avx2F64 rows[4]) {
    const __m256d a = _mm256_unpacklo_pd(rows[0].v, rows[1].v), b = _mm256_unpackhi_pd(rows[0].v, rows[1].v);
    const __m256d c = _mm256_unpacklo_pd(rows[2].v, rows[3].v), d = _mm256_unpackhi_pd(rows[2].v, rows[3].v);
    rows[0].v = _mm256_permute2f128_pd(a, c, 0x20);
    rows[1].v = _mm256_permute2f128_pd(b, d, 0x20);
    rows[2].v = _mm256_permute2f128_pd(a, c, 0x31);
    rows[3].v = _mm256_permute2f128_pd(b, d, 0x31);
  }

 private:
  FUSEDSEP_INLINE static uint32_t lanes_of(Mask mask) {
    return uint32_t(_mm256_movemask_pd(_mm256_castsi256_pd(mask)));
  }
  FUSEDSEP_INLINE static Avx2F64 interleave(Avx2F64 low, Avx2F64 high) {
    const __m256d mixed = _mm256_shuffle_pd(low.v, high.v, 0b1010);
    return {_mm256_permute4x64_pd(mixed, _MM_SHUFFLE(3, 1, 2, 0))};
  }
};

}  // namespace
}  // namespace fusedsep
