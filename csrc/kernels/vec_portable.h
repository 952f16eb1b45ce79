// SPDX-License-Identifier: BSD-3-Clause
//
// A vector of kLanes elements in GCC/Clang vector extensions: correct on every processor, and compiled to whatever SIMD
// the baseline has (SSE2 on x86-64, NEON on AArch64). The other vec_*.h headers offer the same members.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace fusedsep {
namespace {

template <typename Element, int Lanes>
struct PortableVec {
  using T = Element;
  static constexpr int kLanes = Lanes;
  static_assert((Lanes & (Lanes - 1)) == 0, "a power of two, so that vectors tile cache lines");

  typedef T Native __attribute__((vector_size(Lanes * sizeof(T))));
  Native v;

  struct Mask {
    int64_t begin, end;
  };

  FUSEDSEP_INLINE static PortableVec zero() { return {Native{}}; }
  FUSEDSEP_INLINE static PortableVec broadcast(T value) { return {Native{} + value}; }
  FUSEDSEP_INLINE static PortableVec load(const T* p) {
    PortableVec r;
    std::memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  FUSEDSEP_INLINE void store(T* p) const { std::memcpy(p, &v, sizeof(v)); }

  // Lanes [begin, end); both may lie outside [0, kLanes].
  FUSEDSEP_INLINE static Mask mask(int64_t begin, int64_t end) {
    return {begin < 0 ? 0 : begin, end > kLanes ? kLanes : end};
  }
  // Lanes outside the mask are zero and their addresses are not touched.
  FUSEDSEP_INLINE static PortableVec load(const T* p, Mask mask) {
    PortableVec r = zero();
    for (int64_t i = mask.begin; i < mask.end; ++i) r.v[i] = p[i];
    return r;
  }
  FUSEDSEP_INLINE void store(T* p, Mask mask) const {
    for (int64_t i = mask.begin; i < mask.end; ++i) p[i] = v[i];
  }
  // p[0], p[2], ... p[2 * kLanes - 2]; nothing behind the last one is read.
  FUSEDSEP_INLINE static PortableVec load_even(const T* p) {
    PortableVec r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = p[2 * i];
    return r;
  }
  // The same of the elements p[begin .. end); others count as zero and are not touched.
  FUSEDSEP_INLINE static PortableVec load_even(const T* p, int64_t begin, int64_t end) {
    PortableVec r = zero();
    for (int64_t i = 0; i < kLanes; ++i) {
      if (2 * i >= begin && 2 * i < end) r.v[i] = p[2 * i];
    }
    return r;
  }

  // a * b + c. Contracted to one instruction where the target has one.
  FUSEDSEP_INLINE static PortableVec fma(PortableVec a, PortableVec b, PortableVec c) { return {a.v * b.v + c.v}; }
  FUSEDSEP_INLINE static PortableVec add(PortableVec a, PortableVec b) { return {a.v + b.v}; }
  FUSEDSEP_INLINE static PortableVec mul(PortableVec a, PortableVec b) { return {a.v * b.v}; }
  // A NaN in `x` stays a NaN.
  FUSEDSEP_INLINE static PortableVec max(PortableVec bound, PortableVec x) { return {x.v < bound.v ? bound.v : x.v}; }
  FUSEDSEP_INLINE static PortableVec min(PortableVec bound, PortableVec x) { return {x.v > bound.v ? bound.v : x.v}; }
};

}  // namespace
}  // namespace fusedsep
