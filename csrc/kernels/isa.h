// SPDX-License-Identifier: BSD-3-Clause
//
// Which kernels were compiled, which of them this processor can run, and which are in use.
#pragma once

#include <string>
#include <vector>

#include "separable.h"
#include "training.h"

// The one list of ISAs, worst first: X(name, processor can run it, chosen by default).
#if defined(__x86_64__)
#define FUSEDSEP_ISAS(X)                                                         \
  X(portable, true, true)                                                        \
  X(portable16, true, false)                                                     \
  X(avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), true) \
  X(avx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx2"), true)
#else
#define FUSEDSEP_ISAS(X)  \
  X(portable, true, true) \
  X(portable16, true, false)
#endif

namespace fusedsep {

// The kernels of one ISA.
struct Isa {
  const char* name;
  SeparableKernels<float> separable_f32;
  SeparableKernels<double> separable_f64;
  TrainingKernels<float> training_f32;
  TrainingKernels<double> training_f64;

  // A 64-bit hash of `bytes` bytes of memory, going on from `seed`; the same from every ISA.
  uint64_t (*fingerprint)(const void* memory, size_t bytes, uint64_t seed);

  // A loop of multiply-adds in registers, to measure the processor by; the sum of what came out (peak-inl.h).
  float (*multiply_adds)(int64_t rounds, float factor, float addend);
  int64_t multiply_adds_per_round;

  template <typename T>
  const SeparableKernels<T>& separable() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return separable_f32;
    } else {
      return separable_f64;
    }
  }
  template <typename T>
  const TrainingKernels<T>& training() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return training_f32;
    } else {
      return training_f64;
    }
  }
};

#define FUSEDSEP_DECLARE(name, supported, choosable) const Isa& name##_isa();
FUSEDSEP_ISAS(FUSEDSEP_DECLARE)
#undef FUSEDSEP_DECLARE

// Names, worst first. `portable16` is compiled and supported everywhere but never chosen by default.
std::vector<std::string> compiled_isas();
std::vector<std::string> supported_isas();

// The kernels in use: the best supported ones, or what FUSEDSEP_ISA names, decided at the first call.
// Throws std::invalid_argument when FUSEDSEP_ISA names none of `supported_isas()`.
const Isa& active_isa();

// Throws std::invalid_argument when `name` is none of `supported_isas()`.
const Isa& find_isa(const std::string& name);
void use_isa(const std::string& name);

}  // namespace fusedsep
