// SPDX-License-Identifier: BSD-3-Clause
//
// Reading and writing the elements of maps. All arithmetic is in float.
#pragma once

#include <cstdint>

#include "device.h"
#include "forward.h"

namespace fusedsep {
namespace cuda {

// Elements that are read or written at once where addresses allow it: 16 bytes of float, 8 of the 16-bit types.
constexpr int kVector = 4;
template <typename T>
struct alignas(kVector * sizeof(T)) Vector {
  T values[kVector];
};

FUSEDSEP_DEVICE uint32_t bits_of(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}
FUSEDSEP_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

FUSEDSEP_DEVICE float to_float(float value) { return value; }
FUSEDSEP_DEVICE float to_float(bfloat16 value) { return float_of(uint32_t(value.bits) << 16); }
FUSEDSEP_DEVICE float to_float(float16 value) {
#ifdef __CUDACC__
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#else
  return float(__builtin_bit_cast(_Float16, value.bits));
#endif
}

// Rounds to nearest, ties to even.
template <typename T>
FUSEDSEP_DEVICE T from_float(float value);
template <>
FUSEDSEP_DEVICE float from_float<float>(float value) {
  return value;
}
// In integers, since processors before sm_80 have no instruction for it.
template <>
FUSEDSEP_DEVICE bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = bits_of(value);
  if (value != value) return {uint16_t(bits >> 16 | 0x40)};  // rounding could make an infinity of a NaN
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
FUSEDSEP_DEVICE float16 from_float<float16>(float value) {
#ifdef __CUDACC__
  float16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#else
  return {__builtin_bit_cast(uint16_t, _Float16(value))};
#endif
}

// kVector neighbours: at once where `aligned`, otherwise the first `count` of them; the others are zero.
template <typename T>
FUSEDSEP_DEVICE void load(const T* from, bool aligned, int64_t count, float (&values)[kVector]) {
  if (aligned && count >= kVector) {
    const Vector<T> vector = *reinterpret_cast<const Vector<T>*>(from);
#pragma unroll
    for (int i = 0; i < kVector; ++i) values[i] = to_float(vector.values[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) values[i] = i < count ? to_float(from[i]) : 0.0f;
}
template <typename T>
FUSEDSEP_DEVICE void store(T* to, bool aligned, int64_t count, const float (&values)[kVector]) {
  if (aligned && count >= kVector) {
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < kVector; ++i) vector.values[i] = from_float<T>(values[i]);
    *reinterpret_cast<Vector<T>*>(to) = vector;
    return;
  }
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < count) to[i] = from_float<T>(values[i]);
  }
}
template <typename T>
bool is_vector_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector<T>) == 0;
}

// act(x) and g * act'(x), as csrc/kernels/activation-inl.h has them; NaN stays NaN.
FUSEDSEP_DEVICE float above_zero(float x) { return x <= 0 ? 0.0f : x; }
FUSEDSEP_DEVICE float up_to_six(float x) { return x >= 6 ? 6.0f : x; }
FUSEDSEP_DEVICE float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kRelu:
      return above_zero(x);
    case Activation::kRelu6:
      return up_to_six(above_zero(x));
    case Activation::kHardswish:
      return x * (up_to_six(above_zero(x + 3)) * (1.0f / 6));
  }
  return x;
}

}  // namespace cuda
}  // namespace fusedsep
