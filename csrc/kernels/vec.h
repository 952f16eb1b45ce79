// SPDX-License-Identifier: BSD-3-Clause
//
// What every vec_*.h and *-inl.h needs. Everything they define has internal linkage: each ISA's source file compiles
// its own copy with its own flags, and the linker must never pick one file's copy for another.
#pragma once

#include <cstdint>

#define FUSEDSEP_INLINE inline __attribute__((always_inline))

// In front of a loop over a register tile, which must be unrolled for the tile to stay in registers. A file whose tiles
// do not fit the registers anyway defines FUSEDSEP_NO_UNROLL and stays small.
#define FUSEDSEP_PRAGMA(text) _Pragma(#text)
#if defined(FUSEDSEP_NO_UNROLL)
#define FUSEDSEP_UNROLL(count) FUSEDSEP_PRAGMA(GCC unroll 1)
#elif defined(__clang__)
#define FUSEDSEP_UNROLL(count) FUSEDSEP_PRAGMA(unroll count)
#else
#define FUSEDSEP_UNROLL(count) FUSEDSEP_PRAGMA(GCC unroll count)
#endif

namespace fusedsep {
namespace {

constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max_of(int64_t a, int64_t b) { return a < b ? b : a; }
// Rounds down for negative `a` too; the others are for a >= 0.
constexpr int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ASan does not see the accesses of intrinsics that take a mask or store past the caches. In a build with it, these
// read the first and the last of the elements p[i] with bit i set, so that it does; otherwise they do nothing.
template <class T>
FUSEDSEP_INLINE void inspect([[maybe_unused]] const T* p, [[maybe_unused]] uint32_t lanes) {
#if defined(__SANITIZE_ADDRESS__)
  if (lanes == 0) return;
  (void)*static_cast<const volatile T*>(p + __builtin_ctz(lanes));
  (void)*static_cast<const volatile T*>(p + (31 - __builtin_clz(lanes)));
#endif
}

}  // namespace
}  // namespace fusedsep
