// SPDX-License-Identifier: BSD-3-Clause
//
// A hash of memory, for noticing that parameters changed. Not cryptographic; the same value from every ISA.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace fusedsep {
namespace {

// Lanes of h = rotate(h ^ word, 13) * odd, 8 * kGroups of them. Every step is a bijection of h, so that one changed
// word changes its lane for certain, and the rotation carries sign bits down, so that negating everything does not
// cancel out.
template <int kGroups>
uint64_t lane_hash(const char* data, size_t bytes, uint64_t seed) {
  typedef uint32_t Words __attribute__((vector_size(32)));
  constexpr uint32_t kMultiplier = 0x9E3779B1u;  // a prime near 2^32 / golden ratio
  constexpr size_t kAhead = 2048;                // bytes; processors' own prefetchers stop at the end of a page
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
  for (; i + sizeof(hash) <= bytes; i += sizeof(hash)) {
    for (size_t line = 0; line < sizeof(hash); line += 64) __builtin_prefetch(data + i + kAhead + line, 0, 3);
    absorb(data + i);
  }
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

// Twice the lanes where memory is long: a lane waits for its multiplication, and then does not hold back the reading.
// What becomes of the lanes in the end would cost short memory more than that.
inline uint64_t fingerprint(const void* memory, size_t bytes, uint64_t seed) {
  constexpr size_t kLong = 4096;
  const char* const data = static_cast<const char*>(memory);
  return bytes < kLong ? lane_hash<4>(data, bytes, seed) : lane_hash<8>(data, bytes, seed);
}

}  // namespace
}  // namespace fusedsep
