// SPDX-License-Identifier: BSD-3-Clause
//
// A hash of memory, for noticing that parameters changed. Not cryptographic; the same value from every ISA.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace fusedsep {
namespace {

// Thirty-two lanes of h = rotate(h ^ word, 13) * odd. Every step is a bijection of h, so that one changed word changes
// its lane for certain, and the rotation carries sign bits down, so that negating everything does not cancel out.
inline uint64_t fingerprint(const void* memory, size_t bytes, uint64_t seed) {
  typedef uint32_t Words __attribute__((vector_size(32)));
  constexpr int kGroups = 4;
  constexpr uint32_t kMultiplier = 0x9E3779B1u;  // a prime near 2^32 / golden ratio
  const char* data = static_cast<const char*>(memory);
  Words hash[kGroups];
  for (int g = 0; g < kGroups; ++g) {
    for (int i = 0; i < 8; ++i) hash[g][i] = uint32_t(8 * g + i) * 0x85EBCA6Bu;
  }
  const auto absorb = [&](const char* block) {
    for (int g = 0; g < kGroups; ++g) {
      Words words;
      std::memcpy(&words, block + g * sizeof(words), sizeof(words));
      words ^= hash[g];
      hash[g] = ((words << 13) | (words >> 19)) * kMultiplier;
    }
  };
  size_t i = 0;
  for (; i + sizeof(hash) <= bytes; i += sizeof(hash)) absorb(data + i);
  if (i < bytes) {
    char last[sizeof(hash)] = {};
    std::memcpy(last, data + i, bytes - i);
    absorb(last);
  }
  uint64_t result = seed ^ bytes;
  for (int g = 0; g < kGroups; ++g) {
    for (int lane = 0; lane < 8; ++lane) {
      result = (result ^ hash[g][lane]) * 0x9E3779B97F4A7C15u;
      result ^= result >> 29;
    }
  }
  return result;
}

}  // namespace
}  // namespace fusedsep
