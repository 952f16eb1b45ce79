// SPDX-License-Identifier: BSD-3-Clause
//
// Reading and writing the elements of maps. All arithmetic is in float.
#pragma once

#include <cstdint>
#include <type_traits>

#include "device.h"
#include "forward.h"

namespace fusedsep {
namespace cuda {

// 16 bytes: what is read or written at once where addresses allow it.
template <typename T>
constexpr int kWide = 16 / int(sizeof(T));
template <typename T, int kCount = kWide<T>>
struct alignas(kCount * sizeof(T)) Vector {
  T values[kCount];
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

// Two neighbours at once, as one instruction where there is one.
template <typename T>
FUSEDSEP_DEVICE void from_floats(float first, float second, T* to) {
#ifdef __CUDACC__
#if __CUDA_ARCH__ >= 800
  if constexpr (sizeof(T) == 2) {
    uint32_t bits;
    if constexpr (std::is_same_v<T, float16>) {
      asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    } else {
      asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(second), "f"(first));
    }
    *reinterpret_cast<uint32_t*>(to) = bits;
    return;
  }
#endif
#endif
  to[0] = from_float<T>(first);
  to[1] = from_float<T>(second);
}

template <typename T>
bool is_vector_aligned(const T* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(Vector<T>) == 0;
}
template <int kCount, typename T>
FUSEDSEP_DEVICE Vector<T, kCount> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}
template <typename T>
FUSEDSEP_DEVICE Vector<T> load(const T* from) {
  return load<kWide<T>>(from);
}
template <typename T, int kCount>
FUSEDSEP_DEVICE void store(T* to, const Vector<T, kCount>& vector) {
  *reinterpret_cast<Vector<T, kCount>*>(to) = vector;
}

// An element, or what stands for it where there is no tensor.
template <typename T>
FUSEDSEP_DEVICE double number(const T* values, int64_t i, double otherwise) {
  return values == nullptr ? otherwise : double(to_float(values[i]));
}

// As csrc/kernels/activation-inl.h has them; NaN stays NaN.
FUSEDSEP_DEVICE float above_zero(float x) { return x <= 0 ? 0.0f : x; }
FUSEDSEP_DEVICE float up_to_six(float x) { return x >= 6 ? 6.0f : x; }
FUSEDSEP_DEVICE float hardswish(float x) { return x * (up_to_six(above_zero(x + 3)) * (1.0f / 6)); }

// act(x * scale + shift) of neighbours. The others than hardswish are one pair of bounds.
template <int kCount>
FUSEDSEP_DEVICE void normalize(Activation activation, const float (&scale)[kCount], const float (&shift)[kCount],
                               float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = fmaf(values[i], scale[i], shift[i]);
  if (activation == Activation::kHardswish) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = hardswish(values[i]);
    return;
  }
  const float low = activation == Activation::kNone ? float_of(0xff800000) : 0.0f;  // -inf
  const float high = activation == Activation::kRelu6 ? 6.0f : float_of(0x7f800000);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float bounded = values[i] <= low ? low : values[i];
    values[i] = bounded >= high ? high : bounded;
  }
}

// g * act'(x), as csrc/kernels/activation-inl.h has it.
FUSEDSEP_DEVICE float activation_gradient(Activation activation, float x, float g) {
  switch (activation) {
    case Activation::kNone:
      return g;
    case Activation::kRelu:
      return x > 0 ? g : 0.0f;
    case Activation::kRelu6:
      return x > 0 && x < 6 ? g : 0.0f;
    case Activation::kHardswish:
      return x > -3 ? (x < 3 ? g * fmaf(x, 1.0f / 3, 0.5f) : g) : 0.0f;
    default:  // those that chains alone have
      return g;
  }
}

}  // namespace cuda
}  // namespace fusedsep
