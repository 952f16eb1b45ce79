// SPDX-License-Identifier: BSD-3-Clause
//
// A vector of kLanes elements in GCC/Clang vector extensions: correct on every processor, and compiled to whatever SIMD
// the baseline has (SSE2 on x86-64, NEON on AArch64). The other vec_*.h headers offer the same members.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace fusedsep {
namespace {

template <int kBytes>
struct WordOf;
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint64_t;
};

template <typename Element, int Lanes>
struct PortableVec {
  using T = Element;
  static constexpr int kLanes = Lanes;
  static_assert((Lanes & (Lanes - 1)) == 0, "a power of two, so that vectors tile cache lines");
  // Vectors of half as many lanes, for tails; where these have no kernels of their own, the vector itself.
  using Half = PortableVec<T, Lanes * sizeof(T) == 64 ? Lanes / 2 : Lanes>;

  // Registers of 16 bytes, which every baseline has. Wider compiler vectors would be lowered through memory.
  static constexpr int kPartLanes = 16 / sizeof(T);
  static constexpr int kParts = Lanes / kPartLanes;
  typedef T Part __attribute__((vector_size(16)));
  Part part[kParts];

  struct Mask {
    int64_t begin, end;
  };

  FUSEDSEP_INLINE static PortableVec zero() { return broadcast(T(0)); }
  FUSEDSEP_INLINE static PortableVec broadcast(T value) {
    return each([&](int) { return Part{} + value; });
  }
  FUSEDSEP_INLINE static PortableVec load(const T* p) {
    return each([&](int i) {
      Part loaded;
      std::memcpy(&loaded, p + i * kPartLanes, sizeof(loaded));
      return loaded;
    });
  }
  FUSEDSEP_INLINE void store(T* p) const { std::memcpy(p, part, sizeof(part)); }

  // A store past the caches, to an address that is a multiple of the vector; `fence` before others read it.
  static constexpr bool kStreams = false;
  FUSEDSEP_INLINE void stream(T* p) const { store(p); }
  FUSEDSEP_INLINE static void fence() {}

  // Lanes [begin, end); both may lie outside [0, kLanes].
  FUSEDSEP_INLINE static Mask mask(int64_t begin, int64_t end) {
    return {begin < 0 ? 0 : begin, end > kLanes ? kLanes : end};
  }
  // Lanes outside the mask are zero and their addresses are not touched.
  static PortableVec load(const T* p, Mask mask) {
    T lanes[kLanes] = {};
    for (int64_t i = mask.begin; i < mask.end; ++i) lanes[i] = p[i];
    return load(lanes);
  }
  void store(T* p, Mask mask) const {
    T lanes[kLanes];
    store(lanes);
    for (int64_t i = mask.begin; i < mask.end; ++i) p[i] = lanes[i];
  }
  // p[0], p[2], ... p[2 * kLanes - 2]; nothing behind the last one is read.
  FUSEDSEP_INLINE static PortableVec load_even(const T* p) {
    T lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = p[2 * i];
    return load(lanes);
  }
  // The same of the elements p[begin .. end); others count as zero and are not touched.
  using EvenMask = Mask;
  FUSEDSEP_INLINE static EvenMask even_mask(int64_t begin, int64_t end) { return {begin, end}; }
  static PortableVec load_even(const T* p, EvenMask mask) {
    T lanes[kLanes] = {};
    for (int64_t i = 0; i < kLanes; ++i) {
      if (2 * i >= mask.begin && 2 * i < mask.end) lanes[i] = p[2 * i];
    }
    return load(lanes);
  }

  // a[0], b[0], a[1], b[1] ...
  static void zip(const PortableVec& a, const PortableVec& b, PortableVec& low, PortableVec& high) {
    T lanes[2 * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      lanes[2 * i] = a.part[i / kPartLanes][i % kPartLanes];
      lanes[2 * i + 1] = b.part[i / kPartLanes][i % kPartLanes];
    }
    low = load(lanes);
    high = load(lanes + kLanes);
  }

  // a * b + c. Contracted to one instruction where the target has one.
  FUSEDSEP_INLINE static PortableVec fma(const PortableVec& a, const PortableVec& b, const PortableVec& c) {
    return each([&](int i) { return a.part[i] * b.part[i] + c.part[i]; });
  }
  FUSEDSEP_INLINE static PortableVec add(const PortableVec& a, const PortableVec& b) {
    return each([&](int i) { return a.part[i] + b.part[i]; });
  }
  FUSEDSEP_INLINE static PortableVec sub(const PortableVec& a, const PortableVec& b) {
    return each([&](int i) { return a.part[i] - b.part[i]; });
  }
  FUSEDSEP_INLINE static PortableVec mul(const PortableVec& a, const PortableVec& b) {
    return each([&](int i) { return a.part[i] * b.part[i]; });
  }
  FUSEDSEP_INLINE static PortableVec div(const PortableVec& a, const PortableVec& b) {
    return each([&](int i) { return a.part[i] / b.part[i]; });
  }
  // The bits of each lane, moved up by as many as the fraction has: the lowest ones become the exponent.
  FUSEDSEP_INLINE static PortableVec shift_to_exponent(const PortableVec& x) {
    typedef typename WordOf<sizeof(T)>::type Words __attribute__((vector_size(16)));
    return each([&](int i) { return (Part)((Words)x.part[i] << (sizeof(T) == 4 ? 23 : 52)); });
  }
  // A NaN in `x` stays a NaN.
  FUSEDSEP_INLINE static PortableVec max(const PortableVec& bound, const PortableVec& x) {
    return each([&](int i) { return x.part[i] < bound.part[i] ? bound.part[i] : x.part[i]; });
  }
  FUSEDSEP_INLINE static PortableVec min(const PortableVec& bound, const PortableVec& x) {
    return each([&](int i) { return x.part[i] > bound.part[i] ? bound.part[i] : x.part[i]; });
  }
  // `yes` where a > b or either is NaN, otherwise `no`.
  FUSEDSEP_INLINE static PortableVec select_above(const PortableVec& a, const PortableVec& b, const PortableVec& yes,
                                                  const PortableVec& no) {
    return each([&](int i) { return a.part[i] <= b.part[i] ? no.part[i] : yes.part[i]; });
  }

  // sums[lane] += lane, for each lane.
  FUSEDSEP_INLINE void accumulate(double* sums) const {
    T lanes[kLanes];
    store(lanes);
    for (int i = 0; i < kLanes; ++i) sums[i] += double(lanes[i]);
  }

  // Lane j of rows[i] and lane i of rows[j] change places.
  FUSEDSEP_INLINE static void transpose(PortableVec rows[kLanes]) {
    T square[kLanes][kLanes], line[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i].store(square[i]);
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < kLanes; ++j) line[j] = square[j][i];
      rows[i] = load(line);
    }
  }

 private:
  template <class F>
  FUSEDSEP_INLINE static PortableVec each(const F& f) {
    static_assert(kParts == 2 || kParts == 4, "written out, since not every level of optimization unrolls loops");
    PortableVec r;
    r.part[0] = f(0);
    r.part[1] = f(1);
    if constexpr (kParts == 4) {
      r.part[2] = f(2);
      r.part[3] = f(3);
    }
    return r;
  }
};

}  // namespace
}  // namespace fusedsep
